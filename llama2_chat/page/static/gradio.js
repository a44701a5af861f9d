// Gradio's own part of the page, which makes the settings: started once ours is painted, which its work of some tenths of a
// second would delay, and started anew where the line went down while it loaded.

import { h, toast } from "./dialog.js";
import { T } from "./texts.js";

const ELEMENT = "gradio-app"; // which Gradio's code defines, and in which it makes what it makes
const FRAME = "[control_page_title]"; // that element, by whichever name
const LOOK_MS = 20;
const ASK_MS = 1000; // between two questions whether the server is back
const ANSWER_MS = 20_000; // for the answer: a line may be dead without a word
const PATIENCE_MS = 30_000; // in which nothing more of a start has come; on a slow line some times as long as its slowest file took
const PATIENCE = 4;
const MOST_PATIENCE_MS = 120_000; // however long one hung, or the computer slept
const MOST_RESTARTS = 3; // by themselves

/**
 * Gradio's code waits in the document.
 * @param attach tried until it says that Gradio has made what it is for
 * @param onMissing called once it is left to the visitor
 */
export function startGradio(attach, onMissing = sayMissing) {
  if (!document.querySelector(FRAME)) return onMissing(); // of a document that was cut, some browsers show what came
  const loading = new Loading(onMissing);
  keepLanguage();
  requestAnimationFrame(() => setTimeout(() => run(gradiosCode())));
  (function look() {
    if (attach()) loading.isDone = true;
    else setTimeout(look, LOOK_MS);
  })();
}

/** Of the document, which Gradio would say is in the first language of the browser, whether the page has it or not. */
function keepLanguage() {
  const root = document.documentElement;
  const { lang } = root;
  new MutationObserver(() => root.lang !== lang && (root.lang = lang)).observe(root, { attributeFilter: ["lang"] });
}

/** Starts Gradio's code anew, once the server is back, where a part of it did not come. */
class Loading {
  isDone = false;
  #restarts = 0;
  #parts = 0; // that have come
  #slowestMs = 0; // of all files of the page
  #isBroken = false;
  #mending = null;

  constructor(onMissing) {
    this.onMissing = onMissing;
    nameElements(() => (this.#restarts ? `${ELEMENT}-${this.#restarts}` : ELEMENT));
    addEventListener("error", ({ target }) => target.localName === "script" && this.#mend(), true);
    addEventListener("unhandledrejection", () => this.#mend()); // a module that did not come
    new PerformanceObserver((list) => this.#count(list.getEntries())).observe({ type: "resource", buffered: true });
    this.#outcome().then(() => this.isDone || this.#mend());
  }

  /** Of a file whose headers were cut, browsers make an empty one, over plain HTTP, and say nothing. */
  #count(entries) {
    const files = entries.filter(({ initiatorType }) => initiatorType !== "fetch"); // which may be an answer
    this.#slowestMs = Math.max(this.#slowestMs, ...files.map(({ duration }) => duration));
    const parts = entries.filter(({ name }) => name.startsWith(new URL(".", this.#code()).href));
    this.#parts += parts.length;
    if (parts.some(({ decodedBodySize, transferSize }) => decodedBodySize === 0 && transferSize > 0)) this.#mend();
  }

  #mend() {
    this.#isBroken = true;
    if (!this.isDone) this.#mending ??= this.#again().finally(() => (this.#mending = null));
  }

  async #again() {
    do {
      do await pause(ASK_MS);
      while (!(await isReachable()));
      if (this.isDone) return;
      this.#isBroken = false;
      this.#restart();
      await this.#outcome();
    } while (this.#isBroken && this.#restarts < MOST_RESTARTS);
    if (!this.isDone) this.onMissing();
  }

  /** Comes once this start is done or broken, or nothing more of it comes. */
  async #outcome() {
    let before;
    const patience = () => Math.min(Math.max(PATIENCE_MS, PATIENCE * this.#slowestMs), MOST_PATIENCE_MS);
    for (let waited = 0; waited < patience() && !this.isDone && !this.#isBroken; waited += ASK_MS) {
      if (this.#parts !== before) waited = 0;
      before = this.#parts;
      await pause(ASK_MS);
    }
  }

  /** Each start has addresses of its own: most browsers remember of a module that it did not come, and never ask again. */
  #code() {
    return this.#restarts ? gradiosCode().replace(/\/assets\/(?=[^/]+$)/, `/page/again/${this.#restarts}/`) : gradiosCode();
  }

  #restart() {
    this.#restarts += 1;
    run(this.#code());
    const frame = document.querySelector(FRAME);
    const attributes = Object.fromEntries([...frame.attributes].map(({ name, value }) => [name, value]));
    frame.replaceWith(h(`${ELEMENT}-${this.#restarts}`, attributes));
  }
}

/**
 * An element's name is defined once, and Gradio knows of one name: each start gets another, as it would be the first's.
 * @param current the name of Gradio's element today
 */
function nameElements(current) {
  const { get, define } = CustomElementRegistry.prototype;
  const named = (name) => (name === ELEMENT ? current() : name);
  customElements.get = (name) => get.call(customElements, named(name));
  customElements.define = (name, ...rest) => define.call(customElements, named(name), ...rest);
}

/** A private chat would not outlive a reload: the visitor decides. */
function sayMissing() {
  toast(T.settings.missing, { action: T.document.reload, onAction: () => location.reload(), seconds: 86_400 });
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function isReachable() {
  try {
    return (await fetch("page/state", { signal: AbortSignal.timeout(ANSWER_MS) })).status < 502;
  } catch {
    return false;
  }
}

const gradiosCode = () => document.querySelector("#gradio").src;

function run(src) {
  document.head.append(h("script", { type: "module", src }));
}

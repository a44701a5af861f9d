// Gradio's own part of the page, which makes the settings: started once ours is painted, which its work of some tenths of a
// second would delay, and started anew where the line went down while it loaded.

import { h, toast } from "./dialog.js";
import { T } from "./texts.js";

const LOOK_MS = 20;
const ASK_MS = 1000; // between two questions whether the server is back
const PATIENCE_MS = 10_000; // for a second start to come to something

/**
 * Gradio's code waits in the document.
 * @param attach tried until it says that Gradio has made what it is for
 */
export function startGradio(attach) {
  const loading = new Loading();
  keepLanguage();
  requestAnimationFrame(() => setTimeout(run));
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

/** Asks again, once the server is back, for scripts and style sheets that did not come. */
class Loading {
  isDone = false;
  #styles = new Set(); // addresses
  #mending = null;

  constructor() {
    addEventListener("error", ({ target }) => this.#notice(target), true);
    addEventListener("unhandledrejection", () => this.#mend()); // a module that did not come
  }

  #notice({ localName, href }) {
    if (localName === "link") this.#styles.add(href);
    if (localName === "link" || localName === "script") this.#mend();
  }

  #mend() {
    this.#mending ??= this.#again().finally(() => (this.#mending = null));
  }

  async #again() {
    do await pause(ASK_MS);
    while (!(await isReachable()));
    for (const href of this.#styles) document.head.append(h("link", { rel: "stylesheet", href })); // its loader asks once
    this.#styles.clear();
    if (this.isDone) return;
    restart();
    await pause(PATIENCE_MS);
    // It remembers of some modules that they did not come. A private chat would not outlive a reload: the visitor decides.
    if (!this.isDone) toast(T.settings.missing, { action: T.settings.reload, onAction: () => location.reload(), seconds: 86_400 });
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function isReachable() {
  try {
    return (await fetch("page/state")).status < 502;
  } catch {
    return false;
  }
}

function run() {
  const { src } = document.querySelector("#gradio");
  document.head.append(h("script", { type: "module", src }));
}

/** What came is kept by the browser. */
function restart() {
  const frame = document.querySelector("gradio-app");
  frame.replaceWith(frame.cloneNode(false));
  if (!customElements.get("gradio-app")) run();
}

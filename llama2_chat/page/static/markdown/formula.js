// One formula, by KaTeX, which is loaded when the first one is there, and again where the line was down. Until it has come,
// and where KaTeX does not understand a formula or it is too much, its source is shown.

import { keepReachable } from "./scrolling.js";
import { h } from "./text.js";

const KATEX = new URL("../vendor/katex/", import.meta.url);
const AGAIN_MS = 1000; // until KaTeX is asked for once more; then twice as long each time
const LONGEST_MS = 60_000;
const SLICE_MS = 8; // what formulas take of a frame; an answer full of them is typeset over several
const MAX_DEPTH = 40; // KaTeX's effort, and the browser's, with braces in braces
const MAX_LENGTH_EM = 60; // of anything in it, such as a matrix of fifty rows; KaTeX has no limit for lengths below zero

const OPTIONS = {
  throwOnError: true,
  trust: false, // no \href, \url, \includegraphics, \htmlId
  strict: "ignore",
  maxSize: 10, // em, of one rule or space; what paints beyond its own room is cut by markdown.css
  maxExpand: 200,
};

export class Formula {
  constructor(token) {
    this.element = h(token.display ? "div" : "span", { class: token.display ? "math display" : "math", dir: "ltr" });
    keepReachable(this.element);
    this.update(token);
  }

  update({ raw, text, display, open }) {
    if (raw === this.raw && open === this.open) return;
    [this.raw, this.open] = [raw, open];
    this.element.textContent = raw.trim();
    if (!open && depth(text) <= MAX_DEPTH) enqueue(() => raw === this.raw && typeset(this.element, text, display));
  }
}

function depth(text) {
  let now = 0;
  let most = 0;
  for (const [bracket] of text.matchAll(/\{|\}|\\(?:left|right|begin|end)\b/g)) {
    now += /\{|left|begin/.test(bracket) ? 1 : -1;
    most = Math.max(most, now);
  }
  return most;
}

let katex;
const waiting = [];
let working = false;

function enqueue(job) {
  waiting.push(job);
  if (!working) work();
}

async function work() {
  working = true;
  await null; // until all formulas of this update are in the line; they are still shown at once
  katex ??= await load();
  while (waiting.length) {
    const until = performance.now() + SLICE_MS;
    while (waiting.length && performance.now() < until) waiting.shift()();
    if (waiting.length) await pause(SLICE_MS);
  }
  working = false;
}

async function load() {
  document.head.append(h("link", { rel: "stylesheet", href: new URL("katex.min.css", KATEX).href }));
  for (let again = 0; ; again++) {
    const address = new URL(again ? `katex.mjs?${again}` : "katex.mjs", KATEX); // a browser asks once for each
    const module = await import(address.href).catch(() => null);
    if (module) return module.default;
    await pause(Math.min(AGAIN_MS * 2 ** again, LONGEST_MS));
  }
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

function typeset(element, text, displayMode) {
  const result = document.createElement("span");
  try {
    katex.render(text, result, { ...OPTIONS, displayMode });
    if (longest(result) <= MAX_LENGTH_EM) element.replaceChildren(...result.childNodes);
  } catch {
    // not TeX, or not KaTeX's: the source stays
  }
}

/** The longest length in its styles, in em, below zero or above. */
function longest(result) {
  const lengths = [...result.querySelectorAll("[style]")].flatMap(({ style }) => style.cssText.match(/[\d.]+(?=em)/g) ?? []);
  return Math.max(0, ...lengths);
}

// One block of code: its bar with the language, Copy and Wrap, and its lines. A line that is shown stays the same node
// while others follow; its colours come later, from highlighter.js, and only where they differ from what is shown.

import { copyText } from "../clipboard.js";
import { T } from "../texts.js";
import { highlight } from "./highlighter.js";
import { keepReachable } from "./scrolling.js";
import { h } from "./text.js";

const MAX_COLOURED = 200_000; // characters; beyond, code stays plain
const CONTEXT_LINES = 20; // coloured anew with what follows, which may change how they read
const SLICE = 150; // lines coloured at once
const COPIED_MS = 2000;

export class CodeView {
  text = "";
  lines = []; // {text: with its line break, node, colours: as highlight() gives them, while they hold}

  constructor() {
    this.language = h("span", { class: "language" });
    this.code = h("code");
    this.pre = keepReachable(h("pre", { dir: "ltr" }, this.code));
    const bar = h("figcaption", {}, this.language, this.#wrapButton(), this.#copyButton());
    this.element = h("figure", { class: "code", dir: "ltr" }, bar, this.pre);
  }

  /** Shows code so far. info: what stands after the opening fence; its first word is the language. */
  update(text, info) {
    const name = /^[^\s{,:]*/.exec(info ?? "")[0].slice(0, 30);
    if (text === this.text && name === this.name) return;
    [this.text, this.name] = [text, name];
    this.language.textContent = name || T.markdown.code;
    this.#showLines(text.match(/[^\n]*\n|[^\n]+$/g) ?? []);
    this.#keepColouring();
  }

  #showLines(texts) {
    texts.forEach((text, index) => {
      const line = this.lines[index];
      if (!line) this.code.append((this.lines[index] = { text, node: h("span", {}, text) }).node);
      else if (line.text !== text) change(line, text);
    });
    for (const { node } of this.lines.splice(texts.length)) node.remove();
  }

  // One question at a time, and a pause of ten times what the answer took.
  async #keepColouring() {
    if (this.colouring) return;
    this.colouring = true;
    for (let asked; asked !== this.text && this.name && this.text.length < MAX_COLOURED; ) {
      asked = this.text;
      const begun = performance.now();
      if (!(await this.#colour(asked))) break;
      if (asked !== this.text) await pause(10 * (performance.now() - begun));
    }
    this.colouring = false;
  }

  async #colour(asked) {
    const texts = this.lines.map((line) => line.text);
    const uncoloured = this.lines.findIndex((line) => !line.colours);
    const from = Math.max(0, uncoloured - CONTEXT_LINES);
    const coloured = await highlight(asked, this.name, from);
    for (const [index, colours] of coloured?.entries() ?? []) {
      if (index % SLICE === SLICE - 1) await pause(0);
      const line = this.lines[from + index];
      // A line that has changed since waits for the next answer.
      if (line?.text === texts[from + index] && line.colours !== colours) paint(line, colours);
    }
    return coloured;
  }

  #copyButton() {
    const button = h("button", { type: "button" }, T.markdown.copy);
    button.addEventListener("click", async () => {
      button.textContent = (await copyText(this.text)) ? T.markdown.copied : T.markdown.notCopied;
      setTimeout(() => (button.textContent = T.markdown.copy), COPIED_MS);
    });
    return button;
  }

  #wrapButton() {
    const button = h("button", { type: "button", "aria-pressed": "false" }, T.markdown.wrap);
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(this.pre.classList.toggle("wrapped")));
    });
    return button;
  }
}

function change(line, text) {
  if (text.startsWith(line.text)) line.node.append(text.slice(line.text.length));
  else line.node.textContent = text;
  line.text = text;
  line.colours = undefined;
}

function paint(line, colours) {
  line.colours = colours;
  const pieces = colours.split("\u0001").map((piece) => piece.split("\u0002"));
  line.node.replaceChildren(...pieces.map(([kind, text]) => (kind ? h("span", { class: kind }, text) : text)));
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

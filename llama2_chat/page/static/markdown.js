// An answer as it grows, from Markdown to the page. What is finished is never read or touched again, so that a selection
// stays and the work is that of the new text; markdown/ holds the parts: lexer.js, nodes.js, kinds.js and their helpers.

import { Blocks } from "./markdown/blocks.js";
import { Footnotes } from "./markdown/footnotes.js";
import { withoutEndlessMarks } from "./markdown/text.js";
import { T } from "./texts.js";

const REST = 3; // how many times as long as it took to show an answer so far the page has for everything else

export class AnswerView {
  /** @param {Element} element an empty block; the answer stands in it */
  constructor(element) {
    this.element = element;
    element.classList.add("answer");
    this.blocks = new Blocks(element);
    this.footnotes = new Footnotes(element);
    this.text = "";
    this.done = false;
    this.notBefore = 0;
  }

  /**
   * Shows an answer so far: with `done` at once, otherwise with the next frame that has time for it.
   * @param {string} text the whole text so far
   * @param {{done?: boolean}} [options] done: no more text will come (and if it does, it is shown as well)
   */
  update(text, { done = false } = {}) {
    const now = withoutEndlessMarks(String(text ?? "").replace(/\r\n?/g, "\n"));
    if (now === this.text && (this.done || !done)) return;
    this.text = now;
    this.done = done;
    if (done) this.#show();
    else this.frame ??= requestAnimationFrame(() => this.#onFrame());
  }

  #onFrame() {
    this.frame = undefined;
    if (this.done) return;
    if (performance.now() < this.notBefore) this.frame = requestAnimationFrame(() => this.#onFrame());
    else this.#show();
  }

  #show() {
    const begun = performance.now();
    this.notBefore = Infinity;
    if (this.plain) this.element.textContent = this.text;
    else this.#showBlocks();
    // After the frame: laying out and painting what is new belongs to the cost.
    setTimeout(() => {
      const ended = performance.now();
      this.notBefore = ended + REST * (ended - begun);
    });
  }

  /** What was never closed is over all the same, and open to be read where nothing else was said. */
  #endThoughts() {
    for (const title of this.element.querySelectorAll("details.think > summary")) title.textContent = T.markdown.thoughts;
    const alone = this.element.querySelector("details.think:only-child");
    if (alone) alone.open = true;
  }

  #showBlocks() {
    try {
      this.blocks.show(this.text, this.done);
      this.footnotes.number();
      if (this.done) this.#endThoughts();
    } catch (error) {
      console.error(error); // a fault of ours; the answer is there to read all the same
      this.plain = true;
      this.element.classList.add("plain");
      this.element.textContent = this.text;
    }
  }
}

/** Shows a finished answer. */
export function renderAnswer(element, text) {
  new AnswerView(element).update(text, { done: true });
}

// What an answer was made from: a list below it, and its [2] as links, each of which opens the excerpt with file and page.

import { h, openDialog } from "./dialog.js";
import { withoutEndlessMarks } from "./markdown/text.js";
import { T } from "./texts.js";

const MOST_SHOWN = 6; // at first; those that the answer names come before the others

/** @typedef {{ number: number, document: string, name: string, page: number, text: string }} Source */

/** Below the text of an answer. */
export class Sources {
  constructor() {
    this.element = h("ul", { class: "sources", "aria-label": T.documents.sources, hidden: true });
    this.shown = "";
    this.isWhole = false;
  }

  /**
   * @param {Source[]} sources
   * @param {string} text of the answer
   * @param {HTMLElement | null} body where it stands as Markdown once it is complete, and its numbers become links
   */
  show(sources = [], text, body) {
    this.element.hidden = !sources.length;
    if (!sources.length) return;
    if (body) linkNumbers(body, new Map(sources.map((source) => [source.number, source])));
    const named = new Set([...text.matchAll(CITATION)].flatMap(([, numbers]) => numbers.split(",").map(Number)));
    const shown = JSON.stringify([sources.map(({ number }) => number), [...named], this.isWhole]);
    if (shown === this.shown) return; // so that the focus stays where it is
    this.shown = shown;
    this._list(sources, named);
  }

  _list(sources, named) {
    const first = [...sources.filter(({ number }) => named.has(number)), ...sources.filter(({ number }) => !named.has(number))];
    const listed = new Set(this.isWhole ? sources : first.slice(0, MOST_SHOWN));
    const rows = sources.filter((source) => listed.has(source)).map((source) => h("li", {}, link(source, nameOf(source), named.has(source.number))));
    const left = sources.length - listed.size;
    const more = h("button", { type: "button", class: "source", onclick: () => this._showAll(sources, named) }, T.documents.more(left));
    this.element.replaceChildren(...rows, ...(left ? [h("li", {}, more)] : []));
  }

  _showAll(sources, named) {
    this.isWhole = true;
    this._list(sources, named);
    this.element.querySelectorAll("button")[0].focus({ preventScroll: true });
  }
}

const CITATION = /\[(\d+(?:\s*,\s*\d+)*)\]/g;

/** A long name gives way to the page. */
const nameOf = ({ number, name, page }) => [`[${number}]`, h("bdi", { class: "name" }, name), T.documents.page(page)];

function link(source, words, isNamed = true) {
  const title = T.documents.place(source.name, source.page);
  const kind = isNamed ? "source named" : "source";
  return h("button", { type: "button", class: kind, title, onclick: () => open(source) }, ...words);
}

function open({ name, page, text }) {
  openDialog(T.documents.place(name, page), h("blockquote", { class: "excerpt", dir: "auto", tabindex: 0 }, withoutEndlessMarks(text)));
}

/** Each [2] and [1, 2] that names a source, outside of code, links and formulas. */
function linkNumbers(body, byNumber) {
  const walker = document.createTreeWalker(body, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) {
    const { currentNode: text } = walker;
    if (text.data.search(CITATION) >= 0 && !text.parentElement.closest("code, pre, a, button, math, .katex")) texts.push(text);
  }
  for (const text of texts) {
    const pieces = text.data.split(CITATION).flatMap((piece, place) => {
      if (place % 2 === 0) return [piece];
      const numbers = piece.split(",").map(Number);
      if (!numbers.some((number) => byNumber.has(number))) return [`[${piece}]`];
      return numbers.map((number) => (byNumber.has(number) ? link(byNumber.get(number), [`[${number}]`]) : `[${number}]`));
    });
    text.replaceWith(...pieces);
  }
}

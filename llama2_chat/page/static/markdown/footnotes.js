// Marks of footnotes and their texts find each other, in whichever order they come; what has no text stays as written.

import { T } from "../texts.js";
import { h } from "./text.js";

let answers = 0;

/** Numbers the footnotes of one answer in the order of their marks, and links both ways. */
export class Footnotes {
  prefix = `footnote-${++answers}`;

  constructor(element) {
    this.element = element;
    element.addEventListener("click", jump);
  }

  number() {
    const notes = new Map();
    for (const note of this.element.querySelectorAll(".footnote")) if (!notes.has(note.dataset.name)) notes.set(note.dataset.name, note);
    const numbers = new Map();
    for (const mark of this.element.querySelectorAll(".footnote-mark")) this.#link(mark, notes, numbers);
    for (const [name, note] of notes) label(note, numbers.get(name));
  }

  #link(mark, notes, numbers) {
    const { name } = mark.dataset;
    const note = notes.get(name);
    if (!note) return unlink(mark, name);
    if (!numbers.has(name)) {
      numbers.set(name, numbers.size + 1);
      mark.id = `${this.prefix}-mark-${numbers.size}`;
    }
    const number = numbers.get(name);
    note.id = `${this.prefix}-${number}`;
    if (mark.textContent === String(number) && mark.querySelector("a")) return undefined;
    return mark.replaceChildren(
      h("a", { href: `#${note.id}`, "aria-label": T.markdown.footnote(number) }, String(number)),
    );
  }
}

function unlink(mark, name) {
  if (mark.querySelector("a")) mark.textContent = `[^${name}]`;
}

function label(note, number) {
  const place = note.querySelector(".number");
  if (!number) return void (place.textContent = note.dataset.name);
  if (place.textContent === String(number)) return undefined;
  const href = `#${note.id.replace(/-(\d+)$/, "-mark-$1")}`;
  return place.replaceChildren(h("a", { href, "aria-label": T.markdown.backToText(number) }, String(number)));
}

// Not through the page's address: that is the conversation's, and Back would only undo the jump.
function jump(event) {
  const target = document.getElementById(event.target.closest?.('a[href^="#footnote-"]')?.getAttribute("href").slice(1));
  if (!target) return;
  event.preventDefault();
  target.scrollIntoView({ block: "nearest" });
  target.tabIndex = -1;
  target.focus({ preventScroll: true });
}

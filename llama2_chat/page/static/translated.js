// What the server says, in the visitor's language. It says all in English, to programs too; the file of each other language
// has its sentences by the English ones, with {} for what a sentence names.

import { SENTENCES, T } from "./texts.js";

const ENDS = /(?<=[.!?…])\s+/; // of sentences
const NUMBER = /^\d{1,3}(?:,\d{3})*(?:\.\d+)?$/; // as the server writes it

let known; // [expression, text or function], the one that says most first

/** @param {string} text one sentence or several; as it is where one of them is not known */
export function translated(text) {
  known ??= Object.entries(SENTENCES).sort(([one], [other]) => literal(other) - literal(one)).map(prepared);
  return known.length && text ? (said(text) ?? inParts(text)) : text;
}

/** The words and names of an element that is Gradio's. */
export function translate(element) {
  for (const named of element.querySelectorAll("[aria-label], [title], [placeholder]"))
    for (const name of ["aria-label", "title", "placeholder"])
      if (named.hasAttribute(name)) named.setAttribute(name, translated(named.getAttribute(name)));
  const texts = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const { data } = texts.currentNode;
    const words = data.trim();
    if (words && translated(words) !== words) texts.currentNode.data = translated(words);
  }
}

const literal = (sentence) => sentence.replaceAll("{}", "").length;

function prepared([sentence, text]) {
  const parts = sentence.split("{}").map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return [new RegExp(`^${parts.join("(.+?)")}$`, "s"), text];
}

function said(sentence) {
  for (const [expression, text] of known) {
    const found = expression.exec(sentence);
    if (!found) continue;
    const values = found.slice(1).map((value) => (NUMBER.test(value) ? T.number(Number(value.replaceAll(",", ""))) : translated(value)));
    return typeof text === "function" ? text(...values) : text.replace(/\{\}/g, () => values.shift());
  }
  return null;
}

function inParts(text) {
  const parts = text.split(ENDS).map((part) => said(part));
  return parts.length > 1 && parts.every((part) => part !== null) ? parts.join(T.between) : text;
}

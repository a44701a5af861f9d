// What keys do wherever the focus is. What Enter and the arrow do in the box is composer.js's.

import { h, openDialog } from "./dialog.js";
import { T } from "./texts.js";

const SAME_KEY_MS = 500; // from the end of a composition to the key that ended it, in Safari

/** @param handlers onEscape(), onSearch(), onNew(), onSettings() */
export function addShortcuts({ onEscape, onSearch, onNew, onSettings }) {
  document.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    const act = (action) => (event.preventDefault(), action());
    if (document.querySelector("dialog[open], :popover-open")) return; // it takes Escape itself
    if (event.key === "Escape") onEscape();
    else if (command && event.key.toLowerCase() === "k") act(onSearch);
    else if (command && event.shiftKey && event.key.toLowerCase() === "o") act(onNew);
    else if (command && event.key === ",") act(onSettings);
    else if (event.key === "?" && !isTyping(event.target)) act(showShortcuts);
  });
}

/**
 * Keys of an input method are its own: its Enter takes a word and sends nothing. Browsers say so in isComposing, older ones
 * in keyCode 229, and Safari's Enter follows the end of the composition, while elsewhere a key that went up lies between.
 */
export function leaveCompositionsAlone() {
  let endedAt = -Infinity;
  addEventListener("compositionend", ({ timeStamp }) => (endedAt = timeStamp), true);
  addEventListener("keyup", () => (endedAt = -Infinity), true);
  const isOfComposition = (event) => event.isComposing || event.keyCode === 229 || event.timeStamp - endedAt < SAME_KEY_MS;
  addEventListener("keydown", (event) => isOfComposition(event) && event.stopImmediatePropagation(), true);
}

export function showShortcuts() {
  const row = ([keys, what]) => h("div", {}, h("dt", {}, h("kbd", {}, keys)), h("dd", {}, what));
  const isHere = ([, , side]) => !side || document.querySelector(`[data-opens=${side}]`);
  openDialog(T.shortcuts.title, h("dl", { class: "shortcuts" }, ...T.shortcuts.rows.filter(isHere).map(row)));
}

function isTyping(element) {
  return element.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName);
}

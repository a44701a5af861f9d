// What keys do wherever the focus is. What Enter and the arrow do in the box is composer.js's.

import { h, openDialog } from "./dialog.js";
import { T } from "./texts.js";

/** @param handlers onStop(), onSearch(), onNew(), onSettings() */
export function addShortcuts({ onStop, onSearch, onNew, onSettings }) {
  document.addEventListener("keydown", (event) => {
    const command = event.ctrlKey || event.metaKey;
    const act = (action) => (event.preventDefault(), action());
    if (event.isComposing || document.querySelector("dialog[open]")) return;
    if (event.key === "Escape") onStop();
    else if (command && event.key.toLowerCase() === "k") act(onSearch);
    else if (command && event.shiftKey && event.key.toLowerCase() === "o") act(onNew);
    else if (command && event.key === ",") act(onSettings);
    else if (event.key === "?" && !isTyping(event.target)) act(showShortcuts);
  });
}

export function showShortcuts() {
  const row = ([keys, what]) => h("div", {}, h("dt", {}, h("kbd", {}, keys)), h("dd", {}, what));
  openDialog(T.shortcuts.title, h("dl", { class: "shortcuts" }, ...T.shortcuts.rows.map(row)));
}

function isTyping(element) {
  return element.isContentEditable || /^(INPUT|TEXTAREA|SELECT)$/.test(element.tagName);
}

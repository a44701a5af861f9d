// One conversation in the list: its title, which becomes a field to rename it, and the button of its menu.

import { h, icon } from "./dialog.js";
import { T } from "./texts.js";

const MORE = "M6 12h.01M12 12h.01M18 12h.01";
const LONGEST_TITLE = 120; // characters that can be typed

export class Row {
  /** @param {{ onOpen(): void, onRename(title: string): void, onRenameEnd(): void }} hooks */
  constructor(conversation, hooks) {
    this.hooks = hooks;
    this.text = h("span", { dir: "auto" });
    const attributes = { type: "button", class: "open", tabindex: -1, "aria-keyshortcuts": "F2 Delete" };
    this.open = h("button", { ...attributes, onclick: () => hooks.onOpen() }, this.text);
    this.more = h("button", { type: "button", class: "more", tabindex: -1 }, icon(MORE));
    this.element = h("li", { class: "row" }, this.open, this.more);
    this.update(conversation, false);
  }

  get title() {
    return this.conversation.title || T.sidebar.untitled;
  }

  update(conversation, isCurrent) {
    this.conversation = conversation;
    if (this.text.textContent !== this.title) {
      this.text.textContent = this.title;
      this.open.title = this.title; // the whole of it, where it is cut off
      this.more.setAttribute("aria-label", T.sidebar.options(this.title));
    }
    if (isCurrent) this.open.setAttribute("aria-current", "true");
    else this.open.removeAttribute("aria-current");
  }

  /** The title becomes a field: Enter or leaving it keeps what was typed, Escape does not. */
  rename() {
    const attributes = { class: "rename", dir: "auto", maxlength: LONGEST_TITLE, "aria-label": T.sidebar.titleLabel };
    const field = h("input", { ...attributes, autocomplete: "off" });
    field.value = this.conversation.title;
    field.addEventListener("keydown", (event) => this.#onKey(event, field));
    field.addEventListener("blur", () => this.#end(field, true));
    this.open.replaceWith(field);
    field.focus();
    field.select();
  }

  #onKey(event, field) {
    event.stopPropagation(); // what a key does elsewhere on the page, it does not do here
    if (!["Enter", "Escape"].includes(event.key)) return;
    event.preventDefault();
    this.#end(field, event.key === "Enter");
    this.open.focus();
  }

  #end(field, keep) {
    if (!field.isConnected || this.isEnding) return;
    this.isEnding = true; // to take the field away makes it lose the focus, which ends it once more
    field.replaceWith(this.open);
    this.isEnding = false;
    const title = field.value.trim();
    if (keep && title && title !== this.conversation.title) this.hooks.onRename(title);
    this.hooks.onRenameEnd();
  }
}

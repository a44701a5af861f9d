// The search field of the sidebar and its results, which stand in the place of the list while there are words in it.

import { h, icon } from "./dialog.js";
import { T } from "./texts.js";

const MAGNIFIER = "M11 17.5a6.5 6.5 0 1 0 0-13 6.5 6.5 0 0 0 0 13zM20 20l-4.2-4.2";
const CROSS = "M7.5 7.5l9 9M16.5 7.5l-9 9";

export class SearchBox {
  #hits = [];
  #latest = 0;

  /**
   * @param {object} store
   * @param {{ onOpen(id: string, messageId?: string): void, onActive(isActive: boolean): void }} hooks onActive: whether
   *   results are to be seen instead of the list
   */
  constructor(store, hooks) {
    Object.assign(this, { store, hooks });
    const name = { "aria-label": T.sidebar.search, placeholder: T.sidebar.search };
    this.field = h("input", {
      type: "search",
      autocomplete: "off",
      spellcheck: "false",
      enterkeyhint: "search",
      ...name,
    });
    this.field.addEventListener("input", () => this.search());
    this.field.addEventListener("keydown", (event) => this.#onKey(event));
    const clear = {
      type: "button",
      class: "clear",
      "aria-label": T.sidebar.clear,
      title: T.sidebar.clear,
      hidden: true,
    };
    this.clearButton = h("button", { ...clear, onclick: () => this.clear() }, icon(CROSS));
    this.element = h("div", { class: "search", role: "search" }, icon(MAGNIFIER), this.field, this.clearButton);
    this.results = h("div", { class: "list", hidden: true });
    this.status = h("div", { class: "visually-hidden", role: "status" });
  }

  /** Shows what the field asks for; the results before stay until the new ones are there. */
  async search() {
    const asked = ++this.#latest;
    const words = this.field.value.trim();
    this.clearButton.hidden = !this.field.value;
    const hits = words ? await this.store.search(words) : [];
    if (asked !== this.#latest) return; // more was typed meanwhile
    const held = this.#hits[this.#buttons().indexOf(document.activeElement)];
    this.#hits = hits;
    this.results.hidden = !words;
    this.results.scrollTop = 0;
    const said = hits.length ? T.sidebar.found(hits.length) : T.sidebar.nothingFound(words);
    this.results.replaceChildren(hits.length ? this.#resultList() : h("p", { class: "note" }, said));
    if (held) (this.#buttons()[hits.findIndex((hit) => isSame(hit, held))] ?? this.field).focus();
    this.status.textContent = words ? said : "";
    this.hooks.onActive(Boolean(words));
  }

  clear() {
    this.field.value = "";
    this.search();
    this.field.focus();
  }

  #buttons() {
    return [...this.results.querySelectorAll(".result")];
  }

  #resultList() {
    return h("ul", { "aria-label": T.sidebar.results }, ...this.#hits.map((hit) => h("li", {}, this.#result(hit))));
  }

  #result(hit) {
    const { conversation, message, before, match, after } = hit;
    const excerpt = [before, h("mark", {}, match), after];
    const title = message ? [conversation.title || T.sidebar.untitled] : excerpt;
    const lines = [h("span", { class: "where", dir: "auto" }, ...title)];
    if (message) lines.push(h("span", { class: "excerpt", dir: "auto" }, ...excerpt));
    return h("button", { type: "button", class: "result", onclick: () => this.#open(hit) }, ...lines);
  }

  #open({ conversation, message }) {
    this.hooks.onOpen(conversation.id, message?.id);
  }

  #onKey(event) {
    if (event.key === "Enter" && this.#hits.length) this.#open(this.#hits[0]);
    if (event.key !== "Escape" || !this.field.value) return;
    event.preventDefault();
    event.stopPropagation(); // here it ends the search and not the answer
    this.clear();
  }
}

function isSame(hit, other) {
  return hit.conversation.id === other.conversation.id && hit.message?.id === other.message?.id;
}

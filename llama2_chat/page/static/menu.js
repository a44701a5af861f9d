// A menu that drops from a button: by mouse, by touch, by arrow keys. Nothing here knows what its items do.

import { h, icon } from "./dialog.js";

const WIDTH = 208; // px, as in sidebar.css
const HIGHEST_ITEM = 44; // px
const GAP = 4; // px

/** One menu for any number of buttons; its element belongs somewhere in the page. */
export class Menu {
  #button = null;

  constructor() {
    this.element = h("div", { class: "menu", role: "menu", popover: "auto" });
    this.element.addEventListener("keydown", (event) => this.#move(event));
    this.element.addEventListener("beforetoggle", ({ newState }) => {
      this.#button?.setAttribute("aria-expanded", String(newState === "open"));
    });
  }

  /**
   * @param {HTMLButtonElement} button opens it
   * @param {() => { label: string, icon: string, act: () => void, isDanger?: boolean }[]} items what it holds then
   */
  attach(button, items) {
    button.setAttribute("aria-haspopup", "menu");
    button.setAttribute("aria-expanded", "false");
    button.popoverTargetElement = this.element; // the browser opens it after the click, and closes it at the next one
    button.addEventListener("click", () => {
      this.#button = button;
      this.element.setAttribute("aria-label", button.getAttribute("aria-label") ?? button.textContent);
      this.element.replaceChildren(...items().map((item) => this.#item(item)));
      this.element.firstElementChild.autofocus = true;
      this.#place(button.getBoundingClientRect());
    });
  }

  close() {
    if (this.element.matches(":popover-open")) this.element.hidePopover();
  }

  /** Below the button, or above it where there is no room, or as low as can be where there is none either. */
  #place({ top, bottom, left, right, width }) {
    const { style, childElementCount: items } = this.element;
    const height = items * HIGHEST_ITEM + 4 * GAP;
    const fitsBelow = bottom + height < visibleHeight();
    style.top = fitsBelow ? `${bottom + GAP}px` : "auto";
    const above = height < top ? `${innerHeight - top + GAP}px` : `calc(var(--covered) + ${2 * GAP}px)`;
    style.bottom = fitsBelow ? "auto" : above;
    const start = width > WIDTH ? left : right - WIDTH; // a small button stands at the end of its line
    style.left = `${Math.max(2 * GAP, Math.min(innerWidth - 2 * GAP - WIDTH, start))}px`;
  }

  /** The menu closes first: what an item opens finds the focus on the menu's button, and returns it there. */
  #item({ label, icon: path, act, isDanger }) {
    const onclick = () => (this.close(), act());
    const attributes = { type: "button", role: "menuitem", tabindex: -1, class: isDanger ? "danger" : null, onclick };
    return h("button", attributes, icon(path), label);
  }

  #move(event) {
    const items = [...this.element.children];
    const at = items.indexOf(document.activeElement);
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: -1 }[event.key];
    if (event.key === "Tab") this.close();
    if (event.key === "Escape") event.stopPropagation(); // it closes the menu, and stops no answer
    if (next === undefined) return;
    event.preventDefault();
    items.at(next % items.length).focus();
  }
}

/** In px, less what a phone's keyboard covers. */
function visibleHeight() {
  return visualViewport ? visualViewport.height * visualViewport.scale : innerHeight;
}

// The two sides of the page, conversations and settings: beside the chat where there is room, else sheets over it, which
// are modal dialogs. What stands in them is of sidebar.js and settings.js.

import { focusInto, holdFocus, returnFocus } from "./focus.js";
import { keep, kept } from "./kept.js";
import { T } from "./texts.js";

const NARROW = matchMedia("(max-width: 899px)"); // as in screens.css
const KEPT = "llama2-chat.settings-open";
const LABELS = { sidebar: T.sidebar.label, settings: T.settings.title };
const BESIDE = { sidebar: null, settings: "region" }; // roles; in the sidebar stands a navigation

export class Sides {
  #opener = null; // has the focus again once a side closes
  #isAwaited = false; // the settings, which were asked for before Gradio had made them

  /** @param {HTMLElement[]} behind what a sheet covers */
  constructor(sidebar, behind) {
    Object.assign(this, { panels: { sidebar }, behind });
    NARROW.addEventListener("change", () => this.#arrange());
    document.addEventListener("keydown", (event) => this.#hold(event));
    this.#arrange();
  }

  addSettings(panel) {
    this.panels.settings = panel;
    this.#mark();
    if (this.#isAwaited) this.toggle("settings");
  }

  toggle(name) {
    if (!this.panels[name]) this.#isAwaited = !this.#isAwaited;
    else if (this.#isOpen(name)) this.#close(name);
    else this.open(name);
  }

  open(name) {
    if (this.#isOpen(name)) return;
    const other = this.#sheet();
    if (!other) this.#opener = document.activeElement;
    else this.#show(other, false); // one sheet at a time, and back from the second to where the first came from
    this.#show(name, true);
    focusInto(this.panels[name]);
  }

  /** As open, with the focus on one of its controls, once these are there. */
  openAt(name, selector) {
    if (!this.panels[name]) return this.toggle(name);
    this.open(name);
    this.panels[name].querySelector(selector).focus();
  }

  /** Closes the sheet, so that the conversation can be seen. */
  closeSheet() {
    const sheet = this.#sheet();
    if (sheet) this.#close(sheet);
  }

  /** What Escape closes: the sheet, or the settings in which the focus stands. Whether there was something to close. */
  escape() {
    const isInSettings = this.panels.settings?.contains(document.activeElement);
    const name = this.#sheet() ?? (isInSettings ? "settings" : null);
    if (name) this.#close(name);
    return Boolean(name);
  }

  #close(name) {
    const hadFocus = this.#sheet() || this.panels[name].contains(document.activeElement);
    this.#show(name, false);
    if (hadFocus) returnFocus(this.#opener);
  }

  /** In a sheet, and what is said over it. */
  #hold(event) {
    const sheet = this.panels[this.#sheet()];
    if (sheet && !document.querySelector("dialog[open]")) holdFocus(event, [sheet, ...document.querySelectorAll(".toast")]);
  }

  #isOpen(name) {
    return document.body.classList.contains(`${name}-open`);
  }

  #sheet() {
    return NARROW.matches ? Object.keys(this.panels).find((name) => this.#isOpen(name)) : undefined;
  }

  #show(name, open) {
    document.body.classList.toggle(`${name}-open`, open);
    if (name === "settings" && !NARROW.matches) keep(KEPT, open ? "yes" : "");
    this.#mark();
  }

  /** As much as there is room for. */
  #arrange() {
    document.body.classList.toggle("sidebar-open", !NARROW.matches);
    document.body.classList.toggle("settings-open", Boolean(buttonOf("settings")) && innerWidth >= 1200 && kept(KEPT) === "yes");
    this.#mark();
  }

  #mark() {
    const sheet = this.panels[this.#sheet()];
    for (const part of this.behind) part.inert = Boolean(sheet);
    for (const [name, panel] of Object.entries(this.panels)) {
      panel.role = panel === sheet ? "dialog" : BESIDE[name];
      panel.ariaModal = panel === sheet ? "true" : null;
      panel.ariaLabel = panel.role && LABELS[name];
      const button = buttonOf(name);
      button.setAttribute("aria-controls", panel.id);
      button.ariaExpanded = String(this.#isOpen(name));
    }
  }
}

/** There is none for settings that visitors do not see. */
const buttonOf = (name) => document.querySelector(`[data-opens=${name}]`);

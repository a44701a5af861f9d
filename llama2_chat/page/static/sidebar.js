// The conversations beside the chat: a list by day, by mouse, touch and keyboard. What its menus do is in
// sidebar_actions.js, search in sidebar_search.js, one line in sidebar_row.js; where conversations are kept in store.js.

import { h, icon } from "./dialog.js";
import { Menu } from "./menu.js";
import { Actions } from "./sidebar_actions.js";
import { Row } from "./sidebar_row.js";
import { SearchBox } from "./sidebar_search.js";
import { T } from "./texts.js";
import { groupByDay } from "./tree.js";

const PENCIL =
  "M12 5H6.5A2.5 2.5 0 0 0 4 7.5v10A2.5 2.5 0 0 0 6.5 20h10a2.5 2.5 0 0 0 2.5-2.5V12" +
  "M17.6 3.9a1.8 1.8 0 0 1 2.5 2.5L12 14.5l-3.5 1 1-3.5z";
const GLASSES =
  "M3.5 11.5h17M6.5 11.5l1.5-6h8l1.5 6M7.5 19.5a2.75 2.75 0 1 0 0-5.5 2.75 2.75 0 0 0 0 5.5z" +
  "M16.5 19.5a2.75 2.75 0 1 0 0-5.5 2.75 2.75 0 0 0 0 5.5zM10.2 16.3q1.8-.8 3.6 0";
const CROSS = "M7 7l10 10M17 7L7 17";
const BOX = "M4 5h16v4H4zM5.5 9v10h13V9M10 13h4";

/**
 * @param {HTMLElement} element gets the list; for sidebar.css its id is "sidebar"
 * @param {object} options
 * @param {object} options.store as openStore gives it
 * @param {() => string | null} options.current the conversation that is open
 * @param {(id: string, messageId?: string) => void} options.onOpen
 * @param {() => void} options.onNew
 * @param {() => void} options.onPrivate
 * @param {() => void} [options.onClose] of the sheet that the list is on a narrow screen
 * @returns {{ refresh(): Promise<void>, focusSearch(): void }}
 */
export function makeSidebar(element, options) {
  return new Sidebar(element, options);
}

class Sidebar {
  #rows = new Map(); // conversation id -> Row
  #sections = new Map(); // label -> element
  #refreshing = null;
  #menu = new Menu();

  constructor(element, options) {
    this.options = options;
    this.actions = new Actions(options);
    this.search = new SearchBox(options.store, {
      onOpen: options.onOpen,
      onActive: (isActive) => (this.list.hidden = isActive),
    });
    element.append(this.#build());
    this.#listen();
    this.refresh();
  }

  /** Shows the list as the store has it now; calls in quick succession are one. */
  refresh() {
    this.#refreshing ??= Promise.resolve().then(async () => {
      this.#refreshing = null;
      const conversations = await this.options.store.conversations();
      const isRenaming = this.list.querySelector(".rename"); // the list stands still until that ends
      if (!isRenaming) this.#draw(conversations);
    });
    return this.#refreshing;
  }

  focusSearch() {
    this.search.field.focus();
    this.search.field.select();
  }

  #build() {
    const { onNew, onPrivate, onClose } = this.options;
    const fresh = h(
      "button",
      { type: "button", class: "line", onclick: () => onNew() },
      icon(PENCIL),
      T.sidebar.newChat,
    );
    const name = { "aria-label": T.sidebar.privateChat, title: T.sidebar.privateChat };
    const secret = h(
      "button",
      { type: "button", class: "only-icon", onclick: () => onPrivate(), ...name },
      icon(GLASSES),
    );
    const closing = { type: "button", class: "only-icon close", "aria-label": T.sidebar.close, onclick: onClose };
    const close = onClose && h("button", closing, icon(CROSS));
    const manage = h("button", { type: "button", class: "line" }, icon(BOX), T.sidebar.manage);
    this.#menu.attach(manage, () => this.actions.forAll());
    this.list = h("div", { class: "list" });
    this.note = h("p", { class: "note" });
    const top = h("div", { class: "top" }, fresh, secret, close);
    const foot = h("div", { class: "foot" }, this.note, manage);
    const { element, results, status } = this.search;
    const menu = this.#menu.element;
    return (this.element = h(
      "nav",
      { "aria-label": T.sidebar.label },
      top,
      element,
      this.list,
      results,
      foot,
      status,
      menu,
    ));
  }

  #listen() {
    const endings = [
      this.options.store.onChange(({ kind }) => kind === "conversation" && refresh()),
      this.options.store.onPersistence(() => refresh()),
    ];
    const refresh = () => {
      if (this.element.isConnected) return this.refresh();
      document.removeEventListener("visibilitychange", refresh);
      for (const end of endings) end(); // another sidebar has taken its place
    };
    document.addEventListener("visibilitychange", refresh); // midnight may have passed
    this.element.addEventListener("keydown", (event) => this.#onKey(event));
    this.list.addEventListener("scroll", () => this.#menu.close(), { passive: true });
  }

  #draw(conversations) {
    const focused = document.activeElement;
    const current = this.options.current();
    const groups = groupByDay(conversations, Date.now());
    const sections = groups.map((group) => this.#section(group, current));
    arrange(this.list, sections.length ? sections : [this.#emptyNote()]);
    const ids = new Set(conversations.map(({ id }) => id));
    for (const id of this.#rows.keys()) if (!ids.has(id)) this.#rows.delete(id);
    this.#makeReachable(this.#rows.get(current)?.open);
    if (focused !== document.activeElement && this.list.contains(focused)) focused.focus({ preventScroll: true });
    const { store } = this.options;
    this.note.textContent = store.problem || (store.persistent || store.private || store.shared ? "" : T.sidebar.notKept);
  }

  #section({ label, conversations }, current) {
    if (!this.#sections.has(label)) this.#sections.set(label, h("section", {}, h("h2", {}, label), h("ul", {})));
    const section = this.#sections.get(label);
    const rows = conversations.map((conversation) => this.#row(conversation, conversation.id === current));
    arrange(section.lastElementChild, rows);
    return section;
  }

  #row(conversation, isCurrent) {
    const { id } = conversation;
    if (!this.#rows.has(id)) {
      const row = new Row(conversation, {
        onOpen: () => this.options.onOpen(id),
        onRename: (title) => this.actions.rename(id, title),
        onRenameEnd: () => this.refresh(),
      });
      this.#menu.attach(row.more, () => this.actions.forRow(row, () => this.#delete(row)));
      this.#rows.set(id, row);
    }
    this.#rows.get(id).update(conversation, isCurrent);
    return this.#rows.get(id).element;
  }

  #emptyNote() {
    const { store } = this.options;
    return h("p", { class: "note" }, store.private ? T.sidebar.emptyPrivate : store.shared ? T.sidebar.emptyShared : T.sidebar.empty);
  }

  // ---- the keyboard: the list is one stop of the Tab key, within it the arrows lead on

  #lines() {
    return [...this.element.querySelectorAll(".list:not([hidden]) :is(.open, .result)")];
  }

  #makeReachable(line) {
    const before = this.list.querySelector('.open[tabindex="0"]');
    const reachable = line ?? before ?? this.list.querySelector(".open");
    for (const old of this.list.querySelectorAll('button[tabindex="0"]')) old.tabIndex = -1;
    for (const button of reachable?.closest("li").querySelectorAll("button") ?? []) button.tabIndex = 0;
  }

  #focus(line) {
    if (line?.matches(".open")) this.#makeReachable(line);
    line?.focus();
  }

  #onKey(event) {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    const lines = this.#lines();
    const item = event.target.closest(".list li");
    const at = lines.findIndex((line) => line.closest("li") === item);
    const isField = event.target === this.search.field;
    if (!item && !(isField && event.key === "ArrowDown")) return;
    const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: lines.length - 1 }[event.key];
    const row = [...this.#rows.values()].find(({ element }) => element === item);
    if (next === -1) this.search.field.focus();
    else if (next !== undefined) this.#focus(lines[next]);
    else if (row && event.key === "ArrowRight") row.more.focus();
    else if (row && event.key === "ArrowLeft") row.open.focus();
    else if (row && event.key === "F2") row.rename();
    else if (row && event.key === "Delete") this.#delete(row);
    else return;
    event.preventDefault();
  }

  async #delete(row) {
    const lines = this.#lines();
    const at = lines.indexOf(row.open);
    this.#focus(lines[at + 1] ?? lines[at - 1] ?? this.search.field);
    await this.actions.delete(row);
  }
}

/** Puts children in this order; those that stand right are not touched, so that focus and scroll position stay. */
function arrange(parent, children) {
  const wanted = new Set(children);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  let at = parent.firstElementChild;
  for (const child of children) {
    if (child === at) at = at.nextElementSibling;
    else parent.insertBefore(child, at);
  }
}

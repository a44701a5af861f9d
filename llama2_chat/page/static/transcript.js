// The conversation as it is read: which messages stand there, and where the reader stands. One message is article.js's; what
// a click means is for chat.js.

import { Article } from "./article.js";
import { h, icon } from "./dialog.js";
import { focusBox } from "./focus.js";
import { T } from "./texts.js";

const NEAR = 80; // pixels from the end, within which the reader follows what is written

export class Transcript {
  /**
   * @param element the scrolling box
   * @param handlers onEdit(message, text) => whether it is done, onRetry(message), onSame(message), onContinue(message), onBranch(message, step),
   *   onCompare(message), onKeep(message) of two that stand side by side, onConfirm(message, call, allowed, always), onExample(text),
   *   door: to what an empty conversation may start as, onEditing(message, text) while one is edited, with null once it is not
   */
  constructor(element, handlers) {
    this.element = element;
    this.handlers = handlers;
    this.thread = h("div", { class: "thread" });
    this.toEnd = h("button", { type: "button", class: "to-end", "aria-label": T.box.toBottom, hidden: true }, icon("M6 10l6 6 6-6"));
    element.append(this.thread, this.toEnd);
    this.articles = new Map(); // message id -> Article
    this.following = true;
    this.lastTop = 0;
    element.addEventListener("scroll", () => this._scrolled(), { passive: true });
    this.toEnd.addEventListener("click", () => this.scrollToEnd());
    this.thread.addEventListener("click", (event) => this._follow(event));
    new ResizeObserver(() => this.following && this._toEnd()).observe(this.thread);
    new ResizeObserver(() => this._resized()).observe(element);
    // Markdown is made of a message when it comes near: a conversation of a hundred turns opens as fast as one of two.
    const seen = (entries) => entries.forEach((each) => each.isIntersecting && each.target.article.render());
    this.near = new IntersectionObserver(seen, { root: element, rootMargin: "1500px 0px" });
    addEventListener("beforeprint", () => this.articles.forEach((article) => article.render())); // paper has it all
  }

  /**
   * Show these messages, keeping what is on the page already.
   * @param path [{message, index, count, editing, beside}] with the place of each among its versions; editing: what was made
   *   of it and not sent yet; beside: of two that stand side by side, what tells it apart
   * @param running ids of messages that are being written
   * @param forgotten how many of the oldest the model no longer remembers
   */
  show(path, { running, forgotten = 0 } = {}) {
    const focused = this._focusedButton();
    const ids = new Set(path.map(({ message }) => message.id));
    for (const [id, article] of this.articles) if (!ids.has(id)) this._remove(id, article);
    if (path.length) this.thread.querySelector(".empty")?.remove();
    this.thread.querySelector(".forgotten")?.remove();
    let before = null;
    this.thread.classList.toggle("comparing", path.some(({ beside }) => beside !== undefined));
    for (const [position, { message, index, count, editing, beside }] of path.entries()) {
      const article = this.articles.get(message.id) ?? this._add(message);
      article.show(message, { index, count, running: running.has(message.id), last: position === path.length - 1, beside });
      if (editing !== undefined) article.edit(editing, { focus: false });
      const { element } = article;
      if (!element.isConnected || element.previousElementSibling !== before) before ? before.after(element) : this.thread.prepend(element);
      before = article.element;
    }
    if (forgotten && path[forgotten]) {
      const mark = h("div", { class: "forgotten", role: "separator" }, h("span", {}, T.gauge.forgotten));
      this.articles.get(path[forgotten].message.id).element.before(mark);
    }
    if (!path.length && !this.thread.querySelector(".empty")) this.thread.append(this._empty());
    if (focused) this._focusButton(focused);
  }

  /** The text of one message has grown, or its steps. calling: the tool that is called for it now */
  update(message, waiting = "", calling = null) {
    this.articles.get(message.id)?.grow(message, waiting, calling);
  }

  edit(message) {
    this.articles.get(message.id)?.edit();
  }

  scrollToEnd() {
    this.following = true;
    this._toEnd();
  }

  scrollTo(id) {
    const article = this.articles.get(id);
    if (!article) return;
    this.following = false;
    article.render();
    article.element.scrollIntoView({ block: "start" });
    article.element.classList.add("found");
    setTimeout(() => article.element.classList.remove("found"), 2000);
  }

  /** Links to a footnote scroll and leave the address alone, which names the conversation. */
  _follow(event) {
    const target = event.target.closest?.("a[href^='#']")?.hash.slice(1);
    if (!target) return;
    event.preventDefault();
    const note = document.getElementById(target);
    note?.scrollIntoView({ block: "center" });
    note?.focus();
  }

  /** A button below a message, which may be made anew, or stand below another version of the message. */
  _focusedButton() {
    const button = document.activeElement;
    if (!this.thread.contains(button) || !button.closest(".buttons")) return null;
    const place = [...this.thread.querySelectorAll("article")].indexOf(button.closest("article"));
    return { button, place, name: button.ariaLabel ?? button.textContent };
  }

  _focusButton({ button, place, name }) {
    if (button.isConnected) return;
    const buttons = this.thread.querySelectorAll("article")[place]?.querySelectorAll(".buttons button") ?? [];
    [...buttons].find((each) => (each.ariaLabel ?? each.textContent) === name)?.focus({ preventScroll: true });
  }

  /** To the newest message; where there is none, to the top of what stands instead. */
  _toEnd() {
    this.element.scrollTop = this.articles.size ? this.element.scrollHeight : 0;
  }

  /** The keyboard of a phone leaves the end in sight, unless it is for a message that is edited. */
  _resized() {
    if (this.following && !this.thread.contains(document.activeElement)) this._toEnd();
  }

  _scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.element;
    const near = scrollTop < this.lastTop ? 2 : NEAR; // whoever turns the wheel up by a little wants to stay there
    // Only the reader goes up. The end goes away by itself, too, where text grows or a keyboard opens: it is followed then.
    this.following = scrollHeight - scrollTop - clientHeight < near || (this.following && scrollTop >= this.lastTop);
    this.lastTop = scrollTop;
    this.toEnd.hidden = this.following || !this.articles.size;
  }

  _add(message) {
    const article = new Article(message, this.handlers);
    this.articles.set(message.id, article);
    this.near.observe(article.element);
    return article;
  }

  _remove(id, article) {
    this.near.unobserve(article.element);
    article.element.remove();
    this.articles.delete(id);
  }

  _empty() {
    const ask = (text) => h("button", { type: "button", onclick: () => (this.handlers.onExample(text), focusBox()) }, text);
    return h("div", { class: "empty" }, h("h2", {}, T.empty), h("div", { class: "examples" }, ...T.examples.map(ask)), this.handlers.door);
  }
}

// The conversation as it is read: an article for each message, its buttons, and where the reader stands. What a click
// means is for chat.js; how Markdown is shown is in markdown.js.

import { copyText } from "./clipboard.js";
import { h, icon, toast } from "./dialog.js";
import { focusBox } from "./focus.js";
import { AnswerView } from "./markdown.js";
import { Steps } from "./steps.js";
import { T } from "./texts.js";

const ICONS = {
  copy: "M9 9h10v10H9z M5 15V5h10",
  edit: "M4 20h4L19 9l-4-4L4 16z",
  retry: "M4 12a8 8 0 1 0 3-6 M4 4v4h4",
  same: "M4 9h14l-3-3 M20 15H6l3 3",
  continue: "M6 5l8 7-8 7z M18 5v14",
  previous: "M14 6l-6 6 6 6",
  next: "M10 6l6 6-6 6",
};
const NEAR = 80; // pixels from the end, within which the reader follows what is written

export class Transcript {
  /**
   * @param element the scrolling box
   * @param handlers onEdit(message, text), onRetry(message), onSame(message), onContinue(message), onBranch(message, step),
   *   onExample(text)
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
    // Markdown is made of a message when it comes near: a conversation of a hundred turns opens as fast as one of two.
    const seen = (entries) => entries.forEach((each) => each.isIntersecting && each.target.article.render());
    this.near = new IntersectionObserver(seen, { root: element, rootMargin: "1500px 0px" });
  }

  /**
   * Show these messages, keeping what is on the page already.
   * @param path [{message, index, count}] with the place of each among its versions
   * @param running ids of messages that are being written
   * @param forgotten how many of the oldest the model no longer remembers
   */
  show(path, { running, forgotten = 0 } = {}) {
    const focused = this._focusedButton();
    const ids = new Set(path.map(({ message }) => message.id));
    for (const [id, article] of this.articles) if (!ids.has(id)) this._remove(id, article);
    this.thread.querySelector(".empty")?.remove();
    this.thread.querySelector(".forgotten")?.remove();
    let before = null;
    for (const [position, { message, index, count }] of path.entries()) {
      const article = this.articles.get(message.id) ?? this._add(message);
      article.show(message, { index, count, running: running.has(message.id), last: position === path.length - 1 });
      const { element } = article;
      if (!element.isConnected || element.previousElementSibling !== before) before ? before.after(element) : this.thread.prepend(element);
      before = article.element;
    }
    if (forgotten && path[forgotten]) {
      const mark = h("div", { class: "forgotten", role: "separator" }, h("span", {}, T.gauge.forgotten));
      this.articles.get(path[forgotten].message.id).element.before(mark);
    }
    if (!path.length) this.thread.append(this._empty());
    if (focused) this._focusButton(focused);
  }

  /** The text of one message has grown, or its steps. calling: the tool that is called for it now */
  update(message, waiting = "", calling = null) {
    this.articles.get(message.id)?.grow(message, waiting, calling);
  }

  edit(message) {
    this.articles.get(message.id)?.edit();
  }

  get isEditing() {
    return Boolean(this.thread.querySelector(".editor"));
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

  _scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this.element;
    const near = scrollTop < this.lastTop ? 2 : NEAR; // whoever turns the wheel up by a little wants to stay there
    this.following = scrollHeight - scrollTop - clientHeight < near;
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
    return h("div", { class: "empty" }, h("h2", {}, T.empty), h("div", { class: "examples" }, ...T.examples.map(ask)));
  }
}

class Article {
  constructor(message, handlers) {
    this.handlers = handlers;
    this.message = message;
    this.steps = message.role === "assistant" ? new Steps() : null;
    this.body = h("div", { class: "body", dir: "auto" });
    this.remark = h("p", { class: "remark" });
    this.buttons = h("div", { class: "buttons" });
    const speaker = h("h2", { class: "visually-hidden" }, message.role === "user" ? T.you : T.assistant);
    this.element = h("article", { class: message.role }, speaker, this.steps?.element, this.body, h("footer", {}, this.remark, this.buttons));
    this.element.article = this;
    this.view = null; // of an answer, once it has come near
    this.shown = "";
  }

  show(message, { index, count, running, last }) {
    this.message = message;
    this.running = running;
    this.element.setAttribute("aria-busy", running);
    this._steps();
    if (!this.element.querySelector(".editor")) this._text(this.waiting ?? "");
    this.remark.replaceChildren(...this._remark());
    this.remark.hidden = !this.remark.hasChildNodes();
    const state = JSON.stringify([index, count, running, last, message.end?.reason, Boolean(message.text)]);
    if (state !== this.state) this._buttons(index, count, last);
    this.state = state;
  }

  grow(message, waiting, calling) {
    if (waiting !== this.waiting) this._sayWaiting(waiting);
    this.message = message;
    this._steps(calling);
    this.waiting = waiting;
    this._text(waiting);
  }

  _steps(calling) {
    const { steps, text } = this.message;
    this.steps?.show(steps, calling, Boolean(text) || !this.running);
  }

  /** Below what there is already, such as that the line is down. */
  _sayWaiting(waiting) {
    this.remark.textContent = this.message.text ? waiting : "";
    this.remark.hidden = !this.remark.textContent;
  }

  /** Show Markdown instead of the plain text that stands for it while it is far away. */
  render() {
    if (this.view || this.message.role === "user") return;
    this.body.textContent = "";
    this.body.removeAttribute("dir");
    this.view = new AnswerView(this.body);
    this._text(this.waiting ?? "");
  }

  _text(waiting) {
    const { text, role } = this.message;
    this.element.classList.toggle("waiting", this.running && !text);
    if (this.running && !text) this.element.dataset.waiting = waiting || T.sending;
    if (role === "user" || !this.view) {
      if (text !== this.shown) this.body.textContent = text;
    } else {
      this.view.update(text, { done: !this.running });
    }
    this.shown = text;
  }

  _remark() {
    const { end, text, edited, role } = this.message;
    if (role === "user" || this.running) return [];
    if (edited) return [T.end.edited];
    if (!end) return [];
    const parts = [];
    if (end.completionTokens) parts.push(T.end.tokens(end.completionTokens));
    if (end.tokensPerS) parts.push(T.end.speed(end.tokensPerS));
    if (end.firstTokenS != null) parts.push(T.end.first(end.firstTokenS));
    parts.push(T.end[end.reason] ?? end.reason);
    const quiet = h("span", {}, parts.join(" · "));
    return [quiet, ...this._trouble(end, text).map((words) => h("strong", {}, words))];
  }

  _trouble(end, text) {
    if (end.error) return [end.error];
    if (end.reason === "interrupted") return [T.end.lost];
    if (end.reason === "cancelled" && !text) return [T.end.stoppedEarly];
    if (end.reason === "stop" && !text.trim()) return [T.end.empty];
    return [];
  }

  _buttons(index, count, last) {
    const { role, end, text } = this.message;
    const on = this.handlers;
    const button = (name, act, title) =>
      h("button", { type: "button", title: title ?? T.actions[name], "aria-label": T.actions[name], onclick: act }, icon(ICONS[name]));
    const buttons = [];
    if (count > 1) {
      const step = (name, by) => {
        const made = button(name, () => made.ariaDisabled || on.onBranch(this.message, by));
        const isEnd = by < 0 ? index === 0 : index === count - 1;
        made.ariaDisabled = isEnd ? "true" : null; // so that the focus can stay on it
        return made;
      };
      const place = h("span", { class: "version", "aria-label": T.actions.version(index + 1, count) }, `${index + 1}/${count}`);
      buttons.push(step("previous", -1), place, step("next", 1));
    }
    if (!this.running) {
      if (text) buttons.push(button("copy", () => copy(text)));
      buttons.push((this.editButton = button("edit", () => this.edit())));
      if (role === "assistant") {
        const ask = (handler) => () => (handler(this.message), focusBox());
        buttons.push(button("retry", ask(on.onRetry), T.actions.retryHelp));
        if (end?.seed != null) buttons.push(button("same", ask(on.onSame), T.actions.sameHelp));
        if (last && text && end && end.reason !== "stop") {
          const words = h("button", { type: "button", class: "words", onclick: ask(on.onContinue) }, T.actions.continue);
          buttons.push(words);
        }
      }
    }
    this.buttons.replaceChildren(...buttons);
  }

  edit() {
    if (this.element.querySelector(".editor")) return;
    const { text, role } = this.message;
    const area = h("textarea", { "aria-label": T.actions.editLabel, dir: "auto" });
    area.value = text;
    const close = () => {
      editor.remove();
      this.body.hidden = false;
      this.editButton?.focus({ preventScroll: true });
    };
    const save = (event) => {
      event.preventDefault();
      const changed = area.value;
      close();
      if (!changed.trim() || (changed === text && role === "assistant")) return;
      this.handlers.onEdit(this.message, changed);
      if (role === "user") focusBox();
    };
    const onKey = (event) => {
      if (event.key === "Escape") event.stopPropagation(), close(), focusBox();
      if (event.key === "Enter" && !event.shiftKey && event.target === area && role === "user") save(event);
    };
    const editor = h(
      "form",
      { class: "editor", onsubmit: save, onkeydown: onKey },
      area,
      h("button", { type: "button", onclick: close }, T.actions.cancel),
      h("button", { type: "submit", class: "primary" }, role === "user" ? T.actions.sendEdit : T.actions.save),
    );
    this.body.hidden = true;
    this.body.after(editor);
    area.focus();
    area.setSelectionRange(text.length, text.length);
  }
}

async function copy(text) {
  const copied = await copyText(text);
  toast(copied ? T.actions.copied : T.actions.copyFailed, { seconds: copied ? 2 : 8 });
}

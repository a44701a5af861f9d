// One message as it is read: its text, what is said of it, its buttons, and the field in which it is edited. How Markdown is
// shown is in markdown.js.

import { copyText } from "./clipboard.js";
import { h, icon, toast } from "./dialog.js";
import { setText, watchDirection } from "./direction.js";
import { focusBox } from "./focus.js";
import { AnswerView } from "./markdown.js";
import { withoutEndlessMarks } from "./markdown/text.js";
import { Sources } from "./sources.js";
import { Steps } from "./steps.js";
import { T } from "./texts.js";
import { translated } from "./translated.js";

const ICONS = {
  copy: "M9 9h10v10H9z M5 15V5h10",
  edit: "M4 20h4L19 9l-4-4L4 16z",
  retry: "M4 12a8 8 0 1 0 3-6 M4 4v4h4",
  same: "M4 9h14l-3-3 M20 15H6l3 3",
  continue: "M6 5l8 7-8 7z M18 5v14",
  compare: "M4 5h6v14H4z M14 5h6v14h-6z",
  previous: "M14 6l-6 6 6 6",
  next: "M10 6l6 6-6 6",
};

const VISIBLE = /[^\s\p{Cc}\p{Cf}]/u; // characters without width are nothing to read

/** Its handlers are those of Transcript. */
export class Article {
  constructor(message, handlers) {
    this.handlers = handlers;
    this.message = message;
    this.steps = message.role === "assistant" ? new Steps((...said) => handlers.onConfirm(this.message, ...said)) : null;
    this.apart = h("p", { class: "apart", hidden: true });
    this.body = h("div", { class: "body", dir: "auto" });
    this.sources = message.role === "assistant" ? new Sources() : null;
    this.remark = h("p", { class: "remark" });
    this.buttons = h("div", { class: "buttons" });
    const speaker = h("h2", { class: "visually-hidden" }, message.role === "user" ? T.you : T.assistant);
    this.element = h("article", { class: message.role }, speaker, this.apart, this.steps?.element, this.body, this.sources?.element, h("footer", {}, this.remark, this.buttons));
    this.element.article = this;
    this.view = null; // of an answer, once it has come near
    this.shown = "";
  }

  /** beside: what tells it apart from the answer that stands beside it; undefined where none does */
  show(message, { index, count, running, last, beside }) {
    this.message = message;
    this.running = running;
    this.element.classList.toggle("beside", beside !== undefined);
    this.apart.textContent = beside ?? "";
    this.apart.hidden = !beside;
    this.element.setAttribute("aria-busy", running);
    this._steps(running ? this.calling : null);
    if (!this.element.querySelector(".editor")) this._text(this.waiting ?? "");
    this.remark.replaceChildren(...this._remark());
    this.remark.hidden = !this.remark.hasChildNodes();
    const isBeside = beside !== undefined;
    const state = JSON.stringify([index, count, running, last, message.end?.reason, Boolean(message.text), isBeside]);
    if (state !== this.state) this._buttons(index, count, last, isBeside);
    this.state = state;
  }

  grow(message, waiting, calling) {
    if (waiting !== this.waiting) this._sayWaiting(waiting);
    this.message = message;
    this.calling = calling;
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
    this.remark.textContent = this.message.text ? translated(waiting) : "";
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
    if (this.running && !text) this.element.dataset.waiting = translated(waiting) || T.sending;
    if (role === "user" || !this.view) {
      if (text !== this.shown) this.body.textContent = withoutEndlessMarks(text);
    } else {
      this.view.update(text, { done: !this.running });
    }
    this.shown = text;
    this.sources?.show(this.message.sources, text, this.running ? null : this.view && this.body);
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
    if (end.error) return [translated(end.error)];
    if (end.reason === "interrupted") return [T.end.lost];
    if (end.reason === "cancelled" && !text) return [T.end.stoppedEarly];
    if (end.reason === "stop" && !VISIBLE.test(text)) return [T.end.empty];
    return [];
  }

  _buttons(index, count, last, isBeside) {
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
        const answersSomething = this.message.parentId !== null; // not in every file from elsewhere
        if (answersSomething) buttons.push(button("retry", ask(on.onRetry), T.actions.retryHelp));
        if (answersSomething && end?.seed != null) buttons.push(button("same", ask(on.onSame), T.actions.sameHelp));
        if (answersSomething && !isBeside) buttons.push(button("compare", () => on.onCompare(this.message), T.actions.compareHelp));
        if (isBeside) buttons.push(h("button", { type: "button", class: "words", onclick: ask(on.onKeep) }, T.compare.keep));
        if (last && text && end && end.reason !== "stop") {
          const words = h("button", { type: "button", class: "words", onclick: ask(on.onContinue) }, T.actions.continue);
          buttons.push(words);
        }
      }
    }
    this.buttons.replaceChildren(...buttons);
  }

  /** @param begun what it reads so far, where it was left in the middle of it */
  edit(begun = this.message.text, { focus = true } = {}) {
    if (this.element.querySelector(".editor")) return;
    const { text, role } = this.message;
    const tell = () => this.handlers.onEditing(this.message, area.value === text ? null : area.value);
    const area = h("textarea", { "aria-label": T.actions.editLabel, oninput: tell });
    watchDirection(area);
    setText(area, begun);
    const close = () => {
      this.handlers.onEditing(this.message, null);
      editor.remove();
      this.body.hidden = false;
      this.editButton?.focus({ preventScroll: true });
    };
    const save = (event) => {
      event.preventDefault();
      const changed = area.value;
      const isNothing = !changed.trim() || (changed === text && role === "assistant");
      if (!isNothing && !this.handlers.onEdit(this.message, changed)) return;
      close();
      if (!isNothing && role === "user") focusBox();
    };
    const onKey = (event) => {
      if (event.key === "Escape") event.stopPropagation(), close(), focusBox();
      const newLine = event.shiftKey || matchMedia("(pointer: coarse)").matches; // as in the box for messages
      if (event.key === "Enter" && !newLine && event.target === area && role === "user") save(event);
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
    area.setSelectionRange(begun.length, begun.length);
    if (focus) area.focus();
  }
}

async function copy(text) {
  const copied = await copyText(text);
  toast(copied ? T.actions.copied : T.actions.copyFailed, { seconds: copied ? 2 : 8 });
}

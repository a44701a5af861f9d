// What stands in place of the chat where the model is a base model: one text, which the model goes on with.
// The text is kept in this browser, and so is which completion of it is under way; all tabs show the same text.

import { follow, stop } from "./answers.js";
import { h, toast } from "./dialog.js";
import { setText, watchDirection } from "./direction.js";
import { keep, kept } from "./kept.js";
import { ofProfile } from "./profile.js";
import { newId } from "./store.js";
import { T } from "./texts.js";
import { translated } from "./translated.js";

const KEPT = "llama2-chat.completion";
const KEEP_EVERY_MS = 1000;

export class Completing {
  /** @param onSaid says a sentence to who listens to the page */
  constructor(parts, { settings, profile, onSaid }) {
    Object.assign(this, { settings, onSaid, keptAs: ofProfile(KEPT, profile), before: [] });
    this.area = h("textarea", { "aria-label": T.completion.label, placeholder: T.completion.hint, spellcheck: false });
    const button = (name, act, more = {}) => h("button", { type: "button", class: "small", onclick: act, ...more }, T.completion[name]);
    this.complete = button("complete", () => this._complete(), { class: "primary", "aria-keyshortcuts": "Control+Enter" });
    this.stop = button("stop", () => this._stop());
    this.undo = button("undo", () => this._undo());
    this.note = h("span", { class: "note", role: "status" });
    this.unkept = h("p", { class: "unkept", role: "status", hidden: true }, T.completion.unkept);
    const buttons = h("div", { class: "buttons" }, this.complete, this.stop, this.undo, this.note);
    this.element = h("section", { id: "completing", "aria-label": T.completion.title, hidden: true }, h("p", {}, T.completion.what), this.area, this.unkept, buttons);
    parts.transcript.after(this.element);
    watchDirection(this.area);
    this.area.addEventListener("input", () => this._changed());
    this.element.addEventListener("keydown", (event) => this._key(event));
    addEventListener("storage", ({ key }) => key === this.keptAs && !this.element.hidden && this._hear());
  }

  /** @param {boolean} instead of the chat */
  show(instead) {
    document.body.classList.toggle("completes", instead);
    if (!instead || !this.element.hidden) return;
    this.element.hidden = false;
    this._restore();
    if (this._running) this._run(null);
  }

  /** Another tab has changed the text, or lets it be gone on with. */
  _hear() {
    if (this._running) return;
    this._restore();
    if (this._running) this._run(null, { isElsewhere: true });
  }

  get _running() {
    return Boolean(this.answerId);
  }

  _key(event) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      this._complete();
    } else if (event.key === "Escape") this._stop();
  }

  async _complete() {
    if (this._running || !this.area.value) return;
    this.before.push(this.area.value);
    this.answerId = newId();
    const run = this._run({ text: this.area.value, settings: this.settings.read() });
    if (document.activeElement !== this.area) this.stop.focus(); // the button that was clicked is off now
    await run;
  }

  async _stop() {
    if (!this._running) return;
    const { answerId } = this;
    if (this.offline) this.reading.abort(); // the server hears of it later
    const refused = await stop(answerId);
    if (refused) toast(refused.message);
  }

  _undo() {
    setText(this.area, this.before.pop());
    this._changed();
    this.area.focus();
  }

  /**
   * Follow a completion to its end, behind the text that it goes on with.
   * @param question null if it was asked before
   * @param options isElsewhere: another tab keeps what comes of it
   */
  async _run(question, { isElsewhere = false } = {}) {
    const base = this.before.at(-1);
    let keptAt = 0;
    this.reading = new AbortController();
    this.note.textContent = "";
    this._face();
    if (!isElsewhere) this._keep();
    this.onSaid(T.live.begun);
    try {
      for await (const event of follow(this.answerId, question, this.reading.signal)) {
        this.offline = Boolean(event.offline);
        if (event.text !== undefined) this._write(base + event.text);
        if (event.more) this._write(this.area.value + event.more);
        this.note.textContent = event.offline ? T.connection.offline : translated(event.end ? event.end.error : (event.waiting ?? ""));
        if (event.lost) this.note.textContent = T.completion.lost;
        if (!isElsewhere && Date.now() - keptAt > KEEP_EVERY_MS) (keptAt = Date.now()), this._keep();
      }
    } catch (error) {
      this.note.textContent = translated(error.message);
    }
    if (this.reading.signal.aborted) this.note.textContent = "";
    const { answerId } = this;
    this.answerId = null;
    this.offline = false;
    this.onSaid(T.live.ended);
    if (this.area.value === base) this.before.pop(); // there is nothing to take back
    const hadFocus = document.activeElement === this.stop;
    if (this._hasGoneOn(answerId)) this._hear();
    else this._changed();
    if (hadFocus) this.complete.focus();
  }

  /** Whether another tab saw the end before this one did: what is kept is what has been made of it since. */
  _hasGoneOn(answerId) {
    return this.unkept.hidden && kept(this.keptAs) !== "" && this._kept().answerId !== answerId;
  }

  /** What is read stays in view while the text grows, unless its end is. */
  _write(text) {
    const { area } = this;
    const atEnd = area.scrollHeight - area.scrollTop - area.clientHeight < 40;
    setText(area, text);
    if (atEnd) area.scrollTop = area.scrollHeight;
  }

  _changed() {
    this._face();
    this._keep();
  }

  _face() {
    const running = this._running;
    this.area.readOnly = running;
    this.complete.disabled = running || !this.area.value;
    this.stop.disabled = !running;
    this.undo.disabled = running || !this.before.length;
  }

  _keep() {
    const { answerId, before } = this;
    const isKept = keep(this.keptAs, JSON.stringify({ text: this.area.value, before: before.slice(-1), answerId }));
    this.unkept.hidden = isKept || !this.area.value;
  }

  _kept() {
    try {
      const { text, before, answerId } = JSON.parse(kept(this.keptAs));
      return typeof text === "string" && Array.isArray(before) ? { text, before, answerId } : {};
    } catch {
      return {}; // there is nothing, or not ours
    }
  }

  _restore() {
    const { text = "", before = [], answerId = null } = this._kept();
    setText(this.area, text);
    Object.assign(this, { before, answerId: before.length ? answerId : null });
    this._face();
  }
}

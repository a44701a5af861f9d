// The box in which messages are typed, its buttons, and the gauge of the context window below it.

import { h, icon } from "./dialog.js";
import { setText, watchDirection } from "./direction.js";
import { focusBox } from "./focus.js";
import { T } from "./texts.js";

const SEND = "M12 19V6 M6 11l6-6 6 6";
const STOP = "M8 8h8v8H8z";

export class Composer {
  /** @param handlers onSend(text), onQueue(whether the text waits for the answer under way), onStop(), onEditLast(),
   *   onInput(text) */
  constructor(element, handlers) {
    this.handlers = handlers;
    this.area = h("textarea", { "aria-label": T.box.label, placeholder: T.box.hint, rows: 1, enterkeyhint: "enter" });
    const button = (path, name, more) => h("button", { "aria-label": name, title: name, ...more }, icon(path));
    this.send = button(SEND, T.box.send, { type: "submit", class: "primary send" });
    this.stop = button(STOP, T.box.stop, { type: "button", class: "primary send stop", onclick: () => this._stop() });
    this.note = h("span", { class: "note" });
    this.meter = h("meter", { min: 0, max: 1, value: 0, "aria-label": T.gauge.label });
    this.gauge = h("div", { class: "gauge", title: T.gauge.title, hidden: true }, this.meter, h("span"));
    const form = h("form", { class: "box" }, this.area, this.stop, this.send);
    element.append(form, h("div", { class: "below" }, this.gauge, this.note));
    form.addEventListener("submit", (event) => (event.preventDefault(), this._submit()));
    watchDirection(this.area);
    this.area.addEventListener("keydown", (event) => this._key(event));
    this.area.addEventListener("input", () => this._typed());
    this.running = false;
    this.setRunning(false);
  }

  get text() {
    return this.area.value;
  }

  set text(value) {
    setText(this.area, value);
    this._fit();
    this._face();
  }

  focus() {
    this.area.focus({ preventScroll: true });
  }

  /** While an answer is on its way the box takes the next message. queued: it has it, and waits for what these words say. */
  setRunning(running, queued = "") {
    this.running = running;
    this.queued = queued;
    this.note.textContent = queued;
    this._face();
  }

  /**
   * @param fitted what the server says of the window, or null where nobody counts
   * @param most tokens that an answer may have by the settings
   */
  showGauge(fitted, most) {
    this.gauge.hidden = !fitted?.contextLength;
    if (this.gauge.hidden) return;
    const { promptTokens, droppedMessages, answerTokens, contextLength, fits } = fitted;
    this.gauge.classList.toggle("full", Boolean(!fits || droppedMessages));
    this.meter.value = Math.min(1, promptTokens / contextLength);
    const room = Math.min(most, answerTokens);
    const rest = droppedMessages ? T.gauge.dropped(droppedMessages) : T.gauge.free(answerTokens - room);
    const words = fits ? [T.gauge.room(room), rest] : [T.gauge.tooLong(most)];
    this.gauge.querySelector("span").textContent = [T.gauge.used(promptTokens, contextLength), ...words].join(" · ");
  }

  _key(event) {
    const newLine = event.shiftKey || matchMedia("(pointer: coarse)").matches; // on a phone there is a button to send
    if (event.key === "Enter" && !newLine) {
      event.preventDefault();
      this._submit();
    } else if (event.key === "ArrowUp" && !this.text) {
      event.preventDefault();
      this.handlers.onEditLast();
    }
  }

  /** At once, or when the answer under way has ended. */
  _submit() {
    if (this.running) this.handlers.onQueue(this.text.trim() !== "");
    else this._send();
    this.focus();
  }

  _stop() {
    this.handlers.onStop();
    focusBox();
  }

  _send() {
    const { text } = this;
    if (!text.trim()) return;
    this.text = "";
    this.handlers.onSend(text);
  }

  _typed() {
    if (this.queued) this.handlers.onQueue(false);
    this._face();
    this._fit();
    this.handlers.onInput(this.text);
  }

  _face() {
    const hasText = this.text.trim() !== "";
    this.stop.hidden = !this.running;
    this.send.hidden = this.running && !hasText;
    this.send.disabled = !hasText || this.queued !== "";
  }

  /** As high as its text, up to what the style sheet allows. */
  _fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
  }
}

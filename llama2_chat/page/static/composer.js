// The box in which messages are typed, its button, and the gauge of the context window below it.

import { h, icon } from "./dialog.js";
import { T } from "./texts.js";

const SEND = "M12 19V6 M6 11l6-6 6 6";
const STOP = "M8 8h8v8H8z";

export class Composer {
  /** @param handlers onSend(text), onStop(), onEditLast(), onInput(text) */
  constructor(element, handlers) {
    this.handlers = handlers;
    this.area = h("textarea", { "aria-label": T.box.label, placeholder: T.box.hint, rows: 1, dir: "auto", enterkeyhint: "enter" });
    this.button = h("button", { type: "submit", class: "primary send" });
    this.note = h("span", { class: "note" });
    this.meter = h("meter", { min: 0, max: 1, value: 0, "aria-label": T.gauge.label });
    this.gauge = h("div", { class: "gauge", title: T.gauge.title, hidden: true }, this.meter, h("span"));
    const form = h("form", { class: "box" }, this.area, this.button);
    element.append(form, h("div", { class: "below" }, this.gauge, this.note));
    form.addEventListener("submit", (event) => (event.preventDefault(), this._act()));
    this.area.addEventListener("keydown", (event) => this._key(event));
    this.area.addEventListener("input", () => this._typed());
    this.running = false;
    this.setRunning(false);
  }

  get text() {
    return this.area.value;
  }

  set text(value) {
    this.area.value = value;
    this._fit();
    this._face();
  }

  focus() {
    this.area.focus({ preventScroll: true });
  }

  /** While an answer is on its way the box takes the next message, and sends it afterwards. */
  setRunning(running) {
    this.running = running;
    this._face();
    if (!running && this.queued) {
      this._queue(false);
      this._send();
    }
  }

  unqueue() {
    this._queue(false);
  }

  /** @param fitted what the server says of the window, or null where nobody counts */
  showGauge(fitted) {
    this.gauge.hidden = !fitted?.contextLength;
    if (this.gauge.hidden) return;
    const { promptTokens, droppedMessages, answerTokens, contextLength, fits } = fitted;
    this.gauge.classList.toggle("full", Boolean(!fits || droppedMessages));
    this.meter.value = Math.min(1, promptTokens / contextLength);
    const room = droppedMessages ? T.gauge.dropped(droppedMessages) : T.gauge.room(answerTokens);
    const words = [T.gauge.used(promptTokens, contextLength), fits ? room : T.gauge.tooLong];
    this.gauge.querySelector("span").textContent = words.join(" · ");
  }

  _key(event) {
    const newLine = event.shiftKey || matchMedia("(pointer: coarse)").matches; // on a phone there is a button to send
    if (event.key === "Enter" && !newLine && !event.isComposing) {
      event.preventDefault();
      if (this.running) this._queue(this.text.trim() !== "");
      else this._send();
    } else if (event.key === "ArrowUp" && !this.text) {
      event.preventDefault();
      this.handlers.onEditLast();
    }
  }

  _act() {
    if (this.running) this.handlers.onStop();
    else this._send();
  }

  _send() {
    const { text } = this;
    if (!text.trim()) return this.focus();
    this.text = "";
    this.handlers.onSend(text);
    this.focus();
  }

  _typed() {
    this._queue(false);
    this._fit();
    this._face();
    this.handlers.onInput(this.text);
  }

  _queue(queued) {
    this.queued = queued;
    this.note.textContent = queued ? T.box.queued : "";
  }

  _face() {
    this.button.replaceChildren(icon(this.running ? STOP : SEND));
    this.button.setAttribute("aria-label", this.running ? T.box.stop : T.box.send);
    this.button.title = this.running ? T.box.stop : T.box.send;
    this.button.classList.toggle("stop", this.running);
    this.button.disabled = !this.running && !this.text.trim();
  }

  /** As high as its text, up to what the style sheet allows. */
  _fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.area.style.height = "auto";
    this.area.style.height = `${this.area.scrollHeight}px`;
  }
}

// The steps of an answer that uses tools, above its text: what was called, with what, what came of it and how long it took.
// All of it is shown as plain text. Which steps there are is for asking.js to say.

import { h } from "./dialog.js";
import { withoutEndlessMarks } from "./markdown/text.js";
import { T } from "./texts.js";

const LONG = 240; // characters, or
const LINES = 4; // after which a text may be higher than its box

/**
 * @typedef {{ name: string, input: string }} Call the input is JSON, as the model wrote it
 * @typedef {Call & { result: string, seconds: number, failed: boolean }} Step
 */

/** An input as people read it. */
export function inputOf({ input }) {
  try {
    const value = JSON.parse(input);
    return typeof value === "string" ? value : JSON.stringify(value, null, 2);
  } catch {
    return input; // of a file from elsewhere
  }
}

/** One step on one line. */
export const inOneLine = (step) => T.steps.step(step.name, oneLine(inputOf(step)), oneLine(step.result), step.failed);

const oneLine = (text) => text.slice(0, LONG).replace(/\s+/g, " ");

export class Steps {
  /** @param onConfirm (call, allowed, always) what the visitor says of a call that asks first */
  constructor(onConfirm) {
    this.onConfirm = onConfirm;
    this.line = h("summary");
    this.list = h("ol");
    this.element = h("details", { class: "steps", hidden: true }, this.line, this.list);
    this.known = [];
    this.isFolded = null;
  }

  /**
   * @param {Step[]} steps
   * @param {Call | null} calling what is called now
   * @param {boolean} folded the answer has begun, or there will be none
   */
  show(steps = [], calling = null, folded = true) {
    this.element.hidden = !steps.length && !calling;
    this.line.replaceChildren(...this._summary(steps, calling));
    steps.forEach((step, place) => this._put(step, place));
    while (this.known.length > steps.length) this.known.pop().element.remove();
    this._showCall(calling);
    if (folded === this.isFolded) return;
    this.isFolded = folded;
    // Whoever reads in it with the keyboard would lose their place.
    if (!this.list.contains(document.activeElement)) this.element.open = !folded;
  }

  _put(step, place) {
    const written = JSON.stringify(step);
    if (this.known[place]?.written === written) return;
    const element = item(step, T.steps.seconds(step.seconds));
    const before = this.known[place]?.element;
    before ? before.replaceWith(element) : this.list.append(element);
    this.known[place] = { element, written };
  }

  /** With the seconds that it takes, so that a tool which hangs is seen to. */
  _showCall(calling) {
    const written = calling && JSON.stringify(calling);
    if (written !== this.called) {
      this.call?.remove();
      clearInterval(this.ticking);
      this.called = written;
      this.call = calling && item(calling, calling.asks ? "" : "…");
      if (calling?.asks) this.call.append(...this._question(calling));
      if (calling && !calling.asks) this._tick(this.call.querySelector(".time"));
    }
    if (this.call && this.list.lastElementChild !== this.call) this.list.append(this.call);
  }

  _tick(time) {
    const begun = Date.now();
    const ticking = setInterval(() => {
      if (!time.isConnected) return clearInterval(ticking); // another conversation is shown
      time.textContent = T.steps.running(Math.floor((Date.now() - begun) / 1000));
    }, 1000);
    this.ticking = ticking;
  }

  /** What the tool's server says of it, and the buttons. */
  _question(calling) {
    const always = h("input", { type: "checkbox" });
    const say = (allowed) => () => this.onConfirm(calling, allowed, always.checked);
    const button = (text, kind, allowed) => h("button", { type: "button", class: kind, onclick: say(allowed) }, text);
    const buttons = [button(T.steps.allow, "primary", true), button(T.steps.refuse, "", false)];
    const text = calling.asks.description;
    const description = h("p", scrolling(text, T.steps.description(calling.name), "description"), withoutEndlessMarks(text));
    return [description, h("div", { class: "confirm" }, ...buttons, h("label", {}, always, T.steps.always))];
  }

  _summary(steps, calling) {
    if (calling) return [calling.asks ? T.steps.asking(calling.name) : T.steps.calling(calling.name)];
    if (steps.length === 1) return [marked(steps[0], inOneLine(steps[0]))];
    const failed = steps.filter((step) => step.failed).length;
    const names = [...new Set(steps.map(({ name }) => name))];
    const words = [T.steps.several(steps.length, names)];
    return failed ? [...words, " · ", h("span", { class: "failed" }, T.steps.someFailed(failed))] : words;
  }
}

const marked = ({ failed }, text) => h("span", { class: failed ? "failed" : null }, text);

/** @param {Step | Call} step */
function item(step, time) {
  const name = h("strong", {}, step.name);
  const head = h("div", { class: "head" }, name, step.failed && h("span", { class: "failed" }, T.steps.failed), h("span", { class: "time" }, time));
  const result = step.result !== undefined && box(step.result, T.steps.result(step.name), step.failed ? "failed" : "");
  return h("li", {}, head, box(inputOf(step), T.steps.input(step.name), "input"), result);
}

const box = (text, label, kind) => h("pre", scrolling(text, label, kind), withoutEndlessMarks(text));

/** What makes a text scroll where it is long, and then be reached by keyboard. */
function scrolling(text, label, kind) {
  const isLong = text.length > LONG || text.split("\n").length > LINES;
  return { class: kind, dir: "auto", ...(isLong && { tabindex: 0, role: "group", "aria-label": label }) };
}

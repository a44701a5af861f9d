// The settings: Gradio's own controls in the column #settings, read where they stand and kept in this browser. Until Gradio
// has made them, the values are those that were kept.

import { h } from "./dialog.js";
import { keep, kept } from "./kept.js";
import { languageControl } from "./language.js";
import { ofProfile } from "./profile.js";
import { T } from "./texts.js";
import { translate } from "./translated.js";

const KEPT = "llama2-chat.settings";
const CONTROLS = {
  systemPrompt: "#setting-system_prompt textarea",
  maxNewTokens: "#setting-max_new_tokens input[type=number]",
  temperature: "#setting-temperature input[type=number]",
  topP: "#setting-top_p input[type=number]",
  topK: "#setting-top_k input[type=number]",
  repetitionPenalty: "#setting-repetition_penalty input[type=number]",
  seed: "#setting-seed input, #setting-seed textarea",
  useTools: "#setting-use_tools input[type=checkbox]",
  toolsMemory: "#setting-tools_memory input[type=number]",
};
const TEXTS = ["systemPrompt", "seed"];

export class Settings {
  /** @param state what the server says of its defaults, and which controls visitors see */
  constructor(state, { onChange, onReset, onUnkept }) {
    Object.assign(this, { defaults: state.defaults, onReset, onChange, onUnkept });
    this.keptAs = ofProfile(KEPT, state.profile);
    this.controls = Object.fromEntries(Object.entries(CONTROLS).filter(([name]) => state.controls.includes(name)));
    this.waiting = this._kept(); // for its controls; null once they are there
    this.fitWindow(state.contextLength);
  }

  /** Whether Gradio has made all controls, which are the settings from then on; onPanel(the column in which they stand). */
  attach(onPanel) {
    if (!Object.values(this.controls).every((selector) => document.querySelector(selector))) return false;
    const panel = document.querySelector("#settings");
    translate(panel);
    const values = this.read();
    this.waiting = null;
    this.write(values);
    this.known = this._readControls(); // what of it is changed here is kept; the rest may be another tab's to say
    this._addButtons(panel);
    this._checkSeed();
    panel.addEventListener("input", () => (this._keep(), this._checkSeed(), this.onChange()));
    panel.addEventListener("blur", ({ target }) => this._refill(target), true); // before Gradio makes it the lowest
    // Gradio's own button that resets one slider changes it a moment after the click.
    panel.addEventListener("click", () => setTimeout(() => (this._keep(), this.onChange()), 100));
    onPanel(panel);
    return true;
  }

  /** The values as they are sent; what is no number goes as it was typed, for the server to refuse in words. */
  read() {
    return { ...this.defaults, ...this._readControls() };
  }

  /** How conversations start that have no start of their own. */
  readStart() {
    const { systemPrompt, examples, reminder } = this.read();
    return { systemPrompt, examples, reminder };
  }

  _readControls() {
    if (this.waiting) return { ...this.waiting };
    const read = ([name, selector]) => {
      const { type, value, checked } = document.querySelector(selector);
      if (type === "checkbox") return [name, checked];
      return [name, TEXTS.includes(name) ? value : value === "" ? this.defaults[name] : Number(value)];
    };
    return Object.fromEntries(Object.entries(this.controls).map(read));
  }

  /** For the first answer to a question. One that uses tools is the likeliest: digits are to be copied as they are. */
  readFirst() {
    const values = this.read();
    return values.useTools ? { ...values, temperature: 0 } : values;
  }

  /** No answer can be longer than the model's window, and half of it is a better start than all of it. */
  fitWindow(contextLength) {
    if (!contextLength || this.read().maxNewTokens < contextLength) return;
    const fitting = { maxNewTokens: Math.floor(contextLength / 2) };
    if ("maxNewTokens" in this.controls) this.write(fitting);
    else this.defaults = { ...this.defaults, ...fitting };
  }

  write(values) {
    if (this.waiting) return void Object.assign(this.waiting, values);
    for (const [name, selector] of Object.entries(this.controls)) {
      if (values[name] === undefined) continue;
      const control = document.querySelector(selector);
      if (control.type === "checkbox") {
        if (control.checked !== values[name]) control.click();
      } else if (control.value !== String(values[name])) {
        control.value = values[name];
        control.dispatchEvent(new Event("input", { bubbles: true }));
        control.dispatchEvent(new Event("change", { bubbles: true }));
      }
    }
  }

  /** The server's, which depend on its model; what stands at an old one moves along. */
  useDefaults(defaults) {
    const values = this.read();
    const moved = Object.entries(defaults).filter(([name]) => values[name] === this.defaults[name]);
    this.defaults = defaults;
    this.write(Object.fromEntries(moved));
  }

  /** A number that was cleared is its default, in the field as well. */
  _refill(control) {
    const entry = Object.entries(this.controls).find(([, selector]) => control.matches(selector));
    if (entry && control.value === "" && !TEXTS.includes(entry[0])) this.write({ [entry[0]]: this.defaults[entry[0]] });
  }

  _checkSeed() {
    const field = document.querySelector(CONTROLS.seed);
    if (!field) return; // it is not shown
    const isWrong = !/^\s*\d*\s*$/.test(field.value);
    field.setAttribute("aria-invalid", isWrong);
    this.wrongSeed.hidden = !isWrong;
  }

  _keep() {
    const values = this._readControls();
    const changed = Object.entries(values).filter(([name, value]) => value !== this.known[name]);
    const all = { ...this._kept(), ...Object.fromEntries(changed) };
    const chosen = Object.entries(all).filter(([name, value]) => value !== this.defaults[name]);
    if (keep(this.keptAs, JSON.stringify(Object.fromEntries(chosen)))) this.known = values;
    else this.onUnkept();
  }

  /** What of it is of the kind that its default is; nothing of what is not ours. */
  _kept() {
    try {
      const fits = ([name, value]) => name in this.controls && typeof value === typeof this.defaults[name];
      return Object.fromEntries(Object.entries(JSON.parse(kept(this.keptAs) || "{}")).filter(fits));
    } catch {
      return {};
    }
  }

  _addButtons(panel) {
    this.wrongSeed = h("p", { class: "wrong", role: "status", hidden: true }, T.settings.wrongSeed);
    document.querySelector("#setting-seed")?.after(this.wrongSeed);
    panel.append(h("button", { type: "button", class: "reset", onclick: () => (this.write(this.defaults), this.onReset()) }, T.settings.reset), languageControl(this.onUnkept));
  }
}

// Who answers in the open conversation: the model itself, or one of its adapters. A list at the head of the settings, which is
// not there where there are no adapters.

import { h } from "./dialog.js";
import { T } from "./texts.js";

export class Adapter {
  #chosen = ""; // the name of an adapter; "" for the model itself

  /** @param onChange of the visitor's choice */
  constructor({ onChange }) {
    this.list = h("select", { id: "adapter", onchange: () => onChange(this.list.value) });
    this.element = h("div", { class: "start adapter" }, h("label", { for: "adapter" }, T.adapter.label), this.list, h("p", {}, T.adapter.help));
  }

  /** The settings are there. */
  attach() {
    document.querySelector("#settings").prepend(this.element);
  }

  /** @param state what the server says: the model's name, and its adapters' */
  offer({ model, adapters }) {
    this.names = { model, adapters };
    this.#fill();
  }

  /** @param chosen in the conversation that is open now */
  show(chosen) {
    if (chosen === this.#chosen) return; // the list may be open just now
    this.#chosen = chosen;
    this.#fill();
  }

  /** An adapter that is no longer here stays chosen until the visitor chooses another: the server says so in words. */
  #fill() {
    const { model, adapters } = this.names;
    const gone = this.#chosen && !adapters.includes(this.#chosen);
    const option = (value, text) => h("option", { value, dir: "auto" }, text);
    const options = [option("", model), ...adapters.map((name) => option(name, name))];
    if (gone) options.push(option(this.#chosen, T.adapter.gone(this.#chosen)));
    this.list.replaceChildren(...options);
    this.list.value = this.#chosen;
    this.element.hidden = !adapters.length && !gone;
  }
}

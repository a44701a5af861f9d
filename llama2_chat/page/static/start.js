// How the open conversation starts, in the settings: a preset, or a system prompt, examples and a reminder of its own. A
// conversation without them starts as the settings say for all. Which presets there are is told in presets.js.

import { confirmDialog, h, openDialog, toast } from "./dialog.js";
import { setText, watchDirection } from "./direction.js";
import { chooseFile, download, today } from "./files.js";
import { isSame, MOST_EXAMPLES, nameOf, startOf, withoutBlanks } from "./presets.js";
import { T } from "./texts.js";

const OWN = "own: "; // before the name of one's own, in the list of presets
const CHANGED = "changed";

export class Start {
  #start = null; // of the open conversation; null for that of the settings
  #shown = ""; // what stands in the controls
  #listed = ""; // which presets, and which of them is chosen

  /** @param parts presets; controls that visitors see; forAll() how the settings say that conversations start; onChange(start) of the visitor's;
   *   onOpen() shows the settings */
  constructor({ presets, controls, forAll, onChange, onOpen, onUnkept }) {
    Object.assign(this, { presets, controls, forAll, onChange, onUnkept });
    this.door = h("button", { type: "button", class: "preset", hidden: !controls.length, onclick: onOpen }); // for an empty chat
    this.list = h("select", { id: "preset", onchange: () => this.#choose() });
    const button = (name, act) => h("button", { type: "button", class: "small", onclick: act }, T.presets[name]);
    this.saveButton = button("save", () => this.#save());
    this.deleteButton = button("delete", () => this.#delete());
    this.exportButton = button("export", () => download(this.presets.file(), `${T.presets.file} ${today()}.json`));
    const buttons = [this.saveButton, this.deleteButton, this.exportButton, button("import", () => chooseFile(".json,application/json", (file) => this.#import(file)))];
    this.head = h("div", { class: "start" }, h("label", { for: "preset" }, T.presets.label), this.list, h("div", { class: "prompts" }, ...buttons));
    this.prompt = area(T.start.systemPrompt, { rows: 4, id: "own-prompt", oninput: () => this.#edit({ systemPrompt: this.prompt.value }) });
    this.own = h("div", { class: "start own" }, h("label", { for: "own-prompt" }, T.start.systemPrompt), h("p", {}, T.start.own), this.prompt);
    this.rows = h("tbody");
    this.addButton = h("button", { type: "button", class: "small", onclick: () => this.#addRow() }, T.start.add);
    this.reminder = area(T.start.reminder, { rows: 2, id: "reminder", oninput: () => this.#edit({ reminder: this.reminder.value }) });
    this.summary = h("summary", {});
    this.more = h("details", { class: "start more" }, this.summary, h("div", { class: "start" }, ...this.#guidance()));
  }

  /** The settings are there. */
  attach() {
    const prompt = document.querySelector("#setting-system_prompt");
    prompt.before(this.head);
    prompt.after(...(this.controls.includes("examples") ? [this.more] : []));
    this.panel = document.querySelector("#settings");
    this.#fill();
  }

  /** @param start of the conversation that is open now */
  show(start) {
    this.#start = start;
    this.#fill();
  }

  #guidance() {
    const head = h("tr", {}, h("th", { scope: "col" }, T.start.question), h("th", { scope: "col" }, T.start.answer), h("th", {}));
    const table = h("table", { "aria-label": T.start.examples }, h("thead", {}, head), this.rows);
    return [
      h("p", {}, T.start.examplesHelp),
      table,
      this.addButton,
      h("label", { for: "reminder" }, T.start.reminder),
      h("p", {}, T.start.reminderHelp),
      this.reminder,
      h("p", {}, T.start.variables),
    ];
  }

  get #now() {
    return this.#start ?? this.forAll();
  }

  #fill() {
    this.door.textContent = T.presets.door(this.#name);
    if (!this.panel) return;
    this.panel.classList.toggle("has-own-start", Boolean(this.#start));
    if (!this.#start) this.own.remove();
    else if (!this.own.isConnected) document.querySelector("#setting-system_prompt").after(this.own);
    this.#fillList();
    const now = JSON.stringify(this.#now);
    if (now === this.#shown) return; // as it was typed
    this.#shown = now;
    const { systemPrompt, examples, reminder } = this.#now;
    setText(this.prompt, systemPrompt);
    setText(this.reminder, reminder);
    this.rows.replaceChildren(...examples.map((example) => this.#row(example)));
    this.more.open ||= examples.length > 0 || reminder !== "";
    this.#count();
  }

  #fillList() {
    const { given, own } = this.presets;
    const chosen = this.#chosen();
    const listed = JSON.stringify([own.map(({ name }) => name), chosen]);
    if (listed === this.#listed) return; // it may be open just now
    this.#listed = listed;
    const option = (value, text) => h("option", { value }, text);
    const groups = [option("", T.presets.forAll), ...given.map(({ name }, place) => option(String(place), name))];
    if (own.length) groups.push(h("optgroup", { label: T.presets.own }, ...own.map(({ name }) => option(OWN + name, name))));
    if (chosen === CHANGED) groups.push(option(CHANGED, T.presets.changed));
    this.list.replaceChildren(...groups);
    this.list.value = chosen;
    this.deleteButton.hidden = !chosen.startsWith(OWN);
    this.exportButton.hidden = !own.length;
  }

  /** The value of the preset that the conversation starts as. */
  #chosen() {
    if (!this.#start) return "";
    const start = withoutBlanks(this.#start);
    const own = this.presets.own.find((preset) => isSame(preset, start));
    const place = this.presets.given.findIndex((preset) => isSame(preset, start));
    return own ? OWN + own.name : place >= 0 ? String(place) : CHANGED;
  }

  get #name() {
    const chosen = this.#chosen();
    if (chosen.startsWith(OWN)) return chosen.slice(OWN.length);
    return this.presets.given[chosen]?.name ?? (chosen === CHANGED ? T.presets.changed : T.presets.forAll);
  }

  #choose() {
    const { value } = this.list;
    if (value === CHANGED) return;
    const own = value.startsWith(OWN) && this.presets.own.find(({ name }) => OWN + name === value);
    const preset = own || this.presets.given[value];
    this.#change(value && preset ? startOf(preset) : null);
  }

  #change(start) {
    this.#start = start;
    this.#fill();
    this.onChange(start);
  }

  /** What was typed stays as it stands. */
  #edit(change) {
    this.#start = { ...startOf(this.#now), ...change };
    this.#shown = JSON.stringify(this.#start);
    this.#fill();
    this.#count();
    this.onChange(this.#start);
  }

  #row({ question, answer }) {
    const cell = (text, label) => {
      const field = area(label, { rows: 2, oninput: () => this.#edit({ examples: this.#examples() }) });
      setText(field, text);
      return h("td", {}, field);
    };
    const remove = h("button", { type: "button", class: "quiet", "aria-label": T.start.remove }, "×");
    const row = h("tr", {}, cell(question, T.start.question), cell(answer, T.start.answer), h("td", {}, remove));
    remove.addEventListener("click", () => {
      (row.nextElementSibling ?? row.previousElementSibling)?.querySelector("textarea").focus();
      row.remove();
      if (!this.rows.children.length) this.addButton.focus();
      this.#edit({ examples: this.#examples() });
    });
    return row;
  }

  #addRow() {
    this.rows.append(this.#row({ question: "", answer: "" }));
    this.rows.lastElementChild.querySelector("textarea").focus();
    this.#count();
  }

  #examples() {
    const texts = (row) => [...row.querySelectorAll("textarea")].map(({ value }) => value);
    return [...this.rows.children].map(texts).map(([question, answer]) => ({ question, answer }));
  }

  #count() {
    const { length } = withoutBlanks({ examples: this.#examples() }).examples;
    this.summary.textContent = T.start.more(length, Boolean(this.reminder.value.trim()));
    this.addButton.disabled = this.rows.children.length >= MOST_EXAMPLES;
  }

  #save() {
    const { value } = this.list;
    const name = h("input", { type: "text", class: "preset-name", maxlength: 60, required: true, value: value.startsWith(OWN) ? value.slice(OWN.length) : "", "aria-label": T.presets.name, placeholder: T.presets.name });
    const form = h("form", {}, name, h("footer", {}, h("button", { type: "submit", class: "primary" }, T.presets.saveYes)));
    const dialog = openDialog(T.presets.saveTitle, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (nameOf(name.value)) this.#keepAs(nameOf(name.value));
      dialog.close();
    });
    name.focus();
  }

  #keepAs(name) {
    const start = startOf(this.#now);
    if (!this.presets.save(name, start)) return this.onUnkept();
    this.#change(start); // the conversation starts as it does now, under this name
    toast(T.presets.saved(name));
  }

  async #delete() {
    const name = this.list.value.slice(OWN.length);
    if (!(await confirmDialog(T.presets.deleteQuestion(name), T.presets.delete))) return;
    this.presets.remove(name);
    this.#fill();
    this.list.focus();
  }

  async #import(file) {
    try {
      const { added, unreadable } = await this.presets.add(file);
      toast(T.presets.imported(added, unreadable));
    } catch (error) {
      toast(error.message);
    }
    this.#fill();
  }
}

function area(label, attributes) {
  const field = h("textarea", { "aria-label": label, ...attributes });
  watchDirection(field);
  return field;
}

// Two answers to one question side by side: what the second is asked with, and what tells the two apart. Both are versions of one
// message like any others; that they stand beside each other is for as long as they are looked at.

import { h, openDialog } from "./dialog.js";
import { setText, watchDirection } from "./direction.js";
import { T } from "./texts.js";

const NUMBERS = ["temperature", "topP", "topK", "repetitionPenalty"];
const TOLD = [...NUMBERS, "maxNewTokens", "seed", "useTools", "reminder", "systemPrompt"]; // apart from who answers
const LONGEST = 40; // characters of a system prompt

/**
 * Ask what the other answer is to be made with.
 * @param state what the server says of who can answer, and which controls visitors see
 * @param settings of the first answer, which stand there at first
 * @param {number[]} versions numbers of those that can stand beside it as they are
 * @returns {Promise<{ settings: object } | { version: number } | null>} null if the visitor wants none
 */
export function chooseOther(state, settings, versions) {
  return new Promise((resolve) => {
    const fields = [...whoAnswers(state, settings), ...NUMBERS.map((name) => numberField(name, settings)), promptField(settings)];
    const shown = fields.filter(({ name }) => ["adapter", "server"].includes(name) || state.controls.includes(name));
    const chosen = () => ({ ...settings, ...Object.fromEntries(shown.map(({ name, read }) => [name, read()])) });
    const done = (choice) => (event) => (event.preventDefault(), resolve(choice()), dialog.close());
    const there = versions.map((version) => h("button", { type: "button", onclick: done(() => ({ version })) }, T.compare.version(version)));
    const form = h(
      "form",
      { class: "compare", onsubmit: done(() => ({ settings: chosen() })) },
      there.length ? h("p", { class: "versions" }, ...there) : null,
      ...shown.map(({ name, field }) => h("label", {}, T.compare.names[name], field)),
      h("footer", {}, h("button", { type: "button", onclick: () => dialog.close() }, T.dialog.no), h("button", { type: "submit", class: "primary" }, T.compare.ask)),
    );
    const dialog = openDialog(T.compare.title, form);
    dialog.addEventListener("close", () => resolve(null));
  });
}

/** What of an answer's settings is other than those of the one beside it, in a line. */
export function tellApart({ settings: mine = {}, end, seed }, { settings: theirs = {} }) {
  const who = [mine.adapter, mine.server].filter(Boolean);
  if (!who.length && (theirs.adapter || theirs.server)) who.push(theirs.server ? T.compare.anyServer : T.compare.noAdapter);
  const own = TOLD.filter((name) => name !== "seed" && (mine[name] ?? "") !== (theirs[name] ?? ""));
  const words = own.map((name) => `${T.compare.names[name]}: ${valueOf(name, mine[name])}`);
  const drawn = end?.seed ?? seed;
  if (!who.length && !words.length && drawn !== undefined) words.push(`${T.compare.names.seed}: ${drawn}`);
  return [...who, ...words].join(" · ");
}

function valueOf(name, value) {
  if (name === "useTools") return value ? T.compare.yes : T.compare.no;
  const text = String(value ?? "").replace(/\s+/g, " ").trim();
  const characters = [...text];
  return characters.length > LONGEST ? `${characters.slice(0, LONGEST).join("")}…` : text || T.compare.none;
}

/** Where there is anybody else. */
function whoAnswers({ adapters, servers }, settings) {
  const choice = (name, names, first) => {
    const field = h("select", {}, h("option", { value: "" }, first), ...names.map((each) => h("option", { value: each }, each)));
    field.value = names.includes(settings[name]) ? settings[name] : "";
    return { name, field, read: () => field.value };
  };
  return [
    ...(adapters.length ? [choice("adapter", adapters, T.compare.noAdapter)] : []),
    ...(servers.length > 1 ? [choice("server", servers, T.compare.anyServer)] : []),
  ];
}

/** What is no number goes as it was typed, for the server to refuse in words. */
function numberField(name, settings) {
  const field = h("input", { inputmode: "decimal", value: settings[name], autocomplete: "off" });
  const read = () => (field.value.trim() === "" ? settings[name] : Number.isNaN(Number(field.value)) ? field.value : Number(field.value));
  return { name, field, read };
}

function promptField({ systemPrompt = "" }) {
  const field = h("textarea", { rows: 3 });
  watchDirection(field);
  setText(field, systemPrompt);
  return { name: "systemPrompt", field, read: () => field.value };
}

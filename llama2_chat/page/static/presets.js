// How a conversation may start, under a name: the server's presets, and the visitor's own, which this browser keeps and which
// go into files and come from them. How the open conversation starts is told in start.js.

import { keep, kept } from "./kept.js";
import { ofProfile } from "./profile.js";
import { T } from "./texts.js";

const KEPT = "llama2-chat.presets";
const FORMAT = "llama2-chat-presets"; // as in ../../presets.py, which reads these files too
const VERSION = 1;
const LONGEST_NAME = 60; // characters
export const MOST_EXAMPLES = 20;

const isText = (value) => typeof value === "string";
const isExample = (value) => isText(value?.question) && isText(value.answer);

/** @returns {boolean} whether a conversation can start so: with a system prompt, examples and a reminder */
export function isStart(value) {
  if (!value || !isText(value.systemPrompt) || !isText(value.reminder)) return false;
  return Array.isArray(value.examples) && value.examples.length <= MOST_EXAMPLES && value.examples.every(isExample);
}

/** Nothing but the start, of what may hold more. */
export function startOf({ systemPrompt, examples, reminder }) {
  return { systemPrompt, examples: examples.map(({ question, answer }) => ({ question, answer })), reminder };
}

/** Without examples in which nothing stands, which the table may hold. */
export function withoutBlanks(start) {
  return { ...start, examples: start.examples.filter(({ question, answer }) => (question + answer).trim()) };
}

export const isSame = (one, other) => JSON.stringify(startOf(one)) === JSON.stringify(startOf(other));

export class Presets {
  #keptAs;

  /** @param state what the server says: its presets, and whose browser this is */
  constructor({ presets, profile }) {
    this.#keptAs = ofProfile(KEPT, profile);
    this.given = presets.map((preset) => ({ ...preset, name: preset.name ?? T.presets.names[preset.key] }));
  }

  get own() {
    try {
      return JSON.parse(kept(this.#keptAs) || "[]").map(checked).filter(Boolean);
    } catch {
      return []; // not ours
    }
  }

  /** In place of one's own of that name. @returns whether the browser keeps it */
  save(name, start) {
    const preset = { name, ...startOf(withoutBlanks(start)) };
    return this.#keep([...this.own.filter((other) => other.name !== name), preset]);
  }

  remove(name) {
    return this.#keep(this.own.filter((preset) => preset.name !== name));
  }

  /** @returns {Blob} one's own, as PRESETS takes them too */
  file() {
    const document = { format: FORMAT, version: VERSION, presets: this.own };
    return new Blob([JSON.stringify(document, null, 1), "\n"], { type: "application/json" });
  }

  /**
   * Adds the presets of a file that file() made; one of the same name is replaced.
   * @returns {Promise<{ added: number, unreadable: number }>}
   * @throws {Error} with a sentence to show
   */
  async add(file) {
    const entries = entriesIn(await file.text().catch(() => ""));
    const read = entries.map(checked).filter(Boolean);
    const names = read.map(({ name }) => name);
    const all = [...this.own.filter(({ name }) => !names.includes(name)), ...read];
    if (read.length && !this.#keep(all)) throw new Error(T.presets.full);
    return { added: read.length, unreadable: entries.length - read.length };
  }

  #keep(presets) {
    return keep(this.#keptAs, presets.length ? JSON.stringify(presets) : "");
  }
}

/** What the visitor types as a name, as it is kept. */
export const nameOf = (text) => [...text.replace(/[\p{Cc}\s]+/gu, " ").trim()].slice(0, LONGEST_NAME).join("");

function entriesIn(text) {
  let document;
  try {
    document = JSON.parse(text);
  } catch (error) {
    throw new Error(T.presets.notOurs, { cause: error });
  }
  if (document?.format !== FORMAT || !Array.isArray(document.presets)) throw new Error(T.presets.notOurs);
  if (document.version !== VERSION) throw new Error(T.presets.newer);
  return document.presets;
}

/** @returns {object | null} the preset and nothing else; null if it is none */
function checked(entry) {
  const preset = { systemPrompt: "", examples: [], reminder: "", ...entry };
  if (!isText(preset.name) || !nameOf(preset.name) || !isStart(preset)) return null;
  return { name: nameOf(preset.name), ...startOf(preset) };
}

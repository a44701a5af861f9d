// Full-text search over all conversations: texts folded once and kept in memory, read in idle time. Finds and cuts
// excerpts; the list of results is drawn in sidebar.js.

import { byAge } from "./tree.js";

const BEFORE = 40; // characters of an excerpt in front of the word that was found
const AFTER = 120;

// Accents and vowel points: Latin, Greek and Cyrillic; Hebrew; Arabic. In other scripts such marks are letters.
const MARKS = /[\u0300-\u036f\u0591-\u05c7\u064b-\u065f]/g;

/** Text in which case and accents make no difference: "Straße" and "STRASSE" are one word, and "é" is "e". */
export function fold(text) {
  return text.normalize("NFKD").replace(MARKS, "").toUpperCase().toLowerCase().replaceAll("ς", "σ");
}

const idle = () => new Promise((resolve) => (globalThis.requestIdleCallback ?? setTimeout)(resolve));

export class SearchIndex {
  #records;
  #texts = new Map(); // conversation id -> promise of [{ id, createdAt, text }]

  /** @param {import("./records.js").Records} records */
  constructor(records) {
    this.#records = records;
  }

  /** Reads what has not been read, a conversation at a time, whenever the browser has nothing to do. */
  async build(conversations) {
    for (const { id } of conversations) {
      await idle();
      await this.#textsOf(id);
    }
  }

  /** To be told of every message that was written: the next search reads its conversation again. */
  changed(conversationId) {
    this.#texts.delete(conversationId);
  }

  /**
   * Where all words occur: in titles, or in a message (some of them may be in its conversation's title). Titles come
   * first, then messages, the newest first.
   * @returns {Promise<{ conversation: object, message: object?, before: string, match: string, after: string }[]>}
   */
  async search(words, limit, conversations) {
    const wanted = fold(words).split(/\s+/).filter(Boolean);
    if (!wanted.length) return [];
    this.#dropAllBut(conversations);
    const titles = [];
    const messages = [];
    for (const conversation of conversations) {
      const title = fold(conversation.title);
      const missing = wanted.filter((word) => !title.includes(word)); // in the title
      if (!missing.length) titles.push({ conversation, message: null, ...excerpt(conversation.title, wanted) });
      for (const { id, createdAt, text } of await this.#textsOf(conversation.id)) {
        const isHit = missing.every((word) => text.includes(word)) && wanted.some((word) => text.includes(word));
        if (isHit) messages.push({ conversation, id, createdAt });
      }
    }
    const newest = messages.sort(byAge).reverse();
    const room = Math.max(0, limit - titles.length);
    const found = await Promise.all(newest.slice(0, room).map((hit) => this.#withExcerpt(hit, wanted)));
    return [...titles.slice(0, limit), ...found.filter(Boolean)];
  }

  async #withExcerpt({ conversation, id }, wanted) {
    const message = await this.#records.record("messages", id);
    return message && { conversation, message, ...excerpt(message.text, wanted) };
  }

  #textsOf(id) {
    if (!this.#texts.has(id)) {
      const reading = this.#read(id);
      this.#texts.set(id, reading);
      reading.catch(() => this.#texts.delete(id));
    }
    return this.#texts.get(id);
  }

  async #read(conversationId) {
    const messages = await this.#records.messages(conversationId);
    return messages.map(({ id, createdAt, text }) => ({ id, createdAt, text: fold(text) }));
  }

  #dropAllBut(conversations) {
    const ids = new Set(conversations.map(({ id }) => id));
    for (const id of this.#texts.keys()) if (!ids.has(id)) this.#texts.delete(id);
  }
}

/** The first place in a text where one of the words stands, with what stands around it, on one line. */
function excerpt(text, wanted) {
  const folded = fold(text);
  const places = wanted.map((word) => [folded.indexOf(word), word.length]).filter(([place]) => place >= 0);
  const [place, length] = places.sort(([a], [b]) => a - b)[0] ?? [0, 0]; // none, if the message was changed just now
  const [start, end] = unfoldedRange(text, place, length);
  return {
    before: (start > BEFORE ? "…" : "") + oneLine(text.slice(Math.max(0, start - BEFORE), start)),
    match: oneLine(text.slice(start, end)),
    after: oneLine(text.slice(end, end + AFTER)) + (end + AFTER < text.length ? "…" : ""),
  };
}

// Lone halves of characters at the cuts are dropped.
const oneLine = (text) => text.replace(/^[\udc00-\udfff]|[\ud800-\udbff]$/g, "").replace(/\s+/g, " ");

/** Where `length` characters from `place` of the folded text stand in the text itself: [start, end). */
function unfoldedRange(text, place, length) {
  const widths = new Map();
  const widthOf = (character) => {
    if (character < "\x80") return 1;
    if (!widths.has(character)) widths.set(character, fold(character).length);
    return widths.get(character);
  };
  let start = 0;
  let at = 0; // in the text
  let folded = 0; // in the folded text
  for (const character of text) {
    const width = widthOf(character);
    if (folded + width <= place) start = at + character.length;
    if (folded >= place + length && width) break;
    at += character.length;
    folded += width;
  }
  return [start, Math.max(start, at)];
}

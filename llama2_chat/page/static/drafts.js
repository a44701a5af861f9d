// What is typed and not sent yet, in boxes and in messages that are edited: kept once typing pauses, and at once when the page
// is left. A page that is left has no time for the database: what it could not write there waits in a short text.

import { keep, kept } from "./kept.js";
import { ofProfile } from "./profile.js";

const KEPT = "llama2-chat.unwritten";
const KEEP_AFTER_MS = 300; // without a key

export class Drafts {
  #unwritten = new Map(); // place -> { id of the conversation, where in it, text }
  #sending = new Map(); // id of the message that it is about to become -> { id of the conversation, where: "draft", text, as: that id }
  #timer = null;
  #listening = new AbortController();

  constructor(store, profile) {
    Object.assign(this, { store, keptAs: ofProfile(KEPT, profile) });
    if (store.private) return;
    const { signal } = this.#listening;
    document.addEventListener("visibilitychange", () => document.hidden && this.flush(), { signal });
    addEventListener("pagehide", () => this.#leave(), { signal });
    addEventListener("pageshow", ({ persisted }) => persisted && this.recover(), { signal });
  }

  /**
   * @param where "draft" of the conversation, or the id of the message that is edited
   * @param text null where nothing is any more
   */
  put(id, where, text) {
    this.#unwritten.set(`${id} ${where}`, { id, where, text });
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.flush(), KEEP_AFTER_MS);
  }

  /** What stood in the box of the conversation is about to be kept as the message with the id `as`, in place of the draft. */
  send(id, text, as) {
    this.#unwritten.delete(`${id} draft`);
    this.#sending.set(as, { id, where: "draft", text, as });
  }

  /** It is kept, or was not. */
  sent(as) {
    this.#sending.delete(as);
  }

  /** Write at once what was typed last. */
  flush() {
    for (const [place, typed] of this.#unwritten) this.#write(typed).then(() => this.#written(place, typed));
  }

  /**
   * Write what a page that was left could not.
   * @returns {Promise<{ homeless: string, sent: string[] }>} drafts whose conversation was not kept, and what is a message now
   */
  async recover() {
    const left = unwritten(this.keptAs);
    let homeless = "";
    const sent = [];
    for (const typed of left) {
      const { where, text, as } = typed;
      if (as && (await this.store.hasMessage(as))) sent.push(text);
      else if (!(await this.#write(typed)) && where === "draft") homeless = as ? joined(text, homeless) : text;
    }
    const later = unwritten(this.keptAs).slice(left.length); // another tab's, meanwhile
    keep(this.keptAs, later.length ? JSON.stringify(later) : "");
    return { homeless, sent };
  }

  close() {
    this.flush();
    this.#listening.abort();
  }

  #write({ id, where, text, as }) {
    return this.store.updateConversation(id, (kept) => setText(kept, where, as ? joined(text, kept.draft) : text));
  }

  #written(place, typed) {
    if (this.#unwritten.get(place) === typed) this.#unwritten.delete(place); // and not a newer one
  }

  #leave() {
    this.flush();
    // What was sent or given up at this moment had better come back than be lost.
    const texts = [...this.#unwritten.values(), ...this.#sending.values()].filter(({ text }) => text !== null);
    if (texts.length) keep(this.keptAs, JSON.stringify([...unwritten(this.keptAs), ...texts]));
  }
}

/** @param conversation gets the text, or loses it where it is null */
export function setText(conversation, where, text) {
  if (where === "draft") conversation.draft = text ?? "";
  else conversation.editing = withOrWithout(conversation.editing, where, text);
}

/** What was to be sent, and what has been typed since; each may have been kept with the other, or a part of it. */
function joined(sent, since = "") {
  if (sent.startsWith(since)) return sent;
  return since.startsWith(sent) ? since : `${sent}\n\n${since}`;
}

/** texts by the ids of their messages, with another text for one of them, or none. */
function withOrWithout(texts, id, text) {
  const { [id]: _, ...others } = texts ?? {};
  return text === null ? others : { ...others, [id]: text };
}

function unwritten(keptAs) {
  try {
    return JSON.parse(kept(keptAs) || "[]");
  } catch {
    return []; // not ours
  }
}

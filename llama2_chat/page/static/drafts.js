// What is typed and not sent yet, in boxes and in messages that are edited: kept once typing pauses, and at once when the page
// is left. A page that is left has no time for the database: what it could not write there waits in a short text.

import { keep, kept } from "./kept.js";
import { ofProfile } from "./profile.js";

const KEPT = "llama2-chat.unwritten";
const KEEP_AFTER_MS = 300; // without a key

export class Drafts {
  #unwritten = new Map(); // place -> { id of the conversation, where in it, text, as }
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
   * @param as id of the message that it is about to become: once that is kept, it is no draft any more
   */
  put(id, where, text, as) {
    this.#unwritten.set(`${id} ${where}`, { id, where, text, ...(as && { as }) });
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.flush(), KEEP_AFTER_MS);
  }

  /** Write at once what was typed last. */
  flush() {
    for (const [place, typed] of this.#unwritten) this.#write(typed).then(() => this.#written(place, typed));
  }

  /** Write what a page that was left could not. Returns a draft whose conversation was not kept. */
  async recover() {
    const left = unwritten(this.keptAs);
    let homeless = "";
    for (const typed of left) {
      if (typed.as && (await this.store.hasMessage(typed.as))) await this.#takeAway(typed);
      else if (!(await this.#write(typed)) && typed.where === "draft") homeless = typed.text;
    }
    const later = unwritten(this.keptAs).slice(left.length); // another tab's, meanwhile
    keep(this.keptAs, later.length ? JSON.stringify(later) : "");
    return homeless;
  }

  close() {
    this.flush();
    this.#listening.abort();
  }

  #write({ id, where, text }) {
    return this.store.updateConversation(id, (kept) => setText(kept, where, text));
  }

  /** It was sent; what was typed since, in another tab, stays. */
  #takeAway({ id, text }) {
    return this.store.updateConversation(id, (kept) => kept.draft === text && (kept.draft = ""));
  }

  #written(place, typed) {
    if (this.#unwritten.get(place) === typed) this.#unwritten.delete(place); // and not a newer one
  }

  #leave() {
    this.flush();
    // What was sent or given up at this moment had better come back than be lost.
    const texts = [...this.#unwritten.values()].filter(({ text }) => text !== null);
    if (texts.length) keep(this.keptAs, JSON.stringify([...unwritten(this.keptAs), ...texts]));
  }
}

/** @param conversation gets the text, or loses it where it is null */
export function setText(conversation, where, text) {
  if (where === "draft") conversation.draft = text ?? "";
  else conversation.editing = withOrWithout(conversation.editing, where, text);
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

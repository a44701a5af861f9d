// Answers under way: read as they grow, kept meanwhile, and found again after a reload. How one comes to be asked for is told
// in asking.js; the network is answers.js's.

import { confirm, follow, Refused } from "./answers.js";
import { inOneLine } from "./steps.js";
import { T } from "./texts.js";
import { pathTo } from "./tree.js";

const KEEP_EVERY_MS = 1000; // of an answer that is being written

/** A conversation as this tab holds it; none is kept before its first message. */
export const emptyTalk = () => ({ conversation: null, messages: new Map(), documents: [], start: null, adapter: "" });

export function talkOf(conversation, messages) {
  const { documents = [], start = null, adapter = "" } = conversation;
  return { conversation, messages: new Map(messages.map((each) => [each.id, each])), documents, start, adapter };
}

/** Whether they are one conversation, which may have been opened again meanwhile. */
export function isSame(talk, other) {
  return talk === other || Boolean(talk.conversation && talk.conversation.id === other.conversation?.id);
}

/** The messages that are shown: from the first to the leaf at which the conversation stands. */
export const pathOf = ({ conversation, messages }) => (conversation ? pathTo([...messages.values()], conversation.leafId) : []);

/** Whoever extends it has render(), and _finish(message, refusal) for what follows the end of one. */
export class Reading {
  constructor({ store, settings, start, adapter, transcript, composer, documents, hooks }) {
    Object.assign(this, { store, settings, start, adapter, transcript, composer, documents, hooks });
    this.talk = emptyTalk(); // which is open; what has begun in it goes on in it, whichever is open then
    this.running = new Map(); // message id -> AbortController of its reading
    this.doing = new Map(); // message id -> [what it waits for, what is called for it], which the server says only once
    this.offline = new Set(); // ids of those whose line is down
  }

  get id() {
    return this.talk.conversation?.id ?? null;
  }

  get path() {
    return pathOf(this.talk);
  }

  /** Follow an answer to its end, whichever conversation is open meanwhile. question: null if it was asked before. */
  async _read(message, question) {
    const abort = new AbortController();
    const before = question && message.text ? message.text : (message.base ?? "");
    if (before) message.base = before; // what it goes on with
    else if (question) ["steps", "sources"].forEach((name) => delete message[name]); // it is asked anew
    this.running.set(message.id, abort);
    this._put(message);
    const events = follow(message.answerId, question, abort.signal);
    this.render();
    let keptAt = 0;
    let waiting = "";
    let refusal = null;
    try {
      for await (const event of events) {
        const isNews = Boolean(message.unasked && !event.offline); // the server has it
        if (isNews) delete message.unasked;
        if (event.text !== undefined) message.text = before + event.text;
        if (event.more) message.text += event.more;
        if (event.steps) message.steps = event.steps;
        if (event.sources) message.sources = event.sources;
        if (event.step) this._addStep(message, event.step);
        if (event.calling?.asks) await this._permit(message, event.calling);
        if (event.end) this._end(message, event.end);
        if (event.lost) this._end(message, { reason: "interrupted" });
        event.offline ? this.offline.add(message.id) : this.offline.delete(message.id);
        waiting = event.waiting ?? waiting; // a step changes nothing of it
        this.doing.set(message.id, [event.offline ? T.connection.offline : waiting, event.calling]);
        this._show(message);
        if ((isNews || event.step || Date.now() - keptAt > KEEP_EVERY_MS) && message.answerId) {
          keptAt = Date.now();
          this._keepSoFar({ ...message });
        }
      }
    } catch (error) {
      if (error instanceof Refused) refusal = error;
      else console.error(error);
      this._end(message, { reason: "error", error: error.message, refused: !message.text });
    }
    if (this.running.get(message.id) === abort) this._noLonger(message);
    if (!abort.signal.aborted) await this._finish(message, refusal);
  }

  /** What the visitor allowed for the whole conversation is allowed at once; of the rest they are asked. */
  async _permit(message, calling) {
    const { allowed } = (await this.store.conversation(message.conversationId)) ?? {};
    if (Object.hasOwn(allowed ?? {}, calling.name) && allowed[calling.name] === calling.asks.version) {
      confirm(message.answerId, calling.asks.call, true).catch(() => {});
      delete calling.asks;
    } else if (message.conversationId === this.id) {
      this.hooks.onSaid(T.steps.asking(calling.name));
    }
  }

  _addStep(message, step) {
    message.steps = [...(message.steps ?? []), step];
    if (message.conversationId === this.id) this.hooks.onSaid(inOneLine(step));
  }

  _end(message, end) {
    const model = message.settings?.adapter || this.hooks.state().model;
    message.end = { ...end, model, ...(message.seed !== undefined && { seed: message.seed }) };
    for (const passing of ["answerId", "unasked", "base", "seed"]) delete message[passing];
  }

  /** Unless another tab has kept its end, or has asked for it anew: who reads more slowly takes nothing back. */
  _keepSoFar(message) {
    return this.store.putMessage(message, (kept) => kept?.answerId === message.answerId);
  }

  _put(message) {
    if (message.conversationId === this.id) this.talk.messages.set(message.id, message);
  }

  _show(message) {
    if (message.conversationId !== this.id) return;
    this.talk.messages.set(message.id, message);
    this.transcript.update(message, ...this.doing.get(message.id));
  }

  /** Nobody reads it. */
  _noLonger({ id }) {
    for (const known of [this.running, this.doing, this.offline]) known.delete(id);
  }

  /** Read on what was under way when the page was left, or is under way in another tab. */
  _resume(messages) {
    for (const message of messages) {
      const isElsewhere = message.answerId && !message.unasked; // on the server
      if (isElsewhere && !this.running.has(message.id)) this._read({ ...message }, null);
    }
  }

  _runningHere() {
    return this.path.find((message) => this.running.has(message.id));
  }

  /** While the line is down, the server hears of it later. */
  _stopHere(message) {
    this.running.get(message.id).abort();
    this._noLonger(message);
    const stopped = { ...message };
    this._end(stopped, { reason: "cancelled" });
    this._finish(stopped);
  }
}

// From a message to its answer, in the tree of messages that is kept: what chat.js builds on. What is on the screen is
// transcript.js's and composer.js's, what is kept is store.js's, the network is answers.js's.

import { confirm, follow, Refused, turnsOf } from "./answers.js";
import { toast } from "./dialog.js";
import { offerBox } from "./focus.js";
import { inOneLine } from "./steps.js";
import { newId } from "./store.js";
import { T } from "./texts.js";
import { leafBelow, pathTo, siblings, titleOf } from "./tree.js";

const KEEP_EVERY_MS = 1000; // of an answer that is being written

export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

/** A conversation as this tab holds it; none is kept before its first message. */
export const emptyTalk = () => ({ conversation: null, messages: new Map() });

export const talkOf = (conversation, messages) => ({ conversation, messages: new Map(messages.map((each) => [each.id, each])) });

/** The messages that are shown: from the first to the leaf at which the conversation stands. */
export const pathOf = ({ conversation, messages }) => (conversation ? pathTo([...messages.values()], conversation.leafId) : []);

/** Answers under way. Whoever extends it has render(), count(), keepDraft(text) and startNew(draft). */
export class Asking {
  constructor({ store, settings, transcript, composer, hooks }) {
    Object.assign(this, { store, settings, transcript, composer, hooks });
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

  /** Whether what is typed in it now waits for an answer. */
  _isBusy(talk) {
    return Boolean(talk.isAsking || (talk === this.talk && this._runningHere()));
  }

  /** Do what leads to an answer; from its first moment on, what is typed waits for it.
   *  Nothing is done if one is on its way: this is the second of two quick clicks. text: what returns to the box if it fails */
  async _begin(talk, lead, text = "") {
    if (this._isBusy(talk)) return;
    talk.isAsking = true; // until _run reads
    if (talk === this.talk) this.composer.setRunning(true);
    try {
      await lead();
    } catch (error) {
      if (talk.isAsking) this._giveBack(talk, text);
      this.render();
      toast(error.message);
      throw error;
    }
  }

  _giveBack(talk, text) {
    Object.assign(talk, { isAsking: false, queued: null });
    if (text && talk === this.talk && !this.composer.text) this.composer.text = text;
  }

  async _ask(talk, text, parentId) {
    const question = await this._addMessage(talk, { role: "user", text, parentId });
    await this._answer(talk, question);
  }

  async _keepQueue({ conversation, queued }) {
    const kept = queued ? { queuedAfter: queued.after, draft: queued.text } : { queuedAfter: null };
    if (conversation) await this.store.updateConversation(conversation.id, (old) => Object.assign(old, kept));
  }

  /** What was typed while this answer was written; of all tabs that see its end, one sends it. */
  async _sendQueued({ id, conversationId }) {
    let text = "";
    const conversation = await this.store.updateConversation(conversationId, (kept) => {
      if (kept.queuedAfter !== id) return;
      text = kept.draft;
      Object.assign(kept, { queuedAfter: null, draft: "" });
    });
    if (!text) return this._sentElsewhere(id);
    const isOpen = conversationId === this.id;
    const talk = isOpen ? this.talk : talkOf(conversation, await this.store.messages(conversationId));
    talk.queued = null;
    if (this._isBusy(talk)) return this.keepDraft(text); // another answer was asked for at this very moment
    if (isOpen && this.composer.text === text) this.composer.text = ""; // else another tab's text is sent
    await this._begin(talk, () => this._ask(talk, text, id), text);
  }

  /** What waited here for this answer, another tab has sent. */
  _sentElsewhere(id) {
    const { queued } = this.talk;
    if (queued?.after !== id) return;
    if (this.composer.text === queued.text) this.composer.text = "";
    this.talk.queued = null;
    this.render();
  }

  async _ensureConversation(talk, text) {
    if (talk.conversation) return;
    const now = Date.now();
    const kind = { renamed: false, pinned: false };
    talk.conversation = { id: newId(), title: titleOf(text), ...kind, createdAt: now, updatedAt: now, leafId: null };
    await this.store.putConversation(talk.conversation);
    if (talk === this.talk) this.hooks.onOpened(talk.conversation);
  }

  async _addMessage(talk, fields) {
    const message = { id: newId(), conversationId: talk.conversation.id, createdAt: Date.now(), ...fields };
    talk.messages.set(message.id, message);
    await this.store.putMessage(message);
    await this._setLeaf(talk, message.id);
    return message;
  }

  async _setLeaf({ conversation }, leafId) {
    const moved = { leafId, updatedAt: Date.now() };
    Object.assign(conversation, moved);
    await this.store.updateConversation(conversation.id, (kept) => Object.assign(kept, moved));
  }

  async _answer(talk, question, { seed, settings = this.settings.readFirst() } = {}) {
    const fields = { role: "assistant", text: "", parentId: question.id, answerId: newId(), settings };
    const message = await this._addMessage(talk, fields);
    await this._run(talk, message, { seed: seed ?? (settings.seed === "" ? newSeed() : settings.seed), settings });
  }

  /** Sends all before the answer, and of one that is to be continued what there is of it. */
  async _run(talk, message, { seed, settings }) {
    const turns = turnsOf(pathTo([...talk.messages.values()], message.id));
    talk.isAsking = false;
    if (talk.queued && !talk.queued.after) {
      talk.queued.after = message.id;
      this._keepQueue(talk);
    }
    await this._read({ ...message, seed: message.seed ?? seed }, { messages: turns, settings: { ...settings, seed: String(seed) } });
  }

  /** Follow an answer to its end, whichever conversation is open meanwhile. question: null if it was asked before. */
  async _read(message, question) {
    const abort = new AbortController();
    const before = question && message.text ? message.text : (message.base ?? "");
    if (before) message.base = before; // what it goes on with
    else if (question) delete message.steps; // it is asked anew
    this.running.set(message.id, abort);
    this._put(message);
    await this.store.putMessage(message);
    this.render();
    if (question && message.conversationId === this.id) this.transcript.scrollToEnd();
    if (question) this.hooks.onSaid(T.live.begun);
    let keptAt = 0;
    let waiting = "";
    let refusal = null;
    try {
      for await (const event of follow(message.answerId, question, abort.signal)) {
        if (event.text !== undefined) message.text = before + event.text;
        if (event.more) message.text += event.more;
        if (event.steps) message.steps = event.steps;
        if (event.step) this._addStep(message, event.step);
        if (event.calling?.asks) await this._permit(message, event.calling);
        if (event.end) this._end(message, event.end);
        if (event.lost) this._end(message, { reason: "interrupted" });
        event.offline ? this.offline.add(message.id) : this.offline.delete(message.id);
        waiting = event.waiting ?? waiting; // a step changes nothing of it
        this.doing.set(message.id, [event.offline ? T.connection.offline : waiting, event.calling]);
        this._show(message);
        if ((event.step || Date.now() - keptAt > KEEP_EVERY_MS) && message.answerId) {
          keptAt = Date.now();
          this.store.putMessage({ ...message });
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
    const model = this.hooks.state().model;
    message.end = { ...end, model, ...(message.seed !== undefined && { seed: message.seed }) };
    delete message.answerId;
    delete message.base;
    delete message.seed;
  }

  async _finish(message, refusal) {
    const { end } = message;
    const isTakenBack = end.refused && !message.text;
    if (isTakenBack || refusal?.status === 401) explain(refusal ?? { message: end.error });
    if (isTakenBack) return this._takeBack(message);
    if (end.reason === "unread" && !message.text && message.conversationId === this.id) return this._askAgain(message);
    await this.store.putMessage({ ...message });
    this._put(message);
    this.render();
    this.count();
    const said = { cancelled: T.live.stopped, error: T.live.failed }[end.reason] ?? T.live.ended;
    if (message.conversationId === this.id) this.hooks.onSaid(said);
    await this._sendQueued(message);
  }

  /** It lost its place in line while nobody read, and now somebody does. */
  _askAgain({ end, ...message }) {
    const { settings } = message;
    return this._run(this.talk, { ...message, answerId: newId() }, { seed: end.seed ?? newSeed(), settings });
  }

  /** A message that never reached the model returns to the box of its conversation. */
  async _takeBack(message) {
    const { conversationId, parentId } = message;
    const all = await this.store.messages(conversationId);
    const question = all.find(({ id }) => id === parentId);
    if (!question) return this._drop(message); // another tab has taken it back
    const wasAnswered = siblings(all, message).list.length > 1; // only another try was refused
    const gone = wasAnswered ? [message.id] : [message.id, question.id];
    const left = all.filter(({ id }) => !gone.includes(id));
    const leafId = wasAnswered ? leafBelow(left, question.id) : newestBeside(left, question);
    await this.store.updateConversation(conversationId, (conversation) => Object.assign(conversation, { leafId, queuedAfter: null }));
    await this.store.removeMessages(conversationId, gone);
    const isOpen = conversationId === this.id;
    const draft = [!wasAnswered && question.text, isOpen && this.composer.text].filter(Boolean).join("\n\n");
    if (!isOpen) {
      await this.store.updateConversation(conversationId, (kept) => (kept.draft = [draft, kept.draft].filter(Boolean).join("\n\n")));
      return;
    }
    this.talk.queued = null;
    if (!left.length) {
      await this.store.deleteConversation(conversationId);
      this.startNew(draft);
      return;
    }
    gone.forEach((id) => this.talk.messages.delete(id));
    this.talk.conversation.leafId = leafId;
    this.composer.text = draft;
    this.render();
    offerBox();
  }

  async _drop({ id, conversationId }) {
    await this.store.removeMessages(conversationId, [id]);
    const conversation = await this.store.conversation(conversationId);
    if (conversation && conversationId === this.id) await this._reread(conversation, id);
  }

  _put(message) {
    if (message.conversationId === this.id) this.talk.messages.set(message.id, message);
  }

  /** Nobody reads it. */
  _noLonger({ id }) {
    for (const known of [this.running, this.doing, this.offline]) known.delete(id);
  }

  _show(message) {
    if (message.conversationId !== this.id) return;
    this.talk.messages.set(message.id, message);
    this.transcript.update(message, ...this.doing.get(message.id));
  }

  /** Read on what was under way when the page was left. */
  _resume(messages) {
    for (const message of messages) {
      if (message.answerId && !this.running.has(message.id)) this._read({ ...message }, null);
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

/** Why the server did not do it; where the login has ended, with the way to a new one. Texts wait meanwhile. */
export function explain({ message, status }) {
  const logIn = status === 401 && { action: T.login.again, onAction: () => location.reload() };
  toast(message, { seconds: 12, ...logIn });
}

/** Where the conversation stood before this message was added: at another version of it, else at its parent. */
function newestBeside(messages, { parentId }) {
  const others = messages.filter((message) => message.parentId === parentId);
  return others.length ? leafBelow(messages, others.at(-1).id) : parentId;
}

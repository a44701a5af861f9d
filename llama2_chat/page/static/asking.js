// From a message to its answer, in the tree of messages that is kept: what chat.js builds on. How an answer is read is told
// in reading.js. What is on the screen is transcript.js's and composer.js's, what is kept is store.js's.

import { stop, turnsOf } from "./answers.js";
import { toast } from "./dialog.js";
import { today } from "./files.js";
import { offerBox } from "./focus.js";
import { withoutBlanks } from "./presets.js";
import { Reading, talkOf } from "./reading.js";
import { newId } from "./store.js";
import { T } from "./texts.js";
import { translated } from "./translated.js";
import { leafBelow, pathTo, siblings, titleOf } from "./tree.js";

/** What is asked with in this conversation. day: the visitor's, for what the prompt says of it */
export function settingsOf({ start, adapter }, settings, day = today()) {
  return { ...settings, ...(start && withoutBlanks(start)), ...(adapter && { adapter }), today: day };
}

export function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

/** Whoever extends it has drafts, render(), count(), keepDraft(text) and startNew(draft, documents). */
export class Asking extends Reading {
  /** Whether what is typed in it now waits for an answer. */
  _isBusy(talk) {
    return Boolean(talk.isAsking || (talk === this.talk && this._runningHere()));
  }

  /** As _isBusy, and says so to whoever clicked on what must not wait for another answer. */
  _saysBusy(talk) {
    const isBusy = this._isBusy(talk);
    if (isBusy && !talk.isAsking) toast(T.actions.busy); // else it is the second of two quick clicks
    return isBusy;
  }

  /** Whether what is sent in it now would come before an answer that is on its way, or before a file that it may be about. */
  _mustWait(talk) {
    return this._isBusy(talk) || this.documents.isBringing(talk);
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

  /** A conversation that was to begin with it has not begun; one that is open no more may have been deleted in another tab. */
  _giveBack(talk, text) {
    const { isNew } = talk;
    Object.assign(talk, { isAsking: false, isStopped: false, queued: null }, isNew && { isNew: false, conversation: null });
    if (isNew && talk === this.talk) this.hooks.onOpened(null);
    if (!text || this.composer.text || (talk !== this.talk && this.id)) return;
    this.composer.text = text;
    this.id ? this.drafts.put(this.id, "draft", text) : this.hooks.onDraft(text);
  }

  /** What a visitor says, to be kept with the answer that it waits for. */
  _questionOf(talk, text, parentId) {
    return { id: newId(), conversationId: talk.conversation.id, createdAt: Date.now(), role: "user", text, parentId };
  }

  /** Ask what stood in the box of the conversation: it is a draft until it is kept as a message. rest: what is left in the box */
  async _answerBox(talk, text, parentId, rest) {
    const { isNew } = talk;
    const question = this._questionOf(talk, text, parentId);
    const sent = () => this.drafts.sent(question.id);
    this.drafts.send(talk.conversation.id, text, question.id);
    await this._answer(talk, question, { draft: rest, onKept: () => (sent(), isNew && this._hasBegun()) }).finally(sent);
  }

  /** What an empty conversation had is that of a kept one now. */
  _hasBegun() {
    this.hooks.onDraft("");
    this.hooks.onDraftDocuments([]);
    this.hooks.onDraftStart(null);
    this.hooks.onDraftAdapter("");
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
      text = kept.draft; // and stays that until it is kept as a message
      kept.queuedAfter = null;
    });
    if (!text) return this._sentElsewhere(id, conversation);
    const isOpen = conversationId === this.id;
    const talk = isOpen ? this.talk : talkOf(conversation, await this.store.messages(conversationId));
    talk.queued = null;
    if (this.documents.isBringing(talk)) return this._waitFor(talk, text);
    if (this._isBusy(talk)) return this.render(); // another answer was asked for at this very moment
    if (isOpen && this.composer.text === text) this.composer.text = ""; // else another tab's text is sent
    const rest = isOpen ? this.composer.text : "";
    await this._begin(talk, () => this._answerBox(talk, text, id, rest), text);
  }

  /** It waited for an answer and now does for files. */
  _waitFor(talk, text) {
    talk.queued = { text };
    this.drafts.put(talk.conversation.id, "draft", text);
    this.render();
  }

  /** What waited for this answer, another tab has sent: what waited here, or there. In the latter case this stays in the box. */
  async _sentElsewhere(id, conversation) {
    const { talk } = this;
    if (talk.queued?.after !== id) return;
    const { text } = talk.queued;
    talk.queued = null;
    const messages = conversation ? await this.store.messages(conversation.id) : [];
    const isSent = conversation?.draft === text || messages.some((each) => each.parentId === id && each.text === text);
    if (talk === this.talk && this.composer.text === text) {
      if (isSent) this.composer.text = "";
      else this.keepDraft(text);
    }
    this.render();
  }

  /** It is kept with its first message. */
  _beginConversation(talk, text) {
    const now = Date.now();
    const { documents, start, adapter } = talk;
    const kind = { renamed: false, pinned: false, ...(documents.length && { documents }), ...(start && { start }), ...(adapter && { adapter }) };
    talk.conversation = { id: newId(), title: titleOf(text), ...kind, createdAt: now, updatedAt: now, leafId: null };
    talk.isNew = true;
    if (talk === this.talk) this.hooks.onOpened(talk.conversation); // a reload at this moment comes back to it
  }

  /**
   * Keeps messages that follow each other and stand at the end of the conversation from now on, all of them or none.
   * @param draft what stands in its box from now on; undefined leaves that as it is
   */
  async _addMessages(talk, messages, draft) {
    const { conversation, isNew } = talk;
    const moved = { leafId: messages.at(-1).id, updatedAt: Date.now(), ...(draft !== undefined && { draft }) };
    const change = (kept) => Object.assign(kept, moved);
    const kept = await this.store.putMessages(messages, conversation.id, change, isNew ? conversation : undefined);
    if (!kept) throw new Error(T.box.gone);
    talk.isNew = false;
    for (const message of messages) talk.messages.set(message.id, message);
    Object.assign(conversation, moved);
  }

  async _setLeaf({ conversation }, leafId) {
    const moved = { leafId, updatedAt: Date.now() };
    Object.assign(conversation, moved);
    await this.store.updateConversation(conversation.id, (kept) => Object.assign(kept, moved));
  }

  /**
   * @param draft as _addMessages takes it
   * @param onKept once the question is in the store, with the answer that it waits for
   */
  async _answer(talk, question, { seed, settings = settingsOf(talk, this.settings.readFirst()), documents = talk.documents, draft, onKept = () => {} } = {}) {
    const first = seed ?? (settings.seed === "" ? newSeed() : settings.seed);
    const about = this.documents.known(documents);
    const asked = { answerId: newId(), unasked: true, settings, seed: first, ...(about.length && { documents: about }) };
    const { id: parentId, conversationId, createdAt } = question;
    const age = { createdAt: Math.max(Date.now(), createdAt + 1) };
    const message = { id: newId(), conversationId, ...age, role: "assistant", text: "", parentId, ...asked };
    await this._addMessages(talk, talk.messages.has(parentId) ? [message] : [question, message], draft);
    onKept();
    await this._run(talk, message, { seed: first, settings, isKept: true });
  }

  /** @param isKept whether the message is in the store as it is asked for */
  async _run(talk, message, { seed, settings, isKept = false }) {
    const { isStopped } = talk; // before there was an answer to stop
    Object.assign(talk, { isAsking: false, isStopped: false });
    if (talk.queued && !talk.queued.after) {
      talk.queued.after = message.id;
      this._keepQueue(talk);
    }
    if (talk === this.talk) this.transcript.scrollToEnd();
    this.hooks.onSaid(T.live.begun);
    const unasked = { ...message, seed: message.seed ?? seed, unasked: true };
    const reading = this._read(unasked, this._question(talk, message, { seed, settings }));
    if (!isKept) await this.store.putMessage({ ...unasked });
    if (isStopped) await this._stop(unasked);
    await reading;
  }

  async _stop(message) {
    if (this.offline.has(message.id)) this._stopHere(message);
    const refused = await stop(message.answerId);
    if (refused) explain(refused);
  }

  /** All before the answer, and of one that is to be continued what there is of it. */
  _question({ messages }, { id, documents = [] }, { seed, settings }) {
    const turns = turnsOf(pathTo([...messages.values()], id));
    const about = this.documents.known(documents);
    return { messages: turns, settings: { ...settings, seed: String(seed) }, ...(about.length && { documents: about }) };
  }

  async _finish(message, refusal) {
    const { end } = message;
    const isTakenBack = end.refused && !message.text;
    if (isTakenBack || refusal?.status === 401) explain(refusal ?? { message: end.error });
    if (isTakenBack && message.documents) this.documents.refresh(); // one may have been deleted elsewhere
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

  /** Ask for what had not reached the server when the page was left, or what another tab has just begun to ask and may not come
   *  to. The server takes a question once, whichever tab brings it. */
  _askStill(messages) {
    for (const message of messages) {
      if (!message.unasked || this.running.has(message.id)) continue;
      const seed = message.base ? newSeed() : message.seed;
      this._read({ ...message }, this._question(this.talk, message, { seed, settings: message.settings }));
    }
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
    const isOpen = conversationId === this.id;
    const back = wasAnswered ? "" : question.text;
    const joined = (text = "") => (text.startsWith(back) ? text : [back, text].filter(Boolean).join("\n\n")); // another tab may have done it
    const draft = joined(isOpen ? this.composer.text : "");
    const takeBack = (kept) => Object.assign(kept, { leafId, queuedAfter: null, draft: isOpen ? draft : joined(kept.draft) });
    await this.store.updateConversation(conversationId, takeBack);
    await this.store.removeMessages(conversationId, gone);
    if (!isOpen) return;
    this.talk.queued = null;
    if (!left.length) {
      await this.store.deleteConversation(conversationId);
      this.startNew(draft, this.talk.documents, this.talk.start, this.talk.adapter);
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
}

/** Why the server did not do it; where the login has ended, with the way to a new one. Texts wait meanwhile. */
export function explain({ message, status }) {
  const logIn = status === 401 && { action: T.login.logIn, onAction: () => location.reload() };
  toast(translated(message), { seconds: 12, ...logIn });
}

/** Where the conversation stood before this message was added: at another version of it, else at its parent. */
function newestBeside(messages, { parentId }) {
  const others = messages.filter((message) => message.parentId === parentId);
  return others.length ? leafBelow(messages, others.at(-1).id) : parentId;
}

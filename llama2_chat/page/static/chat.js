// The open conversation and the answers under way: what a question, another try, an edit or a continuation does to the
// tree of messages. What is on the screen is transcript.js's and composer.js's, what is kept is store.js's, the network
// is answers.js's.

import { fit, follow, Refused, stop } from "./answers.js";
import { toast } from "./dialog.js";
import { newId } from "./store.js";
import { T } from "./texts.js";
import { leafBelow, leafToShow, pathTo, siblings, titleOf } from "./tree.js";

const KEEP_EVERY_MS = 1000; // of an answer that is being written
const COUNT_AFTER_MS = 400; // without a key

function newSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
}

export class Chat {
  /** @param hooks onOpened(conversation), onSaid(text) for screen readers, state() what the server says of its model */
  constructor({ store, settings, transcript, composer, hooks }) {
    Object.assign(this, { store, settings, transcript, composer, hooks });
    this.conversation = null; // null until its first message: an empty conversation is not kept
    this.messages = new Map();
    this.running = new Map(); // message id -> AbortController of its reading
    this.fitted = null;
    this.close = store.onChange((change) => this._changed(change));
  }

  get id() {
    return this.conversation?.id ?? null;
  }

  get path() {
    return this.conversation ? pathTo([...this.messages.values()], this.conversation.leafId) : [];
  }

  // Which conversation is open.

  async open(id, messageId) {
    const conversation = await this.store.conversation(id);
    if (!conversation || conversation.deletedAt) return this.startNew();
    const messages = await this.store.messages(id);
    this.conversation = conversation;
    this.messages = new Map(messages.map((message) => [message.id, message]));
    conversation.leafId = leafToShow(conversation, messages);
    if (messageId && this.messages.has(messageId) && !this.path.some((message) => message.id === messageId)) {
      await this._setLeaf(leafBelow(messages, messageId));
    }
    this._resume(messages);
    this.composer.text = conversation.draft ?? "";
    this.transcript.following = !messageId;
    this.render();
    if (messageId) this.transcript.scrollTo(messageId);
    else this.transcript.scrollToEnd();
    this.hooks.onOpened(conversation);
    this.count();
  }

  startNew(draft = "") {
    this.conversation = null;
    this.messages = new Map();
    this.composer.text = draft;
    this.render();
    this.hooks.onOpened(null);
    this.count();
    this.composer.focus();
  }

  // What a visitor does.

  async send(text) {
    this.composer.setRunning(true); // at once: what is typed now waits for this answer
    await this._ensureConversation(text);
    const leaf = this.path.at(-1);
    if (leaf && this.running.has(leaf.id)) return void (this.composer.text = text);
    const question = await this._addMessage({ role: "user", text, parentId: leaf?.id ?? null });
    await this.store.updateConversation(this.id, (conversation) => delete conversation.draft);
    await this._answer(question);
  }

  async retry(message) {
    await this._answer(this.messages.get(message.parentId), { seed: newSeed() });
  }

  async sameAgain(message) {
    const settings = { ...message.settings, seed: String(message.end.seed) };
    await this._answer(this.messages.get(message.parentId), { seed: message.end.seed, settings });
  }

  /** A visitor's message is asked anew, beside the old one; an answer is only changed. */
  async edit(message, text) {
    const { role, parentId } = message;
    const edited = await this._addMessage({ role, text, parentId, ...(role === "assistant" && { edited: true }) });
    if (role === "user") await this._answer(edited);
    else this.render();
  }

  async continue(message) {
    const { end: _, ...open } = message;
    await this._run({ ...open, answerId: newId() }, { seed: newSeed(), settings: this.settings.read() });
  }

  async branch(message, step) {
    const { list, index } = siblings([...this.messages.values()], message);
    const other = list[index + step];
    if (other) await this._setLeaf(leafBelow([...this.messages.values()], other.id));
    this.render();
    this.count();
  }

  stop() {
    const message = this._runningHere();
    if (message?.answerId) stop(message.answerId);
  }

  editLast() {
    const last = this.path.findLast((message) => message.role === "user");
    if (last && !this._runningHere()) this.transcript.edit(last);
  }

  keepDraft(text) {
    clearTimeout(this.draftTimer);
    const { id } = this;
    const keep = () => this.store.updateConversation(id, (conversation) => (conversation.draft = text));
    if (id) this.draftTimer = setTimeout(keep, 300);
    this.count();
  }

  /** Count the conversation, with what stands in the box, once typing pauses. */
  count() {
    clearTimeout(this.countTimer);
    this.countTimer = setTimeout(() => this._count(), COUNT_AFTER_MS);
  }

  render() {
    const all = [...this.messages.values()];
    const path = this.path.map((message) => {
      const { list, index } = siblings(all, message);
      return { message, index, count: list.length };
    });
    this.transcript.show(path, { running: this.running, forgotten: this._forgotten(path) });
    this.composer.setRunning(Boolean(this._runningHere()));
  }

  // Asking.

  async _ensureConversation(text) {
    if (this.conversation) return;
    const now = Date.now();
    this.conversation = {
      id: newId(),
      title: titleOf(text),
      renamed: false,
      pinned: false,
      createdAt: now,
      updatedAt: now,
      leafId: null,
    };
    await this.store.putConversation(this.conversation);
    this.hooks.onOpened(this.conversation);
  }

  async _addMessage(fields) {
    const message = { id: newId(), conversationId: this.id, createdAt: Date.now(), ...fields };
    this.messages.set(message.id, message);
    await this.store.putMessage(message);
    await this._setLeaf(message.id);
    return message;
  }

  async _setLeaf(id) {
    const updatedAt = Date.now();
    Object.assign(this.conversation, { leafId: id, updatedAt });
    await this.store.updateConversation(this.id, (conversation) => Object.assign(conversation, { leafId: id, updatedAt }));
  }

  async _answer(question, { seed, settings = this.settings.read() } = {}) {
    const answerId = newId();
    const message = await this._addMessage({ role: "assistant", text: "", parentId: question.id, answerId, settings });
    this.transcript.scrollToEnd();
    await this._run(message, { seed: seed ?? (settings.seed === "" ? newSeed() : settings.seed), settings });
  }

  async _run(message, { seed, settings }) {
    const question = { messages: this._turns(message), settings: { ...settings, seed: String(seed) } };
    await this._read({ ...message, seed }, question);
  }

  /** What the model is sent: all before the answer, and of one that is to be continued what there is of it. */
  _turns(message) {
    const path = pathTo([...this.messages.values()], message.id);
    return path.filter(({ text }) => text).map(({ role, text }) => ({ role, content: text }));
  }

  /** Follow an answer to its end, whichever conversation is open meanwhile. question: null if it was asked before. */
  async _read(message, question) {
    const abort = new AbortController();
    const before = question && message.text ? message.text : (message.base ?? "");
    if (before) message.base = before; // what it goes on with
    this.running.set(message.id, abort);
    this._put(message);
    await this.store.putMessage(message);
    this.render();
    if (question) this.hooks.onSaid(T.live.begun);
    let keptAt = 0;
    try {
      for await (const event of follow(message.answerId, question, abort.signal)) {
        if (event.text !== undefined) message.text = before + event.text;
        if (event.more) message.text += event.more;
        if (event.end) this._end(message, event.end);
        if (event.lost) this._end(message, { reason: "interrupted" });
        this._show(message, event.offline ? T.connection.offline : event.waiting);
        if (Date.now() - keptAt > KEEP_EVERY_MS && message.answerId) {
          keptAt = Date.now();
          this.store.putMessage({ ...message });
        }
      }
    } catch (error) {
      if (!(error instanceof Refused)) console.error(error);
      this._end(message, { reason: "error", error: error.message, refused: !message.text });
    }
    this.running.delete(message.id);
    if (!abort.signal.aborted) await this._finish(message);
  }

  _end(message, end) {
    const model = this.hooks.state().model;
    message.end = { ...end, model, ...(message.seed !== undefined && { seed: message.seed }) };
    delete message.answerId;
    delete message.base;
    delete message.seed;
  }

  async _finish(message) {
    const { end } = message;
    if (end.refused && !message.text) return this._takeBack(message);
    await this.store.putMessage({ ...message });
    this._put(message);
    this.render();
    this.count();
    const said = { cancelled: T.live.stopped, error: T.live.failed }[end.reason] ?? T.live.ended;
    if (message.conversationId === this.id) this.hooks.onSaid(said);
  }

  /** A message that never reached the model returns to the box, with the reason. */
  async _takeBack(message) {
    const { conversationId, parentId, end } = message;
    const all = await this.store.messages(conversationId);
    const question = all.find(({ id }) => id === parentId);
    const wasAnswered = siblings(all, message).list.length > 1; // only another try was refused
    const gone = wasAnswered ? [message.id] : [message.id, question.id];
    const left = all.filter(({ id }) => !gone.includes(id));
    const leafId = wasAnswered ? leafBelow(left, question.id) : newestBeside(left, question);
    await this.store.updateConversation(conversationId, (conversation) => (conversation.leafId = leafId));
    await this.store.removeMessages(conversationId, gone);
    if (!left.length) await this.store.deleteConversation(conversationId);
    toast(end.error, { seconds: 12 });
    if (conversationId !== this.id) return;
    this.composer.unqueue();
    const draft = [!wasAnswered && question.text, this.composer.text].filter(Boolean).join("\n\n");
    if (!left.length) return this.startNew(draft);
    gone.forEach((id) => this.messages.delete(id));
    this.conversation.leafId = leafId;
    this.composer.text = draft;
    this.render();
    this.composer.focus();
  }

  _put(message) {
    if (message.conversationId === this.id) this.messages.set(message.id, message);
  }

  _show(message, waiting) {
    if (message.conversationId !== this.id) return;
    this.messages.set(message.id, message);
    this.transcript.update(message, waiting);
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

  // The window.

  async _count() {
    if (!this.hooks.state().countsTokens) return;
    const turns = this.path.filter(({ text }) => text).map(({ role, text }) => ({ role, content: text }));
    const draft = this.composer.text;
    if (draft.trim() || turns.at(-1)?.role !== "user") turns.push({ role: "user", content: draft.trim() || "…" });
    this.counting?.abort();
    this.counting = new AbortController();
    try {
      this.fitted = await fit({ messages: turns, settings: this.settings.read() }, this.counting.signal);
    } catch {
      return; // a newer count is on its way, or the line is down
    }
    this.composer.showGauge(this.fitted);
    this.render();
  }

  _forgotten(path) {
    const dropped = this.fitted?.droppedMessages ?? 0;
    return dropped < path.length ? dropped : 0;
  }

  // Other tabs.

  async _changed({ conversationId, here }) {
    if (here || conversationId !== this.id) return;
    const conversation = await this.store.conversation(this.id);
    if (!conversation || conversation.deletedAt) return this.startNew(this.composer.text);
    for (const message of await this.store.messages(this.id)) {
      if (!this.running.has(message.id)) this.messages.set(message.id, message);
    }
    // Where this tab reads stays its own, until it has nothing of its own to show.
    if (!this.messages.has(this.conversation.leafId)) this.conversation.leafId = conversation.leafId;
    this.conversation.title = conversation.title;
    this._resume([...this.messages.values()]);
    this.render();
  }
}

/** Where the conversation stood before this message was added: at another version of it, else at its parent. */
function newestBeside(messages, { parentId }) {
  const others = messages.filter((message) => message.parentId === parentId);
  return others.length ? leafBelow(messages, others.at(-1).id) : parentId;
}

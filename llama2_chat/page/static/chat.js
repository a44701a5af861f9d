// The open conversation: which it is, and what a visitor does in it. How an answer comes about is told in asking.js.

import { confirm, stop } from "./answers.js";
import { Asking, explain, newSeed, settingsOf } from "./asking.js";
import { chooseOther, tellApart } from "./compare.js";
import { ContextWindow } from "./context_window.js";
import { toast } from "./dialog.js";
import { Drafts, setText } from "./drafts.js";
import { offerBox } from "./focus.js";
import { emptyTalk, isSame, pathOf, talkOf } from "./reading.js";
import { newId } from "./store.js";
import { T } from "./texts.js";
import { leafBelow, leafToShow, siblings } from "./tree.js";

export class Chat extends Asking {
  /** @param hooks onOpened(conversation), onSaid(text) for screen readers, onDraft(text) and newDraft() of a
   *   conversation that has not begun, onDraftDocuments(ids) and newDocuments() of what it is about, onDraftStart(start) and
   *   newStart() of how it starts, onDraftAdapter(name) and newAdapter() of who answers in it, onTitle(conversation) when it
   *   has another, state() what the server says of its model */
  constructor(parts) {
    super(parts);
    const { store, settings, composer, hooks } = parts;
    this.window = new ContextWindow({ settings, composer, state: hooks.state, onCounted: () => this.render() });
    this.deaf = store.onChange((change) => this._changed(change));
    this.drafts = new Drafts(store, hooks.state().profile);
    this.beside = null; // id of an answer that stands beside another version of it
    this.opening = null; // which conversation is being opened, if the visitor has not gone elsewhere since
  }

  /** No longer what the page shows. A private chat ends with it, and so does what is written for it. */
  close() {
    this.closed = true;
    this.deaf();
    this.window.stop();
    this.drafts.close();
    if (this.store.private) this._stopAll();
    this.talk = emptyTalk(); // what goes on is only kept
  }

  _stopAll() {
    this.running.forEach((abort) => abort.abort());
    for (const { answerId } of this.talk.messages.values()) if (answerId) stop(answerId);
  }

  // Which conversation is open.

  async open(id, messageId) {
    this.drafts.flush();
    const opening = (this.opening = Symbol(id));
    const conversation = await this.store.conversation(id);
    if (!conversation && opening === this.opening) return void this.startNew();
    const messages = conversation && (await this.store.messages(id));
    if (opening !== this.opening) return; // a long one took its time, and the visitor went elsewhere
    const talk = talkOf(conversation, messages);
    conversation.leafId = leafToShow(conversation, messages);
    if (messageId && talk.messages.has(messageId) && !pathOf(talk).some((message) => message.id === messageId)) {
      await this._setLeaf(talk, leafBelow(messages, messageId));
    }
    if (this.closed || opening !== this.opening) return;
    this.talk = talk;
    this.beside = null;
    this._resume(messages);
    this._askStill(messages);
    const { queuedAfter, draft = "" } = conversation;
    if (this.running.has(queuedAfter)) talk.queued = { after: queuedAfter, text: draft }; // else it ended where nobody saw it
    this.composer.text = draft;
    this.transcript.following = !messageId;
    this.render();
    if (messageId) this.transcript.scrollTo(messageId);
    else this.transcript.scrollToEnd();
    this.hooks.onOpened(conversation);
    this.count();
  }

  startNew(draft = this.hooks.newDraft(), documents = this.hooks.newDocuments(), start = this.hooks.newStart(), adapter = this.hooks.newAdapter()) {
    this.drafts.flush();
    this.opening = null;
    this.talk = { ...emptyTalk(), documents, start, adapter };
    this.beside = null;
    if (draft) this.hooks.onDraft(draft);
    this.hooks.onDraftDocuments(documents);
    this.hooks.onDraftStart(start);
    this.hooks.onDraftAdapter(adapter);
    this.composer.text = draft;
    this.render();
    this.hooks.onOpened(null);
    this.count();
    offerBox();
  }

  // What a visitor does.

  async send(text) {
    const { talk } = this;
    const rest = this.composer.text; // where an example was sent
    if (this._mustWait(talk)) {
      this.composer.text = [text, rest].filter(Boolean).join("\n\n");
      return this.queue(true);
    }
    this.beside = null;
    const lead = () => {
      if (!talk.conversation) this._beginConversation(talk, text);
      return this._answerBox(talk, text, talk.conversation.leafId, rest);
    };
    await this._begin(talk, lead, text);
  }

  /** Which documents its questions are about from now on. change: makes ids of those that they are about now */
  async chooseDocuments(change, talk = this.talk) {
    talk.documents = change(talk.documents);
    if (talk === this.talk && !talk.conversation) this.hooks.onDraftDocuments(talk.documents);
    this.render();
    this.count();
    const { id } = talk.conversation ?? {};
    if (id) await this.store.updateConversation(id, (kept) => (kept.documents = change(kept.documents ?? [])));
  }

  /** How the open conversation starts from now on; null as the settings say for all. */
  async chooseStart(start) {
    this.talk.start = start;
    this.count();
    if (!this.id) return this.hooks.onDraftStart(start);
    await this.store.updateConversation(this.id, (kept) => (start ? (kept.start = start) : delete kept.start));
  }

  /** Who answers in the open conversation from now on: an adapter by its name, or "" for the model itself. */
  async chooseAdapter(adapter) {
    this.talk.adapter = adapter;
    this.count();
    if (!this.id) return this.hooks.onDraftAdapter(adapter);
    await this.store.updateConversation(this.id, (kept) => (adapter ? (kept.adapter = adapter) : delete kept.adapter));
  }

  /** What stands in the box is sent when the answer under way here has ended, whichever conversation is open then; or when
   *  the files are on the server that were brought into this one. */
  async queue(waits) {
    const { talk } = this;
    if (waits && !this._mustWait(talk)) return this._sendBox(); // it has ended a moment ago
    talk.queued = waits ? { after: this._runningHere()?.id, text: this.composer.text } : null;
    if (this.id) this.drafts.put(this.id, "draft", this.composer.text);
    this.drafts.flush(); // before the answer ends and it is sent
    this.render();
    if (!waits || talk.queued.after) await this._keepQueue(talk);
  }

  /** Its files are on the server, or isWhole is false: then the question stays in the box, for it may be about what is missing. */
  async brought(talk, isWhole) {
    const { queued } = this.talk;
    if (!isSame(talk, this.talk) || !queued || queued.after || this._mustWait(this.talk)) return;
    this.talk.queued = null;
    this.render();
    if (isWhole) await this._sendBox();
  }

  _sendBox() {
    const { text } = this.composer;
    this.composer.text = "";
    return this.send(text);
  }

  async retry(message) {
    await this._answerAgain(message, { seed: newSeed(), settings: settingsOf(this.talk, this.settings.read()) });
  }

  async sameAgain(message) {
    const settings = { ...this.settings.defaults, examples: [], reminder: "", ...message.settings, seed: String(message.end.seed) };
    await this._answerAgain(message, { seed: message.end.seed, settings, documents: message.documents ?? [] });
  }

  /** Another answer to the same question, or another version, is shown beside this one. */
  async compare(message) {
    const { talk } = this;
    const { list } = siblings([...talk.messages.values()], message);
    if (list.length === 1 && this._saysBusy(talk)) return;
    const asked = { ...settingsOf(talk, this.settings.read()), adapter: "", ...message.settings };
    const others = list.flatMap(({ id }, at) => (id === message.id ? [] : [at + 1]));
    const choice = await chooseOther(this.hooks.state(), asked, others);
    if (!choice || talk !== this.talk || (choice.settings && this._saysBusy(talk))) return;
    this.beside = message.id;
    if (choice.version) {
      await this._setLeaf(talk, leafBelow([...talk.messages.values()], list[choice.version - 1].id));
      return this.render();
    }
    await this._answerAgain(message, { seed: newSeed(), settings: choice.settings, ...(message.documents && { documents: message.documents }) });
  }

  /** Of two answers that stand side by side, the conversation goes on with this one. */
  async keep(message) {
    this.beside = null;
    await this._setLeaf(this.talk, leafBelow([...this.talk.messages.values()], message.id));
    this.render();
    this.count();
  }

  /** The other answer was refused: the conversation stands where it was compared. */
  async _takeBack(message) {
    const first = message.conversationId === this.id ? this.talk.messages.get(this.beside) : null;
    await super._takeBack(message);
    if (first && first.conversationId === this.id) await this.keep(first);
  }

  async _answerAgain({ parentId }, options) {
    const { talk } = this;
    if (this._saysBusy(talk)) return;
    await this._begin(talk, () => this._answer(talk, talk.messages.get(parentId), options));
  }

  /** A visitor's message is asked anew, beside the old one; an answer is only changed. False if that has to wait. */
  edit({ role, parentId, steps, sources }, text) {
    const { talk } = this;
    if (role === "assistant") {
      const edited = { id: newId(), conversationId: this.id, createdAt: Date.now(), role, text, parentId, edited: true };
      const added = this._addMessages(talk, [{ ...edited, ...(steps && { steps }), ...(sources && { sources }) }]);
      added.then(() => this.render(), ({ message }) => toast(message));
    } else if (this._isBusy(talk)) {
      toast(T.actions.busy);
      return false;
    } else {
      this._begin(talk, () => this._answer(talk, this._questionOf(talk, text, parentId)), text);
    }
    return true;
  }

  /** Its seed stays that of its beginning, with which the same question has the same answer again, and so does who gives it.
   *  What began with tools goes on with what they said, and what began without them knows nothing of them. */
  async continue(message) {
    const { talk } = this;
    const { end, ...open } = message;
    const begun = { ...open, answerId: newId(), seed: end.seed };
    const now = settingsOf(talk, this.settings.read(), message.settings?.today);
    const { useTools = false, adapter = "", server = "" } = message.settings ?? {};
    const settings = { ...now, useTools, adapter, server };
    await this._begin(talk, () => this._run(talk, begun, { seed: newSeed(), settings }));
  }

  async branch(message, step) {
    const all = [...this.talk.messages.values()];
    const { list, index } = siblings(all, message);
    const other = list[index + step];
    if (other) await this._setLeaf(this.talk, leafBelow(all, other.id));
    this.render();
    this.count();
  }

  /** always: for the tool as it is described now, in this conversation. */
  async confirm(message, { name, asks }, allowed, always) {
    const { conversation } = this.talk;
    const allow = (kept) => (kept.allowed = { ...kept.allowed, [name]: asks.version });
    if (allowed && always) {
      allow(conversation);
      await this.store.updateConversation(conversation.id, allow);
    }
    await confirm(message.answerId, asks.call, allowed).catch(explain);
  }

  async stop() {
    const message = this._runningHere();
    if (message?.answerId) await this._stop(message);
    else if (this.talk.isAsking) this.talk.isStopped = true;
  }

  editLast() {
    const last = this.path.findLast((message) => message.role === "user");
    if (last && !this._runningHere()) this.transcript.edit(last);
  }

  keepDraft(text) {
    if (this.id) this.drafts.put(this.id, "draft", text);
    this.count();
  }

  /** What a message reads while it is edited; null once it is not. */
  keepEditing({ id }, text) {
    setText(this.talk.conversation, id, text);
    this.drafts.put(this.id, id, text);
    if (text === null) this.drafts.flush(); // it is sent, or given up
  }

  /** Count the conversation, with what stands in the box, once typing pauses. */
  count() {
    if (this.closed) return;
    const settings = () => settingsOf(this.talk, this.settings.read());
    this.window.count(() => [this.path, this.composer.text, this.documents.known(this.talk.documents), settings()]);
  }

  render() {
    if (this.closed) return; // another chat has the page
    const all = [...this.talk.messages.values()];
    const path = this.path.flatMap((message) => {
      const { list, index } = siblings(all, message);
      const shown = { message, index, count: list.length, editing: this.talk.conversation.editing?.[message.id] };
      const first = this.beside !== message.id && list.find(({ id }) => id === this.beside);
      if (!first) return [shown];
      return [{ message: first, beside: tellApart(first, message) }, { ...shown, beside: tellApart(message, first) }];
    });
    this.transcript.show(path, { running: this.running, forgotten: this.window.forgotten(this.path.length) });
    this.documents.show(this.talk.documents);
    this.start.show(this.talk.start);
    this.adapter.show(this.talk.adapter);
    const running = this._runningHere();
    if (this.doing.has(running?.id)) this._show(running); // it may be new on the page
    const isRunning = this._isBusy(this.talk);
    const waits = this._mustWait(this.talk) && this.talk.queued && this.talk.queued.after === running?.id;
    this.composer.setRunning(isRunning, waits ? (isRunning ? T.box.queued : T.box.queuedForFile) : "");
  }

  // Other tabs.

  async _changed({ kind, id, conversationId, here }) {
    if (conversationId !== this.id || (here && kind !== "conversation")) return;
    const conversation = await this.store.conversation(this.id);
    if (conversationId !== this.id) return;
    if (conversation && conversation.title !== this.talk.conversation.title) {
      this.talk.conversation.title = conversation.title;
      this.hooks.onTitle(conversation);
    }
    if (conversation?.documents) this._chosenElsewhere(conversation.documents);
    if (conversation && !here) this._changedElsewhere({ start: conversation.start ?? null, adapter: conversation.adapter ?? "" });
    if (here) return;
    if (!conversation) return void this.startNew(this.composer.text);
    await this._reread(conversation, kind === "message" ? id : null);
  }

  /** In another tab, or when a file arrived that was sent before another conversation was opened. */
  _chosenElsewhere(documents) {
    if (String(documents) === String(this.talk.documents)) return;
    this.talk.documents = documents;
    this.render();
    this.count();
  }

  /** How the conversation starts, or who answers in it. */
  _changedElsewhere({ start, adapter }) {
    if (adapter === this.talk.adapter && JSON.stringify(start) === JSON.stringify(this.talk.start)) return;
    Object.assign(this.talk, { start, adapter });
    this.render();
    this.count();
  }

  /** Show what is kept of the open conversation. changedId: of a message that may be gone from it */
  async _reread(conversation, changedId) {
    const messages = await this.store.messages(conversation.id);
    if (conversation.id !== this.id) return;
    for (const message of messages) if (!this.running.has(message.id)) this.talk.messages.set(message.id, message);
    const isGone = changedId && !this.running.has(changedId) && !messages.some(({ id }) => id === changedId);
    if (isGone) this.talk.messages.delete(changedId);
    // Where this tab reads stays its own, until it has nothing of its own to show; what follows there is shown.
    const leafId = this.talk.messages.has(this.talk.conversation.leafId) ? this.talk.conversation.leafId : conversation.leafId;
    this.talk.conversation.leafId = leafId && leafBelow([...this.talk.messages.values()], leafId);
    this._resume([...this.talk.messages.values()]);
    this._askStill([...this.talk.messages.values()]);
    this.render();
  }
}

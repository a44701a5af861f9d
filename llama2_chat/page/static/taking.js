// The server's copies as they come: taken into this browser's records, merged with what was changed here, or told to differ.
//
// Known of each copy: { id, kind, conversation, revision, sent, gone }. sent is the copy as it was when it was last seen: a
// conversation's fields, a message's fingerprint, null once it is deleted there. gone: it was removed here, and is to be deleted.

import { checkConversation, checkMessage } from "./import_check.js";
import { mergedConversation, mergedMessage, sentOf, sharedConversation, withShared } from "./merging.js";

export const KINDS = { conversation: "conversations", message: "messages" };

/** What is known of a copy. */
export const entryOf = ({ id, kind, conversation }, revision, sent, gone = false) => ({ id, kind, conversation, revision, sent, ...(gone && { gone }) });

export class Taking {
  /**
   * @param {import("./records.js").Records} records
   * @param hooks newId(), onTaken(conversationId, messageId) when a conversation was changed, or a message of it removed,
   *   onDiffers({ id, kind, conversation }) where the record here is to be sent
   */
  constructor(records, hooks) {
    Object.assign(this, { records, hooks });
  }

  /** @param copies as the server tells them: { id, kind, conversation, revision, record } */
  async take(copies) {
    const groups = new Map();
    for (const copy of copies) groups.set(copy.conversation, [...(groups.get(copy.conversation) ?? []), copy]);
    for (const [id, group] of groups) {
      const own = group.find(({ kind }) => kind === "conversation");
      const messages = group.filter(({ kind }) => kind === "message");
      const all = own ? [own, ...messages] : messages; // a message is only written where its conversation is
      let isNews = await this.#addNew(id, own, messages);
      if (!isNews) for (const copy of all) isNews = (await this.#takeOne(copy)) || isNews;
      if (isNews) this.hooks.onTaken(id);
    }
  }

  /** A conversation of which nothing is known here, at once. Whether it was one. */
  async #addNew(id, own, messages) {
    if (!own?.record || (await this.records.record("conversations", id)) || (await this.records.record("known", id))) return false;
    const conversation = checkConversation(own.record);
    if (conversation?.id !== id) return false;
    const checked = messages.map((copy) => [copy, copy.record && checkMessage(copy.record, id)]).filter(([copy, message]) => message?.id === copy.id);
    try {
      await this.records.add(conversation, checked.map(([, message]) => message));
    } catch {
      return false; // the disk is full, which the other way knows to handle
    }
    const entries = checked.map(([copy, message]) => entryOf(copy, copy.revision, sentOf("message", message)));
    await this.records.changeKnown([entryOf(own, own.revision, sentOf("conversation", conversation)), ...entries]);
    return true;
  }

  /** Whether something is another now. */
  async #takeOne(copy) {
    const { id, kind, conversation, revision } = copy;
    const known = await this.records.record("known", id);
    if (known?.revision >= revision) return false;
    const mine = await this.records.record(KINDS[kind], id);
    if (!copy.record) return this.#takeDeletion(copy, known, mine);
    if (known?.gone) return this.#know({ ...known, revision }); // and is to be deleted there
    const theirs = kind === "conversation" ? checkConversation(copy.record) : checkMessage(copy.record, conversation);
    if (theirs?.id !== id) return this.#know(entryOf(copy, revision, known?.sent ?? "")); // of a later page, maybe
    if (!(await (kind === "conversation" ? this.#takeConversation : this.#takeMessage).call(this, theirs, mine, known))) return false;
    await this.#know(entryOf(copy, revision, sentOf(kind, theirs)));
    this.hooks.onDiffers({ id, kind, conversation }); // where it was changed here as well
    return true;
  }

  async #takeDeletion({ id, kind, conversation, revision }, known, mine) {
    if (!mine || (known && known.sent !== null)) {
      if (kind === "conversation") await this.records.remove([id], () => true);
      else await this.records.removeMessages([id]);
      await this.records.changeKnown([], [id]);
      if (kind === "message") this.hooks.onTaken(conversation, id);
      return Boolean(mine);
    }
    await this.#know({ id, kind, conversation, revision, sent: null }); // here it was brought back, or imported
    this.hooks.onDiffers({ id, kind, conversation });
    return false;
  }

  #takeConversation(theirs, mine, known) {
    const shared = sharedConversation(theirs);
    const before = typeof known?.sent === "object" ? known.sent : null;
    return this.records.change("conversations", theirs.id, (old) => {
      if (!old) return mine ? undefined : shared; // removed at this very moment
      return withShared(old, mergedConversation(sharedConversation(old), shared, before));
    });
  }

  async #takeMessage(theirs, mine, known) {
    let beside = null;
    const kept = await this.records.change("messages", theirs.id, (old) => {
      if (!old) return mine ? undefined : theirs; // else removed at this very moment
      if (sentOf("message", old) === known?.sent) return theirs;
      const merged = mergedMessage(old, theirs);
      beside = merged.beside;
      return merged.kept;
    }, theirs.conversationId);
    if (beside) await this.#keepBeside({ ...beside, id: this.hooks.newId() });
    return kept;
  }

  async #keepBeside(message) {
    const { id, conversationId: conversation } = message;
    await this.records.change("messages", id, () => message, conversation);
    this.hooks.onDiffers({ id, kind: "message", conversation });
  }

  async #know(entry) {
    await this.records.changeKnown([entry]);
    return false;
  }
}

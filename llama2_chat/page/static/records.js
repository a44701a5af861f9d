// Where records lie: in the database, and in memory what the database cannot take. That is everything in a private chat
// or without IndexedDB, and what was written since the disk was full. Nothing here knows of tabs, lists or search.

import { asGone } from "./database.js";

// A message is only written where its conversation is, and what is known of a copy of either after both.
const KINDS = ["conversations", "messages", "known"];

const isFull = ({ name }) => name === "QuotaExceededError" || name === "UnknownError"; // the latter is Safari's word

export class Records {
  #database;
  #memory = { conversations: new Map(), messages: new Map(), known: new Map() };
  #wasPersistent;

  /** @param {import("./database.js").Database | null} database null keeps everything in memory */
  constructor(database) {
    this.#database = database;
    this.#wasPersistent = this.persistent;
    /** Called with false when the disk is full, and with true when everything is on it again. */
    this.onPersistence = (_persistent) => {};
  }

  /** Whether all of it will still be there after a reload. */
  get persistent() {
    return this.#database !== null && KINDS.every((kind) => !this.#memory[kind].size);
  }

  async conversations() {
    return this.#overlay("conversations", (await this.#database?.conversations()) ?? [], () => true);
  }

  async messages(conversationId) {
    const stored = (await this.#database?.messages(conversationId)) ?? [];
    return this.#overlay("messages", stored, (message) => message.conversationId === conversationId);
  }

  /** All that is known of the server's copies. */
  async known() {
    return this.#overlay("known", (await this.#database?.known()) ?? [], () => true);
  }

  /** As Database.changeKnown. What is in memory alone is known there alone, or a reload would take it for deleted. */
  async changeKnown(entries, goneIds = []) {
    for (const id of goneIds) this.#memory.known.delete(id);
    if (this.persistent) {
      try {
        return await this.#database.changeKnown(entries, goneIds);
      } catch (error) {
        if (!isFull(error)) throw error;
      }
    }
    for (const entry of entries) this.#memory.known.set(entry.id, structuredClone(entry));
    await this.#database?.changeKnown([], goneIds);
  }

  async record(kind, id) {
    const stored = await this.#database?.record(kind, id);
    return this.#newest(kind, id, stored);
  }

  /** As Database.change. */
  async change(kind, id, change, conversationId) {
    if (this.persistent) {
      try {
        return await this.#database.change(kind, id, change, conversationId);
      } catch (error) {
        if (!isFull(error)) throw error;
      }
    }
    if (conversationId && !(await this.record("conversations", conversationId))) return undefined;
    const stored = await this.#database?.record(kind, id);
    const record = change(this.#newest(kind, id, stored)); // from here to the write nobody comes in between
    if (record) this.#memory[kind].set(id, structuredClone(record));
    await this.#save();
    return record;
  }

  /** As Database.changeWith. */
  async changeWith(messages, conversationId, change) {
    if (this.persistent) {
      try {
        return await this.#database.changeWith(messages, conversationId, change);
      } catch (error) {
        if (!isFull(error)) throw error;
      }
    }
    const conversation = change(await this.record("conversations", conversationId));
    if (!conversation) return undefined;
    this.#memory.conversations.set(conversationId, structuredClone(conversation));
    for (const message of messages) this.#memory.messages.set(message.id, structuredClone(message));
    await this.#save();
    return conversation;
  }

  /** As Database.add; rejects when the disk is full. */
  async add(conversation, messages) {
    if (this.#database) return this.#database.add(conversation, messages);
    const { conversations: known, messages: knownMessages } = this.#memory;
    if (known.get(conversation.id)?.deletedAt) {
      this.#forget(conversation.id);
      this.#memory.known.delete(conversation.id); // it is not to be deleted on the server
    }
    const isNew = !known.has(conversation.id);
    if (isNew) known.set(conversation.id, structuredClone(conversation));
    const added = messages.filter(({ id }) => !knownMessages.has(id));
    for (const message of added) knownMessages.set(message.id, structuredClone(message));
    return { conversations: Number(isNew), messages: added.length };
  }

  /** As Database.remove. What is in memory because the disk was full may fit now. */
  async remove(ids, isExpired) {
    const inMemory = new Map(this.#memory.conversations); // where a full disk may not know yet that one was deleted
    for (const id of ids) if (isExpired(inMemory.get(id) ?? {})) this.#forget(id);
    await this.#database?.remove(ids, (stored) => isExpired(inMemory.get(stored.id) ?? stored));
    await this.#save();
  }

  async removeMessages(ids) {
    for (const id of ids) {
      this.#memory.messages.delete(id);
      this.#markGone(id);
    }
    await this.#database?.removeMessages(ids);
    await this.#save();
  }

  #newest(kind, id, stored) {
    return this.#memory[kind].has(id) ? structuredClone(this.#memory[kind].get(id)) : stored;
  }

  #forget(conversationId) {
    this.#memory.conversations.delete(conversationId);
    this.#markGone(conversationId);
    for (const [id, message] of this.#memory.messages) {
      if (message.conversationId !== conversationId) continue;
      this.#memory.messages.delete(id);
      this.#memory.known.delete(id);
    }
  }

  #markGone(id) {
    const { known } = this.#memory;
    const entry = asGone(known.get(id));
    if (entry) known.set(id, entry);
    else known.delete(id);
  }

  #overlay(kind, stored, belongs) {
    const kept = [...this.#memory[kind].values()].filter(belongs);
    const isOld = ({ id }) => !this.#memory[kind].has(id);
    return [...stored.filter(isOld), ...structuredClone(kept)];
  }

  /** Tries to write what the disk did not take. While it is full, another tab's change to a record may be lost. */
  async #save() {
    if (!this.#database) return;
    try {
      for (const kind of KINDS) for (const entry of this.#memory[kind]) await this.#saveOne(kind, ...entry);
    } catch (error) {
      if (!isFull(error)) throw error;
    }
    if (this.persistent !== this.#wasPersistent) this.onPersistence((this.#wasPersistent = this.persistent));
  }

  async #saveOne(kind, id, record) {
    await this.#database.change(kind, id, () => record, record.conversationId);
    if (this.#memory[kind].get(id) === record) this.#memory[kind].delete(id); // and not a newer one
  }
}

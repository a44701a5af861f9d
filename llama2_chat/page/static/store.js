// The conversations of this browser, shared by all its tabs; a private store has its own and forgets them. Where records
// are kept is told in records.js, how they hang together in tree.js.

import { Database } from "./database.js";
import { ofProfile } from "./profile.js";
import { Records } from "./records.js";
import { SearchIndex } from "./search.js";
import { Syncing } from "./syncing.js";
import { byAge } from "./tree.js";

const CHANNEL = "llama2-chat";
const UNDO_MS = 10_000; // a deleted conversation can be brought back for this long

/** 128 random bits as 32 hex digits. crypto.randomUUID is missing where the page comes over plain HTTP. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

let shared = null; // one in a tab, which has one login: one channel to the others, one index

/**
 * The store of a login in this browser ("" where nobody logs in), or a private one that keeps everything in this tab's memory. Where IndexedDB is missing,
 * blocked or of a newer page, it is in memory too, and `persistent` is false.
 * @param history the most of one request, where the server keeps the login's conversations as well; else null
 * @returns {Promise<Store>}
 */
export async function openStore({ private: isPrivate = false, profile = "", history = null } = {}) {
  if (isPrivate) return new Store(new Records(null), null);
  const channel = ofProfile(CHANNEL, profile);
  shared ??= Database.open(profile).then(
    (database) => new Store(new Records(database), channel),
    () => new Store(new Records(null), channel),
  ).then((store) => {
    if (history) store.shareWith(profile, history);
    return store;
  });
  return shared;
}

class Store {
  #records;
  #index;
  #channel = null;
  #syncing = null;
  #listeners = new Set();
  #persistenceListeners = new Set();

  /** channel: the name under which tabs tell each other; null for a private chat */
  constructor(records, channel) {
    /** True for a private chat, which leaves no trace. */
    this.private = channel === null;
    this.#records = records;
    records.onPersistence = () => this.#tellPersistence();
    this.#index = new SearchIndex(records);
    if (records.persistent) this.#listenToOtherTabs(channel);
    this.#tidy().catch(() => {}); // the next start tidies up, and a search reads what it needs
  }

  /** False while what is written will be gone after a reload. */
  get persistent() {
    return this.#records.persistent;
  }

  /** Whether the server keeps what is written as well, for all browsers of the login. */
  get shared() {
    return this.#syncing !== null;
  }

  /** Why something is not on the server, where it should be; else "". */
  get problem() {
    return this.#syncing?.problem ?? "";
  }

  /** From now on the server keeps these conversations as well: those of a login. limits: the most of one request */
  shareWith(profile, limits) {
    const onTaken = (conversationId, id = null) => {
      this.#tell({ kind: "message", id, conversationId }, false);
      this.#tell({ kind: "conversation", id: conversationId, conversationId }, false);
    };
    this.#syncing = new Syncing(this.#records, { limits, profile, hooks: { newId, onTaken, onProblem: () => this.#tellPersistence() } });
    this.#syncing.start();
  }

  /**
   * listener(persistent) hears that the disk is full, and that everything is saved again; or that `problem` is another.
   * @returns {() => void} ends it
   */
  onPersistence(listener) {
    this.#persistenceListeners.add(listener);
    return () => this.#persistenceListeners.delete(listener);
  }

  /**
   * listener({ kind, id, conversationId, here }) hears of each record that was written or removed; here: by this tab.
   * An import tells once of all messages of a conversation, with the id null.
   * @returns {() => void} ends it
   */
  onChange(listener) {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** All that are not deleted: pinned ones first, then the newest. */
  async conversations() {
    const alive = (await this.#records.conversations()).filter(({ deletedAt }) => !deletedAt);
    return alive.sort((a, b) => Number(b.pinned) - Number(a.pinned) || b.updatedAt - a.updatedAt || byAge(b, a));
  }

  /** @returns {Promise<object | undefined>} undefined if there is none or it is deleted */
  async conversation(id) {
    const conversation = await this.#records.record("conversations", id);
    return conversation?.deletedAt ? undefined : conversation;
  }

  /** All messages of a conversation, of all branches, oldest first. */
  async messages(conversationId) {
    return (await this.#records.messages(conversationId)).sort(byAge);
  }

  /** Creates a conversation; one that is there stays as it is. */
  putConversation(conversation) {
    return this.#change("conversation", conversation.id, conversation.id, (old) => old ?? conversation);
  }

  /**
   * Changes a conversation as it is now: change(conversation) sets fields, and may not wait for anything.
   * @returns {Promise<object | undefined>} as it is then; undefined if it is gone
   */
  updateConversation(id, change) {
    return this.#change("conversation", id, id, (old) => changed(old, change));
  }

  /**
   * Creates or replaces a message. Its conversation must be there: nothing is written to one that is gone meanwhile.
   * @param replaces given the message as it is kept, or undefined, says whether this one takes its place
   * @returns {Promise<object | undefined>} undefined if nothing was written
   */
  putMessage(message, replaces = () => true) {
    return this.#change("message", message.id, message.conversationId, (kept) => (replaces(kept) ? message : undefined));
  }

  /**
   * Creates messages of a conversation and changes it as updateConversation does, in one step: whoever leaves the page
   * meanwhile finds all of it or nothing.
   * @param begun the conversation, where it begins with them
   * @returns {Promise<object | undefined>} the conversation as it is then; undefined if it is deleted, and nothing was written
   */
  async putMessages(messages, conversationId, change, begun) {
    const changeAlive = (old = begun && { ...begun }) => (old?.deletedAt ? undefined : changed(old, change));
    const conversation = await this.#records.changeWith(messages, conversationId, changeAlive);
    if (!conversation) return undefined;
    for (const { id } of messages) this.#tell({ kind: "message", id, conversationId });
    this.#tell({ kind: "conversation", id: conversationId, conversationId });
    return conversation;
  }

  /** Whether it is kept. */
  async hasMessage(id) {
    return Boolean(await this.#records.record("messages", id));
  }

  /** As updateConversation. */
  async updateMessage(id, change) {
    const message = await this.#records.record("messages", id);
    return message && this.#change("message", id, message.conversationId, (old) => changed(old, change));
  }

  /** Removes messages of a conversation that never reached the model, for good. */
  async removeMessages(conversationId, ids) {
    await this.#records.removeMessages(ids);
    for (const id of ids) this.#tell({ kind: "message", id, conversationId });
  }

  /** @returns {Promise<() => Promise<void>>} undo, which works for ten seconds */
  deleteConversation(id) {
    return this.#delete([id]);
  }

  /** @returns {Promise<() => Promise<void>>} undo, which works for ten seconds */
  async deleteAll() {
    return this.#delete((await this.conversations()).map(({ id }) => id));
  }

  /**
   * Adds a conversation and messages, as an import does, and changes nothing that is there.
   * @returns {Promise<{ conversations: number, messages: number }>} how many were added; rejects when the disk is full
   */
  async add(conversation, messages) {
    const added = await this.#records.add(conversation, messages);
    this.#tell({ kind: "message", id: null, conversationId: conversation.id });
    this.#tell({ kind: "conversation", id: conversation.id, conversationId: conversation.id });
    return added;
  }

  /** All words, in titles and texts; case and accents make no difference. Results as in SearchIndex.search. */
  async search(words, limit = 50) {
    return this.#index.search(words, limit, await this.conversations());
  }

  async #change(kind, id, conversationId, change) {
    const needed = kind === "message" ? conversationId : undefined;
    const record = await this.#records.change(`${kind}s`, id, change, needed);
    if (record) this.#tell({ kind, id, conversationId });
    return record;
  }

  async #delete(ids) {
    const deletedAt = Date.now();
    const mark = (conversation) => Object.assign(conversation, { deletedAt });
    await Promise.all(ids.map((id) => this.updateConversation(id, mark)));
    setTimeout(() => this.#purge(), UNDO_MS);
    return async () => {
      await Promise.all(ids.map((id) => this.updateConversation(id, (old) => bringBack(old, deletedAt))));
    };
  }

  /** Removes for good what was deleted ten seconds ago or earlier, by whichever tab, and comes back for the rest. */
  async #purge() {
    const now = Date.now();
    // abs: a clock may have been set back since
    const isExpired = ({ deletedAt }) => Boolean(deletedAt) && Math.abs(now - deletedAt) >= UNDO_MS;
    const deleted = (await this.#records.conversations()).filter(({ deletedAt }) => deletedAt);
    const expired = deleted.filter(isExpired).map(({ id }) => id);
    if (expired.length) await this.#records.remove(expired, isExpired);
    for (const id of expired) this.#tell({ kind: "conversation", id, conversationId: id });
    if (deleted.length > expired.length) setTimeout(() => this.#purge(), UNDO_MS);
  }

  async #tidy() {
    await this.#purge();
    await this.#index.build(await this.conversations());
  }

  #listenToOtherTabs(channel) {
    if (!globalThis.BroadcastChannel) return;
    this.#channel = new BroadcastChannel(channel);
    this.#channel.onmessage = ({ data }) => {
      this.#hear({ ...data, here: false });
      this.#syncing?.changed({ ...data, here: false });
    };
  }

  #tell(change, here = true) {
    this.#channel?.postMessage(change);
    this.#hear({ ...change, here });
    if (here) this.#syncing?.changed({ ...change, here });
  }

  #tellPersistence() {
    this.#persistenceListeners.forEach((listener) => listener(this.persistent));
  }

  #hear(change) {
    if (change.kind === "message") this.#index.changed(change.conversationId);
    for (const listener of this.#listeners) listener(change);
  }
}

function changed(record, change) {
  if (record) change(record);
  return record;
}

function bringBack(conversation, deletedAt) {
  if (conversation.deletedAt === deletedAt) delete conversation.deletedAt;
}

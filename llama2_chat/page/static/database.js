// IndexedDB "llama2-chat": conversations and messages as records on this computer, each change one transaction, and what is
// known of the server's copies (syncing.js). What happens when it is full or missing is decided in records.js.

import { ofProfile } from "./profile.js";
import { T } from "./texts.js";

const NAME = "llama2-chat";
const VERSION = 2;
const KINDS = ["conversations", "messages", "known"];
const PATIENCE_MS = 5000; // an open that waits longer is blocked by another tab, or hangs as old Safaris do

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

export class Database {
  #opening = null;
  #name;

  constructor(profile) {
    this.#name = ofProfile(NAME, profile);
  }

  /** Rejects where there is no IndexedDB, where it is blocked, and where a newer page has changed it. */
  static async open(profile) {
    const database = new Database(profile);
    await database.#connection();
    return database;
  }

  conversations() {
    return this.#transaction("readonly", ({ conversations }) => done(conversations.getAll()));
  }

  /** All that is known of the server's copies. */
  known() {
    return this.#transaction("readonly", ({ known }) => done(known.getAll()));
  }

  /** Writes entries of it, and removes those with these ids. */
  changeKnown(entries, goneIds = []) {
    return this.#transaction("readwrite", async ({ known }) => {
      for (const entry of entries) known.put(entry);
      for (const id of goneIds) known.delete(id);
    });
  }

  /** @param {"conversations" | "messages" | "known"} kind */
  record(kind, id) {
    return this.#transaction("readonly", (stores) => done(stores[kind].get(id)));
  }

  messages(conversationId) {
    return this.#transaction("readonly", ({ messages }) =>
      done(messages.index("conversationId").getAll(conversationId)),
    );
  }

  /**
   * Reads a record, changes it and writes it, with nobody in between. change(old) returns what is written; undefined
   * writes nothing. With `conversationId`, nothing is written if that conversation is gone.
   * @returns {Promise<object | undefined>} what was written
   */
  change(kind, id, change, conversationId) {
    return this.#transaction("readwrite", async (stores) => {
      if (conversationId && !(await done(stores.conversations.get(conversationId)))) return undefined;
      const record = change(await done(stores[kind].get(id)));
      if (record) stores[kind].put(record);
      return record;
    });
  }

  /**
   * Writes messages and changes their conversation, with nobody in between: a page that is left meanwhile has done all of it
   * or nothing. change(old conversation) returns what is written; undefined writes nothing, no messages either.
   * @returns {Promise<object | undefined>} the conversation as it was written
   */
  changeWith(messages, conversationId, change) {
    return this.#transaction("readwrite", async (stores) => {
      const conversation = change(await done(stores.conversations.get(conversationId)));
      if (!conversation) return undefined;
      stores.conversations.put(conversation);
      for (const message of messages) stores.messages.put(message);
      return conversation;
    });
  }

  /**
   * Adds what is not there; a conversation that was deleted counts as not there, and so do its messages.
   * @returns {Promise<{ conversations: number, messages: number }>} how many were added
   */
  add(conversation, messages) {
    return this.#transaction("readwrite", async (stores) => {
      const old = await done(stores.conversations.get(conversation.id));
      if (old?.deletedAt) await removeFrom(stores, old.id);
      if (old?.deletedAt) stores.known.delete(old.id); // it is not to be deleted on the server
      const isNew = !old || Boolean(old.deletedAt);
      if (isNew) stores.conversations.put(conversation);
      const known = await Promise.all(messages.map(({ id }) => done(stores.messages.getKey(id))));
      const added = messages.filter((_, index) => known[index] === undefined);
      for (const message of added) stores.messages.put(message);
      return { conversations: Number(isNew), messages: added.length };
    });
  }

  /** Removes conversations with all their messages, those that are still to be removed when their turn comes. */
  remove(ids, isExpired) {
    return this.#transaction("readwrite", async (stores) => {
      for (const id of ids) {
        const conversation = await done(stores.conversations.get(id));
        if (conversation && isExpired(conversation)) await removeFrom(stores, id);
      }
    });
  }

  /** Removes single messages, such as one that the model never took. */
  removeMessages(ids) {
    return this.#transaction("readwrite", async ({ messages, known }) => {
      for (const id of ids) {
        messages.delete(id);
        await markGone(known, id);
      }
    });
  }

  async #transaction(mode, work) {
    const transaction = (await this.#connection()).transaction(KINDS, mode);
    const ended = new Promise((resolve, reject) => {
      transaction.oncomplete = resolve;
      transaction.onabort = () => reject(transaction.error);
    });
    ended.catch(() => {}); // told below, unless `work` fails first
    const stores = Object.fromEntries(KINDS.map((kind) => [kind, transaction.objectStore(kind)]));
    try {
      const result = await work(stores); // may await requests of this transaction and nothing else
      await ended;
      return result;
    } catch (error) {
      if (!transaction.error) abort(transaction);
      throw transaction.error ?? error;
    }
  }

  /** The connection, opened again after the browser or a newer page closed it. */
  #connection() {
    this.#opening ??= open(this.#name).then(
      (connection) => {
        // Another tab wants a newer version, or wants the database gone: a connection that stays would block it.
        connection.onversionchange = () => {
          connection.close();
          this.#forget();
        };
        connection.onclose = () => this.#forget();
        return connection;
      },
      (error) => {
        this.#forget();
        throw error.name === "VersionError" ? new Error(T.store.outdated, { cause: error }) : error;
      },
    );
    return this.#opening;
  }

  #forget() {
    this.#opening = null;
  }
}

function abort(transaction) {
  try {
    transaction.abort();
  } catch {
    // it has ended by itself
  }
}

async function removeFrom({ conversations, messages, known }, id) {
  conversations.delete(id);
  await markGone(known, id);
  for (const key of await done(messages.index("conversationId").getAllKeys(id))) {
    messages.delete(key);
    known.delete(key);
  }
}

async function markGone(known, id) {
  const entry = asGone(await done(known.get(id)));
  if (entry) known.put(entry);
  else known.delete(id);
}

/** What is known of the server's copy of what was removed here: that it is to be deleted, or nothing once it is. */
export function asGone(entry) {
  return entry && entry.sent !== null ? { ...entry, gone: true } : undefined;
}

function open(name) {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(name, VERSION); // throws where storage is forbidden
    request.onupgradeneeded = ({ oldVersion }) => createStores(request.result, oldVersion);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
    setTimeout(() => {
      if (request.readyState === "done") return;
      request.onsuccess = () => request.result.close();
      reject(new DOMException("IndexedDB does not answer", "TimeoutError"));
    }, PATIENCE_MS);
  });
}

function createStores(connection, oldVersion) {
  if (oldVersion < 1) {
    connection.createObjectStore("conversations", { keyPath: "id" });
    connection.createObjectStore("messages", { keyPath: "id" }).createIndex("conversationId", "conversationId");
  }
  connection.createObjectStore("known", { keyPath: "id" });
}

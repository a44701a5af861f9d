// The conversations of this browser and the server's copies of them, where HISTORY=server: what is new here is sent, and what
// other browsers have sent is asked for. The browser works from its own records, so it works without the server, and catches
// up. How copies are taken in, and what is known of them, is told in taking.js; the server's side is ../history.py.

import { fingerprint, sentOf, sharedConversation, sharedMessage } from "./merging.js";
import { entryOf, KINDS, Taking } from "./taking.js";
import { T } from "./texts.js";
import { translated } from "./translated.js";

const SINCE = "since"; // the entry that says up to which revision all is known
const LOOK_EVERY_MS = 10_000; // for what is new elsewhere, while the page can be seen
const SEND_AFTER_MS = 300; // without a change
const SEND_FOR_OTHERS_MS = 3000; // what another tab has written, which has sent it by then unless it was closed
const RETRY_MS = [1000, 3000, 10_000, 60_000];

export class Syncing {
  #changed = new Map(); // id -> { id, kind, conversation }, whose copy may be another
  #refused = new Set(); // ids of what the server does not take
  #refusal = ""; // why, of the last of them
  #isRead = false; // whether what changed while no page was open is among them
  #working = Promise.resolve();
  #isFull = false; // the server has no room, so that deletions go first
  #failures = 0;
  #pausedUntil = 0;
  #timer = null;
  #most;
  #taking;

  /**
   * @param {import("./records.js").Records} records
   * @param limits records, bytes: the most of one request
   * @param profile the login whose records these are
   * @param hooks newId(), onTaken(conversationId, messageId) when another browser has changed a conversation, or removed a
   *   message of it, onProblem()
   */
  constructor(records, { limits, profile, hooks }) {
    Object.assign(this, { records, limits, profile, hooks });
    this.#taking = new Taking(records, { ...hooks, onDiffers: (record) => this.#changed.set(record.id, record) });
    /** Why something is not on the server; "" if all is well. */
    this.problem = "";
    this.#most = limits.records;
  }

  start() {
    const look = () => this.#work();
    document.addEventListener("visibilitychange", look);
    addEventListener("online", look);
    setInterval(() => document.hidden || Date.now() < this.#pausedUntil || look(), LOOK_EVERY_MS);
    look();
  }

  /** A record was written or removed. id: null for all messages of the conversation; here: by this tab */
  changed({ kind, id, conversationId, here }) {
    const conversation = conversationId;
    this.#changed.set(id ?? `all of ${conversation}`, { id, kind, conversation });
    if (this.#failures && !this.#isFull) return; // it goes along with the next try
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#work(false), here ? SEND_AFTER_MS : SEND_FOR_OTHERS_MS);
  }

  /** One after another. looks: for what is new elsewhere, too */
  #work(looks = true) {
    this.#working = this.#working.then(async () => {
      clearTimeout(this.#timer);
      try {
        if (looks) await this.#look();
        if (!this.#isRead) await this.#readAll();
        await this.#send();
        this.#failures = 0;
        this.#tell(this.#refusal);
      } catch (error) {
        this.#failed(error);
      }
    });
  }

  #failed(error) {
    const isLineDown = [502, 503, 504].includes(error.status);
    this.#isFull = error.status === 507;
    if (!error.status) console.error(error);
    this.#tell(isLineDown ? (this.#changed.size ? T.syncing.offline : "") : (error.status && error.message) || T.syncing.failed);
    const wait = this.#isFull ? RETRY_MS.at(-1) : RETRY_MS[Math.min(this.#failures, RETRY_MS.length - 1)];
    this.#failures += 1;
    this.#pausedUntil = Date.now() + wait;
    this.#timer = setTimeout(() => this.#work(), wait);
  }

  #tell(problem) {
    if (problem === this.problem) return;
    this.problem = problem;
    this.hooks.onProblem();
  }

  // From the server.

  async #look() {
    let since = (await this.records.record("known", SINCE)) ?? { id: SINCE, epoch: "", revision: 0 };
    for (;;) {
      const page = await this.#ask(`?epoch=${since.epoch}&revision=${since.revision}`);
      if (since.epoch && (page.epoch !== since.epoch || page.after < since.revision)) await this.#forget(); // it is another file
      await this.#taking.take(page.records);
      since = { id: SINCE, epoch: page.epoch, revision: page.revision };
      await this.records.changeKnown([since]);
      if (page.isLast) return;
    }
  }

  async #forget() {
    const known = await this.records.known();
    await this.records.changeKnown([], known.map(({ id }) => id));
    this.#isRead = false;
  }

  // To the server.

  /** What changed while no page was open, and what this browser held before. */
  async #readAll() {
    for (const { id, kind, conversation, gone } of await this.records.known()) if (gone) this.#changed.set(id, { id, kind, conversation });
    for (const { id } of await this.records.conversations()) {
      this.#changed.set(id, { id, kind: "conversation", conversation: id });
      await new Promise((resolve) => setTimeout(resolve)); // what the visitor does comes first
      await this.#addMessages(id);
    }
    this.#isRead = true;
  }

  async #addMessages(conversation) {
    const all = await this.records.messages(conversation);
    const entries = await Promise.all(all.map(({ id }) => this.records.record("known", id)));
    all.forEach((message, at) => {
      const { id } = message;
      if (sentOf("message", message) !== entries[at]?.sent) this.#changed.set(id, { id, kind: "message", conversation });
    });
  }

  async #send() {
    for (let refusals = 0; refusals < 5; ) {
      const batch = await this.#batch();
      if (!batch.length) return;
      const { epoch = "", revision = 0 } = (await this.records.record("known", SINCE)) ?? {};
      let saved;
      try {
        saved = await this.#ask("", { epoch, records: batch.map(({ change }) => change) });
      } catch (error) {
        if (![400, 413].includes(error.status)) throw error;
        this.#narrow(batch, error);
        continue;
      }
      for (const each of batch) await this.#sent(each, saved.kept[each.change.id]);
      await this.#taking.take(saved.others);
      await this.#advance({ epoch, revision }, saved);
      refusals = Object.keys(saved.kept).length ? 0 : refusals + 1; // others write all the time
    }
  }

  /** One record too large, or more than a proxy takes, must not hold back the rest. */
  #narrow(batch, error) {
    if (batch.length > 1) return void (this.#most = Math.ceil(batch.length / 2));
    this.#refused.add(batch[0].change.id);
    this.#refusal = error.message;
    this.#most = this.limits.records;
  }

  /** What is to be sent next: conversations before messages, which are not kept without them. */
  async #batch() {
    for (const [key, { id, conversation }] of this.#changed) {
      if (id) continue;
      this.#changed.delete(key);
      await this.#addMessages(conversation);
    }
    const batch = [];
    let bytes = 0;
    for (const kind of ["conversation", "message"]) {
      for (const changed of [...this.#changed.values()].filter((each) => each.kind === kind && !this.#refused.has(each.id))) {
        const each = await this.#change(changed);
        if (!each) this.#changed.delete(changed.id);
        if (!each || (this.#isFull && each.change.record)) continue;
        batch.push(each);
        bytes += JSON.stringify(each.change).length;
        if (batch.length >= this.#most || bytes > this.limits.bytes) return batch;
      }
    }
    if (batch.length || !this.#isFull) return batch;
    this.#isFull = false; // what was deleted elsewhere may have made room
    return this.#batch();
  }

  /** What the server is to be told of a record; null if it has it as it is. */
  async #change(changed) {
    const { id, kind, conversation } = changed;
    const known = await this.records.record("known", id);
    const mine = await this.records.record(KINDS[kind], id);
    const base = known?.revision ?? 0;
    const isGone = known?.gone || mine?.deletedAt;
    if (isGone && (!known || known.sent === null)) return null;
    if (isGone) return { changed, sent: null, change: { id, kind, conversation, base, record: null } };
    if (!mine) return null;
    if (kind === "conversation" && known?.sent === null) await this.#addMessages(id); // brought back
    const record = kind === "conversation" ? sharedConversation(mine) : sharedMessage(mine);
    const sent = record && sentOf(kind, mine);
    if (!record || fingerprint(sent) === fingerprint(known?.sent ?? null)) return null;
    return { changed, sent, change: { id, kind, conversation, base, record } };
  }

  /** revision: undefined if another browser has changed it meanwhile */
  async #sent({ changed, sent }, revision) {
    const { id, kind } = changed;
    if (revision === undefined) return;
    if (this.#changed.get(id) === changed) this.#changed.delete(id); // and not changed again meanwhile
    const isHere = await this.records.record(KINDS[kind], id);
    if (sent === null && kind === "conversation") {
      const messages = await this.records.messages(id);
      await this.records.changeKnown([], messages.map((message) => message.id));
    }
    if (sent === null && !isHere) return this.records.changeKnown([], [id]);
    await this.records.changeKnown([entryOf(changed, revision, sent, !isHere)]);
    if (!isHere) this.changed({ kind, id, conversationId: changed.conversation, here: true }); // removed while it was sent
  }

  /** What was sent need not be read again, unless others have sent something before it. */
  async #advance({ epoch, revision }, saved) {
    const news = Object.values(saved.kept).filter((each) => each > revision).sort((a, b) => a - b);
    const isSame = saved.epoch === epoch || (!epoch && !revision);
    const isAll = isSame && news.every((each, at) => each === revision + 1 + at);
    if (isAll) await this.records.changeKnown([{ id: SINCE, epoch: saved.epoch, revision: revision + news.length }]);
  }

  async #ask(query, changes) {
    const headers = { "X-Login": encodeURIComponent(this.profile), ...(changes && { "Content-Type": "application/json" }) };
    const asked = { headers, ...(changes && { method: "PUT", body: JSON.stringify(changes) }) };
    const response = await fetch(`page/history${query}`, asked).catch((error) => {
      throw Object.assign(error, { status: 503 }); // the line is down
    });
    const body = await response.json().catch(() => null);
    if (response.ok && body) return body;
    throw Object.assign(new Error(translated(body?.error?.message) ?? T.connection.refused(response.status)), { status: response.ok ? 502 : response.status });
  }
}

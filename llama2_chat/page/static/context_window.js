// How the conversation stands in the model's window, counted by the server, shown by composer.js's gauge.

import { fit, turnsOf } from "./answers.js";

const COUNT_AFTER_MS = 400; // without a key

export class ContextWindow {
  /** @param parts state() what the server says of its model, onCounted() when there is a new count */
  constructor({ settings, composer, state, onCounted }) {
    Object.assign(this, { settings, composer, state, onCounted });
    this.fitted = null;
  }

  /** @param read () => [path, draft, documents, settings], asked once typing pauses: the messages, what stands in the box, and ids */
  count(read) {
    this._show(); // the settings may have changed
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this._count(...read()), COUNT_AFTER_MS);
  }

  stop() {
    clearTimeout(this.timer);
    this.counting?.abort();
  }

  /** How many of the oldest messages the model would not see; 0 where a newer count of a shorter talk is on its way. */
  forgotten(length) {
    const dropped = this.fitted?.droppedMessages ?? 0;
    return dropped < length ? dropped : 0;
  }

  async _count(path, draft, documents, settings) {
    if (!this.state().countsTokens) return;
    const turns = turnsOf(path);
    if (draft.trim() || turns.at(-1)?.role !== "user") turns.push({ role: "user", content: draft.trim() || "…" });
    this.counting?.abort();
    this.counting = new AbortController();
    try {
      this.fitted = await fit({ messages: turns, settings, ...(documents.length && { documents }) }, this.counting.signal);
    } catch {
      return; // a newer count is on its way, or the line is down
    }
    this._show();
    this.onCounted();
  }

  _show() {
    this.composer.showGauge(this.fitted, this.settings.read().maxNewTokens);
  }
}

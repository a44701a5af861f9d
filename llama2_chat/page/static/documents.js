// The visitor's documents above the box: brought by the paperclip, dropped or pasted, read, taken into a conversation or left
// out of it, deleted. The server's side is ../../server/files.py; what an answer was made from is in sources.js.

import { explain } from "./asking.js";
import { confirmDialog, h, icon, toast } from "./dialog.js";
import { isSame } from "./reading.js";
import { T } from "./texts.js";
import { translated } from "./translated.js";

const ICONS = {
  clip: "M17 8l-7 7a2 2 0 0 1-3-3l8-8a4 4 0 0 1 6 6l-8.5 8.5a6 6 0 0 1-8.5-8.5L11 3.5",
  delete: "M5 7h14M9.5 7V4.5h5V7M7 7l.8 12.5h8.4L17 7",
};
const TYPES = ".pdf,.docx,.txt,.md,.markdown,.csv,.tsv,.html,.htm";
const LOOK_EVERY_MS = 1000; // while one is being read

export class Documents {
  /**
   * @param composer the element of the box
   * @param limits largest file in bytes, most documents of a question, kept: for how long, in words; null where the server has no documents
   * @param handlers talk() the open conversation, onChoose(change, talk) where change makes ids of ids, onSaid(text),
   *   onBrought(talk, whether all that was brought is on the server)
   */
  constructor(composer, limits, handlers) {
    Object.assign(this, { limits, handlers, list: limits ? null : [], chosen: [], uploading: [] });
    if (!limits) return;
    this._build(composer);
    this._takeDropped();
    document.addEventListener("visibilitychange", () => document.hidden || this.refresh()); // another tab may have changed them
    this.refresh();
  }

  /** Of these ids, those that can be asked about; all of them while nobody knows. */
  known(ids) {
    if (!this.list) return ids;
    const readable = new Set(this.list.filter(({ status }) => status !== "error").map(({ id }) => id));
    return ids.filter((id) => readable.has(id));
  }

  /** Whether files are on their way to the server that were brought into this conversation. */
  isBringing(talk) {
    return this.uploading.some((each) => isSame(each.talk, talk));
  }

  /** @param chosen ids of those that the open conversation is about */
  show(chosen = this.chosen) {
    this.chosen = chosen;
    if (!this.limits) return;
    const list = this.list ?? [];
    this.section.hidden = !list.length && !this.uploading.length;
    this.use.checked = this.known(chosen).length > 0;
    this.details.classList.toggle("busy", Boolean(this.uploading.length) || list.some(isUnread));
    this.cancel.hidden = !this.uploading[0]?.sending;
    this.use.disabled = !list.some(({ status }) => status !== "error");
    const line = this._line(list);
    if (this.summary.textContent !== line) this.summary.textContent = line;
    const shown = JSON.stringify([list, chosen]);
    if (shown === this.shown) return; // so that the focus stays where it is
    this.shown = shown;
    this._showRows(list);
  }

  _build(composer) {
    this.input = h("input", { type: "file", multiple: true, accept: TYPES, hidden: true, onchange: () => this._picked() });
    const words = { "aria-label": T.documents.add, title: T.documents.addHelp };
    const clip = h("button", { type: "button", class: "quiet clip", ...words, onclick: () => this.input.click() }, icon(ICONS.clip));
    composer.querySelector("form").prepend(clip, this.input);
    this.use = h("input", { type: "checkbox", onchange: () => this._useAll(this.use.checked) });
    this.summary = h("summary", {});
    this.rows = h("ul", {});
    this.details = h("details", {}, this.summary, this.rows, h("p", {}, translated(this.limits.kept)));
    this.section = h("section", { class: "documents", "aria-label": T.documents.label, hidden: true });
    this.cancel = h("button", { type: "button", class: "quiet", hidden: true, onclick: () => this.uploading[0]?.sending?.abort() }, T.documents.cancel);
    this.section.append(h("label", { title: T.documents.useHelp }, this.use, T.documents.use), this.cancel, this.details);
    composer.prepend(this.section);
  }

  _takeDropped() {
    const isHere = () => !document.body.classList.contains("completes") && !document.querySelector("dialog[open]");
    const hasFiles = (event) => isHere() && [...(event.dataTransfer?.types ?? [])].includes("Files");
    const mark = (over) => document.body.classList.toggle("dropping", over);
    addEventListener("dragover", (event) => hasFiles(event) && (event.preventDefault(), mark(true)));
    addEventListener("dragleave", (event) => event.relatedTarget || mark(false));
    addEventListener("drop", (event) => {
      mark(false);
      if (!hasFiles(event)) return;
      event.preventDefault();
      this._bring([...event.dataTransfer.files]);
    });
    addEventListener("paste", (event) => {
      const { files, types } = event.clipboardData ?? { files: [], types: [] };
      if (!files.length || types.includes("text/plain") || !isHere()) return; // a word processor adds a picture of its text
      event.preventDefault();
      this._bring([...files]);
    });
  }

  _picked() {
    const files = [...this.input.files];
    this.input.value = ""; // so that the same file can be chosen again
    this._bring(files);
  }

  /** One after another, each read from its disk as it is sent; into the conversation that is open now. */
  async _bring(files) {
    const talk = this.handlers.talk();
    const brought = files.map((file) => ({ file, talk }));
    this.uploading.push(...brought);
    let isWhole = true;
    for (const each of brought) {
      this.show();
      isWhole = (await this._upload(each)) && isWhole;
      this.uploading.splice(this.uploading.indexOf(each), 1);
    }
    this.handlers.onBrought(talk, isWhole);
    await this.refresh();
  }

  /** @returns whether the server has it */
  async _upload(each) {
    const { file, talk } = each;
    const onSent = (share) => (Object.assign(each, { share }), this.show());
    try {
      if (file.size > this.limits.largest) throw new Error(T.documents.tooLarge(this.limits.largest));
      const form = new FormData();
      form.append("purpose", "user_data");
      form.append("file", file, file.name);
      each.sending = new AbortController();
      this.show();
      const added = await answered("page/files", { body: form, onSent, signal: each.sending.signal }, posted);
      this.list = [added, ...(this.list ?? []).filter(({ id }) => id !== added.id)];
      this.handlers.onChoose((ids) => [...ids.filter((id) => id !== added.id), added.id], talk);
      return true;
    } catch (error) {
      if (!each.sending?.signal.aborted) explain({ status: error.status, message: T.documents.failed(file.name, error.message) });
      return false;
    }
  }

  /** Ask the server which there are. */
  async refresh() {
    if (!this.limits) return;
    clearTimeout(this.timer);
    const before = new Map((this.list ?? []).map((each) => [each.id, each]));
    try {
      this.list = (await answered("page/files")).data;
    } catch {
      // The line is down, or the login has ended: what is known stays.
    }
    this.list?.forEach((each) => this._tellEnd(before.get(each.id), each));
    this.show();
    if (this.list?.some(isUnread)) this.timer = setTimeout(() => this.refresh(), LOOK_EVERY_MS);
  }

  /** What a visitor should know of a document that has just been read. */
  _tellEnd(before, document) {
    if (!before || !isUnread(before) || isUnread(document)) return;
    const { filename, status, status_details: why } = document;
    this.handlers.onSaid(T.documents.failed(filename, status === "error" ? translated(why) : T.documents.read));
    const words = remarksOn(document).join(" ");
    if (words) toast(T.documents.failed(filename, words), { seconds: 12 });
  }

  /** With one click all of them are left out, and with another taken in again. */
  _useAll(use) {
    const talk = this.handlers.talk();
    const again = this.leftOut?.talk === talk ? this.known(this.leftOut.ids) : [];
    if (!use) this.leftOut = { talk, ids: this.chosen };
    const all = this.known(this.list.map(({ id }) => id)).slice(0, this.limits.most);
    this.handlers.onChoose(() => (use ? (again.length ? again : all) : []), talk);
  }

  _line(list) {
    if (this.uploading.length) return T.documents.uploading(this.uploading[0].file.name, this.uploading[0].share);
    const unread = list.find(isUnread);
    if (unread) return `${T.documents.name(unread.filename)}: ${stateOf(unread)}`;
    const used = this.known(this.chosen);
    const only = used.length === 1 && list.find(({ id }) => id === used[0]);
    const line = only ? T.documents.name(only.filename) : T.documents.count(used.length, list.length);
    const remarks = (only ? [only] : list).flatMap(remarksOn).length; // their toasts are soon gone
    return remarks ? `${line} · ${T.documents.remarks(remarks)}` : line;
  }

  /** Made anew, with the focus on the same control as before. */
  _showRows(list) {
    const focused = [...this.rows.querySelectorAll("input, button")].indexOf(document.activeElement);
    this.rows.replaceChildren(...list.map((document) => this._row(document)));
    if (focused >= 0) this.rows.querySelectorAll("input, button")[focused]?.focus({ preventScroll: true });
  }

  _row(document) {
    const { id, filename, status } = document;
    const change = ({ target }) => this.handlers.onChoose((ids) => [...ids.filter((each) => each !== id), ...(target.checked ? [id] : [])], this.handlers.talk());
    const used = h("input", { type: "checkbox", onchange: change });
    used.checked = this.chosen.includes(id) && status !== "error";
    used.disabled = status === "error";
    const words = { "aria-label": T.documents.delete(filename), title: T.documents.delete(filename) };
    const remove = h("button", { type: "button", class: "quiet", ...words, onclick: () => this._delete(document) }, icon(ICONS.delete));
    const state = h("span", { class: "state" }, stateOf(document));
    const trouble = remarksOn(document).map((text) => h("span", { class: "trouble" }, text));
    return h("li", {}, h("label", {}, used, h("bdi", { class: "name", title: filename }, filename)), remove, state, ...trouble);
  }

  async _delete({ id, filename }) {
    if (!(await confirmDialog(T.documents.deleteQuestion(filename), T.documents.deleteYes))) return;
    try {
      await answered(`page/files/${id}`, { method: "DELETE" });
      this.handlers.onChoose((ids) => ids.filter((each) => each !== id), this.handlers.talk());
    } catch (error) {
      explain({ status: error.status, message: T.documents.failed(filename, error.message) });
    }
    await this.refresh();
  }
}

const isUnread = ({ status }) => status === "uploaded";

/** Why it cannot be read, or what a visitor should know of it. */
const remarksOn = ({ status, status_details: why, notes }) => [status === "error" && why, ...notes].filter(Boolean).map(translated);

function stateOf({ bytes, pages, pages_done: done, seconds_left: left, status }) {
  if (isUnread({ status })) return pages ? T.documents.reading(done, pages, left) : T.documents.waiting;
  return [pages && T.documents.pages(pages), T.documents.size(bytes)].filter(Boolean).join(" · ");
}

/** fetch() would not say how much of the body has been sent. */
function posted(address, { body, onSent, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.upload.onprogress = ({ loaded, total }) => onSent(loaded / total);
    request.onload = () => resolve(new Response(request.responseText, { status: request.status }));
    request.onerror = request.onabort = reject;
    signal.onabort = () => request.abort();
    request.open("POST", address);
    request.send(body);
  });
}

/** @returns its JSON; raises an Error with the server's sentence and status where it refused */
async function answered(address, options, ask = fetch) {
  let response, body;
  try {
    response = await ask(address, options);
    body = await response.json();
  } catch {
    throw new Error(response ? T.documents.refused(response.status) : T.documents.lost);
  }
  if (response.ok) return body;
  throw Object.assign(new Error(translated(body?.error?.message) ?? T.documents.refused(response.status)), { status: response.status });
}

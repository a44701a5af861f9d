// What can be done with conversations from the sidebar: pin, delete with undo, export, import. Each says what it did.

import { confirmDialog, toast } from "./dialog.js";
import { chooseFile, download, today } from "./files.js";
import { T } from "./texts.js";
import { exportJson, exportMarkdown, importChats } from "./transfer.js";

const ICONS = {
  pin: "M9 4h6l-.8 6 3.3 3.5h-11L9.8 10zM12 13.5V20",
  rename: "M4.5 19.5l1-4L16.6 4.4a1.8 1.8 0 0 1 2.5 0l.5.5a1.8 1.8 0 0 1 0 2.5L8.5 18.5z",
  export: "M12 4v11M7.5 11l4.5 4.5 4.5-4.5M5 20h14",
  import: "M12 15.5V4.5M7.5 9 12 4.5 16.5 9M5 20h14",
  delete: "M5 7h14M9.5 7V4.5h5V7M7 7l.8 12.5h8.4L17 7",
};

const CHATS = ".json,.jsonl,.zip,application/json,application/zip";

export class Actions {
  /** @param {{ store: object, current(): string | null, onOpen(id: string): void, onNew(): void }} options */
  constructor({ store, current, onOpen, onNew }) {
    Object.assign(this, { store, current, onOpen, onNew });
  }

  /** The menu of one line of the list. */
  forRow(row, onDelete) {
    const { conversation, title } = row;
    const { id, pinned } = conversation;
    return [
      { label: pinned ? T.sidebar.unpin : T.sidebar.pin, icon: ICONS.pin, act: () => this.#pin(id, !pinned) },
      { label: T.sidebar.rename, icon: ICONS.rename, act: () => row.rename() },
      { label: T.sidebar.exportMarkdown, icon: ICONS.export, act: () => this.#exportMarkdown(id, title) },
      { label: T.sidebar.exportJson, icon: ICONS.export, act: () => this.#exportJson([id], fileName(title)) },
      { label: T.sidebar.delete, icon: ICONS.delete, act: onDelete, isDanger: true },
    ];
  }

  /** The menu of all of them. */
  forAll() {
    return [
      { label: T.sidebar.import, icon: ICONS.import, act: () => this.#import() },
      { label: T.sidebar.exportAll, icon: ICONS.export, act: () => this.#exportJson(null, `llama2-chat ${today()}`) },
      { label: T.sidebar.deleteAll, icon: ICONS.delete, act: () => this.#deleteAll(), isDanger: true },
    ];
  }

  rename(id, title) {
    return attempt(() => this.store.updateConversation(id, (old) => Object.assign(old, { title, renamed: true })));
  }

  delete({ conversation: { id }, title }) {
    return attempt(async () => {
      const wasOpen = id === this.current();
      const undo = await this.store.deleteConversation(id);
      if (wasOpen) this.onNew();
      if (wasOpen && this.store.private) return; // the page has left the private chat, and its store is gone
      this.#offerUndo(T.sidebar.deleted(title), undo, wasOpen ? id : null);
    });
  }

  #pin(id, pinned) {
    return attempt(() => this.store.updateConversation(id, (old) => Object.assign(old, { pinned })));
  }

  #exportMarkdown(id, title) {
    return attempt(async () => download(await exportMarkdown(this.store, id), `${fileName(title)}.md`));
  }

  #exportJson(ids, name) {
    return attempt(async () => download(await exportJson(this.store, ids), `${name}.json`));
  }

  #deleteAll() {
    return attempt(async () => {
      if (!(await confirmDialog(this.store.shared ? T.sidebar.deleteAllSharedQuestion : T.sidebar.deleteAllQuestion, T.sidebar.deleteAllYes))) return;
      const open = this.current();
      const undo = await this.store.deleteAll();
      this.onNew();
      if (!this.store.private) this.#offerUndo(T.sidebar.deletedAll, undo, open);
    });
  }

  #offerUndo(text, undo, open) {
    const onAction = () =>
      attempt(async () => {
        await undo();
        if (open) this.onOpen(open);
      });
    toast(text, { action: T.sidebar.undo, onAction });
  }

  #import() {
    chooseFile(CHATS, (file) => attempt(async () => toast(sentenceOf(await importChats(this.store, file)))));
  }
}

/** Errors of ours are sentences for people; others are for the console. */
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    const isOurs = error.constructor === Error;
    if (!isOurs) console.error(error);
    toast(isOurs ? error.message : T.sidebar.failed);
  }
}

function sentenceOf({ conversations, messages, skipped, unreadable }) {
  if (!conversations && !messages && unreadable) return T.sidebar.unreadable;
  const imported = T.sidebar.imported(conversations, messages);
  return skipped && (conversations || messages) ? `${imported} ${T.sidebar.importedInPart(skipped)}` : imported;
}

/** A title as the name of a file that every system takes. */
function fileName(title) {
  const letters = title.replace(/[^\p{L}\p{M}\p{N} _-]+/gu, " ").replace(/\s+/g, " ");
  return [...letters].slice(0, 60).join("").trim() || "chat";
}

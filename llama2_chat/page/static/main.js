// Puts the page together: waits for Gradio's frame, fills the column #chat, and ties store, settings, transcript, box and
// sidebar to the open conversation.

import { Chat } from "./chat.js";
import { Composer } from "./composer.js";
import { toast } from "./dialog.js";
import { offerBox, watchFocus } from "./focus.js";
import { buildFrame } from "./frame.js";
import { keep, kept } from "./kept.js";
import { addShortcuts, leaveCompositionsAlone } from "./keys.js";
import { completeLogin } from "./login.js";
import { ofProfile } from "./profile.js";
import { Settings } from "./settings.js";
import { makeSidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import { T } from "./texts.js";
import { Transcript } from "./transcript.js";

const DRAFT = "llama2-chat.draft"; // of a conversation that has not begun

const frame = new Promise((resolve) => {
  const look = () => {
    const element = document.querySelector("#chat");
    if (element) resolve(element);
    else if (!completeLogin()) setTimeout(look, 20);
  };
  look();
});

async function readState() {
  const response = await fetch("page/state");
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response.json();
}

async function start() {
  const known = readState().then(async (state) => [state, await openStore(state)]); // while Gradio builds its frame
  known.catch(() => {}); // a login is all that there is without one
  const element = await frame; // where a login is needed, the page is loaded anew after it
  let [[state, store]] = await Promise.all([known, known.then(([first]) => Settings.ready(first))]);
  const draft = ofProfile(DRAFT, state.profile);
  const parts = buildFrame(element, state);
  const settings = new Settings(state, { onChange: () => chat.count() });
  const transcript = new Transcript(parts.transcript, {
    onEdit: (message, text) => chat.edit(message, text),
    onRetry: (message) => chat.retry(message),
    onSame: (message) => chat.sameAgain(message),
    onContinue: (message) => chat.continue(message),
    onBranch: (message, step) => chat.branch(message, step),
    onExample: (text) => composer.running || chat.send(text),
  });
  const composer = new Composer(parts.composer, {
    onSend: (text) => {
      keep(draft, "");
      chat.send(text);
    },
    onQueue: (waits) => chat.queue(waits),
    onStop: () => chat.stop(),
    onEditLast: () => chat.editLast(),
    onInput: (text) => {
      if (!chat.id) hooks.onDraft(text);
      chat.keepDraft(text);
    },
  });
  watchFocus(composer.area, parts.transcript);
  const hooks = {
    state: () => state,
    onSaid: (text) => (parts.live.textContent = text),
    onDraft: (text) => store.private || keep(draft, text),
    onTitle: (conversation) => {
      document.title = conversation ? `${conversation.title} – ${T.title}` : T.title;
      parts.title.textContent = conversation?.title ?? T.title;
    },
    onOpened: (conversation) => {
      hooks.onTitle(conversation);
      const hash = conversation && !store.private ? `#${conversation.id}` : "";
      if (location.hash !== hash) history.pushState(null, "", hash || location.pathname + location.search);
      sidebar.refresh();
    },
  };
  let chat, sidebar;

  function use(opened) {
    store = opened;
    chat?.close();
    chat = new Chat({ store, settings, transcript, composer, hooks });
    parts.sidebar.replaceChildren();
    sidebar = makeSidebar(parts.sidebar, {
      store,
      current: () => chat.id,
      onOpen: (id, messageId) => (parts.sides.closeSheet(), chat.open(id, messageId)),
      onNew: leavePrivate,
      onPrivate: goPrivate,
      onClose: () => parts.sides.closeSheet(),
    });
    document.body.classList.toggle("private", store.private);
  }

  async function goPrivate() {
    parts.sides.closeSheet();
    use(await openStore({ private: true }));
    chat.startNew();
  }

  async function leavePrivate() {
    parts.sides.closeSheet();
    if (store.private) use(await openStore(state));
    chat.startNew(kept(draft));
  }

  const linked = () => location.hash.slice(1) || null;
  const openLinked = () => (linked() ? chat.open(linked()) : chat.startNew(kept(draft)));
  addEventListener("popstate", async () => {
    if (store.private) use(await openStore(state));
    else if (linked() === chat.id) return;
    await openLinked();
  });
  parts.onNew = leavePrivate;
  use(store);
  if (!store.persistent) toast(T.header.memoryOnly);
  addShortcuts({
    onEscape: () => parts.sides.escape() || chat.stop(),
    onSearch: () => (parts.sides.open("sidebar"), sidebar.focusSearch()),
    onNew: () => (leavePrivate(), composer.focus()),
    onSettings: () => parts.sides.toggle("settings"),
  });
  await openLinked();
  offerBox();
  watch(state, parts, (newer) => {
    state = newer;
    settings.fitWindow(state.contextLength);
    chat.count();
  });
}

/** Keep the line about the model up to date, while there is something to come. */
async function watch(state, parts, onChange) {
  for (;;) {
    const calm = state.state === "ready";
    parts.status.hidden = calm;
    parts.status.className = `status ${state.state}`;
    parts.status.textContent = calm ? "" : state.line;
    parts.model.textContent = calm ? state.line : "";
    parts.model.title = state.why;
    parts.notice.textContent = state.notice;
    if (calm && !state.changes) return;
    await new Promise((resolve) => setTimeout(resolve, calm || state.state === "failed" ? 10_000 : 700));
    try {
      const newer = await readState();
      const changed = newer.state !== state.state || newer.model !== state.model;
      state = newer;
      if (changed) onChange(state);
    } catch {
      // The line is down: what runs says so itself.
    }
  }
}

leaveCompositionsAlone();
start();

// Puts the page together, before Gradio has built the settings: ties store, settings, transcript, box and sidebar to the
// open conversation.

import { Adapter } from "./adapter.js";
import { Chat } from "./chat.js";
import { Completing } from "./completing.js";
import { Composer } from "./composer.js";
import { h, toast } from "./dialog.js";
import { Documents } from "./documents.js";
import { offerBox, watchFocus } from "./focus.js";
import { buildFrame } from "./frame.js";
import { startGradio } from "./gradio.js";
import { keepOfTab, keptOfTab } from "./kept.js";
import { addShortcuts, leaveCompositionsAlone } from "./keys.js";
import { completeLogin } from "./login.js";
import { isStart, Presets, startOf } from "./presets.js";
import { ofProfile } from "./profile.js";
import { Settings } from "./settings.js";
import { makeSidebar } from "./sidebar.js";
import { Start } from "./start.js";
import { openStore } from "./store.js";
import { T } from "./texts.js";
import { Transcript } from "./transcript.js";
import { translated } from "./translated.js";

const DRAFT = "llama2-chat.draft"; // of a conversation that has not begun
const DRAFT_START = "llama2-chat.draft-start"; // how it starts, if not as the settings say for all
const DRAFT_ADAPTER = "llama2-chat.draft-adapter"; // who answers in it, if not the model itself
const DRAFT_DOCUMENTS = "llama2-chat.draft-documents"; // that it is about: their ids
const STATE_MS = 20_000;

/** What the server says of its model and this visitor; null where nobody has logged in. */
async function readState() {
  const response = await fetch("page/state", { signal: AbortSignal.timeout(STATE_MS) }); // a line may be dead without a word
  if (response.status === 401) return null;
  if (!response.ok) throw new Error(`page/state was answered with ${response.status}`);
  return response.json();
}

/** As readState, tried until the server can be reached. */
async function firstState() {
  for (;;) {
    try {
      const state = await readState();
      document.querySelector(".unreachable")?.remove();
      return state;
    } catch (error) {
      console.error(error);
      if (!document.querySelector(".unreachable")) document.body.append(h("p", { class: "unreachable", role: "status" }, T.connection.unreachable));
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

let saidUnkept = false;

/** Once: the browser has no room for a short text. */
function sayUnkept() {
  if (!saidUnkept) toast(T.header.unkept);
  saidUnkept = true;
}

/** There is something to type into: loading.js no longer loads the page anew. */
const begin = () => (dispatchEvent(new Event("begun")), true);
/** It does, if there is nothing yet. */
const giveUp = () => dispatchEvent(new Event("stuck"));

async function start() {
  let state = await firstState();
  if (!state) {
    return startGradio(() => completeLogin() && begin(), giveUp); // after it, the page is loaded anew
  }
  let store = await openStore(state);
  // A line that is down is said beside the list alone, and by what waits for it.
  store.onPersistence(() => store.problem && store.problem !== T.syncing.offline && toast(store.problem, { seconds: 12 }));
  const draft = ofProfile(DRAFT, state.profile);
  const draftDocuments = ofProfile(DRAFT_DOCUMENTS, state.profile);
  const draftStart = ofProfile(DRAFT_START, state.profile);
  const draftAdapter = ofProfile(DRAFT_ADAPTER, state.profile);
  const parts = buildFrame(state);
  const resetStart = () => (conversationStart.show(null), chat.chooseStart(null));
  const settings = new Settings(state, { onChange: () => chat.count(), onReset: resetStart, onUnkept: sayUnkept });
  const conversationStart = new Start({
    presets: new Presets(state),
    controls: state.controls,
    forAll: () => settings.readStart(),
    onChange: (chosen) => chat.chooseStart(chosen),
    onOpen: () => parts.sides.openAt("settings", "#preset"),
    onUnkept: sayUnkept,
  });
  const adapter = new Adapter({ onChange: (name) => chat.chooseAdapter(name) });
  adapter.offer(state);
  const transcript = new Transcript(parts.transcript, {
    onEdit: (message, text) => chat.edit(message, text),
    onRetry: (message) => chat.retry(message),
    onSame: (message) => chat.sameAgain(message),
    onCompare: (message) => chat.compare(message),
    onKeep: (message) => chat.keep(message),
    onContinue: (message) => chat.continue(message),
    onBranch: (message, step) => chat.branch(message, step),
    onEditing: (message, text) => chat.keepEditing(message, text),
    onConfirm: (message, ...said) => chat.confirm(message, ...said),
    door: conversationStart.door,
    onExample: (text) => composer.running || chat.send(text),
  });
  const composer = new Composer(parts.composer, {
    onSend: (text) => chat.send(text),
    onQueue: (waits) => chat.queue(waits),
    onStop: () => chat.stop(),
    onEditLast: () => chat.editLast(),
    onInput: (text) => {
      if (!chat.id) hooks.onDraft(text);
      chat.keepDraft(text);
    },
  });
  const documents = new Documents(parts.composer, state.documents, {
    talk: () => chat.talk,
    onChoose: (change, talk) => chat.chooseDocuments(change, talk),
    onBrought: (talk, isWhole) => chat.brought(talk, isWhole),
    onSaid: (text) => (parts.live.textContent = text),
  });
  watchFocus(composer.area, parts.transcript);
  const { profile } = state;
  const withAdapter = { read: () => ({ ...settings.read(), adapter: chat.talk.adapter }) };
  const completing = new Completing(parts, { settings: withAdapter, profile, onSaid: (text) => (parts.live.textContent = text) });
  completing.show(!state.chats);
  const hooks = {
    state: () => state,
    onSaid: (text) => (parts.live.textContent = text),
    onDraft: (text) => store.private || keepOfTab(draft, text) || sayUnkept(),
    newDraft: () => (store.private ? "" : keptOfTab(draft)),
    onDraftDocuments: (ids) => store.private || keepOfTab(draftDocuments, ids.join(" ")) || sayUnkept(),
    newDocuments: () => (store.private ? [] : keptOfTab(draftDocuments).split(" ").filter(Boolean)),
    onDraftStart: (chosen) => store.private || keepOfTab(draftStart, chosen ? JSON.stringify(chosen) : "") || sayUnkept(),
    onDraftAdapter: (name) => store.private || keepOfTab(draftAdapter, name) || sayUnkept(),
    newAdapter: () => (store.private ? "" : keptOfTab(draftAdapter)),
    newStart: () => (store.private || !state.controls.length ? null : readStart(keptOfTab(draftStart))),
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
    chat = new Chat({ store, settings, start: conversationStart, adapter, transcript, composer, documents, hooks });
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
    chat.startNew();
  }

  const linked = () => location.hash.slice(1) || null;
  const openLinked = async () => (linked() ? chat.open(linked()) : chat.startNew());
  addEventListener("popstate", async () => {
    if (store.private) use(await openStore(state));
    else if (linked() === chat.id) return;
    await openLinked();
  });
  parts.onNew = leavePrivate;
  use(store);
  begin();
  if (!store.persistent && !store.shared) (saidUnkept = true), toast(T.header.memoryOnly);
  addShortcuts({
    onEscape: () => parts.sides.escape() || chat.stop(),
    onSearch: () => (parts.sides.open("sidebar"), sidebar.focusSearch()),
    onNew: () => (leavePrivate(), composer.focus()),
    onSettings: () => parts.sides.toggle("settings"),
  });
  const { homeless, sent } = await chat.drafts.recover().catch(() => ({ homeless: "", sent: [] }));
  if (sent.includes(hooks.newDraft())) hooks.onDraft("");
  if (homeless.startsWith(hooks.newDraft())) hooks.onDraft(homeless);
  await openLinked().catch((error) => {
    console.error(error);
    chat.startNew();
  });
  offerBox();
  const hasSettings = state.controls.length > 0; // without them, the page needs nothing of Gradio's
  if (hasSettings) startGradio(() => settings.attach((panel) => (conversationStart.attach(), adapter.attach(), parts.addSettings(panel))));
  watch(state, parts, (newer) => {
    state = newer;
    settings.useDefaults(state.defaults);
    settings.fitWindow(state.contextLength);
    adapter.offer(state);
    completing.show(!state.chats);
    chat.count();
  });
}

/** @returns what was kept of how a conversation starts; null where that is nothing */
function readStart(text) {
  try {
    const start = JSON.parse(text);
    return isStart(start) ? startOf(start) : null;
  } catch {
    return null;
  }
}

/** Keep the line about the model up to date, while there is something to come. */
async function watch(state, parts, onChange) {
  let said = "ready";
  for (;;) {
    const calm = state.state === "ready";
    if (state.state !== said) parts.live.textContent = translated(state.line); // its figures change too often to be listened to
    said = state.state;
    parts.status.hidden = calm;
    parts.status.className = `status ${state.state}`;
    parts.status.textContent = calm ? "" : translated(state.line);
    parts.model.textContent = calm ? translated(state.line) : "";
    parts.model.title = state.why;
    parts.notice.textContent = translated(state.notice);
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
start().catch((error) => {
  giveUp();
  throw error;
});

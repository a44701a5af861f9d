"""The sidebar on a page of its own, with stand-ins for what the rest of the page gives it."""

INDEX = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Sidebar</title>
  <link rel="stylesheet" href="stand-in.css"><link rel="stylesheet" href="sidebar.css">
</head>
<body><main id="chat"><aside id="sidebar"></aside></main><script type="module" src="start.js"></script></body>
</html>
"""

# Colours and buttons as on the page.
STYLE = """
:root { --text: #1e2330; --muted: #5b6376; --line: #e1e4eb; --surface: #ffffff; --raised: #f3f4f8; --accent: #4346c8;
  --danger: #b3261e; --radius: 12px; --side: 272px; color-scheme: light; }
:root:has(body.dark) { --text: #e7e9f0; --muted: #a3abbd; --line: #2e3443; --surface: #14171f; --raised: #1d212c;
  --accent: #a9b0ff; --danger: #ff9b93; color-scheme: dark; }
body { margin: 0; background: var(--surface); color: var(--text); font: 16px/1.6 system-ui, sans-serif; }
#sidebar { width: 280px; height: 100vh; }
#chat button { font: inherit; font-size: 14px; border: 1px solid var(--line); border-radius: 8px; padding: 6px 12px; }
#chat button:hover:not(:disabled) { background: var(--raised); }
.icon { fill: none; stroke: currentColor; stroke-width: 1.75; stroke-linecap: round; stroke-linejoin: round; }
.visually-hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.toast { position: fixed; bottom: 8px; left: 300px; background: var(--text); color: var(--surface); }
"""

DIALOG = """
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}
export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", "icon");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}
export function toast(text, { action, onAction } = {}) {
  document.querySelector(".toast")?.remove();
  const line = h("div", { class: "toast", role: "alert" }, text);
  if (action) line.append(h("button", { onclick: () => (line.remove(), onAction()) }, action));
  document.body.append(line);
}
export async function confirmDialog(text, yes) {
  window.asked = [text, yes];
  return true;
}
"""

START = """
import { makeSidebar } from "./sidebar.js";
import { openStore } from "./store.js";
import * as transfer from "./transfer.js";

const open = { id: null };
const calls = [];
const options = { private: location.search === "?private" };
const store = await openStore(options);
const show = (id) => ((open.id = id), sidebar.refresh());
const hooks = {
  onOpen: (...what) => (calls.push(["open", ...what]), show(what[0])),
  onNew: () => (calls.push(["new"]), show(null)),
  onPrivate: () => calls.push(["private"]),
};
const make = () => makeSidebar(document.querySelector("#sidebar"), { store, current: () => open.id, ...hooks });
let sidebar = make();
const id = (name) => Array.from(name, (c) => c.charCodeAt(0).toString(16)).join("").padStart(32, "0").slice(-32);
const add = async (title, daysAgo = 0, texts = [], more = {}) => {
  const time = Date.now() - daysAgo * 86_400_000;
  const records = texts.map((text, n) => ({ id: id(`${title}${n}`), conversationId: id(title), text, createdAt: n,
    parentId: n ? id(`${title}${n - 1}`) : null, role: n % 2 ? "assistant" : "user" }));
  await store.add({ id: id(title), title, renamed: false, pinned: false, createdAt: time, updatedAt: time,
    leafId: records.at(-1)?.id ?? null, ...more }, records);
};
Object.assign(window, { store, calls, show, add, id, make, refresh: () => sidebar.refresh(), ready: true,
  focusSearch: () => sidebar.focusSearch() });
"""

FILES = {"index.html": INDEX, "stand-in.css": STYLE, "dialog.js": DIALOG, "start.js": START}

"""The sidebar on a page of its own, without a transcript beside it."""

INDEX = """<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Sidebar</title>
  <link rel="stylesheet" href="page.css"><link rel="stylesheet" href="overlays.css">
  <link rel="stylesheet" href="screens.css"><link rel="stylesheet" href="sidebar.css">
</head>
<body class="sidebar-open"><main id="chat"><aside id="sidebar"></aside></main>
<script type="module" src="start.js"></script></body>
</html>
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

FILES = {"index.html": INDEX, "start.js": START}

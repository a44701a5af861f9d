// Conversations as files and back: JSON with everything, Markdown to read. What an imported file may hold is checked in
// import_check.js, other pages' files become ours in foreign_chats.js; buttons and downloads are in sidebar.js.

import { foreignChats } from "./foreign_chats.js";
import { checkConversation, checkMessage } from "./import_check.js";
import { inputOf } from "./steps.js";
import { T } from "./texts.js";
import { leafToShow, pathTo } from "./tree.js";
import { isZip, textsInZip } from "./zip.js";

const FORMAT = "llama2-chat";
const VERSION = 1;
const IN_ZIP = /(^|\/)(conversations[-\w]*\.json|[^/]+\.jsonl)$/; // as ChatGPT and llama.cpp's page name them

/**
 * All of the conversations: every branch, settings, drafts.
 * @param {string[] | null} ids null for all of them
 * @returns {Promise<Blob>} JSON, { format, version, conversations: [{ …conversation, messages: [message] }] }
 */
export async function exportJson(store, ids = null) {
  const wanted = (await store.conversations()).filter(({ id }) => !ids || ids.includes(id));
  const parts = []; // a conversation at a time: the whole may be longer than a string can be
  for (const conversation of wanted) {
    const messages = await store.messages(conversation.id);
    parts.push(parts.length ? ",\n" : "", JSON.stringify({ ...conversation, messages }));
  }
  const head = `{"format":"${FORMAT}","version":${VERSION},"conversations":[\n`;
  return new Blob([head, ...parts, "\n]}\n"], { type: "application/json" });
}

/**
 * The branch that is shown, to be read or published. What the model wrote stands as it wrote it, since it writes
 * Markdown; what the visitor typed is shown as it was typed.
 * @returns {Promise<Blob>}
 */
export async function exportMarkdown(store, id) {
  const conversation = await store.conversation(id);
  const messages = await store.messages(id);
  const shown = pathTo(messages, leafToShow(conversation, messages));
  const parts = [`# ${asWords(conversation.title || T.transfer.untitled)}`];
  for (const { role, text, end, steps = [], sources = [] } of shown) {
    if (role === "user") parts.push(`## ${T.transfer.you}`, asTyped(text));
    else parts.push(`## ${end?.model ?? T.transfer.assistant}`, ...steps.map(written), withFencesClosed(text), ...listed(sources));
  }
  return new Blob([`${parts.join("\n\n")}\n`], { type: "text/markdown" });
}

/**
 * Adds the conversations of a file that exportJson made, or that ChatGPT or llama.cpp's page exported, and changes nothing that
 * is there. What is broken in it is left out.
 * @param {Blob} file
 * @returns {Promise<{ conversations: number, messages: number, skipped: number, unreadable: number }>} how many were added; how
 *   many records were there already or made no sense; how many of these made no sense
 * @throws {Error} with a sentence to show, if it is no such file or the disk is full
 */
export async function importChats(store, file) {
  const total = { conversations: 0, messages: 0, skipped: 0, unreadable: 0 };
  for await (const entry of conversationsOf(file)) {
    const conversation = checkConversation(entry);
    const given = Array.isArray(entry?.messages) ? entry.messages : [];
    const messages = conversation ? given.map((message) => checkMessage(message, conversation.id)).filter(Boolean) : [];
    const added = conversation ? await add(store, conversation, messages) : { conversations: 0, messages: 0 };
    total.conversations += added.conversations;
    total.messages += added.messages;
    total.unreadable += (conversation ? 0 : 1) + given.length - messages.length;
    total.skipped += 1 + given.length - added.conversations - added.messages;
  }
  return total;
}

/** One after another, so that only one file of an archive is in memory. */
async function* conversationsOf(file) {
  let isEmpty = true;
  for await (const text of textsOf(file)) {
    isEmpty = false;
    yield* foreignChats(text) ?? conversationsIn(text);
  }
  if (isEmpty) throw new Error(T.transfer.notOurs);
}

async function* textsOf(file) {
  try {
    if (await isZip(file)) yield* textsInZip(file, (name) => IN_ZIP.test(name));
    else yield await file.text();
  } catch (error) {
    throw new Error(T.transfer.notOurs, { cause: error }); // broken, longer than a string can be, or gone from the disk
  }
}

function conversationsIn(text) {
  let document;
  try {
    document = JSON.parse(text);
  } catch (error) {
    throw new Error(T.transfer.notOurs, { cause: error });
  }
  if (document?.format !== FORMAT || !Number.isInteger(document.version)) throw new Error(T.transfer.notOurs);
  if (document.version > VERSION) throw new Error(T.transfer.newer);
  if (!Array.isArray(document.conversations)) throw new Error(T.transfer.notOurs);
  return document.conversations;
}

async function add(store, conversation, messages) {
  try {
    return await store.add(conversation, messages);
  } catch (error) {
    throw error.name === "QuotaExceededError" ? new Error(T.transfer.full, { cause: error }) : error;
  }
}

/** One line, in which nothing is markup. */
const asWords = (text) => text.replace(/\s+/g, " ").replace(/[\\`*_<>[\]#|~&$]/g, "\\$&");

/** What an answer was made from, by the numbers that it names. */
function listed(sources) {
  const lines = sources.map(({ number, name, page }) => `- ${asWords(`[${number}] ${T.documents.place(name, page)}`)}`);
  return lines.length ? [`${T.documents.sources}:`, lines.join("\n")] : [];
}

/** Plain words as they are; anything that Markdown would read as markup, or join to one line, in a code block. */
function asTyped(text) {
  const isPlain = !/[`*_<>[\]#|~&\\$\n]|^\s*(?:[-+=]|\d+[.)])|^ {4}|^\t|:\/\//u.test(text);
  return isPlain ? text : fenced(text);
}

/** A call of a tool, and what came of it. */
function written(step) {
  const { name, result, seconds, failed } = step;
  const outcome = failed ? `${T.steps.failed}: ${result}` : result;
  return fenced(`${name} (${T.steps.seconds(seconds)})\n${inputOf(step)}\n→ ${outcome}`);
}

function fenced(text) {
  const longest = Math.max(2, ...Array.from(text.matchAll(/`+/g), ([run]) => run.length));
  const fence = "`".repeat(longest + 1);
  return `${fence}text\n${text}\n${fence}`;
}

/** Ends a code block that the model did not, because it was stopped: it would swallow the rest of the file. */
function withFencesClosed(text) {
  let open = null;
  for (const line of text.split("\n")) {
    const [, fence, info] = /^ {0,3}(`{3,}|~{3,})(.*)$/.exec(line) ?? [];
    if (!fence) continue;
    const ends = open && fence[0] === open[0] && fence.length >= open.length && !info.trim();
    if (ends) open = null;
    else if (!open && !(fence[0] === "`" && info.includes("`"))) open = fence;
  }
  return open ? `${text}${text.endsWith("\n") ? "" : "\n"}${open}` : text;
}

// What a record of an imported file may be. A file comes from anywhere: each field that the page reads is checked here,
// so that the rest of the page can trust every record in the store. Fields of a later page pass if they are plain values.

import { isStart, startOf } from "./presets.js";

const is = {
  id: (value) => typeof value === "string" && /^[0-9a-f]{32}$/.test(value),
  text: (value) => typeof value === "string",
  title: (value) => typeof value === "string" && value.length <= 1000,
  flag: (value) => typeof value === "boolean",
  number: (value) => Number.isFinite(value),
  count: (value) => Number.isInteger(value) && value >= 0,
  measured: (value) => Number.isFinite(value) && value >= 0 && value < 1e6,
  typed: (value) => is.text(value) || is.number(value),
  time: (value) => Number.isFinite(value) && value >= 0 && value <= 8.64e15, // as far as Date goes, in milliseconds
  texts: (value) => typeof value === "object" && Object.entries(value).every(([id, text]) => is.id(id) && is.text(text)),
  documents: (value) => Array.isArray(value) && value.length <= 500 && value.every((id) => /^file-[0-9a-f]{24}$/.test(id)),
  examples: (value) => isStart({ systemPrompt: "", examples: value, reminder: "" }),
  day: (value) => typeof value === "string" && /^\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])$/.test(value),
  role: (value) => value === "user" || value === "assistant",
  reason: (value) => ["stop", "length", "cancelled", "unread", "error", "interrupted"].includes(value),
};
const or = (check, other) => (value) => value === other || check(value);
const optional = (check) => or(or(check, null), undefined);

const CONVERSATION = {
  id: is.id,
  title: is.title,
  renamed: is.flag,
  pinned: is.flag,
  createdAt: is.time,
  updatedAt: is.time,
  leafId: or(is.id, null),
  draft: optional(is.text),
  editing: optional(is.texts),
  documents: optional(is.documents),
  start: optional(isStart),
  adapter: optional(is.title),
};

// As they were typed: the server refuses what is no number with a sentence.
const SETTINGS = {
  systemPrompt: optional(is.text),
  examples: optional(is.examples),
  reminder: optional(is.text),
  today: optional(is.day),
  maxNewTokens: optional(is.typed),
  temperature: optional(is.typed),
  topP: optional(is.typed),
  topK: optional(is.typed),
  repetitionPenalty: optional(is.typed),
  seed: optional(is.typed),
  useTools: optional(is.flag),
  toolsMemory: optional(is.typed),
  adapter: optional(is.title),
  server: optional(is.title),
};

const END = {
  reason: is.reason,
  promptTokens: optional(is.count),
  completionTokens: optional(is.count),
  cachedTokens: optional(is.count),
  droppedMessages: optional(is.count),
  firstTokenS: optional(is.measured),
  tokensPerS: optional(is.measured),
  model: optional(is.text),
  seed: optional(is.typed),
  error: optional(is.text),
};

const STEP = {
  name: is.title,
  input: is.text,
  result: is.text,
  seconds: is.measured,
  failed: is.flag,
};
const MOST_STEPS = 50;
const areSteps = (value) => Array.isArray(value) && value.length <= MOST_STEPS && value.every((each) => checked(each, STEP));

const SOURCE = {
  number: is.count,
  document: is.text,
  name: is.text,
  page: is.count,
  text: is.text,
};
const MOST_SOURCES = 2000;
const areSources = (value) => Array.isArray(value) && value.length <= MOST_SOURCES && value.every((each) => checked(each, SOURCE));

const MESSAGE = {
  id: is.id,
  conversationId: is.id,
  parentId: or(is.id, null),
  role: is.role,
  text: is.text,
  createdAt: is.time,
  edited: optional(is.flag),
  answerId: optional(is.id), // a part of addresses
  end: optional((value) => Boolean(checked(value, END))),
  settings: optional((value) => Boolean(checked(value, SETTINGS))),
  steps: optional(areSteps),
  documents: optional(is.documents),
  sources: optional(areSources),
};

/** @returns {object | null} a copy of a conversation without its messages; null if one of its fields makes no sense */
export function checkConversation(value) {
  const conversation = withoutNulls(checked(value, CONVERSATION), ["queuedAfter"]);
  if (conversation?.start) conversation.start = startOf(conversation.start);
  return conversation;
}

/** @returns {object | null} as checkConversation, for a message of this conversation */
export function checkMessage(value, conversationId) {
  const message = withoutNulls(checked(value, MESSAGE), ["unasked"]);
  if (message?.conversationId !== conversationId) return null;
  if (message.end) message.end = checked(message.end, END);
  if (message.settings) message.settings = asSettings(withoutNulls(checked(message.settings, SETTINGS)));
  if (message.steps) message.steps = message.steps.map(asStep);
  if (message.sources) message.sources = message.sources.map((source) => checked(source, SOURCE));
  return message;
}

function asSettings({ examples, ...settings }) {
  return examples ? { ...settings, examples: startOf({ examples }).examples } : settings;
}

/** As the server takes it, which knows no other fields. */
function asStep({ name, input, result, seconds, failed }) {
  return { name, input, result, seconds, failed };
}

function checked(value, fields) {
  if (typeof value !== "object" || value === null || Array.isArray(value)) return null;
  const own = new Map(Object.entries(value));
  if (!Object.entries(fields).every(([name, check]) => check(own.get(name)))) return null;
  return Object.fromEntries([...own].filter(([name, field]) => Object.hasOwn(fields, name) || isHarmless(name, field)));
}

/**
 * The page reads null in parentId, leafId and how an answer ended alone; what else a record says is null, it does not have.
 * @param asking fields by which the page would ask the model, which no file may
 */
function withoutNulls(record, asking = []) {
  const isThere = ([name, field]) => !asking.includes(name) && (field !== null || name === "parentId" || name === "leafId");
  return record && Object.fromEntries(Object.entries(record).filter(isThere));
}

function isHarmless(name, field) {
  const isPlain = field === null || ["string", "number", "boolean"].includes(typeof field);
  return isPlain && name !== "deletedAt" && !(name in Object.prototype); // __proto__ and toString are in it
}

// What the server keeps of a record, and what becomes of one that two browsers have changed: pure functions on plain records.
// When they are sent and taken in is told in syncing.js and taking.js.

// What is typed and not sent, and which tools are allowed, stays in its browser.
const SHARED = ["id", "title", "renamed", "pinned", "createdAt", "updatedAt", "leafId", "documents", "start", "adapter"];

/** A conversation as the server keeps it. */
export function sharedConversation(conversation) {
  return Object.fromEntries(SHARED.filter((name) => conversation[name] !== undefined).map((name) => [name, conversation[name]]));
}

/** The conversation with these fields in place of its shared ones; what it has for this browser alone stays. */
export function withShared(conversation, shared) {
  const own = Object.entries(conversation).filter(([name]) => !SHARED.includes(name));
  return { ...Object.fromEntries(own), ...shared };
}

/**
 * A message as the server keeps it; null of one that has not reached the server. An answer under way is where it began: whoever
 * opens it reads on by its answerId.
 */
export function sharedMessage(message) {
  if (message.unasked) return null;
  if (!message.answerId) return message;
  const { steps, sources, ...begun } = message;
  return { ...begun, text: message.base ?? "" };
}

/** By what a record is compared with its copy. */
export function sentOf(kind, record) {
  return kind === "conversation" ? sharedConversation(record) : fingerprint(sharedMessage(record));
}

/** By this two versions of a record are told apart; the order of fields makes no difference. */
export function fingerprint(record) {
  const sorted = (_, value) => (value && typeof value === "object" && !Array.isArray(value) ? Object.fromEntries(Object.entries(value).sort(byName)) : value);
  const text = JSON.stringify(record, sorted);
  let hash = 0;
  for (let at = 0; at < text.length; at += 1) hash = (Math.imul(hash, 31) + text.charCodeAt(at)) | 0;
  return `${text.length} ${hash}`;
}

const byName = ([a], [b]) => (a < b ? -1 : 1);

/**
 * A conversation that was changed here and elsewhere: each field as it was changed last.
 * @param before both began with it; null where nobody knows
 */
export function mergedConversation(mine, theirs, before) {
  const isOlder = mine.updatedAt < theirs.updatedAt;
  const isMine = (name) => (before ? !isSame(mine[name], before[name]) : !isOlder);
  const merged = Object.fromEntries(SHARED.map((name) => [name, isMine(name) ? mine[name] : theirs[name]]));
  return sharedConversation({ ...merged, updatedAt: Math.max(mine.updatedAt, theirs.updatedAt) });
}

/**
 * A message of which there are two versions.
 * @returns {{ kept: object, beside: object | null }} beside: the other, which is to be another branch
 */
export function mergedMessage(mine, theirs) {
  const isOpen = ({ answerId }) => Boolean(answerId);
  if (mine.unasked || isOpen(theirs)) return { kept: mine, beside: null };
  if (isOpen(mine) || mine.text === theirs.text || theirs.text.startsWith(mine.text)) return { kept: theirs, beside: null };
  if (mine.text.startsWith(theirs.text)) return { kept: mine, beside: null };
  return { kept: theirs, beside: mine };
}

const isSame = (a, b) => fingerprint([a]) === fingerprint([b]);

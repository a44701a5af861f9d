// Conversations as trees: which messages are shown, which branch of how many, titles, groups by day. Pure functions on
// plain records; nothing here reads the page or the store.

import { T } from "./texts.js";

const LONGEST_TITLE = 48; // characters

/** Oldest first; the id decides between messages of one millisecond, so that every tab has the same order. */
export function byAge(a, b) {
  return a.createdAt - b.createdAt || (a.id < b.id ? -1 : Number(a.id > b.id));
}

/**
 * The messages from the first one down to `leafId`; none if it is null or not there. Where a parent is missing (its
 * write was lost in a crash), the path begins below the gap.
 * @param {object[]} messages of one conversation, in any order
 * @param {string | null} leafId
 * @returns {object[]}
 */
export function pathTo(messages, leafId) {
  const byId = new Map(messages.map((message) => [message.id, message]));
  const path = new Set(); // a set: parents that go in a circle, as only a broken import has them, end it
  for (let at = byId.get(leafId); at && !path.has(at); at = byId.get(at.parentId)) path.add(at);
  return [...path].reverse();
}

/**
 * The branches at a message: all that answer or replace the same thing, oldest first, and where this one stands.
 * @returns {{ list: object[], index: number }}
 */
export function siblings(messages, message) {
  const list = messages.filter(({ parentId }) => parentId === message.parentId).sort(byAge);
  return { list, index: list.findIndex(({ id }) => id === message.id) };
}

/**
 * Where the path ends when a branch is opened at `id`: the newest message without an answer below it, or itself.
 * @returns {string}
 */
export function leafBelow(messages, id) {
  const children = new Map();
  for (const message of messages) {
    if (!children.has(message.parentId)) children.set(message.parentId, []);
    children.get(message.parentId).push(message);
  }
  const self = messages.find((message) => message.id === id);
  const below = new Set([self]);
  for (const message of below) for (const child of children.get(message?.id) ?? []) below.add(child);
  const leaves = [...below].filter((message) => message && !children.has(message.id));
  return leaves.sort(byAge).at(-1)?.id ?? id;
}

/**
 * The leaf to show when a conversation is opened: the stored one as a rule. A crash may have lost it, or may have left
 * messages below it that were written: then it is the newest there is.
 * @returns {string | null} null for a conversation without messages
 */
export function leafToShow(conversation, messages) {
  const known = messages.some(({ id }) => id === conversation.leafId);
  if (known) return leafBelow(messages, conversation.leafId);
  return [...messages].sort(byAge).at(-1)?.id ?? null;
}

/**
 * A title from what a conversation begins with: its first words, at most 48 characters; "" if there are none.
 * @param {string} text
 */
export function titleOf(text) {
  const line = text
    .slice(0, 1000)
    .replace(/[\p{Cc}\s]+/gu, " ")
    .trim();
  const characters = [...new Intl.Segmenter().segment(line)].map(({ segment }) => segment); // no half emoji
  if (characters.length <= LONGEST_TITLE) return line;
  const start = characters.slice(0, LONGEST_TITLE - 1).join("");
  const words = characters[LONGEST_TITLE - 1] === " " ? start : start.replace(/ [^ ]*$/u, "");
  return `${words.trimEnd()}…`;
}

/**
 * Groups for a list, in the order in which they come: pinned ones, then by the day of the last change.
 * @param {object[]} conversations pinned first, newest first
 * @param {number} now in milliseconds
 * @returns {{ label: string, conversations: object[] }[]}
 */
export function groupByDay(conversations, now) {
  const groups = new Map();
  for (const conversation of conversations) {
    const label = conversation.pinned ? T.tree.pinned : dayOf(conversation.updatedAt, new Date(now));
    if (!groups.has(label)) groups.set(label, []);
    groups.get(label).push(conversation);
  }
  return [...groups].map(([label, conversations]) => ({ label, conversations }));
}

function dayOf(time, now) {
  const midnight = (daysAgo) => new Date(now.getFullYear(), now.getMonth(), now.getDate() - daysAgo).getTime();
  if (time >= midnight(0)) return T.tree.today; // also what another clock puts into the future
  if (time >= midnight(1)) return T.tree.yesterday;
  if (time >= midnight(7)) return T.tree.week;
  return T.tree.month(new Date(time));
}

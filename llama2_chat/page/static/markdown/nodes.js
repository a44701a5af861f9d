// From tokens to the page, node by node: nothing here is ever parsed as HTML, so there is nothing to sanitise. What was
// shown before and reads the same now is left alone, however deep, and a selection in it stays.

import { KINDS, kindOf } from "./kinds.js";

/** What is shown in an element: element -> [{token, kind, node, …}]. */
const shown = new WeakMap();

/**
 * Shows tokens in an element, and touches only what differs from what it shows already.
 * @param {Element} host
 * @param {object[]} tokens
 * @param {object} context relink: link definitions have changed, so that what holds a bracket may differ; directed:
 *   the element gives the direction of what stands in it; inLink: it is in a link.
 * @param {number} [from] how many nodes are left as they are; tokens are those after them.
 */
export function show(host, tokens, context, from = 0) {
  if (!shown.has(host)) shown.set(host, []);
  const records = shown.get(host);
  let index = from;
  for (const token of tokens) {
    const kind = kindOf(token, context);
    if (!kind) continue;
    if (!records[index]) host.append((records[index] = made(token, kind, context)).node);
    else if (!same(records[index].token, token, context)) change(records, index, token, kind, context);
    index++;
  }
  for (const { node } of records.splice(index)) node.remove();
}

/** How many nodes an element shows of tokens. */
export const count = (tokens) => tokens.filter((token) => kindOf(token, {})).length;

function same(before, now, { relink }) {
  return (
    ["type", "raw", "href", "title", "open", "loose", "skip"].every((name) => before[name] === now[name]) &&
    !(relink && now.raw.includes("["))
  );
}

function made(token, kind, context) {
  const record = { token, kind, ...kind.make(token, context) };
  showChildren(record, token, context);
  return record;
}

function change(records, index, token, kind, context) {
  const record = records[index];
  if (record.kind === kind && kind.key?.(record.token) === kind.key?.(token)) {
    kind.update?.(record, token);
    showChildren(record, token, context);
    record.token = token;
  } else {
    record.node.replaceWith((records[index] = made(token, kind, context)).node);
  }
}

function showChildren({ kind, host, node }, token, context) {
  if (kind.head) show(node.querySelector("thead"), kind.head(token), context);
  if (kind.children) show(host ?? node, kind.children(token), { ...context, ...kind.context }, token.skip);
}

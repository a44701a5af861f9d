// Conversations that other pages have exported, as records of this one: ChatGPT's conversations.json, and what the page of
// llama.cpp exports. Their ids are made from the others', so that a file that is imported twice adds nothing. What comes of it
// is checked like any other import (import_check.js).

import { T } from "./texts.js";
import { titleOf } from "./tree.js";

const CITATION = /\ue200[^\ue201]*\ue201/g; // ChatGPT's marks, which its page draws as links

/**
 * @param {string} text of a file
 * @returns {object[] | null} conversations with their messages, as exportJson writes them, null in place of one that is not read;
 *   null if it is no such file
 */
export function foreignChats(text) {
  const chats = chatsIn(text).map((chat) => {
    if (isObject(chat?.mapping)) return fromChatGpt(chat);
    return isObject(chat?.conv) && Array.isArray(chat.messages) ? fromLlamaCpp(chat) : null;
  });
  return chats.some(Boolean) ? chats : null;
}

/** What may be chats: in a list, alone, or as lines of which each "session" begins one. */
function chatsIn(text) {
  const document = parsed(text);
  if (Array.isArray(document)) return document;
  if (document && document.type !== "session") return [document];
  const chats = [];
  let chat = null;
  for (const each of text.split("\n").filter((line) => line.trim())) {
    const line = parsed(each);
    if (!isObject(line)) chats.push(null); // such as the last one of a file that was cut off
    else if (line.type === "session") chats.push((chat = { conv: line, messages: [] }));
    else chat?.messages.push(isObject(line.message) ? line.message : line);
  }
  return chats;
}

function fromChatGpt(chat) {
  const id = idOf("ChatGPT", chat.conversation_id ?? chat.id ?? `${chat.create_time} ${chat.title}`);
  const nodes = Object.entries(chat.mapping).map(([key, node]) => {
    const { author, content, create_time: time, metadata = {}, recipient = "all" } = node?.message ?? {};
    const isShown = recipient === "all" && !metadata?.is_visually_hidden_from_conversation;
    return { key, parent: node?.parent, role: author?.role, text: isShown ? textOf(content) : "", time: time * 1000, model: metadata?.model_slug };
  });
  const times = [chat.create_time * 1000, chat.update_time * 1000];
  return chatOf({ id, title: chat.title, times, nodes, current: chat.current_node });
}

/** What a person or the model said; neither calls of tools nor what they returned. */
function textOf(content) {
  if (!["text", "multimodal_text"].includes(content?.content_type)) return "";
  const texts = (Array.isArray(content.parts) ? content.parts : []).map((part) => {
    if (typeof part === "string") return part;
    if (typeof part?.text === "string") return part.text; // of what was spoken
    return part?.content_type === "image_asset_pointer" ? T.transfer.picture : "";
  });
  return texts.filter(Boolean).join("\n\n").replace(CITATION, "");
}

function fromLlamaCpp({ conv, messages }) {
  let before = null;
  const nodes = messages.filter(isObject).map((message) => {
    const { id, role, content, timestamp, model, extra, type } = message;
    const node = { key: id, parent: message.parent ?? before, role: type === "root" ? "" : role, time: timestamp, model };
    before = id;
    return { ...node, text: [content, ...attached(extra)].filter((text) => typeof text === "string" && text).join("\n\n") };
  });
  return chatOf({ id: idOf("llama.cpp", conv.id), title: conv.name, times: [nodes[0]?.time, conv.lastModified], nodes, current: conv.currNode });
}

/** The texts of files that went with a message. */
function attached(extra) {
  const files = (Array.isArray(extra) ? extra : []).filter(isObject);
  return files.map(({ type, name, content }) => (typeof content === "string" ? `${name ?? ""}\n${content}`.trim() : /^image/i.test(type) && T.transfer.picture));
}

/**
 * A conversation from nodes, of which only what a person or the model said is kept; what was said in several pieces, around
 * calls of tools, is one message.
 */
function chatOf({ id, title, times: [first, last], nodes, current }) {
  const started = validTime(first) ?? validTime(last) ?? 0;
  const byKey = new Map(nodes.map((node, at) => [String(node.key), { ...node, at, createdAt: validTime(node.time) ?? started + at }]));
  const messages = new Map();
  const above = (node, seen = new Set()) => {
    let parent = byKey.get(String(node.parent));
    while (parent && !isSaid(parent) && !seen.has(parent)) parent = (seen.add(parent), byKey.get(String(parent.parent)));
    return parent && isSaid(parent) ? parent : null;
  };
  const messageOf = (node, below = new Set()) => {
    if (!node || below.has(node)) return null; // parents in a circle
    if (messages.has(node)) return messages.get(node);
    const parent = messageOf(above(node), below.add(node));
    const isMore = parent?.role === node.role;
    const { role, createdAt, model } = node;
    const text = isMore ? `${parent.text}\n\n${node.text}` : node.text;
    const message = { id: idOf(id, node.key), conversationId: id, parentId: (isMore ? parent.parentId : parent?.id) ?? null, role, text, createdAt };
    if (role === "assistant") message.end = { reason: "stop", ...(typeof model === "string" && { model }) };
    messages.set(node, isMore ? Object.assign(message, { begins: parent }) : message);
    return message;
  };
  for (const node of byKey.values()) if (isSaid(node)) messageOf(node);
  return withMessages({ id, title, started, last, all: [...messages.values()], leaf: leafOf(byKey, messages, current, above) });
}

function leafOf(byKey, messages, current, above) {
  const node = byKey.get(String(current));
  return messages.get(node) ?? (node && messages.get(above(node)));
}

function withMessages({ id, title, started, last, all, leaf }) {
  const parents = new Set(all.map(({ parentId }) => parentId));
  const isBegun = new Set(all.map(({ begins }) => begins).filter(Boolean)); // and said whole by another
  const kept = all.filter((message) => !isBegun.has(message) || parents.has(message.id));
  const name = typeof title === "string" && title.trim() ? title.slice(0, 1000) : titleOf(kept[0]?.text ?? "");
  return {
    id,
    title: name,
    renamed: false,
    pinned: false,
    createdAt: started,
    updatedAt: validTime(last) ?? started,
    leafId: leaf?.id ?? null,
    messages: kept.map(({ begins: _, ...message }) => message),
  };
}

const isSaid = ({ role, text }) => ["user", "assistant"].includes(role) && Boolean(text.trim());
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const validTime = (time) => (Number.isFinite(time) && time > 0 && time <= 8.64e15 ? Math.round(time) : undefined);

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** 32 hexadecimal digits that are always the same for the same names. */
function idOf(...names) {
  const text = names.map(String).join("\n");
  const parts = [1, 2, 3, 4].map((seed) => {
    let hash = Math.imul(seed, 0x9e3779b1);
    for (let at = 0; at < text.length; at += 1) hash = Math.imul(hash ^ text.charCodeAt(at), 0x85ebca6b) ^ (hash >>> 13);
    return (hash >>> 0).toString(16).padStart(8, "0");
  });
  return parts.join("");
}

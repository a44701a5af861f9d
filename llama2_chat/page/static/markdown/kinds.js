// How each type of token looks: which nodes it becomes, and how they follow when it grows.

import { T } from "../texts.js";
import { CodeView } from "./code.js";
import { Formula } from "./formula.js";
import { keepReachable } from "./scrolling.js";
import { decodeEntities, h, safeImage, safeLink } from "./text.js";

// make: the node, and `host` where its children stand in another; children: the tokens in it; update: makes the node
// follow the token; key: what the node cannot follow, so that it is made anew; context: what its children should know.

const text = {
  make: (token) => ({ node: document.createTextNode(words(token)) }),
  update: ({ node }, token) => grow(node, words(token)),
};

const longText = {
  make: (token) => ({ node: h("span", {}, ...inPieces(words(token))) }),
  update: ({ node }, token) => node.replaceChildren(...inPieces(words(token))),
};

const paragraph = {
  make: (token, context) => ({ node: h("p", direction(context)) }),
  children: (token) => token.tokens,
};

const link = {
  make: ({ href, title }) => ({
    node: h("a", {
      href: safeLink(href),
      target: "_blank",
      rel: "noopener noreferrer nofollow",
      ...(title && { title: decodeEntities(title) }),
    }),
  }),
  children: (token) => {
    const words = token.text.trim(); // or there would be nothing to see and to click on
    return token.type === "link" && words ? token.tokens : [{ type: "text", raw: token.raw, text: words || token.href }];
  },
  key: ({ href, title }) => `${href} ${title}`,
  context: { inLink: true },
};

/** The address of links elsewhere, where none leads to it: models end with lists of them. */
const definition = {
  make: (token, context) => ({ node: h("p", direction(context)) }),
  children: ({ raw, href }) => {
    const [before, ...after] = raw.split(href);
    const written = (text) => ({ type: "text", raw: text, text, escaped: true });
    return after.length ? [written(before), { type: "link", raw: href, href, text: href, tokens: [written(href)] }, written(after.join(href))] : [written(raw)];
  },
};

const picture = {
  make: ({ href, text: alt }) => ({ node: h("img", { src: safeImage(href), alt: decodeEntities(alt) }) }),
  key: (token) => token.raw,
};

const htmlBlock = {
  make: (token) => ({ node: h("div", { class: "html", dir: "auto" }, ...inPieces(token.text)) }),
  update: ({ node }, { text }) => {
    if (node.childNodes.length === 1 && !ENDLESS_WORD.test(text)) grow(node.firstChild, text);
    else node.replaceChildren(...inPieces(text));
  },
};

const inline = (name) => ({ make: () => ({ node: h(name) }), children: (token) => token.tokens });

export const KINDS = {
  paragraph,
  strong: inline("strong"),
  em: inline("em"),
  del: inline("del"),
  hr: { make: () => ({ node: h("hr") }) },
  br: { make: () => ({ node: h("br") }) },
  codespan: {
    make: (token) => ({ node: h("code", { dir: "ltr" }, token.text) }),
    update: ({ node }, token) => (node.textContent = token.text),
  },
  heading: {
    make: ({ depth }, context) => ({ node: h(`h${depth}`, direction(context)) }),
    children: (token) => token.tokens,
    key: (token) => token.depth,
  },
  blockquote: {
    make: () => ({ node: h("blockquote", { dir: "auto" }) }),
    children: (token) => token.tokens,
    context: { directed: true },
  },
  list: {
    make: (token) => {
      const node = h(token.ordered ? "ol" : "ul");
      setList(node, token);
      return { node };
    },
    update: ({ node }, token) => setList(node, token),
    children: (token) => token.items,
    key: (token) => token.ordered,
  },
  list_item: {
    make: (token) => ({ node: h("li", { dir: "auto", ...(token.task && { class: "task" }) }) }),
    children: (token) => withCheckbox(token.tokens),
    key: (token) => token.task,
    context: { directed: true },
  },
  checkbox: { make: ({ checked }) => ({ node: checkbox(checked) }), key: (token) => token.checked },
  code: {
    make: (token) => {
      const view = new CodeView();
      view.update(codeOf(token), token.lang);
      return { node: view.element, view };
    },
    update: ({ view }, token) => view.update(codeOf(token), token.lang),
  },
  table: {
    make: () => {
      const host = h("tbody");
      const node = h("div", { class: "table", role: "group", "aria-label": T.markdown.table });
      node.append(h("table", { dir: "auto" }, h("thead"), host));
      return { node: keepReachable(node), host };
    },
    head: (token) => [row(token.header)],
    children: (token) => token.rows.map(row),
  },
  row: { make: () => ({ node: h("tr") }), children: (token) => token.cells },
  cell: {
    make: ({ header, align }) => ({ node: h(header ? "th" : "td", align ? { class: align } : {}) }),
    children: (token) => token.tokens.map(lineBreak),
    key: (token) => token.align,
  },
  math: {
    make: (token) => {
      const formula = new Formula(token);
      return { node: formula.element, formula };
    },
    update: ({ formula }, token) => formula.update(token),
    key: (token) => token.display,
  },
  footnote: {
    make: ({ name }) => {
      const host = h("div", { dir: "auto" });
      return { node: h("div", { class: "footnote", "data-name": name }, h("span", { class: "number" }), host), host };
    },
    children: (token) => token.tokens,
    key: (token) => token.name,
    context: { directed: true },
  },
  footnoteMark: {
    make: ({ name, raw }) => ({ node: h("span", { class: "footnote-mark", "data-name": name }, raw) }),
    key: (token) => token.name,
  },
  think: {
    make: (token) => {
      const host = h("div");
      const title = h("summary", {}, thinking(token));
      return { node: h("details", { class: "think" }, title, host), host, title };
    },
    update: ({ title }, token) => (title.textContent = thinking(token)),
    children: (token) => token.tokens,
  },
};

/** Which kind shows a token; null for what is not shown. What has no kind of its own is shown as it was written. */
export function kindOf(token, { inLink }) {
  const { type } = token;
  if (type === "space") return null;
  if (type === "def") return token.unused || !safeLink(token.href) ? definition : null;
  if (type === "text" && !token.tokens) return ENDLESS_WORD.test(token.raw) ? longText : text;
  if (type === "text") return paragraph;
  if (type === "html") return token.block ? htmlBlock : text;
  if (type === "link") return safeLink(token.href) ? link : text;
  if (type === "image" && safeImage(token.href)) return picture;
  if (type === "image") return safeLink(token.href) && !inLink ? link : text;
  return KINDS[type] ?? text;
}

/** What a text node says for a token; whatever is no text, a link that is not safe for example, is shown as written. */
function words({ type, escaped, text: said, raw }) {
  if (type === "text") return escaped ? said : decodeEntities(said);
  return type === "escape" ? said : raw;
}

// Without the line break before the closing fence, which marked keeps where the line above is blank.
const codeOf = ({ text }) => text.replace(/\n$/, "");

// A browser's time to break thousands of digits into lines grows with their square, unless they are several nodes.
const ENDLESS_WORD = /(?<!\S)\S{1000}/;

const inPieces = (text) => (ENDLESS_WORD.test(text) ? text.match(/[^]{1,1000}/gu) : [text]);

/** Appends where it can: a selection in the text before stays. */
function grow(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length));
  else node.data = text;
}

// The direction of a quotation or an item is found in its paragraphs, which must have none of their own for that.
const direction = ({ directed }) => (directed ? {} : { dir: "auto" });

const thinking = ({ open }) => (open ? T.markdown.thinking : T.markdown.thoughts);

function setList(node, { ordered, start, loose, skip }) {
  node.className = loose ? "loose" : "tight";
  if (!ordered || skip) return;
  if (start === 1) node.removeAttribute("start");
  else node.setAttribute("start", start);
}

/** marked puts the checkbox of a tight item before its text and not into it. */
function withCheckbox([first, second, ...others]) {
  if (first?.type !== "checkbox" || !second?.tokens) return [first, second, ...others].filter(Boolean);
  return [{ ...second, raw: first.raw + second.raw, tokens: [first, ...second.tokens] }, ...others];
}

function checkbox(checked) {
  const box = h("input", { type: "checkbox", disabled: "", "aria-label": checked ? T.markdown.done : T.markdown.notDone });
  box.checked = checked;
  return box;
}

const row = (cells) => ({
  type: "row",
  raw: cells.map((cell) => cell.text).join("\n"),
  cells: cells.map((cell) => ({ ...cell, type: "cell", raw: cell.text })),
});

// The one piece of HTML that is obeyed: a table's cell has no other way to begin a line.
const lineBreak = (token) => (/^<br\s*\/?>$/i.test(token.raw) ? { type: "br", raw: token.raw } : token);

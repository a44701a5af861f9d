// From Markdown to tokens: marked's, with mathematics, footnotes and <think> besides, and with bounds on what it takes.
// Nothing here knows the page.

import { Lexer, Marked, Tokenizer } from "../vendor/marked/marked.esm.js";

// Beyond these, text is shown as it was written. Answers nest three or four levels; marked's own effort grows with
// the square of the depth, and its stack ends at some thousand levels.
const MAX_BLOCK_DEPTH = 16;
const MAX_INLINE_DEPTH = 8;
// Characters in one paragraph that may begin something: each makes marked look through the rest of it.
const MAX_MARKS = 4000;
const MARK = /[*_~`[<$\\@\n]/g;
const MAX_FORMULA = 4000;
// Of a table: a row of one letter gets as many cells as the head has, so that few letters make millions.
const MAX_CELLS = 20_000;
const ENDLESS = /^[^\s<]{2000}/; // no address is so long, and marked's time grows with the square of it
// Text is read in pieces: marked looks from each letter through the rest of it for the @ of an address. A piece ends
// where no address can be, if there is such a place.
const PIECE = 500;
const PIECE_OF = /^[^]{0,500}[^!-~]/;
// A browser shows one space for them, and marked's time grows with their square.
const MANY_SPACES = / {64,}/g;
const SPACES = " ".repeat(64);
const MATHS = /\$|\\[([]/;

/**
 * The tokens of a Markdown text.
 * @param {string} text
 * @param {{links?: Record<string, {href: string, title: string}>, open?: boolean}} [options] links: definitions that
 *   stand elsewhere; open: more text will follow, so that what is not closed yet may still be closed.
 * @returns {{tokens: object[], links: Record<string, {href: string, title: string}>}}
 */
export function lex(text, { links = {}, open = false } = {}) {
  const lexer = new BoundedLexer({ ...MARKED.defaults, tokenizer: new BoundedTokenizer() });
  lexer.open = open;
  Object.assign(lexer.tokens.links, links);
  const tokens = lexer.lex(text);
  if (!open) for (const definition of lexer.definitions) definition.unused = !lexer.followed.has(definition.href);
  return { tokens, links: lexer.tokens.links };
}

class BoundedLexer extends Lexer {
  blockDepth = 0;
  inlineDepth = 0;
  definitions = []; // of addresses: [name]: https://…
  followed = new Set(); // addresses of those that a link names
  maths = false; // whether the paragraph may hold a formula

  blockTokens(text, tokens = [], clipped) {
    if (this.blockDepth >= MAX_BLOCK_DEPTH) {
      this.state.top = true;
      if (text) tokens.push(plain(text));
      return tokens;
    }
    this.blockDepth++;
    try {
      return super.blockTokens(text, tokens, clipped);
    } finally {
      this.blockDepth--;
    }
  }

  inlineTokens(text, tokens = []) {
    if (this.inlineDepth >= MAX_INLINE_DEPTH || marks(text) > MAX_MARKS) {
      tokens.push(plain(text));
      return tokens;
    }
    this.inlineDepth++;
    if (this.inlineDepth === 1) this.maths = MATHS.test(text);
    try {
      return super.inlineTokens(text.replace(MANY_SPACES, SPACES), tokens);
    } finally {
      this.inlineDepth--;
    }
  }
}

class BoundedTokenizer extends Tokenizer {
  table(text) {
    const underline = /^[^\n]*\n([ |:-]+)(?:\n|$)/.exec(text)?.[1];
    if (!underline?.includes("-")) return undefined;
    const end = text.indexOf("\n\n");
    const whole = end < 0 ? text : text.slice(0, end);
    const cells = underline.split("|").length * whole.split("\n").length;
    return cells > MAX_CELLS ? asWritten(whole) : super.table(text);
  }

  def(text) {
    const token = super.def(text);
    if (token) this.lexer.definitions.push(token);
    return token;
  }

  reflink(text, links) {
    const token = super.reflink(text, links);
    if (token?.href) this.lexer.followed.add(token.href);
    return token;
  }

  url(text) {
    return ENDLESS.test(text) ? undefined : super.url(text);
  }

  inlineText(text) {
    return super.inlineText(text.length > PIECE ? (PIECE_OF.exec(text)?.[0] ?? text.slice(0, PIECE)) : text);
  }
}

/** A token that is shown as it was written, with all its lines. */
export const asWritten = (text) => ({ type: "html", block: true, raw: text, text });

const plain = (text) => (text.includes("\n") ? asWritten(text) : { type: "text", raw: text, text, escaped: true });

const marks = (text) => text.match(MARK)?.length ?? 0;

// $$ … $$ or \[ … \] on lines of their own; blank lines may stand between if the opening stands alone on its line.
const mathBlock = {
  name: "mathBlock",
  level: "block",
  start: (text) => startOfLine(text, /\n {0,3}(?:\$\$|\\\[)/),
  tokenizer(text) {
    const opening = /^ {0,3}(\$\$|\\\[)([ \t]*\n)?/.exec(text);
    if (!opening) return undefined;
    const begin = opening[0].length;
    const close = opening[1] === "$$" ? "$$" : "\\]";
    const body = text.slice(begin, begin + MAX_FORMULA);
    const length = body.indexOf(close);
    const formula = length < 0 ? body : body.slice(0, length);
    if (!opening[2] && /\n[ \t]*\n/.test(formula)) return undefined;
    if (length < 0) {
      // Only outside of lists and quotations: whether those have changed is told from their text alone.
      const pending = this.lexer.open && this.lexer.blockDepth === 1 && begin + body.length === text.length;
      return pending ? { type: "math", raw: text, text: formula, display: true, open: true } : undefined;
    }
    const after = /^[ \t]*(?:\n|$)/.exec(text.slice(begin + length + 2));
    if (!after || !formula.trim()) return undefined;
    const raw = text.slice(0, begin + length + 2 + after[0].length);
    return { type: "math", raw, text: formula, display: true, open: false };
  },
};

// \( … \), \[ … \], $$ … $$, and $ … $ by pandoc's rule: no space inside next to the signs, and no digit or letter
// after, so that prices stay prices.
const mathInline = {
  name: "mathInline",
  level: "inline",
  start(text) {
    return this.lexer.maths ? text.search(MATHS) : undefined; // asked at each piece of text: quadratic
  },
  tokenizer(text, tokens) {
    const pair = PAIRS.find(([opening]) => text.startsWith(opening));
    if (pair) return delimited(text, pair);
    if (text[0] !== "$" || /[\w$]$/.test(tokens.at(-1)?.raw ?? "")) return undefined;
    const match = /^\$(?![\s$])((?:[^$\\\n]|\\[^\n]){1,1000})\$(?![\w$])/.exec(text);
    return match && !/\s$/.test(match[1]) ? formula(match[0], match[1], false) : undefined;
  },
};

const PAIRS = [
  ["$$", "$$", true],
  ["\\[", "\\]", true],
  ["\\(", "\\)", false],
];

function delimited(text, [opening, closing, display]) {
  const length = text.slice(2, 2 + MAX_FORMULA).indexOf(closing);
  const body = text.slice(2, 2 + length);
  return length > 0 && body.trim() ? formula(opening + body + closing, body, display) : undefined;
}

const formula = (raw, text, display) => ({ type: "math", raw, text, display, open: false });

// [^name]: text, with lines that are indented below it.
const footnote = {
  name: "footnote",
  level: "block",
  tokenizer(text) {
    const match = /^\[\^([^\]\s]{1,64})\]:[ \t]*([^\n]*(?:\n+(?: {2,}|\t)[^\n]+)*)(?:\n|$)/.exec(text);
    if (!match) return undefined;
    const body = match[2].replace(/^(?: {1,4}|\t)/gm, "");
    this.lexer.state.top = true;
    return { type: "footnote", raw: match[0], name: match[1], tokens: this.lexer.blockTokens(body, []) };
  },
};

const footnoteMark = {
  name: "footnoteMark",
  level: "inline",
  tokenizer(text) {
    const match = /^\[\^([^\]\s]{1,64})\]/.exec(text);
    return match ? { type: "footnoteMark", raw: match[0], name: match[1] } : undefined;
  },
};

// What a model thinks before it answers. Not closed yet, it reaches to the end.
const think = {
  name: "think",
  level: "block",
  start: (text) => startOfLine(text, /\n {0,3}<think>/),
  tokenizer(text) {
    const opening = /^ {0,3}<think>\n*/.exec(text);
    if (!opening) return undefined;
    const end = text.indexOf("</think>");
    const raw = end < 0 ? text : text.slice(0, end + "</think>".length) + /^\s*/.exec(text.slice(end + 8))[0];
    this.lexer.state.top = true;
    const tokens = this.lexer.blockTokens(text.slice(opening[0].length, end < 0 ? undefined : end).trimEnd(), []);
    return { type: "think", raw, tokens, open: end < 0 };
  },
};

/** Where in a paragraph a line begins that pattern matches; a paragraph ends at a blank line, so no further is looked. */
function startOfLine(text, pattern) {
  const end = text.indexOf("\n\n");
  return pattern.exec(end < 0 ? text : text.slice(0, end))?.index;
}

const DOLLARS = /\$(?![\s$])[^$\n]{0,999}[^\s$]\$(?![\w$])/g;

// In a chat a line break is meant: poems and addresses come without two spaces at the end.
const MARKED = new Marked({ gfm: true, breaks: true });
MARKED.use({
  extensions: [mathBlock, mathInline, footnote, footnoteMark, think],
  // An asterisk or underscore within a formula is no emphasis.
  hooks: { emStrongMask: (text) => text.replace(DOLLARS, (formula) => "a".repeat(formula.length)) },
});

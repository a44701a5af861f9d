// Which part of a growing text must be read again. A block is finished once another has begun after it; of a long list
// or table, all items or rows but the last two are. What is finished is read once more at the very end, as a whole, so
// that a streamed answer always ends as the same nodes as one that is shown at once.

import { asWritten, lex } from "./lexer.js";
import { count, show } from "./nodes.js";

const MAX_LENGTH = 300_000; // characters; beyond, a text is shown as it was written
const MAX_LINES = 10_000; // the same; each makes an element or two
const OPEN_PARTS = 2; // of a list or table: the next line may still belong to the last item, the one before may get a blank line

export class Blocks {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.#forget();
  }

  /** Shows a text so far; done: it is whole. */
  show(text, done) {
    this.tooMuch = text.length > MAX_LENGTH || hasMoreLines(text, MAX_LINES);
    if (done || this.tooMuch || !text.startsWith(this.text)) this.#forget();
    this.text = text;
    const { tokens, links } = this.#lex(text, done);
    const relink = this.#adopt(links, tokens, done);
    if (relink && this.offset) return this.#showAgain(text, done);
    show(this.element, tokens, { relink }, this.finished);
    return this.#finish(tokens);
  }

  #forget() {
    this.links = {}; // the definitions so far
    this.#restart();
  }

  #restart() {
    this.finished = 0; // nodes that are finished
    this.offset = 0; // where the text after them begins
    this.part = null; // of the list or table there: how many items or rows are finished, and what it begins with
  }

  #lex(text, done) {
    if (this.tooMuch) return { tokens: [asWritten(text)], links: {} };
    const head = this.part?.head ?? "";
    const lexed = lex(head + text.slice(this.offset), { links: this.links, open: !done });
    const [first] = lexed.tokens;
    if (this.part && first) {
      first.skip = this.part.count;
      if (this.part.loose) first.loose = true;
    }
    return lexed;
  }

  // The address of a link may stand below it. A definition counts when its line is whole.
  #adopt(links, tokens, done) {
    if (!done && tokens.at(-1)?.type === "def" && !this.text.endsWith("\n")) return false;
    const fresh = Object.keys(links).filter((name) => !(name in this.links));
    for (const name of fresh) this.links[name] = links[name];
    return fresh.length > 0;
  }

  #showAgain(text, done) {
    this.#restart();
    const { tokens } = this.#lex(text, done);
    show(this.element, tokens, { relink: true });
    this.#finish(tokens);
  }

  #finish(tokens) {
    const open = firstOpen(tokens);
    const rest = this.#rest();
    const finished = tokens.slice(0, open);
    const length = lengthOf(finished, rest);
    if (length > 0) {
      this.finished += count(finished);
      this.offset += length - (this.part?.head.length ?? 0);
      this.part = null;
    }
    if (length >= 0) this.#finishParts(tokens[open]);
  }

  #finishParts(token) {
    if (token?.type === "list") this.#finishItems(token);
    if (token?.type === "table") this.#finishRows(token);
  }

  #finishItems(list) {
    const finished = list.items.slice(0, -OPEN_PARTS);
    const length = lengthOf(finished, this.#rest());
    if (length > 0) this.#part("", length, finished.length, list.loose);
  }

  #finishRows(table) {
    const lines = table.raw.trimEnd().split("\n");
    const finished = lines.slice(2, -OPEN_PARTS);
    if (!finished.length || lines.length !== table.rows.length + 2) return;
    const head = lines.slice(0, 2).join("\n") + "\n";
    const length = head.length + finished.join("\n").length + 1;
    this.#part(head, length - (this.part?.head.length ?? 0), finished.length, false);
  }

  #part(head, length, number, loose) {
    this.offset += length;
    this.part = { head, loose, count: (this.part?.count ?? 0) + number };
  }

  #rest() {
    return (this.part?.head ?? "") + this.text.slice(this.offset);
  }
}

/** The index of the first block that may still change: the last one, or the one before while its first line is not whole. */
function firstOpen(tokens) {
  const blocks = tokens.flatMap(({ type }, index) => (type === "space" ? [] : [index]));
  const last = blocks.at(-1) ?? 0;
  return tokens[last]?.raw.includes("\n") ? last : (blocks.at(-2) ?? 0);
}

/** How much of a text its first tokens take; -1 if the text does not begin with what they say that they were made of. */
function lengthOf(tokens, text) {
  const raw = tokens.map((token) => token.raw).join("");
  return text.startsWith(raw) ? raw.length : -1;
}

function hasMoreLines(text, most) {
  let lines = 1;
  for (let place = text.indexOf("\n"); place >= 0 && lines <= most; place = text.indexOf("\n", place + 1)) lines++;
  return lines > most;
}

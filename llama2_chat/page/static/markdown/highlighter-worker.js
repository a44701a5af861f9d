// highlight.js in a worker: code in, lines of coloured pieces out. A grammar is loaded when the first code needs it.

import hljs from "../vendor/highlightjs/core.min.js";

// Files in vendor/highlightjs/languages/, and what else people write for them.
const LANGUAGES = Object.entries({
  ada: "", arduino: "ino", armasm: "arm asm", awk: "", bash: "sh zsh", c: "h", clojure: "clj edn", cmake: "",
  cpp: "c++ cc cxx hpp hh h++ hxx cuda cu hip metal", csharp: "cs c#", css: "", dart: "", delphi: "pas pascal dpr",
  diff: "patch", dockerfile: "docker containerfile", elixir: "ex exs", elm: "", erlang: "erl", fortran: "f90 f95 f",
  fsharp: "fs f#", glsl: "hlsl wgsl", go: "golang", gradle: "", graphql: "gql", groovy: "", haskell: "hs", http: "https",
  ini: "toml conf cfg", java: "jsp", javascript: "js jsx mjs cjs node", json: "jsonc json5 jsonl", julia: "jl",
  kotlin: "kt kts", latex: "tex", less: "", lisp: "elisp emacs-lisp", llvm: "ll", lua: "luau", makefile: "make mk mak",
  markdown: "md", matlab: "octave", nginx: "", nix: "", objectivec: "objc obj-c mm", ocaml: "ml", perl: "pl pm", php: "",
  powershell: "ps1 ps pwsh", prolog: "", protobuf: "proto", python: "py python3 gyp ipython", "python-repl": "pycon",
  r: "", ruby: "rb", rust: "rs", scala: "", scheme: "scm racket", scss: "sass",
  shell: "console shellsession terminal", sql: "mysql postgresql postgres sqlite plsql tsql", swift: "", tcl: "",
  typescript: "ts tsx mts cts", vbnet: "vb", verilog: "v sv systemverilog", vhdl: "", vim: "", x86asm: "assembly nasm",
  xml: "html xhtml svg rss vue svelte", yaml: "yml",
}).flatMap(([file, others]) => [file, ...others.split(" ")].map((name) => [name, file])); // prettier-ignore
const FILES = new Map(LANGUAGES);
const WITHIN = { xml: ["css", "javascript"], markdown: ["xml"], shell: ["bash"], dockerfile: ["bash"], "python-repl": ["python"] };

// highlight.js's scopes, by their first word; a scope that is not here has the colour of what it stands in.
const KINDS = new Map(
  Object.entries({
    comment: "comment quote",
    keyword: "keyword doctag selector-tag name section template-tag",
    string: "string regexp char meta-string link symbol bullet",
    number: "number literal",
    title: "title function selector-id selector-class",
    type: "type built_in class attribute attr variable template-variable params-type",
    meta: "meta",
    addition: "addition",
    deletion: "deletion",
  }).flatMap(([kind, scopes]) => scopes.split(" ").map((scope) => [scope, kind])),
);
const ENTITIES = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": '"', "&#x27;": "'" };
const registered = new Map();
let lost = 0; // grammars that did not come

addEventListener("message", async ({ data: { id, code, language, from } }) => {
  const lines = await coloured(code, language.toLowerCase(), from).catch(() => null);
  postMessage({ id, lines });
});

async function coloured(code, name, from) {
  const file = FILES.get(name);
  if (!name || !file || /[\u0001\u0002]/.test(code)) return null;
  await Promise.all([file, ...(WITHIN[file] ?? [])].map(register));
  const { value } = hljs.highlight(code, { language: file, ignoreIllegals: true });
  return inLines(value).slice(from);
}

function register(file) {
  if (!registered.has(file)) {
    const grammar = import(`../vendor/highlightjs/languages/${file}.min.js${lost ? `?${lost}` : ""}`); // a browser asks once for each
    const register = (module) => hljs.registerLanguage(file, module.default);
    const forget = (error) => {
      lost += 1;
      registered.delete(file);
      throw error;
    };
    registered.set(file, grammar.then(register, forget));
  }
  return registered.get(file);
}

/** highlight.js's HTML, spans in spans with text, as lines of flat pieces. */
function inLines(html) {
  const lines = [[]];
  const kinds = [""];
  for (const [, scope, closing, text] of html.matchAll(/<span class="([^"]*)">|(<\/span>)|([^<]+)/g)) {
    if (scope !== undefined) kinds.push(kindOf(scope) ?? kinds.at(-1));
    else if (closing) kinds.pop();
    else addText(lines, kinds.at(-1), text.replace(/&(?:lt|gt|amp|quot|#x27);/g, (entity) => ENTITIES[entity]));
  }
  return lines.filter((pieces) => pieces.length).map((pieces) => pieces.join("\u0001"));
}

function addText(lines, kind, text) {
  for (const part of text.match(/[^\n]*\n|[^\n]+$/g) ?? []) {
    lines.at(-1).push(`${kind}\u0002${part}`);
    if (part.endsWith("\n")) lines.push([]);
  }
}

/** "hljs-title function_" -> "title"; null for a scope without a colour of its own. */
function kindOf(scope) {
  return KINDS.get(scope.replace("hljs-", "").split(" ")[0]) ?? null;
}

"""What the page says in each language, as its modules say it: they are run by the Node that Playwright brings along."""

import ast
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright._impl._driver import compute_driver_executable

from llama2_chat.page.assets import STATIC
from llama2_chat.page.language import LANGUAGES

ERRORS = {"ApiError", "Busy", "ChatError", "ModelUnavailable", "NoAdapter", "NoRoom", "NotHere", "Unsafe"}
# Of each language: the tree of its texts, functions as what they give for names and for numbers; and its sentences.
READ = """
import { readFileSync } from "node:fs";
const asked = JSON.parse(readFileSync(0, "utf8"));
const NAMES = ["alpha", "beta", "gamma", "delta"], NUMBERS = [3217, 4318, 5419, 6521];
const attempt = (text, values) => { try { return String(text(...values)); } catch { return ""; } };
const spoken = (text) => ({ takes: text.length, names: attempt(text, NAMES), numbers: attempt(text, NUMBERS) });
const leaf = (text) => (typeof text === "function" ? spoken(text) : String(text));
const tree = (value) => value && typeof value === "object"
  ? Object.fromEntries(Object.entries(value).map(([name, each]) => [name, tree(each)])) : leaf(value);
const found = {};
for (const language of asked.languages) {
  const { T, SENTENCES } = await import(`./${language}/texts/${language}.js`);
  const { translated } = await import(`./${language}/translated.js`);
  const sentences = Object.fromEntries(Object.entries(SENTENCES).map(([key, text]) => [key, leaf(text)]));
  const said = Object.fromEntries(asked.sentences.map((each) => [each, translated(each)]));
  found[language] = { texts: tree(T), sentences, said };
}
console.log(JSON.stringify(found));
"""


def read_texts(folder: Path, sentences: list[str]) -> dict[str, dict[str, Any]]:
    """For each language, its "texts", its "sentences" of the server, and what is "said" for these English ones.

    folder: an empty one.
    """
    (folder / "package.json").write_text('{"type": "module"}')
    (folder / "read.js").write_text(READ)
    for language in LANGUAGES:  # as a document's import map has it
        shutil.copytree(STATIC / "texts", folder / language / "texts")
        for name in ("formats.js", "translated.js"):
            shutil.copy(STATIC / name, folder / language / name)
        (folder / language / "texts.js").write_text(f'export * from "./texts/{language}.js";')
    node, _ = compute_driver_executable()
    asked = json.dumps({"languages": sorted(LANGUAGES), "sentences": sentences})
    run = subprocess.run([node, "read.js"], cwd=folder, input=asked, capture_output=True, text=True, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def leaves(tree: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Each text with its path, such as box.send; what a function gives is one."""
    for name, value in tree.items():
        if isinstance(value, dict) and "takes" not in value:
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def sentences_in(path: Path) -> set[str]:
    """Of errors that are raised in a file of Python, and of its constants, with {} for what they name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
            found.update(text for argument in node.args for text in _texts(argument))
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.col_offset == 0 and node.value:
            found.update(_texts(node.value))
    return {text for text in found if re.search(r"^[A-Z{][^\n]* [^\n]*[.…]$", text)}


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not isinstance(node, ast.Call):
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)

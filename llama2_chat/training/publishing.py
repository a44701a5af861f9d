"""A finished model for others: a GGUF with its Modelfile, and what of its folder goes to the Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.config import read_config
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.text import first_line
from llama2_chat.training import merging
from llama2_chat.training.base_model import fetch_checkpoint
from llama2_chat.training.card import LICENCES
from llama2_chat.training.ollama import modelfile

CONVERTER = "convert_hf_to_gguf.py"  # of llama.cpp
HOW = (
    "git clone https://github.com/ggml-org/llama.cpp && "
    "pip install -r llama.cpp/requirements/requirements-convert_hf_to_gguf.txt, and then --llama_cpp llama.cpp"
)
# What others need. Checkpoints, answers and run.json, which names folders of this machine, are not among it.
PUBLIC = (
    *("README.md", "curves.png", "*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json"),
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("chat_template.jinja", "gguf/*.gguf", "gguf/Modelfile", *LICENCES),
)


class Exported(NamedTuple):
    gguf: Path
    modelfile: Path


def export_gguf(folder: Path, outtype: str, llama_cpp: Path | None) -> Exported:
    """A GGUF of the model and a Modelfile for Ollama, in the folder's gguf/.

    llama_cpp: where llama.cpp lies; None looks for its converter among the programs.
    Raises ChatError if there is no converter, if it fails, or if the folder holds an adapter or lacks what it needs.
    """
    checkpoint = fetch_checkpoint(str(folder))
    if checkpoint.adapter:
        raise ChatError(
            f"{folder} is an adapter, and a GGUF is a whole model. Merge it first: sft_trainer.py with the same flags, "
            "--resume and --merge_to, and then give the merged folder."
        )
    check_tokenizer(folder)
    converter = find_converter(llama_cpp)
    to = folder / "gguf"
    to.mkdir(exist_ok=True)
    file = to / f"{folder.resolve().name}-{outtype}.gguf"
    length = getattr(read_config(checkpoint.base), "max_position_embeddings", None)
    (to / "Modelfile").write_text(modelfile(file.name, load_tokenizer(checkpoint), length), "utf-8")
    _convert(converter, folder, file, outtype)
    return Exported(file, to / "Modelfile")


def check_tokenizer(folder: Path) -> None:
    """Raise ChatError for a SentencePiece tokenizer without its tokenizer.model.

    The converter would give all its tokens one score, and llama.cpp, which merges by scores, then reads gibberish.
    """
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    except FileNotFoundError:
        return
    if tokenizer["model"].get("byte_fallback") and not (folder / "tokenizer.model").is_file():
        raise ChatError(
            f"{folder} lacks tokenizer.model, without which llama.cpp would split texts otherwise than the model has "
            "learned. Copy it there from the base model."
        )


def find_converter(llama_cpp: Path | None) -> Path:
    """Raises ChatError, with how to get it, if llama.cpp's converter is not here."""
    found = llama_cpp / CONVERTER if llama_cpp else shutil.which(CONVERTER)
    if not (found and Path(found).is_file()):
        where = f"{llama_cpp} has no {CONVERTER}" if llama_cpp else f"{CONVERTER} of llama.cpp is not installed"
        raise ChatError(f"{where}. Get it by: {HOW}")
    return Path(found)


def _convert(converter: Path, folder: Path, file: Path, outtype: str) -> None:
    """Into a file aside, so that what has its name is whole."""
    part = file.with_suffix(".part")
    command = [sys.executable, str(converter), str(folder), "--outfile", str(part), "--outtype", outtype]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not part.is_file():
        part.unlink(missing_ok=True)
        lines = done.stderr.strip().splitlines() or ["it wrote nothing"]
        raise ChatError(f"llama.cpp's converter failed ({first_line(lines[-1])}). Its own packages: {HOW}")
    part.replace(file)


def check_is_public(folder: Path) -> None:
    """Raise ChatError for what nobody else could load."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    except FileNotFoundError:
        return
    base = config["base_model_name_or_path"]
    if base == EMBEDDED or Path(base).exists():
        raise ChatError(
            f"{folder} is an adapter for {base}, which others do not have under this name. Publish the merged model."
        )


def push(folder: Path, repo: str) -> list[str]:
    """Upload what others need to a repository on the Hub, a private one if it is new. Returns the files' names."""
    check_is_public(folder)
    names = sorted({file.relative_to(folder).as_posix() for pattern in PUBLIC for file in folder.glob(pattern)})
    if not any(name.endswith((".safetensors", ".gguf")) for name in names):
        raise ChatError(f"{folder} has no model: no file there ends with .safetensors or .gguf.")
    merging.create_repo(repo)
    merging.push(folder, repo, names)
    return names

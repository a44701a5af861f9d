"""What lies in Meta's own download, and what it says about its model: nothing is written here.

llama-2-7b-chat/ holds params.json, checklist.chk and consolidated.00.pth, of larger models more of these;
tokenizer.model lies in it or above.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.disk import not_readable
from llama2_chat.loading.shards import SAFETENSORS_NAMES, Shards, groups, joined_shape

log = logging.getLogger("llama2_chat")

WEIGHTS = "consolidated.[0-9][0-9].pth"  # and no "consolidated.00 (1).pth", which a browser makes
CHECKLISTS = ("checklist.chk", "tokenizer_checklist.chk")
CHECKLIST_LINE = re.compile(r"\s*([0-9a-fA-F]{32})\s+\*?(?:\./)?(\S+)\s*")
MD5_BYTES = 2**22  # read at once
# What Llama 2, Code Llama and the first Llama say in params.json; of any other model the tensors alone would not do.
NEEDED = {"dim": int, "n_layers": int, "n_heads": int, "norm_eps": float}
MAY_SAY = {"n_kv_heads": int, "rope_theta": float}
IGNORED = {"vocab_size", "multiple_of", "ffn_dim_multiplier", "max_batch_size", "max_seq_len"}
CHAT_NAME = re.compile(r"chat|instruct", re.IGNORECASE)
CODE_LLAMA_70B_INSTRUCT = re.compile(r"code-?llama-?70b.*instruct", re.IGNORECASE)
FIRST_LLAMA = re.compile(r"(7|13|30|65)B")  # as their folders are called
NOT_LLAMA_2 = (
    "Of models in Meta's own format, only Llama 2 and Code Llama are read here; of any other, choose the repository in "
    "transformers' format, which has a config.json."
)


def is_metas(folder: Path) -> bool:
    """Whether a folder is Meta's own download, or a part of one, rather than in transformers' format."""
    is_theirs = (folder / "params.json").is_file() or any(folder.glob(WEIGHTS))
    return is_theirs and not (folder / "config.json").is_file()


def is_chat(name: str) -> bool:
    """Whether a folder of this name holds a model that chats in Llama 2's format. Raises ModelUnavailable for one that
    chats in another, of which nothing in the folder tells."""
    if CODE_LLAMA_70B_INSTRUCT.search(name):
        raise ModelUnavailable(
            "CodeLlama-70b-Instruct chats in a format of its own, which Meta's files do not hold. Set "
            "MODEL_ID=codellama/CodeLlama-70b-Instruct-hf, or CHAT_FORMAT=none to complete texts with it."
        )
    return bool(CHAT_NAME.search(name))


def find_weights(folder: Path) -> list[Path]:
    """consolidated.00.pth and so on. Raises ModelUnavailable for a file that is not there."""
    paths = sorted(folder.glob(WEIGHTS))
    numbered = [f"consolidated.{i:02}.pth" for i in range(max(len(paths), 1))]
    listed = [name for name in _read_checklist(folder / CHECKLISTS[0]) if Path(name).match(WEIGHTS)]
    needed = ["params.json", *sorted({*numbered, *listed})]
    if lost := next((name for name in needed if not (folder / name).is_file()), None):
        raise ModelUnavailable(f"{quoted(folder)} is incomplete: {lost} is missing. Download it again.")
    return paths


def find_tokenizer(folder: Path) -> Path:
    """In the folder or above: Meta's download.sh puts one beside the folders of all models."""
    for place in (folder, folder.absolute().parent, folder.resolve().parent):
        if (place / "tokenizer.model").is_file():
            return place / "tokenizer.model"
    raise ModelUnavailable(
        f"{quoted(folder)} has no tokenizer.model, and neither has the folder above it. "
        "Copy it there from Meta's download."
    )


def check_md5(path: Path, report: Callable[[int], None] = lambda read_bytes: None) -> None:
    """Raise ModelUnavailable if a checklist beside the file names another MD5."""
    lists = {name: _read_checklist(path.with_name(name)) for name in CHECKLISTS}
    name = next((name for name, listed in lists.items() if path.name in listed), None)
    if name is None:
        log.warning("No checklist.chk lists the MD5 of %s, so it is converted unchecked", path)
        report(path.stat().st_size)
        return
    md5 = hashlib.md5(usedforsecurity=False)
    try:
        for data in _pieces(path):
            md5.update(data)
            report(len(data))
    except OSError as error:
        raise not_readable(path, error) from error
    if md5.hexdigest() != lists[name][path.name]:
        raise ModelUnavailable(
            f"{quoted(path)} is damaged or was changed: its MD5 is not the one in {name}. Download it again."
        )


def _read_checklist(path: Path) -> dict[str, str]:
    """Name and MD5 of each file that it lists, as md5sum writes them; none without a checklist."""
    if not path.is_file():
        return {}
    lines = map(CHECKLIST_LINE.fullmatch, path.read_text("utf-8-sig", "replace").splitlines())
    return {line[2]: line[1].lower() for line in lines if line}


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(MD5_BYTES):
            yield data


def read_config(folder: Path, shards: Shards) -> LlamaConfig:
    """From params.json and, where that says nothing or -1, from the tensors. Raises ModelUnavailable if the two do not
    go together."""
    params, first = _read_params(folder), shards[0]
    try:
        embedding, w1 = first["tok_embeddings.weight"], first["layers.0.feed_forward.w1.weight"]
        rows, columns = embedding.shape
    except (KeyError, ValueError) as error:
        raise ModelUnavailable(f"{quoted(folder)} holds tensors of another model. {NOT_LLAMA_2}") from error
    if params["n_layers"] > len(first):  # whose tensors we would list for a long time before we miss one
        raise ModelUnavailable(f"{quoted(folder)} lacks layers that its params.json asks for. Download it again.")
    if columns * len(shards) < params["dim"]:
        raise ModelUnavailable(
            f"{quoted(folder)} is incomplete: it has {len(shards)} of the {params['dim'] // columns} files "
            "consolidated.NN.pth of its model. Download it again."
        )
    theta = float(params.get("rope_theta") or 10_000)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=rows,
        hidden_size=params["dim"],
        intermediate_size=len(w1) * len(shards),
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params.get("n_kv_heads") or params["n_heads"],
        rms_norm_eps=params["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        max_position_embeddings=_context_length(folder.resolve().name, theta),
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        dtype=embedding.dtype,
    )
    _check_tensors(folder, config, shards)
    return config


def _context_length(name: str, theta: float) -> int:
    """Tokens, which params.json does not say: Code Llama was trained on 16,384 and turns its positions more slowly."""
    if FIRST_LLAMA.fullmatch(name):
        return 2_048
    return 16_384 if theta == 1_000_000 else 4_096


def _read_params(folder: Path) -> dict[str, Any]:
    path = folder / "params.json"
    try:
        params = json.loads(path.read_text("utf-8-sig"))
        said = NEEDED | {name: kind for name, kind in MAY_SAY.items() if params.get(name) is not None}
        valid = all(_is_number(params[name], kind) for name, kind in said.items())
        valid = valid and params["dim"] % params["n_heads"] == 0
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ModelUnavailable(f"{quoted(path)} does not describe a model. Download it again.")
    if more := sorted(name for name, value in params.items() if value and name not in {*NEEDED, *MAY_SAY, *IGNORED}):
        raise ModelUnavailable(f"{quoted(path)} says {more[0]}, which Llama 2 does not have. {NOT_LLAMA_2}")
    return dict(params)


def _is_number(value: object, kind: type) -> bool:
    """One above 0 that a model can have."""
    return isinstance(value, (int, kind)) and not isinstance(value, bool) and 0 < value < 2**31  # type: ignore[operator]


def _check_tensors(folder: Path, config: LlamaConfig, shards: Shards) -> None:
    """Raise ModelUnavailable unless all files hold just the tensors of this model, in shapes that make it whole."""
    parts = [part for group in groups(config) for part in group]
    expected = {part.source for part in parts}
    for shard in shards:
        names = {name for name in shard if name != "rope.freqs"}  # computed anew
        if odd := sorted(names ^ expected):
            what = "lacks" if odd[0] in expected else "also holds"
            raise ModelUnavailable(f"A file of weights in {quoted(folder)} {what} {odd[0]}. {NOT_LLAMA_2}")
    for part in parts:
        dtypes = {shard[part.source].dtype for shard in shards}
        if (
            joined_shape(part, shards) != part.shape
            or dtypes != {config.dtype}
            or config.dtype not in SAFETENSORS_NAMES
        ):
            raise ModelUnavailable(
                f"{part.source} in {quoted(folder)} has not the shape or precision that its params.json asks for. "
                f"{NOT_LLAMA_2}"
            )

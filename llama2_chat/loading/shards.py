"""Meta's consolidated.NN.pth as one model: where each tensor goes, how its parts are joined, and writing it down.

A model of N files was trained on N GPUs, each of which had some heads of every layer and a part of every MLP. Nothing
here holds a whole tensor in memory: files are mapped, and blocks of rows go from there to the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.disk import not_readable

BLOCK_BYTES = 2**22  # of rows that are joined or reordered at once
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
Shards = list[dict[str, Tensor]]


class Part(NamedTuple):
    """A tensor of the whole model."""

    name: str  # that transformers gives it
    source: str  # Meta's name
    join: Literal["rows", "columns", "none"]  # none: it is the same in all files
    shape: tuple[int, ...]
    heads: int = 0  # whose rows stand in another order


def groups(config: LlamaConfig) -> list[list[Part]]:
    """All tensors, by the file that they go to: the embedding, each layer, the output head."""
    size, vocabulary = config.hidden_size, config.vocab_size
    embedding = Part("model.embed_tokens.weight", "tok_embeddings.weight", "columns", (vocabulary, size))
    norm = Part("model.norm.weight", "norm.weight", "none", (size,))
    head = Part("lm_head.weight", "output.weight", "rows", (vocabulary, size))
    return [[embedding], *(_layer(config, i) for i in range(config.num_hidden_layers)), [norm, head]]


def _layer(config: LlamaConfig, index: int) -> list[Part]:
    size, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv_heads = config.num_key_value_heads or heads
    kv_size = size // heads * kv_heads
    ours, theirs = f"model.layers.{index}", f"layers.{index}"
    attention, mlp = f"{ours}.self_attn", f"{ours}.mlp"
    return [
        Part(f"{attention}.q_proj.weight", f"{theirs}.attention.wq.weight", "rows", (size, size), heads),
        Part(f"{attention}.k_proj.weight", f"{theirs}.attention.wk.weight", "rows", (kv_size, size), kv_heads),
        Part(f"{attention}.v_proj.weight", f"{theirs}.attention.wv.weight", "rows", (kv_size, size)),
        Part(f"{attention}.o_proj.weight", f"{theirs}.attention.wo.weight", "columns", (size, size)),
        Part(f"{mlp}.gate_proj.weight", f"{theirs}.feed_forward.w1.weight", "rows", (inner, size)),
        Part(f"{mlp}.up_proj.weight", f"{theirs}.feed_forward.w3.weight", "rows", (inner, size)),
        Part(f"{mlp}.down_proj.weight", f"{theirs}.feed_forward.w2.weight", "columns", (size, inner)),
        Part(f"{ours}.input_layernorm.weight", f"{theirs}.attention_norm.weight", "none", (size,)),
        Part(f"{ours}.post_attention_layernorm.weight", f"{theirs}.ffn_norm.weight", "none", (size,)),
    ]


@contextmanager
def mapped(paths: list[Path]) -> Iterator[Shards]:
    """The tensors of the files, none of which is read before it is used; what was read is let go at the end."""
    shards = [_mapped(path) for path in paths]
    try:
        yield shards
    finally:
        shards.clear()


def _mapped(path: Path) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise not_readable(path, error) from error
    except Exception as error:  # torch raises RuntimeError, UnpicklingError and what zip files and pickles break with
        if "weights_only" in str(error).lower():
            raise ModelUnavailable(
                f"{quoted(path)} holds more than tensors, and Python code in a file of weights is never run here. "
                "Download it from where the model comes from."
            ) from error
        raise ModelUnavailable(f"{quoted(path)} is damaged or cut off. Download it again.") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ModelUnavailable(f"{quoted(path)} holds something else than the tensors of a model. Download it again.")
    return tensors


def joined_shape(part: Part, shards: Shards) -> tuple[int, ...]:
    """What the parts of a tensor make together. Raises KeyError for a tensor that a file lacks."""
    shapes = [tuple(shard[part.source].shape) for shard in shards]
    if part.join == "none":
        return shapes[0]
    along = 0 if part.join == "rows" else 1
    total = sum(shape[along] for shape in shapes)
    return (*shapes[0][:along], total, *shapes[0][along + 1 :])


def blocks(part: Part, shards: Shards) -> Iterator[Tensor]:
    """The rows of a whole tensor, some at a time."""
    tensors = [shard[part.source] for shard in shards]
    if part.join == "none":
        yield tensors[0]
        return
    rows = max(1, BLOCK_BYTES // (part.shape[1] * tensors[0].element_size()))
    if part.join == "columns":
        for split in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            yield torch.cat(split, 1)
        return
    head_size = part.shape[0] // part.heads if part.heads else 1
    for tensor in tensors:
        for block in tensor.split(max(rows // head_size, 1) * head_size):
            yield _reordered(block, head_size) if part.heads else block


def _reordered(rows: Tensor, head_size: int) -> Tensor:
    """Heads whose rotary pairs stand beside each other, as Meta has them, with one half behind the other."""
    heads = rows.view(-1, head_size // 2, 2, rows.shape[1])
    return heads.transpose(1, 2).reshape(rows.shape)


def file_bytes(parts: list[Part], dtype: torch.dtype) -> int:
    """What write() writes."""
    header, data_bytes = _header(parts, dtype)
    return len(header) + data_bytes


def write(parts: list[Part], shards: Shards, path: Path) -> None:
    """A file of safetensors, block by block: their own library takes whole tensors only, all of a file at once."""
    dtype = shards[0][parts[0].source].dtype
    with path.open("wb") as file:
        file.write(_header(parts, dtype)[0])
        for part in parts:
            for block in blocks(part, shards):
                file.write(block.contiguous().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _header(parts: list[Part], dtype: torch.dtype) -> tuple[bytes, int]:
    """The head of a file of safetensors: its length in 8 bytes, then JSON; and how many bytes of data follow."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in parts:
        start, end = end, end + torch.Size(part.shape).numel() * dtype.itemsize
        entries[part.name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8
    return len(text).to_bytes(8, "little") + text, end

"""A Llama on one CUDA GPU, faster: its layers compiled, its steps recorded as CUDA graphs.

All layers share one compiled function, so that compiling takes seconds and not minutes. It happens in a thread of its
own while the engine answers without it; the engine's thread then records each size between two steps. A recorded step
reads all it needs from tensors that stay where they are, so the host only says which rows, or which ids.
"""

from __future__ import annotations

import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llama2_chat.engine.kv_cache import BLOCK_TOKENS, PAGE_TOKENS, Pages
from llama2_chat.engine.sampler import NARROW, Rows

log = logging.getLogger(__name__)

# What is recorded, in the order in which it is missed most: decode steps for so many rows, prefill for so many tokens.
# Fewer are padded to the next size.
SIZES = (
    *(("decode", 1), ("prefill", 512), ("decode", 8), ("decode", 32), ("prefill", 2048), ("prefill", 128)),
    *(("decode", 4), ("decode", 16), ("prefill", 1024), ("prefill", 256), ("prefill", 64), ("decode", 2)),
)
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # whose frequencies do not change with the position


@dataclass(frozen=True)
class Part:
    """The next ids of a request in this row, the first of which stands at start."""

    row: int
    start: int
    ids: list[int]


@dataclass
class _Recording:
    size: int
    inputs: Tensor  # int64, written before each replay
    forward: torch.cuda.CUDAGraph
    logits: Tensor  # [N, V]
    sample: torch.cuda.CUDAGraph | None = None  # of a decode step all of whose rows are narrow
    tokens: Tensor | None = None  # int64 [N]


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: tuple[int, int] | None) -> Iterator[None]:
    """What is computed here is recorded. What another thread does meanwhile is its own affair, but a garbage collection
    in this one might destroy what no recording may contain, such as the events of an engine that is gone."""
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        gc.enable()


def decode_kernel(model: PreTrainedModel) -> Callable[..., Tensor] | None:
    """kernels.attention.decode_attention, if all of the model is where it runs: bfloat16, GPUs of compute capability 8.0,
    heads of a power of two."""
    devices = {parameter.device for parameter in model.parameters()}
    on_gpus = all(device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) for device in devices)
    head_dim = getattr(model.config, "head_dim", None) or 0
    if not on_gpus or model.dtype != torch.bfloat16 or head_dim.bit_count() != 1:
        return None
    try:
        from llama2_chat.kernels import attention
    except ImportError:  # no Triton here
        return None
    return attention.decode_attention


class CompiledModel:
    """What the engine runs instead of the model, as far as it is ready."""

    def __init__(self, model: PreTrainedModel, pages: Pages, rows: Rows, most_pages: int) -> None:
        self._model, self._pages, self._rows = model, pages, rows
        # A page more than anybody has: the last block of a prompt may reach beyond it.
        self._table = torch.zeros(rows.padding + 1, most_pages + 1, dtype=torch.int32, device=rows.device)
        wanted = [(kind, size) for kind, size in SIZES if kind == "prefill" or size <= rows.padding]
        self._sizes = list(dict.fromkeys([*wanted, ("decode", rows.padding)]))  # a full batch whatever MAX_BATCH is
        self._recordings: dict[tuple[str, int], _Recording] = {}
        self._pool = None
        self._compiled: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._recorded = threading.Event()
        self._closed = False
        self.progress = "eager"
        self._decode_layer = torch.compile(_decode_layer, dynamic=False)
        self._prefill_layer = torch.compile(_prefill_layer, dynamic=True)

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Whether this model can run compiled, where the kernels run: a Llama, whole on one GPU."""
        rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        devices = {parameter.device for parameter in model.parameters()}
        return type(model) is LlamaForCausalLM and len(devices) == 1 and rope in STATIC_ROPE

    def start(self, wake: Callable[[], None]) -> None:
        """Compile in the background; wake() tells the engine's thread that there is something to record."""
        self._wake = wake
        threading.Thread(target=self._compile, name="compile", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._recorded.set()

    # In a thread of its own. Whatever it computes goes to the padding row and to page 0.

    @torch.inference_mode()
    def _compile(self) -> None:
        started = time.perf_counter()
        try:
            torch.cuda.set_device(self._rows.device)
            for done, (kind, size) in enumerate(self._sizes):
                self.progress = f"{self._ready()}; {kind} of {size} compiles, {done + 1} of {len(self._sizes)}"
                for _ in range(2):
                    self._step(kind, size)
                torch.cuda.synchronize(self._rows.device)
                self._recorded.clear()
                self._compiled.put((kind, size))
                self._wake()
                if not self._closed:  # else clear() may have come after what close() sets
                    self._recorded.wait()
                if self._closed:
                    return
                log.info("%s of %d is recorded, %.0f s after loading", kind, size, time.perf_counter() - started)
            self.progress = self._ready()
        except Exception:
            self.progress = f"{self._ready()}; compiling failed"
            log.exception("Compiling failed; what is ready is used: %s", self._ready())

    def _ready(self) -> str:
        sizes = {kind: sorted(size for k, size in self._recordings if k == kind) for kind in ("decode", "prefill")}
        told = [f"{kind} {', '.join(map(str, found))}" for kind, found in sizes.items() if found]
        return f"CUDA graphs: {'; '.join(told)}" if told else "eager"

    def _new_inputs(self, kind: str, size: int) -> Tensor:
        if kind == "decode":
            return torch.full((size,), self._rows.padding, device=self._rows.device)
        return _packed([], size, self._rows.padding).to(self._rows.device)

    def _step(self, kind: str, size: int) -> None:
        inputs = self._new_inputs(kind, size)
        logits = self._decode(inputs) if kind == "decode" else self._prefill(inputs, size)
        if kind == "decode":
            self._rows.sample(logits, inputs, NARROW)

    # In the engine's thread.

    @property
    def unrecorded(self) -> bool:
        return not self._compiled.empty()

    def record(self) -> None:
        """Record a step that has been compiled, if there is one."""
        try:
            kind, size = self._compiled.get_nowait()
        except queue.Empty:
            return
        try:
            self._recordings[kind, size] = self._record(kind, size)
        except torch.OutOfMemoryError:
            log.warning("No GPU memory is left to record the step %s %d; KV_HEADROOM_GB leaves more", kind, size)
        except Exception:
            self._closed = True
            self.progress = f"{self._ready()}; recording failed"
            log.exception("The step %s %d could not be recorded; what is ready is used: %s", kind, size, self._ready())
        self._recorded.set()

    def _record(self, kind: str, size: int) -> _Recording:
        # Once without recording: cuBLAS makes itself ready in each thread anew, which no recording may contain.
        self._step(kind, size)
        inputs = self._new_inputs(kind, size)
        torch.cuda.synchronize(self._rows.device)
        forward = torch.cuda.CUDAGraph()
        with _recording(forward, self._pool):
            logits = self._decode(inputs) if kind == "decode" else self._prefill(inputs, size)
        self._pool = self._pool or forward.pool()
        if kind == "prefill":
            return _Recording(size, inputs, forward, logits)
        sample = torch.cuda.CUDAGraph()
        with _recording(sample, self._pool):
            tokens = self._rows.sample(logits, inputs, NARROW)
        return _Recording(size, inputs, forward, logits, sample, tokens)

    def set_pages(self, row: int, first: int, pages: list[int]) -> None:
        """The pages of a row from the first one on; what stood there of another request is forgotten."""
        self._table[row, first:] = 0
        self._table[row, first : first + len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def decode(self, rows: list[int]) -> _Recording | None:
        """Compute the next logits of these rows; None if no step for so many is recorded."""
        recording = self._fitting("decode", len(rows))
        if recording is not None:
            recording.inputs.copy_(_pinned(rows + [self._rows.padding] * (recording.size - len(rows))), True)
            recording.forward.replay()
        return recording

    def can_prefill(self, tokens: int) -> bool:
        return self._fitting("prefill", tokens) is not None

    def prefill(self, parts: list[Part]) -> Tensor:
        """Logits [n, V] after each part. Parts are packed into as few steps as they fit in."""
        most = max(size for kind, size in self._recordings if kind == "prefill")
        packs, room = [], 0
        for part in parts:
            size = -(-len(part.ids) // BLOCK_TOKENS) * BLOCK_TOKENS
            if size > room:
                packs.append([])
                room = most
            packs[-1].append(part)
            room -= size
        logits = []
        for pack in packs:
            size = sum(-(-len(part.ids) // BLOCK_TOKENS) * BLOCK_TOKENS for part in pack)
            recording = self._fitting("prefill", size)
            recording.inputs.copy_(_packed(pack, recording.size, self._rows.padding).pin_memory(), True)
            recording.forward.replay()
            logits.append(recording.logits[: len(pack)].clone())
        return torch.cat(logits)

    def _fitting(self, kind: str, size: int) -> _Recording | None:
        sizes = [known for k, known in self._recordings if k == kind and known >= size]
        return self._recordings[kind, min(sizes)] if sizes else None

    # The steps themselves.

    def _decode(self, rows: Tensor) -> Tensor:
        """Logits [N, V] of the next token of each row, int64 [N]."""
        state = self._rows
        hidden, cos_sin = self._embed(state.tokens[rows], state.positions[rows])
        for layer, (keys, values) in zip(self._model.model.layers, self._pages.layers, strict=True):
            where = rows, state.positions, self._table
            hidden = self._decode_layer(layer, hidden, *cos_sin, keys, values, *where)
        return self._model.lm_head(self._model.model.norm(hidden))[0]

    def _prefill(self, inputs: Tensor, size: int) -> Tensor:
        """Logits [rows, V] after the last token of each part of a pack of so many tokens, as _packed() lays it out."""
        blocks, offset = size // BLOCK_TOKENS, torch.arange(BLOCK_TOKENS, device=inputs.device)
        ids, rows, starts, counts, last = inputs.split([size, blocks, blocks, blocks, self._rows.padding])
        positions = starts[:, None] + offset
        page = self._table[rows[:, None], positions // PAGE_TOKENS]
        # What only fills a block goes to page 0.
        slots = torch.where(offset < counts[:, None], page * PAGE_TOKENS + positions % PAGE_TOKENS, offset).flatten()
        hidden, cos_sin = self._embed(ids, positions.flatten())
        for layer, (keys, values) in zip(self._model.model.layers, self._pages.layers, strict=True):
            where = slots, rows, starts, counts, self._table
            hidden = self._prefill_layer(layer, hidden, *cos_sin, keys, values, *where)
        return self._model.lm_head(self._model.model.norm(hidden[:, last]))[0]

    def _embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden = self._model.model.embed_tokens(ids[None])
        return hidden, self._model.model.rotary_emb(hidden, position_ids=positions[None])


# One layer, as LlamaDecoderLayer computes it, with its products joined and its keys and values in pages.


def _decode_layer(layer, hidden, cos, sin, keys, values, rows, positions, table):
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return torch.ops.llama2_chat.decode_attention(query, key, value, keys, values, rows, positions, table, scale)

    return _layer(layer, hidden, cos, sin, attend)


def _prefill_layer(layer, hidden, cos, sin, keys, values, slots, rows, starts, counts, table):
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return torch.ops.llama2_chat.prefill_attention(
            query, key, value, keys, values, slots, rows, starts, counts, table, scale
        )

    return _layer(layer, hidden, cos, sin, attend)


def _layer(layer, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable[..., Tensor]) -> Tensor:
    """hidden: [1, T, hidden_size]; cos, sin: [1, T, head_dim]."""
    attention, mlp = layer.self_attn, layer.mlp
    projected = _together(layer.input_layernorm(hidden), attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for states in projected)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    hidden = hidden + attention.o_proj(attend(query, key, value, attention.scaling).flatten(2))
    gate, up = _together(layer.post_attention_layernorm(hidden), mlp.gate_proj, mlp.up_proj)
    return hidden + mlp.down_proj(mlp.act_fn(gate) * up)


def _together(x: Tensor, *linears: nn.Module) -> Sequence[Tensor]:
    joined = getattr(linears[0], "joined", None)
    if joined is None:
        return [linear(x) for linear in linears]
    return F.linear(x, joined).split([linear.out_features for linear in linears], -1)


def join_projections(model: LlamaForCausalLM) -> None:
    """Let what is multiplied with the same input be one product, which reads weights faster than several small ones.

    The single weights become views of the joined ones, so that the model itself computes as before and takes no more
    memory. Quantised and adapted layers stay as they are.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linears in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            if all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
                joined = torch.cat([linear.weight for linear in linears])
                for linear, part in zip(
                    linears, joined.split([linear.out_features for linear in linears]), strict=True
                ):
                    linear.weight = nn.Parameter(part, requires_grad=False)
                linears[0].register_buffer("joined", joined, persistent=False)
    torch.cuda.empty_cache()  # else PyTorch would keep the memory in which the single weights were


def _packed(parts: list[Part], size: int, padding: int) -> Tensor:
    """What a prefill step of so many tokens reads, int64: the ids, for each block its row, its start and how many of
    its tokens count, and for each part where its last token is. A part begins with a block of its own."""
    ids, rows, starts, counts, last = [], [], [], [], []
    for part in parts:
        for first in range(0, len(part.ids), BLOCK_TOKENS):
            block = part.ids[first : first + BLOCK_TOKENS]
            ids += block + [0] * (BLOCK_TOKENS - len(block))
            rows.append(part.row)
            starts.append(part.start + first)
            counts.append(len(block))
        last.append(len(ids) - BLOCK_TOKENS + counts[-1] - 1)
    blocks = size // BLOCK_TOKENS
    filled = ((ids, size, 0), (rows, blocks, padding), (starts, blocks, 0), (counts, blocks, 0), (last, padding, 0))
    return torch.tensor([number for have, want, fill in filled for number in have + [fill] * (want - len(have))])


def _pinned(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers).pin_memory()

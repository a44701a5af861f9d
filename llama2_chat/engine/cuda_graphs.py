"""A Llama on one CUDA GPU, faster: its layers compiled, its steps recorded as CUDA graphs.

All layers share one compiled function, so that compiling takes seconds and not minutes. It happens in a thread of its
own while the engine answers without it; the engine's thread then records each size between two steps. A recorded step
reads all it needs from tensors that stay where they are, so the host only says which slots, or which ids.
"""

from __future__ import annotations

import gc
import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llama2_chat.engine.architecture import STATIC_ROPE
from llama2_chat.engine.join_projections import project
from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool
from llama2_chat.engine.prefix_cache import BlockTable
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import NARROW, SamplerState
from llama2_chat.engine.scheduler import Chunk, DraftChunk
from llama2_chat.engine.step_ways import Agree, ModelStep, Outcome, VerifiedDrafts
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.lora import AdapterRows, Taken
from llama2_chat.kernels.rank_sum import SummedLinear, is_together, together
from llama2_chat.process import collect_garbage_later
from llama2_chat.text import first_line, is_out_of_memory

log = logging.getLogger("llama2_chat")

Kind = Literal["decode", "prefill"]

TILE_SIZE = 64  # tokens: a recorded prefill step takes prompts in tiles, each of one request
# What is recorded, in the order in which it is missed most: decode steps for so many requests, or for fewer and guesses
# at what they say next; prefill for so many tokens. Fewer are padded to the next size.
SIZES: tuple[tuple[Kind, int], ...] = (
    *(("decode", 1), ("prefill", 512), ("decode", 8), ("decode", 32), ("prefill", 2048), ("prefill", 128)),
    *(("decode", 4), ("decode", 16), ("prefill", 1024), ("prefill", 256), ("prefill", 64), ("decode", 2)),
)
LEAST_TOKENS = 192  # so many take as long as fewer do, by prompts of 100 and 512 tokens: all weights are read
PIECE_SIZE = 512  # tokens: how prompts are read where all steps have the same number of rows


@dataclass
class _Recording:
    size: int
    inputs: Tensor  # int64, written before each replay
    forward: torch.cuda.CUDAGraph
    logits: Tensor  # [N, V]


@dataclass
class _DecodeRecording(_Recording):
    sampling: torch.cuda.CUDAGraph  # for steps of narrow requests only
    tokens: Tensor  # int64 [N]


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream) -> Iterator[None]:
    """What is computed here is recorded. What another thread does meanwhile is its own affair, but a garbage collection
    in this one might destroy what no recording may contain, such as the events of an engine that is gone."""
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    finally:
        gc.enable()


class StepKernels(NamedTuple):
    """What steps take from kernels/, whether they are recorded or not."""

    decode_attention: Callable[..., Tensor]
    sample_narrow: Callable[..., Tensor]


def step_kernels(model: PreTrainedModel) -> StepKernels | None:
    """If all of the model is where they run: bfloat16, GPUs of compute capability 8.0, heads of a power of two."""
    devices = {parameter.device for parameter in model.parameters()}
    on_gpus = all(device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0) for device in devices)
    head_dim = getattr(model.config, "head_dim", None) or 0
    if not on_gpus or model.dtype != torch.bfloat16 or head_dim.bit_count() != 1:
        return None
    try:
        from llama2_chat.kernels import attention, prefill_attention, sampling, sum_and_norm  # noqa: F401
    except ImportError:  # no Triton here
        return None
    return StepKernels(attention.decode_attention, sampling.sample_narrow)


class RecordedWay:
    """What computes steps instead of the model, as far as it is ready; a step_ways.BackgroundWay.

    deterministic: record one decode step, of a full batch, and one prefill step, of a piece of one prompt in which a
    token's row is its position's. How libraries order a sum depends on the number of rows, not on what is in them.
    rows: which adapters there are; a recorded step adds them all, each to the rows of the slots that take it.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        pool: KVPool,
        sampler: SamplerState,
        most_blocks: int,
        deterministic: bool = False,
        rows: AdapterRows | None = None,
    ) -> None:
        self._deterministic, self._rows = deterministic, rows
        self._model, self._kv_pool, self._sampler = model, pool, sampler
        # A block more than any request has: the last tile of a prompt may reach beyond it.
        self._table = torch.zeros(sampler.padding + 1, most_blocks + 1, dtype=torch.int32, device=sampler.device)
        self._adapters = torch.zeros(sampler.padding + 1, dtype=torch.long, device=sampler.device)  # of each slot
        self._bound: list[tuple[BlockTable | None, int]] = [(None, 0)] * sampler.padding  # what self._table holds
        fitting = [(kind, size) for kind, size in SIZES if kind == "prefill" or size <= sampler.padding]
        # A full batch is recorded whatever MAX_BATCH is.
        self._sizes: list[tuple[Kind, int]] = list(dict.fromkeys([*fitting, ("decode", sampler.padding)]))
        if deterministic:
            self._sizes = [("prefill", PIECE_SIZE), ("decode", sampler.padding)]
        self._decodes: dict[int, _DecodeRecording] = {}
        self._prefills: dict[int, _Recording] = {}
        self._stream: torch.cuda.Stream | None = None  # on which all are recorded
        self._graph_pool: Any = None  # the memory that all recordings share; PyTorch keeps its type to itself
        self._compiled: queue.SimpleQueue[tuple[Kind, int, Outcome]] = queue.SimpleQueue()
        self._recorded, self._complete = threading.Event(), threading.Event()
        self._closed = self._failed = False
        self._heard: dict[int, Tensor] = {}  # where recorded steps leave what listen() asks for
        self._hear: Callable[[dict[int, Tensor]], None] = lambda states: None
        self.mode = "eager"
        # For any number of rows at once: each by itself takes seconds more, and after eight PyTorch compiles no more.
        self._decode_layer = torch.compile(_decode_layer, dynamic=True)
        self._prefill_layer = torch.compile(_prefill_layer, dynamic=True)

    @staticmethod
    def supports(model: PreTrainedModel) -> TypeGuard[LlamaForCausalLM]:
        """Whether this model can run compiled, where the kernels run: a Llama, whole on one GPU."""
        rope = (getattr(model.config, "rope_parameters", None) or {}).get("rope_type", "default")
        devices = {parameter.device for parameter in model.parameters()}
        return type(model) is LlamaForCausalLM and len(devices) == 1 and rope in STATIC_ROPE

    def listen(self, layers: Sequence[int], hear: Callable[[dict[int, Tensor]], None]) -> None:
        """After each step hear() is told what was computed behind so many layers, [T, H] of its tokens, one chunk after
        the other, and, as 0, what the output head got. What it is told the next step writes over. Before start()."""
        rows, like = max(size for _, size in self._sizes), self._model.model.norm.weight
        self._heard = {behind: like.new_zeros(rows, len(like)) for behind in (*layers, 0)}
        self._hear = hear

    def start(self, wake: Callable[[], None]) -> None:
        """Compile in the background; wake() tells the engine's thread that there is something to record."""
        self._wake = wake
        threading.Thread(target=self._compile, name="compile", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        self._recorded.set()

    def wait(self) -> None:
        """Return once all is recorded. Raises ModelUnavailable if something could not be, or if rows are not alike."""
        self._complete.wait()
        if not self._closed and (len(self._decodes) + len(self._prefills) < len(self._sizes) or not self._rows_alike()):
            raise ModelUnavailable(
                f"DETERMINISTIC=1 does not work here: {self.mode}. See the log, leave more memory with KV_HEADROOM_GB, "
                "or unset DETERMINISTIC."
            )

    @torch.inference_mode()
    def _rows_alike(self) -> bool:
        """Whether a row of a full batch comes out the same wherever it stands: some GPU may share them otherwise."""
        layer, rows = self._model.model.layers[0], self._sampler.padding
        taken = self._taken(torch.ones_like(self._adapters[:rows]))
        attention, mlp = layer.self_attn, layer.mlp
        groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        for linears in (*groups, [mlp.gate_proj, mlp.up_proj], [mlp.down_proj], [self._model.lm_head]):
            base: Any = getattr(linears[0], "base_layer", linears[0])
            x = torch.randn(base.in_features, device=self._sampler.device, dtype=self._model.dtype)
            for y in project(x.expand(1, rows, -1).contiguous(), *linears, taken=taken):
                if not bool((y == y[:, :1]).all()):
                    self.mode = f"{self._ready()}; rows of a product are not alike on this GPU"
                    return False
        return True

    # In a thread of its own. Whatever it computes goes to the padding slot and to block 0.

    @torch.inference_mode()
    def _compile(self) -> None:
        started = time.perf_counter()
        for done, (kind, size) in enumerate(self._sizes):
            self.mode = f"{self._ready()}; {kind} {size} compiles, {done + 1} of {len(self._sizes)}"
            outcome = self._try(self._compile_step, kind, size)
            self._recorded.clear()
            self._compiled.put((kind, size, outcome))
            self._wake()
            if not self._closed:  # else clear() may have come after what close() sets
                self._recorded.wait()
            if self._closed or self._failed:
                break
            if (kind, size) in self.recorded:
                log.info("%s %d is recorded, %.0f s after loading", kind, size, time.perf_counter() - started)
        else:
            collect_garbage_later()  # compilers bring as much as a model does
            self.mode = self._ready()
        self._complete.set()

    def _compile_step(self, kind: Kind, size: int) -> None:
        torch.cuda.set_device(self._sampler.device)  # of this thread
        for _ in range(2):
            self._step(kind, size)
        torch.cuda.synchronize(self._sampler.device)

    def _try(self, work: Callable[[Kind, int], None], kind: Kind, size: int) -> Outcome:
        try:
            work(kind, size)
        except Exception as error:
            if is_out_of_memory(error):
                _log_out_of_memory(kind, size, error)
                return Outcome.NO_MEMORY
            log.exception("%s %d could not be made faster; what is ready is used: %s", kind, size, self._ready())
            return Outcome.FAILED
        return Outcome.DONE

    def _ready(self) -> str:
        sizes = (("decode", sorted(self._decodes)), ("prefill", sorted(self._prefills)))
        parts = [f"{kind} {', '.join(map(str, ready))}" for kind, ready in sizes if ready]
        return f"CUDA graphs: {'; '.join(parts)}" if parts else "eager"

    def _new_inputs(self, kind: Kind, size: int) -> Tensor:
        if kind == "decode":
            return self._padded_rows([], size).to(self._sampler.device)
        return _packed([], size, self._sampler.padding).to(self._sampler.device)

    def _step(self, kind: Kind, size: int) -> None:
        inputs = self._new_inputs(kind, size)
        logits = self._logits(kind, size, inputs, told=False)
        if kind == "decode":
            self._sampler.sample(logits, inputs[0], NARROW)

    # In the engine's thread.

    @property
    def recorded(self) -> list[tuple[str, int]]:
        return [*(("decode", size) for size in self._decodes), *(("prefill", size) for size in self._prefills)]

    @property
    def maintenance_due(self) -> bool:
        return not self._compiled.empty()

    def maintain(self, agree: Agree) -> None:
        """Record a step that has been compiled, if there is one: on all ranks, or on none."""
        try:
            kind, size, outcome = self._compiled.get_nowait()
        except queue.Empty:
            return
        if (outcome := agree(outcome)) is Outcome.DONE:
            # Once without recording: cuBLAS makes itself ready in each thread anew, which no recording may contain.
            # And alone: in the middle of a sum a rank that has no memory for it could not tell the others.
            with together(False):
                outcome = agree(self._try(self._step, kind, size))
        if outcome is Outcome.DONE:
            if is_together():
                self._step(kind, size)  # NCCL, too. Whoever fails here ends, since the others wait
            outcome = agree(self._try(self._record, kind, size))
        if outcome is not Outcome.DONE:
            self._decodes.pop(size, None) if kind == "decode" else self._prefills.pop(size, None)
        if outcome is Outcome.FAILED:
            self._failed = True
            self.mode = f"{self._ready()}; {kind} {size} failed"
        self._recorded.set()

    def _record(self, kind: Kind, size: int) -> None:
        inputs = self._new_inputs(kind, size)
        torch.cuda.synchronize(self._sampler.device)
        if self._stream is None:  # torch.cuda.graph's own belongs to the GPU on which it was first used
            self._stream = torch.cuda.Stream(self._sampler.device)  # one for all: cuBLAS keeps 32 MB for each
        forward, stream = torch.cuda.CUDAGraph(), self._stream
        with _recording(forward, self._graph_pool, stream):
            logits = self._logits(kind, size, inputs)
        self._graph_pool = self._graph_pool or forward.pool()
        if kind == "prefill":
            self._prefills[size] = _Recording(size, inputs, forward, logits)
            return
        sampling = torch.cuda.CUDAGraph()
        with _recording(sampling, self._graph_pool, stream):
            tokens = self._sampler.sample(logits, inputs[0], NARROW)
        self._decodes[size] = _DecodeRecording(size, inputs, forward, logits, sampling, tokens)

    def decode(self, requests: Sequence[Request]) -> ModelStep | None:
        """None if no step for so many is recorded."""
        recording, N = self._decoding(len(requests)), len(requests)
        if recording is None:
            return None
        self._replay_decode(recording, requests, [(request.slot, 0, 0) for request in requests])
        self._hear({behind: states[:N] for behind, states in self._heard.items()})

        def sample() -> Tensor:
            recording.sampling.replay()
            return recording.tokens[:N]

        rows = recording.size if self._deterministic else N
        return ModelStep([*requests], recording.logits[:rows], recording.inputs[0, :rows], sample)

    def verify(self, chunks: Sequence[DraftChunk]) -> VerifiedDrafts | None:
        """None if no step for so many tokens is recorded. It is a decode step with several rows of each request."""
        recording = self._decoding(sum(len(chunk.ids) for chunk in chunks))
        if recording is None:
            return None
        rows = [(chunk.request.slot, ahead, id) for chunk in chunks for ahead, id in enumerate(chunk.ids)]
        self._replay_decode(recording, [chunk.request for chunk in chunks], rows)
        self._hear({behind: states[: len(rows)] for behind, states in self._heard.items()})
        return VerifiedDrafts.of(chunks, recording.logits.clone(), self._sampling_step)

    def _sampling_step(self, requests: Sequence[Request], logits: Tensor, rows: list[int]) -> ModelStep:
        """What chooses from these rows of logits, one of each request, as it would behind a decode step of so many."""
        N, recording = len(requests), self._decoding(len(requests))
        assert recording is not None  # a step of at least so many rows has been replayed
        size = recording.size if self._deterministic else N
        chosen = logits[_pinned(rows + [0] * (size - N)).to(logits.device, non_blocking=True)]
        slots = [request.slot for request in requests] + [self._sampler.padding] * (recording.size - N)
        recording.inputs[0].copy_(_pinned(slots), non_blocking=True)

        def sample() -> Tensor:
            recording.logits[:size].copy_(chosen)
            recording.sampling.replay()
            return recording.tokens[:N]

        return ModelStep([*requests], chosen, recording.inputs[0, :size], sample)

    def _decoding(self, rows: int) -> _DecodeRecording | None:
        """The smallest step of at least so many rows."""
        sizes = [size for size in self._decodes if size >= rows]
        return self._decodes[min(sizes)] if sizes else None

    def _replay_decode(
        self, recording: _DecodeRecording, requests: Sequence[Request], rows: list[tuple[int, int, int]]
    ) -> None:
        """Compute the logits after these rows, as _decode() takes them."""
        self._bind(requests)
        recording.inputs.copy_(self._padded_rows(rows, recording.size).pin_memory(), non_blocking=True)
        recording.forward.replay()

    def _padded_rows(self, rows: list[tuple[int, int, int]], size: int) -> Tensor:
        return torch.tensor(rows + [(self._sampler.padding, 0, 0)] * (size - len(rows))).t().contiguous()

    def prefill(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """None if the longest chunk fits in no recorded step."""
        if self._deterministic:
            self._bind([chunk.request for chunk in chunks])
            logits, heard = self._replay_prefill(chunks)
            self._hear(heard)
            return logits
        longest = max(_padded(chunk) for chunk in chunks)
        if not any(size >= longest for size in self._prefills):
            return None
        self._bind([chunk.request for chunk in chunks])
        packs = _packs(chunks, self._prefills)
        replayed = [self._replay_prefill(pack) for pack in packs]
        logits = torch.cat([logits for logits, _ in replayed])
        self._hear({behind: torch.cat([heard[behind] for _, heard in replayed]) for behind in self._heard})
        return logits[[index for index, chunk in enumerate(itertools.chain(*packs)) if chunk.is_last]]

    def _replay_prefill(self, pack: Sequence[Chunk]) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits after each chunk, and what listen() asks for."""
        tokens = sum(map(_padded, pack))
        recording = self._prefills[min(size for size in self._prefills if size >= tokens)]
        skipped = pack[0].start % PIECE_SIZE // TILE_SIZE if self._deterministic else 0
        packed = _packed(pack, recording.size, self._sampler.padding, skipped)
        recording.inputs.copy_(packed.pin_memory(), non_blocking=True)
        recording.forward.replay()
        return recording.logits[: None if self._deterministic else len(pack)].clone(), self._heard_of(pack, skipped)

    def _heard_of(self, pack: Sequence[Chunk], skipped: int) -> dict[int, Tensor]:
        """What listen() asks for, of the tokens of a pack that lies as _packed() lays it."""
        if not self._heard:
            return {}
        rows: list[int] = []
        first = skipped * TILE_SIZE
        for chunk in pack:
            rows += range(first, first + chunk.end - chunk.start)
            first += _padded(chunk)
        at = _pinned(rows).to(self._table.device, non_blocking=True)
        return {behind: states[at] for behind, states in self._heard.items()}

    def _bind(self, requests: Sequence[Request]) -> None:
        """Bring the slots' rows of the table on the device up to date. A request's own table only grows at its end."""
        for request in requests:
            slot, table, length = request.slot, request.blocks, len(request.blocks)
            bound, known = self._bound[slot]
            if bound is table and known == length:
                continue
            if bound is not table:
                known = 0
                self._table[slot] = 0
                self._adapters[slot] = request.adapter
            self._table[slot, known:length] = torch.tensor(table.blocks[known:], dtype=torch.int32)
            self._bound[slot] = (table, length)

    # The steps themselves.

    def _logits(self, kind: Kind, size: int, inputs: Tensor, told: bool = True) -> Tensor:
        """told: leave what listen() asks for where it is found. A step that is only tried must not: another is read."""
        return self._decode(inputs, told) if kind == "decode" else self._prefill(inputs, size, told)

    def _decode(self, rows: Tensor, told: bool = True) -> Tensor:
        """Logits [N, V] after some tokens. rows, int64 [3, N]: whose each is, how many tokens it comes after the newest
        one of its slot, and, where that is not 0, which token it is."""
        state = self._sampler
        slots, ahead, guesses = rows
        positions = state.positions[slots] + ahead
        kv_index = self._table[slots, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        hidden, cos_sin = self._embed(torch.where(ahead > 0, guesses, state.tokens[slots]), positions)
        taken = self._taken(self._adapters[slots])
        normed = self._model.model.layers[0].input_layernorm(hidden)
        for number, (layer, following, kept) in enumerate(self._layers(), 1):
            where = kv_index, slots, positions, self._table
            hidden, normed = self._decode_layer(layer, following, hidden, normed, *cos_sin, taken, kept, *where)
            if told:
                self._keep(number, hidden)
        if told:
            self._keep(0, normed)
        return self._model.lm_head(normed)[0]

    def _prefill(self, inputs: Tensor, size: int, told: bool = True) -> Tensor:
        """Logits [slots, V] after the last token of each chunk of a pack of so many tokens, laid out by _packed()."""
        tiles, offset = size // TILE_SIZE, torch.arange(TILE_SIZE, device=inputs.device)
        ids, slots, starts, counts, last = inputs.split([size, tiles, tiles, tiles, self._sampler.padding])
        positions = starts[:, None] + offset
        block = self._table[slots[:, None], positions // BLOCK_SIZE]
        # What only fills a tile goes to block 0.
        kv_index = torch.where(offset < counts[:, None], block * BLOCK_SIZE + positions % BLOCK_SIZE, offset).flatten()
        hidden, cos_sin = self._embed(ids, positions.flatten())
        taken = self._taken(self._adapters[slots].repeat_interleave(TILE_SIZE))
        normed = self._model.model.layers[0].input_layernorm(hidden)
        for number, (layer, following, kept) in enumerate(self._layers(), 1):
            where = kv_index, slots, starts, counts, self._table
            hidden, normed = self._prefill_layer(layer, following, hidden, normed, *cos_sin, taken, kept, *where)
            if told:
                self._keep(number, hidden)
        if told:
            self._keep(0, normed)
        return self._model.lm_head(normed[:, last])[0]

    def _keep(self, behind: int, states: Tensor) -> None:
        """Of a step, if listen() asks for what is computed behind so many layers. states: [1, T, H]."""
        if (place := self._heard.get(behind)) is not None:
            place[: states.shape[1]].copy_(states[0])

    def _layers(self) -> Iterator[tuple[LlamaDecoderLayer, nn.Module, tuple[Tensor, ...]]]:
        """Each layer, the norm of what it gives, which is that of the next one, and its keys and values."""
        layers, model = [*self._model.model.layers], self._model.model
        norms = [*(layer.input_layernorm for layer in layers[1:]), model.norm]
        return zip(layers, norms, self._kv_pool.layers, strict=True)

    def _taken(self, adapters: Tensor) -> Taken | None:
        """As project() takes it, of the adapter of each row, int64 [T]."""
        return None if self._rows is None else self._rows.taken_by(adapters)

    def _embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden = self._model.model.embed_tokens(ids[None])
        return hidden, self._model.model.rotary_emb(hidden, position_ids=positions[None])


def _log_out_of_memory(kind: Kind, size: int, error: Exception) -> None:
    torch.cuda.empty_cache()
    sentence = "No GPU memory is left for a faster step (%s %d), which stays as it is; KV_HEADROOM_GB leaves more. %s"
    log.warning(sentence, kind, size, first_line(error))  # how much was needed, and how much was free


# One layer, as LlamaDecoderLayer computes it, with its products joined and its keys and values in the pool.


def _decode_layer(
    layer: LlamaDecoderLayer,
    following: nn.Module,
    hidden: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    taken: Taken | None,
    kept: tuple[Tensor, ...],
    kv_index: Tensor,
    slots: Tensor,
    positions: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ops = torch.ops.llama2_chat
        attend_over = ops.decode_attention if len(kept) == 2 else ops.decode_attention_in_8_bits
        return attend_over(query, key, value, cos, sin, kv_index, slots, positions, table, scale, *kept)

    return _layer(layer, following, hidden, normed, taken, attend)


def _prefill_layer(
    layer: LlamaDecoderLayer,
    following: nn.Module,
    hidden: Tensor,
    normed: Tensor,
    cos: Tensor,
    sin: Tensor,
    taken: Taken | None,
    kept: tuple[Tensor, ...],
    kv_index: Tensor,
    slots: Tensor,
    starts: Tensor,
    counts: Tensor,
    table: Tensor,
) -> tuple[Tensor, Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ops = torch.ops.llama2_chat
        attend_over = ops.prefill_attention if len(kept) == 2 else ops.prefill_attention_in_8_bits
        return attend_over(query, key, value, cos, sin, kv_index, slots, starts, counts, table, scale, *kept)

    return _layer(layer, following, hidden, normed, taken, attend)


def _layer(
    layer: LlamaDecoderLayer,
    following: nn.Module,
    hidden: Tensor,
    normed: Tensor,
    taken: Taken | None,
    attend: Callable[..., Tensor],
) -> tuple[Tensor, Tensor]:
    """hidden: [1, T, hidden_size]; normed: what the layer's first norm makes of it; both again for the layer behind it,
    whose norm is `following`. taken: of adapters, as project() takes it.

    A norm belongs to the sum before it: as one kernel they are faster, however many GPUs have a part of the sum.
    """
    attention, mlp = layer.self_attn, layer.mlp
    inputs = attention.q_proj, attention.k_proj, attention.v_proj
    projected = project(normed, *inputs, taken=taken)
    query, key, value = (states.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for states in projected)
    attended = attend(query, key, value, attention.scaling).flatten(2)
    hidden, normed = _add_and_norm(hidden, attended, attention.o_proj, layer.post_attention_layernorm, taken)
    gate, up = project(normed, mlp.gate_proj, mlp.up_proj, taken=taken)
    return _add_and_norm(hidden, mlp.act_fn(gate) * up, mlp.down_proj, following, taken)


def _add_and_norm(
    hidden: Tensor, x: Tensor, linear: nn.Module, norm: Any, taken: Taken | None
) -> tuple[Tensor, Tensor]:
    """hidden and what `linear` makes of x, and the norm of their sum."""
    if isinstance(linear, SummedLinear):
        return torch.ops.llama2_chat.sum_and_norm(linear.part(x), hidden, norm.weight, norm.variance_epsilon)
    hidden = hidden + project(x, linear, taken=taken)[0]
    return hidden, norm(hidden)


def _padded(chunk: Chunk) -> int:
    """Tokens that a chunk takes in a recorded step: whole tiles."""
    return -(-(chunk.end - chunk.start) // TILE_SIZE) * TILE_SIZE


def _packs(chunks: Sequence[Chunk], sizes: Collection[int]) -> list[list[Chunk]]:
    """The chunks, in order, in steps of these sizes that take least time: one may be read in parts by several steps."""
    packs: list[list[Chunk]] = []
    left = deque(chunks)
    for room in _steps(sum(map(_padded, chunks)), sizes):
        packs.append([])
        while left and room:
            chunk = left.popleft()
            if _padded(chunk) > room:
                middle = chunk.start + room
                left.appendleft(chunk.part(middle, chunk.end))
                chunk = chunk.part(chunk.start, middle)
            packs[-1].append(chunk)
            room -= _padded(chunk)
    return packs


def _steps(tokens: int, sizes: Collection[int]) -> list[int]:
    """Of these sizes those that have room for so many tokens together and take least time, the largest first."""
    enough, fewer = [size for size in sizes if size >= tokens], [size for size in sizes if size < tokens]
    ways = [[min(enough)]] if enough else []
    if fewer:
        ways.append([max(fewer), *_steps(tokens - max(fewer), sizes)])
    return min(ways, key=lambda steps: sum(max(size, LEAST_TOKENS) for size in steps))


def _packed(chunks: Sequence[Chunk], size: int, padding: int, skipped: int = 0) -> Tensor:
    """What a prefill step of so many tokens reads, int64: the ids; for each tile its slot, its start and how many of
    its tokens count; and for each chunk where its last token is. A chunk begins with a tile of its own, the first after
    so many skipped."""
    ids = [0] * (skipped * TILE_SIZE)
    slots, starts, counts, last = [padding] * skipped, [0] * skipped, [0] * skipped, []
    for chunk in chunks:
        for first in range(0, len(chunk.ids), TILE_SIZE):
            tile = chunk.ids[first : first + TILE_SIZE]
            ids += tile + [0] * (TILE_SIZE - len(tile))
            slots.append(chunk.request.slot)
            starts.append(chunk.start + first)
            counts.append(len(tile))
        last.append(len(ids) - TILE_SIZE + counts[-1] - 1)
    tiles = size // TILE_SIZE
    filled = ((ids, size, 0), (slots, tiles, padding), (starts, tiles, 0), (counts, tiles, 0), (last, padding, 0))
    return torch.tensor([number for have, want, fill in filled for number in have + [fill] * (want - len(have))])


def _pinned(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers).pin_memory()

"""What a step computes: the batch's tensors, the forward pass in one of several ways, and the next tokens.

A way takes a step if it can, and the first that takes it computes it: recorded steps (cuda_graphs.py) where they are
ready, else transformers' own forward (step_ways.py). The engine knows none of this, only runner.Runner.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llama2_chat.engine.adapters import add_adapters
from llama2_chat.engine.cuda_graphs import PIECE_SIZE, RecordedWay, step_kernels
from llama2_chat.engine.draft_model import Drafter, DraftNet, HeadNet, ModelNet
from llama2_chat.engine.drafts import Guess, GuessCost
from llama2_chat.engine.host_store import HostStore
from llama2_chat.engine.join_projections import join_projections
from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool, input_embeddings
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.engine.rehearsal import FreeBytes, activation_bytes, leaving, pool_beside_steps, rehearse
from llama2_chat.engine.request import Likelihood, Request
from llama2_chat.engine.runner import Masks
from llama2_chat.engine.sampler import NARROW, Likeliest, SamplerState, biased, is_narrow, restrict
from llama2_chat.engine.scheduler import Chunk, DraftChunk
from llama2_chat.engine.self_check import SelfCheck
from llama2_chat.engine.step_ways import BackgroundWay, EagerWay, ModelStep, Outcome, StepWay, VerifiedDrafts
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.kernels.fixed_rows import ROWS, fix_rows
from llama2_chat.kernels.int8 import Int8Linear
from llama2_chat.kernels.lora import AdapterRows, LoraWeights
from llama2_chat.kernels.packed import PackedLinear, compile_products
from llama2_chat.settings import CPU_BATCH, GPU_BATCH

log = logging.getLogger("llama2_chat")

CPU_CHUNK, GPU_CHUNK = 256, 2048  # tokens of prompts per step; Stop waits no longer than one chunk
SHORTEST_CPU_CHUNK, SHORTEST_GPU_CHUNK = 64, 512
CPU_DRAFT_TOKENS = ROWS  # in 8 bits a step of so many takes up to twice as long as one of a single token
GPU_DRAFT_TOKENS = 16  # of a step of so many rows all linear products take about as long as those of one
KERNEL_SIZES = (16, 32, 64, 128, 256)  # of heads of a model that guesses, which attends by the kernel then
# Of a row more in a step of few, where a step of one row costs 1 (docs/measured.md). In 8 bits a CPU multiplies row by
# row; in 16 bits it takes ROWS at once, whatever they hold.
GPU_ROW_COST, INT8_ROW_COST, FIXED_ROW_COST = 0.03, 0.15, 0.01
TOLD_AT_ONCE = 64  # tokens of a prompt, of each of which the whole vocabulary is looked at
NOT_DETERMINISTIC = (
    "DETERMINISTIC=1 needs COMPILE=1 and a Llama in bfloat16, int8, int4 or NF4, whole on one GPU of compute "
    "capability 8.0 or higher: only there are steps recorded. Choose such a model, set QUANTIZATION=nf4, or unset "
    "DETERMINISTIC."
)


@dataclass
class TokensInFlight:
    """On the CPU, valid after `arrived`."""

    tokens: Tensor  # int64 [N]
    rows: Sequence[int] = ()  # those that ask for logprobs
    logprobs: Sequence[Tensor] = ()  # of the tokens in these rows, [n]; of the likeliest, [n, k]; their ids, [n, k]
    arrived: torch.cuda.Event | None = None

    def result(self) -> list[int]:
        if self.arrived is not None:
            self.arrived.synchronize()  # the only wait for the GPU in a step
        return self.tokens.tolist()

    def likelihood(self, index: int) -> Likelihood:
        chosen, top, ids = (values[self.rows.index(index)] for values in self.logprobs)
        return Likelihood(chosen.item(), [*zip(ids.tolist(), top.tolist(), strict=True)])


class ModelRunner:
    """The Runner of a transformers model.

    model: a causal LM in eval mode, on its device or devices, that attends by ATTENTION.
    pool: where its keys and values are.
    faster: what computes instead of transformers' forward as far as it is ready.
    windows: of each layer, as paged_attention.attention_windows() finds them.
    piece_size: of prompts, in tokens, if `faster` computes all steps, and each kind with the same number of rows.
    rows: which rows of a step take which adapter, if there are any.
    draft_tokens: as Runner has it; of steps that are recorded, as soon as there is one of so many rows.
    host: where blocks of the pool go that make room.
    """

    block_size = BLOCK_SIZE

    def __init__(
        self,
        model: PreTrainedModel,
        pool: KVPool,
        sampler: SamplerState,
        context_length: int,
        kernel: Callable[..., Tensor] | None = None,
        faster: BackgroundWay | None = None,
        longest_chunk: int | None = None,
        windows: Sequence[int | None] = (None,),
        piece_size: int | None = None,
        rows: AdapterRows | None = None,
        draft_tokens: int = 0,
        host: HostStore | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._pool, self.sampler, self._faster, self._host, self._drafter = pool, sampler, faster, host, drafter
        self._model, self._device = model, sampler.device
        self._eager = EagerWay(model, pool, sampler, kernel, -(-context_length // BLOCK_SIZE), rows)
        self._ways: list[StepWay] = [self._eager] if faster is None else [faster, self._eager]
        on_gpu = self._device.type == "cuda"
        self.pipelined, self.piece_size = on_gpu, piece_size
        self._most_draft_tokens, self.draft_tokens = draft_tokens, 0 if faster else draft_tokens
        self._drafts_later = faster is not None and draft_tokens > 0  # draft_tokens is too small for any as yet
        in_bytes = isinstance(model.get_output_embeddings(), Int8Linear)
        self.row_cost = GPU_ROW_COST if on_gpu else INT8_ROW_COST if in_bytes else FIXED_ROW_COST
        self._guess_cost = GuessCost(drafter.cost + self.row_cost) if drafter else None
        self.longest_chunk = longest_chunk or (GPU_CHUNK if on_gpu else CPU_CHUNK)
        self.shortest_chunk = min(self.longest_chunk, SHORTEST_GPU_CHUNK if on_gpu else SHORTEST_CPU_CHUNK)
        self.max_batch, self.vocab_size, self.num_blocks = sampler.padding, sampler.vocab_size, pool.num_blocks
        self.context_length = min(context_length, pool.tokens)
        self._check = SelfCheck(model, windows, self.context_length, self.longest_chunk, pool)

    @property
    def mode(self) -> str:
        """ "eager", or what has been recorded so far."""
        return self._faster.mode if self._faster else "eager"

    @property
    def host_blocks(self) -> int:
        return self._host.num_pages if self._host else 0

    @property
    def kv_format(self) -> str:
        return self._pool.format

    @property
    def kv_bytes(self) -> int:
        return self._pool.bytes

    @property
    def recorded(self) -> list[tuple[str, int]]:
        """Which steps are recorded: their kinds and sizes."""
        return self._faster.recorded if self._faster else []

    def start(self, wake: Callable[[], None]) -> None:
        if self._faster:
            self._faster.start(wake)

    def wait(self) -> None:
        if self._faster and self.piece_size:
            self._faster.wait()

    def close(self) -> None:
        if self._faster:
            self._faster.close()
        if self._drafter:
            self._drafter.close()
        if self._host:
            self._host.close()

    def forget_recorded(self) -> None:
        """Give back what recorded steps keep, once no step is computed any more."""
        self._faster, self._ways = None, [self._eager]

    def enter_thread(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # for events, graphs and kernels; else they take the first GPU

    @property
    def maintenance_due(self) -> bool:
        return self._faster is not None and self._faster.maintenance_due

    def maintain(self) -> None:
        if self._faster and self._faster.maintenance_due:
            self._faster.maintain(self._agree)
            rows = max((size for kind, size in self.recorded if kind == "decode"), default=0)
            self.draft_tokens = min(self._most_draft_tokens, rows)
            self._drafts_later = self._drafts_later and self.draft_tokens < 2

    def _agree(self, outcome: Outcome) -> Outcome:
        return outcome

    # ---- A step ----

    def prefill(self, chunks: Sequence[Chunk]) -> ModelStep:
        self._settle(chunks)
        telling = any(chunk.request.params.prompt_logprobs for chunk in chunks)
        logits = self._prefill_and_tell(chunks) if telling else self._prefill(chunks)
        if self._drafter:
            self._drafter.read(chunks, prompts=True)
        ready = [chunk.request for chunk in chunks if chunk.is_last]
        for request in ready:
            self.sampler.join(request.slot, request.ids, request.answer_tokens, request.params, request.draws)
        return ModelStep(ready, logits, self._slots(ready))

    def _prefill(self, chunks: Sequence[Chunk]) -> Tensor:
        return next(logits for way in self._ways if (logits := way.prefill(chunks)) is not None)

    def _prefill_and_tell(self, chunks: Sequence[Chunk]) -> Tensor:
        """As a way does it; on the way, who asks is told how likely the prompt is."""
        everywhere = self._eager.prefill(chunks, everywhere=True)
        of_chunks = everywhere.split([chunk.end - chunk.start for chunk in chunks])
        for chunk, logits in zip(chunks, of_chunks, strict=True):
            if chunk.request.params.prompt_logprobs:
                self._tell(chunk, logits)
        last = [logits[-1:] for chunk, logits in zip(chunks, of_chunks, strict=True) if chunk.is_last]
        return torch.cat(last) if last else everywhere[:0]

    def _tell(self, chunk: Chunk, logits: Tensor) -> None:
        """How likely each id of a prompt is after those before it. logits: [T, V] after the chunk's tokens."""
        request, count = chunk.request, chunk.request.params.logprobs or 0
        del request.prompt_logprobs[chunk.start :]  # if the chunk is computed again
        following = request.ids[chunk.start + 1 : min(chunk.end + 1, request.prompt_tokens)]
        for start in range(0, len(following), TOLD_AT_ONCE):
            ids = torch.tensor(following[start : start + TOLD_AT_ONCE], device=self._device)
            rows = [*range(start, start + len(ids))]
            likeliest = Likeliest.of(logits[:, : self.vocab_size], rows, count)
            told = TokensInFlight(ids, rows, [likeliest.logprobs.gather(1, ids[:, None])[:, 0], *likeliest[2:]])
            request.prompt_logprobs += map(told.likelihood, rows)

    def decode(self, requests: Sequence[Request]) -> ModelStep:
        if self._host:
            self._host.settle(request.blocks[request.computed // BLOCK_SIZE] for request in requests)
        step = next(step for way in self._ways if (step := way.decode(requests)) is not None)
        self._count_step()
        most = self._most_draft_tokens if self._drafts_later else self.draft_tokens
        if self._drafter and len(requests) < most:  # else there is no room for guesses
            self._drafter.read([Chunk(request, request.computed, request.computed + 1) for request in requests])
        return step

    @property
    def may_draft(self) -> bool:
        return self._drafts_later or self.draft_tokens > 0

    @property
    def draft_cost(self) -> float | None:
        return self._guess_cost.cost if self._guess_cost else None

    def draft(self, requests: Sequence[Request], lengths: Sequence[int], least: Sequence[float]) -> list[list[Guess]]:
        if not (self._drafter and self._guess_cost):
            return [[] for _ in requests]
        reached = zip(requests, lengths, strict=True)
        self._settle([Chunk(each, each.computed, each.computed + 1 + length) for each, length in reached])
        started = time.perf_counter()
        guesses = self._drafter.draft(requests, lengths, least)
        if self._device.type == "cuda":  # on a CPU weights tell it, and other programs do not change it
            self._guess_cost.made(started, time.perf_counter(), max(map(len, guesses), default=0))
        return guesses

    def verify(self, chunks: Sequence[DraftChunk]) -> VerifiedDrafts:
        self._settle(chunks)
        verified = next(drafts for way in self._ways if (drafts := way.verify(chunks)) is not None)
        self._count_step()
        if self._drafter:
            self._drafter.read(chunks)
        return verified

    def _count_step(self) -> None:
        if self._guess_cost:
            self._guess_cost.computed()

    def _settle(self, chunks: Sequence[Chunk]) -> None:
        """Let a step wait for what is copied from blocks that it writes to, and to those that it reads."""
        if self._host:
            for chunk in chunks:
                self._host.settle(chunk.request.blocks.blocks[: (chunk.end - 1) // BLOCK_SIZE + 1])

    def new_masks(self, count: int) -> Tensor:
        return torch.zeros(count, -(-self.vocab_size // 32), dtype=torch.int32, pin_memory=self.pipelined)

    def sample(self, step: ModelStep, masks: Masks | None) -> TokensInFlight:
        """The next token of each request. Who shares a step changes nobody's way of being sorted."""
        likeliest = self._likeliest(step)
        if masks is not None:
            restrict(step.logits[:, : self.vocab_size], masks.indices, masks.bits)
        if biases := {index: bias for index, request in enumerate(step.requests) if (bias := request.bias)}:
            step = replace(step, logits=biased(step.logits, biases), sample=None)  # not what was recorded
        narrow = [index for index, request in enumerate(step.requests) if is_narrow(request.params)]
        wide = [index for index, request in enumerate(step.requests) if not is_narrow(request.params)]
        if not wide and step.sample is not None:
            tokens = step.sample()
        elif self.piece_size is None and not (wide and narrow):
            tokens = self.sampler.sample(step.logits, step.slots, NARROW if narrow else self.vocab_size)
        else:
            tokens = torch.empty(len(step.requests), dtype=torch.long, device=self._device)
            for indices, candidates in ((narrow, NARROW), (wide, self.vocab_size)):
                if indices:
                    which = torch.tensor(indices, device=self._device)
                    tokens[which] = self._sample_some(step, which, candidates)
        return self._send(tokens, likeliest)

    def _likeliest(self, step: ModelStep) -> Likeliest | None:
        """In the rows of those who ask for logprobs, before masks and biases; None if nobody does."""
        asked = [(row, n) for row, request in enumerate(step.requests) if (n := request.params.logprobs) is not None]
        if not asked:
            return None
        rows, counts = zip(*asked, strict=True)
        return Likeliest.of(step.logits[:, : self.vocab_size], [*rows], max(counts))

    def _sample_some(self, step: ModelStep, which: Tensor, candidates: int) -> Tensor:
        """The next token of these requests of a step, int64 [n]."""
        if self.piece_size is None:
            return self.sampler.sample(step.logits[which], step.slots[which], candidates)
        # Which of two equal scores comes first depends on how many rows are sorted: as many as a recorded step has.
        slots = torch.full((self.max_batch,), self.sampler.padding, device=self._device)
        slots[which] = step.slots[which]
        return self.sampler.sample(step.logits, slots, candidates)[which]

    def _send(self, tokens: Tensor, likeliest: Likeliest | None) -> TokensInFlight:
        """On their way to the CPU."""
        rows = likeliest.rows if likeliest else ()
        values = [tokens, *([likeliest.chosen(tokens), likeliest.top, likeliest.ids] if likeliest else [])]
        if not self.pipelined:
            return TokensInFlight(values[0], rows, values[1:])
        values = [torch.empty(v.shape, dtype=v.dtype, pin_memory=True).copy_(v, non_blocking=True) for v in values]
        arrived = torch.cuda.Event()
        arrived.record()
        return TokensInFlight(values[0], rows, values[1:], arrived)

    def _slots(self, requests: Sequence[Request]) -> Tensor:
        return torch.tensor([request.slot for request in requests], dtype=torch.long, device=self._device)

    # ---- Memory and devices ----

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # not for blocks that leave for the host meanwhile

    def is_alive(self) -> bool:
        try:
            for device in self._pool.devices:
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
        except Exception:
            return False
        return True

    def release_memory(self) -> None:
        torch.cuda.empty_cache()

    def copy_block(self, source: int, target: int) -> None:
        if self._host:
            self._host.settle((source, target))
        self._pool.copy(source, target)

    def save_block(self, block: int, page: int) -> None:
        assert self._host is not None  # whoever has no pages is asked for none
        self._host.save(block, page)

    def restore_block(self, page: int, block: int) -> None:
        assert self._host is not None
        self._host.restore(page, block)

    def are_arriving(self, blocks: Sequence[int]) -> bool:
        return self._host is not None and self._host.are_arriving(blocks)

    def wait_for_block(self) -> None:
        if self._host:
            self._host.wait()

    def zero_blocks(self, blocks: list[int] | slice) -> None:
        if self._host:
            self._host.settle(range(self.num_blocks) if isinstance(blocks, slice) else blocks)
        self._pool.zero(blocks)

    def are_finite(self, blocks: list[int]) -> bool:
        return self._pool.are_finite(blocks)

    # ---- At the start ----

    @property
    def check_lengths(self) -> Sequence[int]:
        return self._check.lengths

    @torch.inference_mode()
    def self_check(self, requests: Sequence[Request]) -> bool:
        return self._check.agrees(requests, self._eager.prefill, self._decode_after)

    def _decode_after(self, requests: Sequence[Request], token: int) -> Tensor:
        """Logits [n, V] after this token, with which each request is gone on."""
        for request in requests:
            self.sampler.tokens[request.slot] = token
        return self._eager.decode(requests).logits


RunnerT = TypeVar("RunnerT", bound=ModelRunner)


def build_runner(
    model: PreTrainedModel,
    free_bytes: Callable[[], Mapping[torch.device, int]],
    context_length: int,
    *,
    max_batch: int | None = None,
    longest_chunk: int | None = None,
    compile: bool = True,
    deterministic: bool = False,
    speculate: bool = True,
    make_pool: Callable[..., KVPool] = KVPool,
    adapters: Sequence[LoraWeights] = (),
    host_bytes: int = 0,
    draft: EagleHead | PreTrainedModel | None = None,
    rehearsed: bool = True,
    runner_type: type[RunnerT] = ModelRunner,  # type: ignore[assignment]
) -> RunnerT:
    """The fastest runner that this model can have where it is.

    free_bytes: for each device of the model what the KV pool may take there, as soon as the rest has its memory.
    context_length: tokens of prompt and answer that one request may have; more memory than that for each is not taken.
    max_batch: requests answered at once.
    compile: make a Llama on a single GPU faster, in the background.
    deterministic: let an answer depend on its prompt, its settings and its seed alone; on a CPU it always does.
    speculate: guess what answers say next, and check several tokens in one step; on a GPU where steps are recorded.
    make_pool: how keys and values are kept; takes what KVPool takes.
    adapters: which requests may choose from, by their place here, 1 for the first.
    host_bytes: memory of the host for what makes room in the pool, at most.
    draft: what guesses, where text does not come again.
    rehearsed: on a GPU, try the longest steps, and keep less for keys and values where they do not fit beside these.
    runner_type: ModelRunner, or what lets several processes compute one model (ranks.py).

    Raises ModelUnavailable if the model attends in a way, or keeps something, that cannot be computed over blocks, if
    no memory is left for keys and values, or if its steps cannot be recorded and must be.
    """

    def pool_for(rows: AdapterRows | None, step_bytes: int, beside: Sequence[Tensor] = ()) -> KVPool:
        def make(free: FreeBytes) -> KVPool:
            return make_pool(model, free, context_length, max_batch, beside)

        def try_steps(pool: KVPool) -> None:
            rehearse(EagerWay(model, pool, sampler, kernel, most_blocks, rows), sampler, chunk)

        if on_gpu and rehearsed:
            return pool_beside_steps(make, free_bytes, step_bytes, try_steps)
        return make(partial(leaving, step_bytes, free_bytes))

    weight, most_blocks = input_embeddings(model).weight, -(-context_length // BLOCK_SIZE)
    on_gpu = weight.device.type == "cuda"
    max_batch = max_batch or (GPU_BATCH if on_gpu else CPU_BATCH)
    kernel, sample_narrow = step_kernels(model) or (None, None)
    if not on_gpu:
        from llama2_chat.kernels.cpu_sampling import sample_narrow  # compiled, which nobody else needs
    sampler = SamplerState(max_batch, weight.shape[0], context_length, weight.device, sample_narrow)
    in_pieces = deterministic and on_gpu
    if packed := [module for module in model.modules() if isinstance(module, PackedLinear)]:
        compile_products(packed, in_order=(max_batch, PIECE_SIZE) if in_pieces else ())
    windows = attention_windows(model)
    if not on_gpu:
        fix_rows(model)
        if isinstance(model.get_output_embeddings(), Int8Linear):
            from llama2_chat.engine.cpu_llama import speed_up_llama  # which compiles what nobody else needs

            speed_up_llama(model)
    if in_pieces:
        longest_chunk = PIECE_SIZE
    chunk = min(longest_chunk or GPU_CHUNK, context_length)
    step_bytes = activation_bytes(model, chunk) if on_gpu else 0
    if not (compile and kernel is not None and RecordedWay.supports(model)):
        if in_pieces:
            raise ModelUnavailable(NOT_DETERMINISTIC)
        rows = add_adapters(model, adapters)
        if on_gpu and draft is not None:
            log.warning("No step is recorded here, so DRAFT_MODEL does not guess.")
        net = _draft_net(draft, model) if speculate and not on_gpu else None
        pool = pool_for(rows, step_bytes, net.probe() if net else ())
        draft_tokens = CPU_DRAFT_TOKENS if speculate and not on_gpu else 0
        return runner_type(
            model,
            pool,
            sampler,
            context_length,
            kernel,
            longest_chunk=longest_chunk,
            windows=windows,
            draft_tokens=draft_tokens,
            rows=rows,
            host=HostStore(pool.tensors, host_bytes) if host_bytes else None,
            drafter=_drafter(net, model, pool, sampler, context_length, None) if net else None,
        )
    join_projections(model)
    rows = add_adapters(model, adapters)
    net = _draft_net(draft, model) if speculate else None
    # Recorded steps have memory of their own.
    pool = pool_for(rows, 2 * step_bytes, net.probe() if net else ())
    recorded = RecordedWay(model, pool, sampler, most_blocks, in_pieces, rows)
    drafter = _drafter(net, model, pool, sampler, context_length, kernel) if net else None
    if net and drafter:
        recorded.listen(net.feature_layers, drafter.hear)
    piece_size = PIECE_SIZE if in_pieces else None
    draft_tokens = max_batch if in_pieces else GPU_DRAFT_TOKENS  # in pieces each step is one of a full batch
    return runner_type(
        model,
        pool,
        sampler,
        context_length,
        kernel,
        recorded,
        longest_chunk,
        piece_size=piece_size,
        rows=rows,
        host=HostStore(pool.tensors, host_bytes) if host_bytes else None,
        draft_tokens=draft_tokens if speculate else 0,
        drafter=drafter,
    )


def _draft_net(draft: EagleHead | PreTrainedModel | None, model: PreTrainedModel) -> DraftNet | None:
    if draft is None:
        return None
    return HeadNet(draft, model) if isinstance(draft, EagleHead) else ModelNet(draft)


def _drafter(
    net: DraftNet,
    model: PreTrainedModel,
    pool: KVPool,
    sampler: SamplerState,
    context_length: int,
    kernel: Callable[..., Tensor] | None,
) -> Drafter:
    if isinstance(net, HeadNet) and kernel is None and isinstance(net.output, Int8Linear):
        from llama2_chat.kernels.compiled import panels_are_fast  # which imports a compiler, as such layers do

        if panels_are_fast():
            from llama2_chat.engine.cpu_draft import in_one_call  # compiled for processors with VNNI

            net = in_one_call(net, pool)
    fits = all(keys.dtype == torch.bfloat16 and keys.shape[3] in KERNEL_SIZES for keys in net.probe())
    most_blocks = -(-context_length // BLOCK_SIZE)
    way = EagerWay(model, pool.of_beside(), sampler, kernel if fits else None, most_blocks)
    return Drafter(net, model, way, sampler)

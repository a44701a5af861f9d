"""The decode loop: one thread owns the model, and requests take their turn on it in order of arrival.

Ids go in, ids come out, one step at a time, through a streamer with put() and end() as `generate` calls them. Prefill
runs in chunks so that a request can be cancelled inside it, and the KV cache of recent conversations is kept, so that
the next turn of each only computes what is new. This file has never heard of text, roles or pages.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from chat_types import Busy, ChatError, FinishReason, ModelUnavailable, SamplingParams

log = logging.getLogger(__name__)

PAGE_TOKENS = 256  # a KV cache grows by this much at a time
CPU_PREFILL_CHUNK = 256  # half a second of a 135M model on two cores; Stop waits no longer than one chunk
GPU_PREFILL_CHUNK = 1024
CPU_KEPT_BYTES = 512 * 2**20  # 20,000 tokens of the embedded model


class Streamer(Protocol):
    """Where ids go: any of transformers' streamers that skips no prompt. Called from the engine's thread."""

    def put(self, value: torch.Tensor) -> None: ...  # int64 [1], on the CPU
    def end(self) -> None: ...  # always called, once, whatever happened; the request then says why


class Request:
    """One prompt on its way through the engine. Everything that belongs to it is born and dies with it."""

    def __init__(self, engine: Engine, input_ids: list[int], params: SamplingParams, streamer: Streamer) -> None:
        self.input_ids = input_ids
        self.params = params
        self.streamer = streamer
        self.cached_tokens = 0  # of input_ids, found in a kept KV cache
        self.finish_reason: FinishReason | None = None
        self.error: ChatError | None = None  # what to tell the visitor when finish_reason is "error"
        self.cancelled = False
        self._engine = engine

    @property
    def queue_position(self) -> int:
        """How many requests are ahead of this one; 0 once it runs."""
        return self._engine.position(self)

    def cancel(self) -> None:
        """Leave the line, or stop within one step. Safe from any thread, also after the end."""
        self._engine.cancel(self)


class Engine:
    """Runs requests on one model, in a thread of its own.

    model: a causal LM in eval mode, on its device or devices.
    stop_ids: ids that end an answer; they are not streamed.
    queue_limit: requests that may wait; one more raises Busy.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: set[int], queue_limit: int = 64) -> None:
        self._model = model
        self._stop_ids = stop_ids
        self._queue_limit = queue_limit
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        self._device = model.get_input_embeddings().weight.device
        on_gpu = self._device.type == "cuda"
        self._chunk = GPU_PREFILL_CHUNK if on_gpu else CPU_PREFILL_CHUNK
        self._kept = KeptCaches(_free_gpu_bytes() // 3 if on_gpu else CPU_KEPT_BYTES)
        self._waiting: deque[Request] = deque()
        self._running: Request | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, input_ids: list[int], params: SamplingParams, streamer: Streamer) -> Request:
        """The request, placed last in line. Its ids go to the streamer, then streamer.end() is called.

        Raises Busy when the line is full, ModelUnavailable after close(), ChatError for ids the model does not know.
        """
        if not input_ids or not all(type(token) is int and 0 <= token < self._vocab_size for token in input_ids):
            raise ChatError(f"input_ids must be one or more whole numbers from 0 to {self._vocab_size - 1}.")
        request = Request(self, list(input_ids), params, streamer)
        with self._changed:
            if self._closed:
                raise ModelUnavailable("The model has been stopped. Start the program again.")
            if len(self._waiting) >= self._queue_limit:
                raise Busy(f"The line is full ({len(self._waiting)} waiting). Please try again in a minute.")
            self._waiting.append(request)
            self._changed.notify()
        return request

    def position(self, request: Request) -> int:
        with self._changed:
            if request not in self._waiting:
                return 0
            return self._waiting.index(request) + (self._running is not None)

    def cancel(self, request: Request) -> None:
        with self._changed:
            request.cancelled = True
            if request not in self._waiting:
                return  # running: the loop looks before each step; ended: nothing to do
            self._waiting.remove(request)
        _end(request, "cancelled")

    def close(self, timeout_s: float = 5) -> None:
        """Cancel every request and end the thread; waits for the step that is being computed."""
        with self._changed:
            self._closed = True
            requests = [*self._waiting, *([self._running] if self._running else [])]
            self._changed.notify()
        for request in requests:
            self.cancel(request)
        self._thread.join(timeout_s)

    # Everything below runs in the engine's thread.

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = None
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                request = self._running = self._waiting.popleft()
            try:
                _end(request, self._answer(request))
            except torch.OutOfMemoryError:
                log.exception("Out of GPU memory at a prompt of %d tokens", len(request.input_ids))
                self._kept.clear()
                torch.cuda.empty_cache()
                request.error = ChatError("The GPU ran out of memory for this answer. Try again, or start a new chat.")
                _end(request, "error")
            except Exception:
                log.exception("A request with a prompt of %d tokens failed", len(request.input_ids))
                request.error = ChatError("Something went wrong while answering. Please try again.")
                _end(request, "error")

    @torch.inference_mode()
    def _answer(self, request: Request) -> FinishReason:
        """Prefill what is not cached, then one token per step. Returns why it ended."""
        ids, cache = self._kept.take(request.input_ids, self._new_cache)
        request.cached_tokens = len(ids)
        sampler = Sampler(request.params, request.input_ids, self._vocab_size, self._device)
        new_ids = request.input_ids[len(ids) :]
        answered = 0
        try:
            while True:
                for start in range(0, len(new_ids), self._chunk):
                    if request.cancelled:
                        return "cancelled"
                    chunk = new_ids[start : start + self._chunk]
                    logits = self._forward(chunk, cache)
                    ids += chunk
                token = sampler.next_token(logits)
                if request.cancelled:
                    return "cancelled"
                if token in self._stop_ids:
                    return "stop"
                request.streamer.put(torch.tensor([token]))
                answered += 1
                if answered == request.params.max_new_tokens:
                    return "length"
                new_ids = [token]
        finally:
            # A forward that raised has left its layers uneven; such a cache would give silently wrong text.
            if cache.is_even(len(ids)):
                self._kept.put(ids, cache)

    def _forward(self, ids: list[int], cache: KVCache) -> torch.Tensor:
        """float32 logits [V] of the token after ids, whose keys and values join the cache."""
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[0, -1].to(self._device, torch.float32)

    def _new_cache(self) -> KVCache:
        return KVCache(config=self._model.config)


def _end(request: Request, reason: FinishReason) -> None:
    request.finish_reason = reason
    try:
        request.streamer.end()
    except Exception:
        log.exception("A reader could not be told that its request has ended")


def _free_gpu_bytes() -> int:
    return sum(torch.cuda.mem_get_info(device)[0] for device in range(torch.cuda.device_count()))


class Sampler:
    """Chooses the tokens of one request: penalties, temperature, top-k, top-p, in the order `generate` has them.

    The random numbers come from a generator of the request's own on the CPU, one per token, so that a seed gives
    the same answer on any device and whoever else is talking.
    """

    def __init__(self, params: SamplingParams, input_ids: list[int], vocab_size: int, device: torch.device) -> None:
        self._params = params
        self._generator = torch.Generator()
        self._generator.manual_seed(params.seed) if params.seed is not None else self._generator.seed()
        self._penalised = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._counts = torch.zeros(vocab_size, device=device)  # how often each token stands in the answer
        self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)  # in prompt or answer
        self._seen[torch.tensor(input_ids, dtype=torch.long, device=device)] = True

    def next_token(self, logits: torch.Tensor) -> int:
        """One token id. logits: float32 [V]. Raises FloatingPointError if they are not numbers."""
        token = self._choose(self._penalise(logits[: self._counts.shape[0]]))
        self._counts[token] += 1
        self._seen[token] = True
        return token

    def _penalise(self, scores: torch.Tensor) -> torch.Tensor:
        params = self._params
        if not self._penalised:
            return scores
        pushed = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        scores = torch.where(self._seen, pushed, scores)
        return scores - params.presence_penalty * (self._counts > 0) - params.frequency_penalty * self._counts

    def _choose(self, scores: torch.Tensor) -> int:
        params = self._params
        kept = 1 if params.temperature == 0 else min(params.top_k or len(scores), len(scores))
        scores, ids = scores.topk(kept)  # from the likeliest down; NaN would come first
        if not torch.isfinite(scores[0]):
            raise FloatingPointError("The model computed logits that are not finite numbers.")
        if kept == 1:
            return int(ids[0])
        # Below 1e-6 the division would overflow float32, and the likeliest token takes everything anyway.
        probs = torch.softmax((scores - scores[0]) / max(params.temperature, 1e-6), dim=-1)
        cumulative = probs.cumsum(dim=-1)
        nucleus = cumulative[: int((cumulative - probs < params.top_p).sum().clamp(min=1))]
        threshold = torch.rand((), generator=self._generator) * nucleus[-1]
        return int(ids[(nucleus <= threshold).sum().clamp(max=len(nucleus) - 1)])


class KVLayer(DynamicLayer):
    """Keys and values of one layer, [1, heads, T, head_dim], written in place into pages allocated ahead.

    transformers' own dynamic layer copies the whole cache for each token; this one copies it once per page.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        start, self.length = self.length, self.length + key_states.shape[-2]
        self.keys = _write(self.keys, key_states, start)
        self.values = _write(self.values, value_states, start)
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]

    def get_seq_length(self) -> int:
        return self.length


def _write(pages: torch.Tensor, states: torch.Tensor, start: int) -> torch.Tensor:
    """The pages with states [1, heads, T, head_dim] at start, in larger ones if these are full."""
    end = start + states.shape[-2]
    if end > pages.shape[-2]:
        room = -(-end // PAGE_TOKENS) * PAGE_TOKENS
        larger = states.new_empty(*states.shape[:-2], room, states.shape[-1])
        larger[..., :start, :] = pages[..., :start, :]
        pages = larger
    pages[..., start:end, :] = states
    return pages


class KVCache(DynamicCache):
    """The KV cache of one conversation, which can be cut and copied at any token.

    Models whose layers forget (sliding windows, recurrent states) keep transformers' own layers and start anew.
    """

    def __init__(self, config) -> None:
        super().__init__(config=config)
        self.reusable = all(type(layer) is DynamicLayer for layer in self.layers)
        if self.reusable:
            self.layers = [KVLayer() for _ in self.layers]

    def is_even(self, length: int) -> bool:
        return self.reusable and all(layer.length == length for layer in self.layers)

    def cut(self, length: int) -> None:
        for layer in self.layers:
            layer.length = length

    def copy_into(self, other: KVCache, length: int) -> KVCache:
        """The other cache, filled with the first tokens of this one."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.update(mine.keys[..., :length, :], mine.values[..., :length, :])
        return other

    @property
    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers if layer.is_initialized)


class KeptCaches:
    """KV caches of recent conversations, found by the ids they begin with; the longest unused goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: list[tuple[list[int], KVCache]] = []  # the most recently used last

    def take(self, input_ids: list[int], new_cache) -> tuple[list[int], KVCache]:
        """Ids whose keys and values the cache holds, the longest prefix of input_ids known, and that cache.

        The last id is always left to compute: its logits are needed.
        """
        matches = [_common_prefix(ids, input_ids[:-1]) for ids, _ in self._entries]
        length = max(matches, default=0)
        if length == 0:
            return [], new_cache()
        index = matches.index(length)
        ids, cache = self._entries[index]
        if 2 * length >= len(ids):  # the same conversation goes on, or is answered again
            del self._entries[index]
            cache.cut(length)
        else:  # another one with the same beginning, such as the system prompt
            cache = cache.copy_into(new_cache(), length)
        return ids[:length], cache

    def put(self, ids: list[int], cache: KVCache) -> None:
        self._entries.append((ids, cache))
        while self._entries and sum(cache.bytes for _, cache in self._entries) > self._max_bytes:
            del self._entries[0]

    def clear(self) -> None:
        self._entries.clear()


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

"""One prompt on its way through the engine, and what whoever asks brings along. Data only: the engine acts on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from llama2_chat.engine.drafts import Confidence, Drafts
from llama2_chat.engine.prefix_cache import BlockTable
from llama2_chat.errors import ChatError
from llama2_chat.types import FinishReason, SamplingParams

if TYPE_CHECKING:  # the scheduler reads requests and knows no torch
    from torch import Tensor

NO_SLOT = -1
NEVER = -1e9  # as a bias; finite, so that a grammar that allows nothing but the end is followed


class Streamer(Protocol):
    """Where ids go: any of transformers' streamers that skips no prompt. Called from the engine's thread."""

    def put(self, value: Tensor) -> None: ...  # int64 [1], on the CPU
    def end(self) -> None: ...  # always called, once, whatever happened; the request then says why


class TokenConstraint(Protocol):
    """Which ids may come next in one answer. Used by the engine's thread alone; raises ChatError when it gives up."""

    @property
    def complete(self) -> bool: ...  # nothing may follow but the end

    def allow(self, mask: Tensor) -> None: ...  # writes a bit for each id to int32 [words] on the CPU, lowest first
    def advance(self, token: int) -> None: ...
    def forced(self) -> list[int]: ...  # what most probably comes next, since little or nothing else is allowed


class Likelihood(NamedTuple):
    """How likely the model found a token, as natural logarithms of probabilities."""

    logprob: float
    top: list[tuple[int, float]]  # the likeliest ids, in this order


@dataclass(eq=False)
class Request:
    """Everything that belongs to one prompt; it is born and dies with it. Only the engine's thread changes it, except
    that anyone may set `cancelled`, through Engine.cancel()."""

    ids: list[int]  # prompt and answer so far
    params: SamplingParams
    streamer: Streamer
    limit: int  # tokens of its answer, at most
    draws: Tensor  # float32 [limit]: the random numbers of its answer
    constraint: TokenConstraint | None = None  # as far as ids have been emitted
    stop_ids: frozenset[int] = frozenset()  # ids that end the answer; they are not emitted
    adapter: int = 0  # which of the runner's adapters computes it, 1 for the first; 0 for none
    drafts: Drafts | None = None  # guesses at its next tokens; None if there shall be none

    prompt_tokens: int = field(init=False)
    cached_tokens: int = 0  # of the prompt, in whole blocks that were found in the KV cache
    finish_reason: FinishReason | None = None
    error: ChatError | None = None  # what to tell the visitor when finish_reason is "error"
    cancelled: bool = False

    slot: int = NO_SLOT  # where it runs; NO_SLOT while it waits and after the end
    blocks: BlockTable = field(default_factory=BlockTable)
    computed: int = 0  # ids whose keys and values are in its blocks
    prompt_logprobs: list[Likelihood] = field(default_factory=list)  # of its ids from the second on, if params ask
    logprobs: list[Likelihood] = field(default_factory=list)  # of each token of its answer, if params.logprobs asks
    sampled: int = 0  # tokens of its answer chosen so far, some perhaps still in flight; 0 before and in prefill

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.ids)

    @property
    def runs(self) -> bool:
        return self.slot != NO_SLOT

    @property
    def confidence(self) -> Confidence | None:
        """How far a model may guess for it; None if it may not."""
        return self.drafts.of_model if self.drafts is not None else None

    def stop_model(self) -> None:
        """From here on no model guesses for it."""
        if self.drafts is not None:
            self.drafts.of_model = None

    @property
    def client(self) -> str:
        return self.params.client

    @property
    def answer_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def reads_cache(self) -> bool:
        """Whether it may begin with keys and values that were computed for another."""
        return self.params.cache_prompt and not self.params.prompt_logprobs

    @property
    def bias(self) -> list[tuple[int, float]]:
        """What is added to the scores of which ids for its next token, which `sampled` others come before."""
        ends = self.stop_ids if self.sampled < self.params.min_tokens else ()
        return [*self.params.logit_bias, *((id, NEVER) for id in ends)]

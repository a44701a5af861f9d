"""What the engine asks of whoever computes its steps. ModelRunner keeps this promise; tests have one that computes
nothing. All methods but `start`, `wait` and `close` are called by the engine's thread alone, or before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from llama2_chat.engine.drafts import Guess
from llama2_chat.engine.request import Likelihood, Request
from llama2_chat.engine.scheduler import Chunk, DraftChunk


class Step(Protocol):
    """A step that has been computed, or is being computed, as far as choosing the next tokens."""

    @property
    def requests(self) -> Sequence[Request]: ...  # whose next token can be chosen


class Tokens(Protocol):
    """The next token of each request of a step, perhaps still on its way."""

    def result(self) -> list[int]: ...  # waits; -1 where the logits were not finite
    def likelihood(self, index: int) -> Likelihood: ...  # of one whose request asks for logprobs; after result()


@dataclass(frozen=True)
class Masks:
    """What the constraints of some requests of a step allow."""

    indices: list[int]  # which requests of the step
    bits: Tensor  # int32 [len(indices), words]: a bit for each id, lowest first


StepT = TypeVar("StepT", bound=Step)
StepT_co = TypeVar("StepT_co", bound=Step, covariant=True)


class Verification(Protocol[StepT_co]):
    """Logits after each id of some DraftChunks."""

    def step(self, place: int, requests: Sequence[Request]) -> StepT_co:
        """The step that chooses what these requests say after this id of their chunks, 0 for the first."""


class Runner(Protocol[StepT]):
    """A model, the pool of its keys and values, and the state of its sampler."""

    num_blocks: int  # of the pool; block 0 takes what padding computes
    block_size: int  # tokens
    max_batch: int  # requests in a decode step
    longest_chunk: int  # tokens of prompts in a prefill step
    shortest_chunk: int  # below, the weights are read for too few tokens
    piece_size: int | None  # tokens: as SchedulerConfig has it
    vocab_size: int
    context_length: int  # tokens that one request may have, prompt and answer together, and that the pool can hold
    draft_tokens: int  # that verify() takes at a cost little above that of one, those without a draft too; 0: no drafts
    row_cost: float  # of a row more in a step of few, where a step of one row costs 1
    pipelined: bool  # whether the next decode step can be launched before the tokens of this one have arrived

    @property
    def may_draft(self) -> bool: ...  # whether a request that comes now may have drafts, if only once steps are faster

    @property
    def draft_cost(self) -> float | None:
        """Of one guess of draft() and its check, where a step with one token costs 1. None: no model guesses."""

    @property
    def mode(self) -> str: ...  # how a step runs, in words

    @property
    def host_blocks(self) -> int: ...  # for which there are pages of the host so far; 0: what makes room is forgotten

    @property
    def kv_format(self) -> str: ...  # how keys and values are kept, as KV_CACHE names it

    @property
    def kv_bytes(self) -> int: ...

    def start(self, wake: Callable[[], None]) -> None:
        """Begin with whatever makes steps faster later; wake() tells the engine's thread that maintain() is due."""

    def wait(self) -> None:
        """Return once steps are computed as they will be from then on, if answers depend on it.

        Raises ModelUnavailable if that will never be. Not called by the engine's thread.
        """

    def close(self) -> None: ...

    def enter_thread(self) -> None:
        """Called once by the thread that will call all other methods."""

    @property
    def maintenance_due(self) -> bool: ...

    def maintain(self) -> None:
        """Whatever must happen between two steps."""

    @property
    def check_lengths(self) -> Sequence[int]: ...  # tokens of the requests that self_check() wants, the most first

    def self_check(self, requests: Sequence[Request]) -> bool:
        """Whether requests that have slots and blocks get through them, together, what the model alone gives each."""

    def prefill(self, chunks: Sequence[Chunk]) -> StepT:
        """Compute the keys and values of these chunks; the step's requests are those whose chunk is the last."""

    def decode(self, requests: Sequence[Request]) -> StepT:
        """Compute the keys and values of the newest token of each request, at position request.computed."""

    def verify(self, chunks: Sequence[DraftChunk]) -> Verification[StepT]:
        """Compute what decode() would if the guesses of these chunks were what has been chosen: bit for bit where an
        answer does not depend on its company, too."""

    def draft(self, requests: Sequence[Request], lengths: Sequence[int], least: Sequence[float]) -> list[list[Guess]]:
        """What a model guesses that these requests, whose blocks reach so far, say next: at most so many ids each, and
        none behind such as are not likelier than `least` to come true."""

    def new_masks(self, count: int) -> Tensor:
        """Zeros, int32 [count, words], on the CPU: nothing is allowed."""

    def sample(self, step: StepT, masks: Masks | None) -> Tokens: ...

    def synchronize(self) -> None:
        """Wait until all that was asked for has been computed."""

    def is_alive(self) -> bool:
        """Whether the devices still compute."""

    def release_memory(self) -> None:
        """After torch.OutOfMemoryError: give back what is kept for later."""

    def copy_block(self, source: int, target: int) -> None: ...

    def save_block(self, block: int, page: int) -> None: ...

    def restore_block(self, page: int, block: int) -> None: ...

    def are_arriving(self, blocks: Sequence[int]) -> bool:
        """Whether any of them is still on its way from the host: no step may read it."""

    def wait_for_block(self) -> None:
        """Until the next of those that are on their way has arrived, if there is one."""

    def zero_blocks(self, blocks: list[int] | slice) -> None: ...

    def are_finite(self, blocks: list[int]) -> bool: ...

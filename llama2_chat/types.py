"""The words every room speaks: messages, sampling settings, replies, and the promise that every model keeps.

Only the standard library is used here, so anything may import it. No behaviour lives here beyond checking ranges.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NotRequired, Protocol, TypedDict

from llama2_chat.errors import BadGrammar, ChatError

if TYPE_CHECKING:
    import numpy as np

FinishReason = Literal["stop", "length", "cancelled", "error"]
GrammarKind = Literal["json_schema", "regex", "lark"]
Phase = Literal["choose", "download", "convert", "load", "connect"]  # of loading
# What a text is turned into a vector for: a visitor's question waits for nobody, a program's request goes before
# documents. Questions and documents get the prefixes that the encoder was trained with.
EmbeddingPurpose = Literal["question", "request", "document"]


class ToolCall(TypedDict):
    """A tool that the assistant wants to be run."""

    id: str  # by which its result is found; "" where nobody gave one
    name: str
    arguments: str  # JSON, as the model wrote it


class Message(TypedDict):
    """One turn of a conversation, in the shape that chat templates take. A tool's turn is the result of a call."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: NotRequired[list[ToolCall]]  # of the assistant
    tool_call_id: NotRequired[str]  # of a tool: the call's
    name: NotRequired[str]  # of a tool, where no call says so
    is_example: NotRequired[bool]  # stands before the conversation, and is never left out where it is too long


# Name -> (lowest, highest); a lower bound in OPEN_BELOW is itself not allowed.
RANGES: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 1_000_000),  # the context window is what limits an answer
    "temperature": (0, 5),
    "top_p": (0, 1),
    "top_k": (0, 1000),
    "min_p": (0, 1),
    "repetition_penalty": (0.5, 2),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "min_tokens": (0, 1_000_000),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, 20),
}
OPTIONAL = {"seed", "logprobs"}  # may be None
OPEN_BELOW = {"top_p"}
WHOLE_NUMBERS = {"max_new_tokens", "top_k", "min_tokens", "seed", "logprobs"}
MAX_STOP_STRINGS = 16
MAX_NAMED_TOKENS = 1024  # in stop_token_ids, and in logit_bias
MAX_BIAS = 100  # added to a token's score, which is then chosen always or never
MAX_GRAMMAR_CHARACTERS = 2**20
GRAMMAR_NAMES: dict[GrammarKind, str] = {  # as sentences begin with them
    "json_schema": "A JSON schema",
    "regex": "A regular expression",
    "lark": "A grammar",
}


@dataclass(frozen=True)
class GrammarSpec:
    """What an answer must follow: a JSON schema, a regular expression, or a grammar in llguidance's kind of Lark.

    A JSON schema is text that holds a JSON object. Raises BadGrammar for what does not look like it; whether answers
    can be held to it is for the model to say. A choice of texts is a regular expression, or a grammar.
    """

    kind: GrammarKind
    text: str
    strict: bool = False  # refuse a JSON schema of which anything cannot be followed; else reply.relaxed names it

    def __post_init__(self) -> None:
        name = GRAMMAR_NAMES.get(self.kind)
        if name is None:
            raise BadGrammar(f"A grammar's kind must be one of {', '.join(GRAMMAR_NAMES)}; it was {self.kind!r:.40}.")
        if not isinstance(self.text, str) or not self.text:
            raise BadGrammar(f"{name} must be text, and not empty.")
        if len(self.text) > MAX_GRAMMAR_CHARACTERS:
            most, length = f"{MAX_GRAMMAR_CHARACTERS:,}", f"{len(self.text):,}"
            raise BadGrammar(f"{name} may have {most} characters; this has {length}.")
        if self.kind == "json_schema" and not _is_json_object(self.text):
            raise BadGrammar(f"{name} must be text that holds a JSON object.")


class Unasked(int):
    """The most tokens of an answer where nobody asked for a number; a number that was asked for is a plain int."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen and when to end; every value is checked on creation.

    Raises ChatError for a value outside its range, naming the setting, the range and the value.
    """

    max_new_tokens: int = Unasked(1024)
    temperature: float = 0.6  # 0 takes the likeliest token every time
    top_p: float = 0.9  # keep the likeliest tokens that together reach this probability
    top_k: int = 50  # keep this many of the likeliest tokens; 0 keeps all
    min_p: float = 0.0  # keep tokens that are at least this times as likely as the likeliest
    repetition_penalty: float = 1.1  # divides the score of tokens already in prompt or answer; 1 is off
    presence_penalty: float = 0.0  # subtracted once from tokens already in the answer
    frequency_penalty: float = 0.0  # subtracted as often as a token stands in the answer
    seed: int | None = None  # the same seed and conversation give the same answer; on a GPU with DETERMINISTIC=1
    stop: tuple[str, ...] = ()  # the answer ends before any of these; they are not shown
    stop_token_ids: tuple[int, ...] = ()  # it ends before these tokens, too
    ignore_eos: bool = False  # go on where the model would end the answer
    min_tokens: int = 0  # before so many nothing ends the answer but its grammar
    logit_bias: tuple[tuple[int, float], ...] = ()  # token and what is added to its score; a mapping is taken as well
    grammar: GrammarSpec | None = None  # what the answer must follow
    logprobs: int | None = None  # have the reply's `logprobs`, with so many of the likeliest tokens in each place
    prompt_logprobs: bool = False  # where logprobs are asked, those of the prompt, which is then computed whole
    cache_prompt: bool = True  # False: the whole prompt is computed, whatever of it the KV cache holds
    client: str = ""  # who asks; where several wait, each has the same share of the model
    adapter: str = ""  # which of status.adapters answers; "" for the model without any
    server: str = ""  # which of the backend's servers answers, and no other in its place; "" for whichever can

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in RANGES:
                value = getattr(self, field.name)
                if not (value is None and field.name in OPTIONAL):
                    object.__setattr__(self, field.name, _checked(field.name, value))
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        valid = isinstance(stop, (list, tuple)) and all(isinstance(text, str) and text for text in stop)
        if not valid or len(stop) > MAX_STOP_STRINGS:
            raise ChatError(f"stop takes up to {MAX_STOP_STRINGS} strings, none of them empty.")
        object.__setattr__(self, "stop", tuple(stop))
        object.__setattr__(self, "stop_token_ids", _checked_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if not (self.grammar is None or isinstance(self.grammar, GrammarSpec)):
            raise BadGrammar("grammar must be a GrammarSpec.")


def _checked(name: str, value: object) -> int | float:
    """The value as the int or float the setting needs, or ChatError."""
    low, high = RANGES[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        in_range = low <= value <= high and not (name in OPEN_BELOW and value == low)  # False for NaN
        if in_range and name not in WHOLE_NUMBERS:
            return float(value)
        if in_range and value == int(value):
            return value if isinstance(value, Unasked) else int(value)
    kind = "a whole number" if name in WHOLE_NUMBERS else "a number"
    lower = f"above {low:g}" if name in OPEN_BELOW else f"from {low:g}"
    upper = "2^63 - 1" if name == "seed" else f"{high:,}"
    raise ChatError(f"{name} must be {kind} {lower} to {upper}; it was {_short(value)}.")


def _checked_ids(ids: Any) -> tuple[int, ...]:
    valid = isinstance(ids, (list, tuple)) and all(type(id) is int and 0 <= id < 2**31 for id in ids)
    if not valid or len(ids) > MAX_NAMED_TOKENS:
        raise ChatError(f"stop_token_ids takes up to {MAX_NAMED_TOKENS:,} token ids.")
    return tuple(ids)


def _checked_bias(bias: Any) -> tuple[tuple[int, float], ...]:
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    try:
        found = {id: float(value) for id, value in pairs}
        _checked_ids([*found])
        valid = all(-MAX_BIAS <= value <= MAX_BIAS for value in found.values())  # False for NaN
    except (ChatError, TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        wanted = f"up to {MAX_NAMED_TOKENS:,} token ids, each with a number from -{MAX_BIAS} to {MAX_BIAS}"
        raise ChatError(f"logit_bias takes {wanted}.")
    return tuple(sorted(found.items()))


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _short(value: object) -> str:
    # Python refuses to print a whole number of more than 4,300 digits.
    return "far too large" if isinstance(value, int) and abs(value) > 10**40 else repr(value)[:40]


class Candidate(NamedTuple):
    """A token, and how likely the model found it before penalties, temperature, biases, grammar and the like."""

    token: str  # its text; what is no whole character as OpenAI writes it, such as "bytes:\xf0\x9f"
    bytes: bytes
    logprob: float | None  # natural logarithm of its probability; None for the first of a prompt


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer or a prompt, and what else could have stood in its place."""

    chosen: Candidate
    top: tuple[Candidate, ...]  # as many as params.logprobs says, the likeliest first
    offset: int  # characters of the answer before it; of a prompt, negative, those from here to the answer


TOOL_NAME = re.compile(r"[a-zA-Z0-9_.:/-]{1,128}")
MAX_TOOLS = 128


@dataclass(frozen=True)
class Tool:
    """What the model may ask to be run. Raises ChatError for a name that does not match TOOL_NAME, and for parameters
    that are no object's."""

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None  # a JSON schema of an object; None for a tool that takes nothing
    strict: bool = False  # as GrammarSpec has it

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not TOOL_NAME.fullmatch(self.name):
            raise ChatError(f"A tool's name has 1 to 128 letters, digits and _ . : / -; it was {self.name!r:.60}.")
        if (kind := (self.parameters or {}).get("type", "object")) != "object":
            raise ChatError(f"The parameters of {self.name} must be of type object; it was {_short(kind)}.")


@dataclass(frozen=True)
class ToolOffer:
    """Which tools a reply may call. Raises ChatError for no tool, more than MAX_TOOLS, and two of the same name."""

    tools: tuple[Tool, ...]
    must_call: bool = False  # the reply is a call, and no text
    may_call: bool = True  # False: the model is told of the tools, as before and after, but the reply is text
    names: tuple[str, ...] = ()  # of the tools that may be called, out of those that the model is told of; () for all
    parallel: bool | None = None  # whether several may be called at once; None where the model is used to it

    def __post_init__(self) -> None:
        known = [tool.name for tool in self.tools]
        if not 0 < len(known) <= MAX_TOOLS:
            raise ChatError(f"A question may come with 1 to {MAX_TOOLS} tools; it came with {len(known)}.")
        if twice := next((name for name in known if known.count(name) > 1), None):
            raise ChatError(f"There are two tools called {twice!r}.")
        if missing := next((name for name in self.names if name not in known), None):
            raise ChatError(f"There is no tool called {missing!r:.60} among those that came with the question.")

    @property
    def callable(self) -> list[Tool]:
        names = self.names or [tool.name for tool in self.tools]
        return [tool for tool in self.tools if tool.name in names and self.may_call]


@dataclass(frozen=True)
class CallStyle:
    """How calls are written in a model's text: opening, name, middle, arguments, closing.

    Of several, what is in `between` stands in place of the closing of one and the opening of the next.
    """

    opening: str
    middle: str
    closing: str
    between: str | None = None  # None where there is one call at most

    @property
    def marker(self) -> str:
        """The text that only a call has, wherever it stands; "" where a call is told by the beginning of the text."""
        return self.opening.partition("{")[0].rstrip()

    @property
    def end(self) -> str:
        """With what a call is whole, whether another follows or not."""
        return self.closing if self.between is None else commonprefix([self.closing, self.between])  # noqa: RUF071

    def write(self, *calls: ToolCall) -> str:
        """Several only if there is something between them."""
        said = [call["name"] + self.middle + (call["arguments"].strip() or "{}") for call in calls]
        return self.opening + (self.between or "").join(said) + self.closing


@dataclass(frozen=True)
class Usage:
    """What one reply cost, in tokens and messages."""

    prompt_tokens: int = 0  # the answer that is gone on with included
    completion_tokens: int = 0
    cached_tokens: int = 0  # of the prompt, in whole blocks that were already in the KV cache
    dropped_messages: int = 0  # oldest messages left out because they no longer fit


@dataclass(frozen=True)
class Fit:
    """How a conversation stands in the context window, which prompt and answer share."""

    prompt_tokens: int  # of what would be sent; more than the window for what is too long to be read
    dropped_messages: int  # oldest ones that would be left out
    answer_tokens: int  # what the window leaves for the answer, whatever max_new_tokens says
    context_length: int  # 0 where nobody knows it
    fits: bool = True  # False: stream_reply would raise PromptTooLong, though all but the newest message were left out


@dataclass(frozen=True)
class Timing:
    """How fast one reply was. Seconds from submit to first token; tokens per second after it."""

    time_to_first_token_s: float | None = None
    tokens_per_second: float | None = None


class Reply(Protocol):
    """One answer on its way: an iterator of pieces of text, sync or async, and a context manager both ways.

    Leaving the context, or close(), frees the model within one step. close() may be called from any thread,
    any number of times, and wakes a reader that waits. A failed answer raises ChatError from the iteration, after
    the pieces already yielded.
    """

    @property
    def queue_position(self) -> int: ...  # place in the waiting queue, 1 for the next; 0 once it runs

    @property
    def finish_reason(self) -> FinishReason | None: ...  # None while the answer is on its way

    @property
    def usage(self) -> Usage: ...

    @property
    def timing(self) -> Timing: ...

    @property
    def relaxed(self) -> Sequence[str]: ...  # words of its JSON schema that it may violate; none where nobody knows

    @property
    def json_ends(
        self,
    ) -> bool: ...  # whether JSON that begins now ends before max_new_tokens; False where nobody knows

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]: ...  # none before the first piece, or if not asked for

    @property
    def logprobs(self) -> Sequence[TokenLogprob]: ...  # of the tokens whose text has been read; none if not asked for

    def __iter__(self) -> Iterator[str]: ...
    def __next__(self) -> str: ...
    def __aiter__(self) -> AsyncIterator[str]: ...
    async def __anext__(self) -> str: ...
    def __enter__(self) -> Reply: ...
    def __exit__(self, *exc: object) -> None: ...
    async def __aenter__(self) -> Reply: ...
    async def __aexit__(self, *exc: object) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Status:
    """What the model is doing now, in words that the page and /healthz show as they stand."""

    state: Literal["loading", "ready", "failed"] = "loading"
    phase: Phase = "choose"  # while loading
    done_bytes: int = 0  # of the download
    total_bytes: int = 0  # 0 while unknown
    model: str = ""  # what the model is called: its Hub id, the name of its folder, or MODEL_NAME
    adapters: tuple[str, ...] = ()  # what its adapters are called, of which a request may choose one
    precision: str = ""  # "bfloat16", "int8", "nf4", ...
    kv_cache: str = ""  # keys and values: "int8", "fp8", or "none" as the model computes them
    guesses_format: bool = False  # it chats in Llama 2's format, and nothing says that it was trained to
    device: str = ""  # "cpu", "cuda:0", "2 x cuda"; the hosts of servers, whose precision nobody knows
    why: str = ""  # why this model in this precision, one or two sentences
    error: str = ""  # when failed: what happened and what to do, one or two sentences


@dataclass(frozen=True)
class Occupancy:
    """Who is answered, who waits and how full the KV cache is, right now."""

    running: int  # requests
    waiting: int
    kv_tokens: int  # whose keys and values running requests hold, in whole blocks
    kv_capacity_tokens: int  # that there is memory for
    preemptions: int = 0  # since the start: requests that went back to the waiting queue because memory was full
    drafted: int = 0  # since the start: tokens of answers that were guessed, so that several are computed at once
    accepted: int = 0  # of those the ones that were chosen
    host_tokens: int = 0  # of conversations that left the GPU, whose keys and values are in memory of the host
    host_capacity_tokens: int = 0  # that there is memory of the host for
    recalled_tokens: int = 0  # since the start: that came back from there
    drafted_by_model: int = 0  # of `drafted` those that a DRAFT_MODEL guessed
    accepted_by_model: int = 0  # of `accepted` the same


@dataclass(frozen=True)
class ServerStatus:
    """One server that has the model, as far as this program knows it."""

    name: str  # host and port
    healthy: bool
    running: int  # answers of this program that are on their way there


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do beyond streaming a reply."""

    supports_token_ids: bool  # encode(), encode_text(), decode() and stream_completion(); else they raise ChatError
    knows_queue: bool  # reply.queue_position and occupancy report the queue
    can_fail_over: bool  # its servers come and go, so that `status` may change at any time
    counts_tokens: bool  # fit(); else it raises ChatError
    chats: bool = True  # False: a base model, whose stream_reply(), fit() and encode() raise ChatError


class ChatBackend(Protocol):
    """A model that answers, wherever it is: the one thing that the page, the API and scripts know.

    Kept by model.ChatModel, which has the model in this process, and by remote.RemoteModel, which asks servers.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def status(self) -> Status: ...

    @property
    def state(self) -> Literal["loading", "ready", "failed"]: ...  # of `status`

    @property
    def mode(self) -> str: ...  # how a step runs, in words; "" where nobody knows

    @property
    def context_length(self) -> int: ...  # tokens, prompt and answer together; 0 while unknown

    @property
    def call_style(self) -> CallStyle: ...  # of the calls in the text of a reply that was offered tools

    @property
    def occupancy(self) -> Occupancy | None: ...  # None where nobody knows

    @property
    def gpu_memory(self) -> list[tuple[int, int]]: ...  # bytes used, and bytes in total, of each GPU here

    @property
    def servers(self) -> Sequence[ServerStatus]: ...  # none if the model is in this process

    def start(self) -> threading.Thread:
        """Load or connect in the background; `status` tells how far it is."""

    def close(self, timeout_s: float = 5) -> None:
        """Stop within timeout_s seconds. Readers see their replies end as cancelled."""

    def stream_reply(
        self,
        messages: list[Message],
        params: SamplingParams,
        *,
        trim: bool = True,
        to_the_end: bool = False,
        tools: ToolOffer | None = None,
    ) -> Reply:
        """The answer to a conversation, on its way. Entering the reply may wait until somebody has accepted it.

        messages: if they end with the assistant's, that is an answer to go on with; the reply begins exactly where its
            text ends, and params.max_new_tokens are new ones. An empty one is as good as none.
        trim: leave out the oldest exchanges if the conversation is too long; reply.usage.dropped_messages counts them.
        to_the_end: the answer may be as long as the context window leaves; params.max_new_tokens then only says how
            much room trimming makes.
        tools: what the model is told of and the reply may call. Its text is then an answer, which follows
            params.grammar, or calls in `call_style`, which tools.CallReader tells apart.

        Raises PromptTooLong, Busy, ModelUnavailable while the model is not ready, ChatError for malformed messages,
        BadGrammar for a grammar that answers cannot be held to; a backend that asks servers raises some of them
        when the reply is entered.
        """

    def fit(self, messages: list[Message], params: SamplingParams, tools: ToolOffer | None = None) -> Fit:
        """How the conversation would stand in the context window if stream_reply were asked now, with trim.

        A few ms for a hundred turns, or a request to a server, so it is not for an event loop.
        Raises as stream_reply does, but for a newest message that is too long, and nothing is in line for it.
        """

    def stream_completion(self, input_ids: Sequence[int], params: SamplingParams, *, to_the_end: bool = False) -> Reply:
        """What follows input_ids, on its way; after encode_infilling()'s, what stands between its texts.

        Raises as stream_reply does; nothing is ever left out.
        """

    def encode(self, messages: list[Message], tools: ToolOffer | None = None) -> list[int]:
        """The prompt that stream_reply makes of a conversation, however long it is."""

    def decode(self, input_ids: Sequence[int]) -> str:
        """The text of token ids, control tokens by their names. Raises ChatError for ids that the model lacks."""

    def encode_text(self, text: str) -> list[int]:
        """The prompt of a text to go on with; none of it becomes a control token, save a BOS at its head.

        A text that is just "<PRE> prefix <SUF>suffix <MID>" is encode_infilling()'s, on a model that can fill in.
        """

    def encode_infilling(
        self, prefix: str, suffix: str, *, extra: Sequence[str] = (), room: int | None = None
    ) -> list[int]:
        """The prompt of what stands between two texts. Raises NoInfilling for a model that cannot.

        extra: further texts, the nearest last.
        room: tokens that the prompt may have; what is farthest from the gap is left out for it, `extra` first.
        """


class Embedded(NamedTuple):
    vectors: np.ndarray  # [N, D], float32, each of length 1
    tokens: int  # of all texts together, as the encoder read them; 0 where nobody says


class Embedder(Protocol):
    """An encoder, wherever it is: texts become vectors, whose product is the larger the more alike two texts mean.

    Kept by embeddings.LocalEmbedder, which has it in a process of its own, and by embeddings.RemoteEmbedder, which
    asks a server. Used by any number of threads.
    """

    @property
    def name(self) -> str: ...  # as programs call it

    @property
    def state(self) -> Literal["loading", "ready", "failed"]: ...

    @property
    def error(self) -> str: ...  # a sentence, of one that failed

    @property
    def identity(self) -> str: ...  # of its vectors: those of two identities cannot be compared; "" while unknown

    @property
    def dimensions(self) -> int: ...  # 0 while unknown

    def start(self) -> None:
        """Load or connect in the background. Again, it tries what failed once more, and changes nothing else."""

    def close(self) -> None: ...

    def embed(self, texts: Sequence[str], purpose: EmbeddingPurpose) -> Embedded:
        """The vectors of some texts, in their order. What is too long is cut, but for a request.

        Raises ModelUnavailable where there is no encoder now, ChatError for a request that it refuses.
        """

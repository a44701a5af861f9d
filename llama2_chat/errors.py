"""What can go wrong in a way that a visitor or an operator can put right. Every other exception is ours, and logged.

The text of a ChatError is written for people and shown as it stands; where folders of this machine stand in it, only
the log and --check show them. Only the standard library is used here.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Literal

Subject = Literal["conversation", "message", "message and its answer so far", "prompt"]
DISK_FULL = "The disk of this server is full, so nothing more can be kept."
GPU_LOST = "The GPU stopped working, so this program is shutting down. It must be restarted if no supervisor does so."


# An absolute path, or one from home: in quotes, or without blanks. Not the end of an address, a Hub id or a tag.
PATH = re.compile(r"""(?<![\w/.:~<>\[\]-])(?:'(?P<quoted>~?/[^']+)'|(?P<bare>~?/[^\s'",;()]+))""")


def quoted(path: str | Path) -> str:
    """A path as it stands in sentences: in quotes, as a shell takes it, if it holds blanks and the like."""
    return shlex.quote(str(path))


def without_folders(sentence: str) -> str:
    """The sentence with the last part alone of each absolute path in it."""

    def name(path: re.Match[str]) -> str:
        text = path["quoted"] or path["bare"]
        whole = text.rstrip("/.:?!")  # what ends a sentence is no part of a path
        return whole.rpartition("/")[2] + text[len(whole) :].lstrip("/")

    return PATH.sub(name, sentence)


class ChatError(Exception):
    """Something the visitor can put right. Its text is written for them and shown as it stands.

    detail: the same for the log and whoever started this program, with what is not for visitors.
    """

    def __init__(self, sentence: str = "", detail: str = "") -> None:
        super().__init__(sentence)
        self.detail = detail or sentence


class UnknownToken(ChatError):
    """A setting that names a token which the model does not have. setting: its name in SamplingParams."""

    def __init__(self, sentence: str, setting: str) -> None:
        super().__init__(sentence)
        self.setting = setting


class NoAdapter(ChatError):
    """A model that has no adapter of this name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no adapter {name!r:.100} here. Choose another model.")


class NoInfilling(ChatError):
    """A model that goes on with a text and cannot fill in before another."""


class PromptTooLong(ChatError):
    """A prompt that does not fit in the context window with room to answer. "Too long" is worded here and nowhere else.

    prompt_tokens, context_length: 0 where nobody knows them.
    max_new_tokens: the room that was requested for the answer; 0 if any will do.
    system_tokens: of the prompt, the system text and examples; what to shorten depends on it.
    subject: what is so long; a message is the newest alone, a prompt a text to go on with.
    """

    def __init__(
        self,
        prompt_tokens: int = 0,
        context_length: int = 0,
        max_new_tokens: int = 0,
        system_tokens: int = 0,
        subject: Subject = "conversation",
        has_examples: bool = False,
    ) -> None:
        self.prompt_tokens, self.context_length = prompt_tokens, context_length
        too_much_system = 2 * system_tokens > prompt_tokens
        verb = "are" if " and " in subject else "is"
        what = f"This {subject} {verb} {f'{prompt_tokens:,} tokens' if prompt_tokens else 'too long'}"
        if too_much_system:
            begins = "system prompt and its examples are" if has_examples else "system prompt is"
            what = f"The {begins} {system_tokens:,} tokens, {prompt_tokens:,} with this {subject}"
        answer = f", and {max_new_tokens:,} more are requested for the answer" if max_new_tokens else ""
        holds = ""
        if context_length:
            holds = f" This model's maximum context length is {context_length:,} tokens, prompt and answer together."
        longest = "the system prompt or its examples" if has_examples else "the system prompt"
        shorten = f"Shorten {longest}" if too_much_system else "Shorten it"
        room = context_length - prompt_tokens if prompt_tokens else 0
        less = f", or ask for an answer of at most {room:,} tokens" if max_new_tokens and room > 0 else ""
        super().__init__(f"{what}{answer}.{holds} {shorten}{less}.")


class ModelUnavailable(ChatError):
    """No model can answer now: still loading, could not be loaded, or stopped. Its text names no folder."""

    def __init__(self, detail: str = "") -> None:
        super().__init__(without_folders(detail), detail)


class Unsafe(ChatError):
    """A guard has judged the question, or the answer to it, unsafe."""


class Busy(ChatError):
    """The waiting queue is full."""


class BadGrammar(ChatError):
    """Answers cannot be held to this grammar."""


class NotHere(ChatError):
    """There is nothing of this name, or it is somebody else's, which is not told from none."""


class NoRoom(ChatError):
    """Nothing more can be kept: the disk is full, or whoever asks has as much as they may have."""

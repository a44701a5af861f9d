"""What can go wrong in a way that a visitor or an operator can put right. Every other exception is ours, and logged.

The text of a ChatError is written for people and shown as it stands. Only the standard library is used here.
"""

from __future__ import annotations

from typing import Literal

GPU_LOST = "The GPU stopped working, so this program is shutting down. It must be restarted if no supervisor does so."


class ChatError(Exception):
    """Something the visitor can put right. Its text is written for them and shown as it stands."""


class PromptTooLong(ChatError):
    """A prompt that does not fit in the context window with room to answer. "Too long" is worded here and nowhere else.

    prompt_tokens, context_length: 0 where nobody knows them.
    max_new_tokens: the room that was requested for the answer; 0 if any will do.
    system_tokens: of the prompt, the system text; what to shorten depends on it.
    subject: what is so long, "message" if it is only the newest one.
    """

    def __init__(
        self,
        prompt_tokens: int = 0,
        context_length: int = 0,
        max_new_tokens: int = 0,
        system_tokens: int = 0,
        subject: Literal["conversation", "message"] = "conversation",
    ) -> None:
        self.prompt_tokens, self.context_length = prompt_tokens, context_length
        too_much_system = 2 * system_tokens > prompt_tokens
        what = f"This {subject} is {f'{prompt_tokens:,} tokens' if prompt_tokens else 'too long'}"
        if too_much_system:
            what = f"The system prompt is {system_tokens:,} tokens, {prompt_tokens:,} with this {subject}"
        answer = f", and {max_new_tokens:,} more are requested for the answer" if max_new_tokens else ""
        holds = ""
        if context_length:
            holds = f" This model's maximum context length is {context_length:,} tokens, prompt and answer together."
        shorten = "Shorten the system prompt" if too_much_system else "Shorten it"
        room = context_length - prompt_tokens if prompt_tokens else 0
        less = f", or ask for an answer of at most {room:,} tokens" if max_new_tokens and room > 0 else ""
        super().__init__(f"{what}{answer}.{holds} {shorten}{less}.")


class ModelUnavailable(ChatError):
    """No model can answer now: still loading, could not be loaded, or stopped."""


class Busy(ChatError):
    """The line of waiting requests is full."""


class BadGrammar(ChatError):
    """Answers cannot be held to this grammar."""

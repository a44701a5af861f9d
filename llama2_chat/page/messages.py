"""Between Gradio's history and the model's messages: turns that the page shows, and the conversation they stand for.

A turn is a dict with role and content, as gr.Chatbot takes it. Remarks of the page are turns too, marked by the "id"
in their metadata, so that no model reads them later, whatever is retried, undone or edited.
"""

from __future__ import annotations

import html
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from llama2_chat.errors import ChatError
from llama2_chat.page import wording
from llama2_chat.text import valid_unicode
from llama2_chat.types import Message

Turn = dict[str, Any]

# The class of a remark that hands the message back, which page.js looks for. An answer may hold any HTML, but cannot
# guess this.
REFUSED_CLASS = f"refused-{secrets.token_hex(8)}"


@dataclass(frozen=True)
class Shown:
    """What the page shows of one answer at a time."""

    text: str = ""  # so far
    waiting: str = ""  # what it waits for; shown while there is no text
    remark: str = ""  # below the text, once it has ended
    refused: bool = False  # the message never reached the model: the remark hands it back

    def turns(self) -> list[Turn]:
        """The answer, and a small remark below it as a turn of its own."""
        turns = [text_turn("assistant", self.text)] if self.text else []
        if self.waiting and not self.text:
            # Stop leaves this turn behind; page.css then shows its second half.
            both = f"<span class=waiting>{html.escape(self.waiting)}</span><span class=stopped>{wording.STOPPED}</span>"
            turns.append(_remark_turn(both))
        elif self.remark:
            turns.append(_remark_turn(html.escape(self.remark), self.refused))
        return turns


def text_turn(role: str, text: str) -> Turn:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _remark_turn(markup: str, refused: bool = False) -> Turn:
    kind, css_class = ("refused", f"refused {REFUSED_CLASS}") if refused else ("remark", "remark")
    return {**text_turn("assistant", f'<small class="{css_class}">{markup}</small>'), "metadata": {"id": kind}}


def is_refusal(turn: Turn) -> bool:
    """Whether this remark says that the message before it was not sent."""
    return _remark_kind(turn) == "refused"


def _remark_kind(turn: Turn) -> str | None:
    """ "remark" or "refused"; None for what visitor and model said."""
    return (turn.get("metadata") or {}).get("id")


def plain_messages(message: object, history: list[Turn], system_prompt: str | None) -> list[Message]:
    """The conversation as a model takes it. Remarks of the page stay out, and so do messages that were refused.

    Raises ChatError for an empty message and for a history that no chat can have.
    """
    if not isinstance(message, str) or not message.strip():
        raise ChatError(wording.NO_MESSAGE)
    messages: list[Message] = []
    for turn in history:
        if is_refusal(turn) and messages:
            messages.pop()
        if _remark_kind(turn) not in ("refused", "remark"):
            messages.append(_message(turn))
    system = [Message(role="system", content=system_prompt)] if system_prompt else []
    return [*system, *messages, Message(role="user", content=message)]


def _message(turn: Turn) -> Message:
    role = turn.get("role")
    if role not in ("user", "assistant"):
        raise ChatError(f"A conversation is between user and assistant, not {role!r}.")
    return Message(role=role, content=_text_of(turn.get("content")))


def _text_of(content: object) -> str:
    """Gradio's page sends a list of parts, its API plain text."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError(wording.TEXT_ONLY)
    return "\n".join(cast(list[str], texts))


def verbatim(postprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Chatbot.postprocess, except that texts keep their indentation and hold nothing that JSON in UTF-8 cannot.

    Given a plain str, Gradio takes the common indentation out: pasted code would lose it, for the model too.
    """

    def postprocess_verbatim(turns: list[Turn] | None) -> Any:
        texts = [(turn, valid_unicode(_text_of(turn["content"]))) for turn in turns or []]
        return postprocess([{**turn, **text_turn(turn["role"], text)} for turn, text in texts])

    return postprocess_verbatim

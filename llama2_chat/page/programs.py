"""What gr.ChatInterface calls: Gradio's /chat, as gradio_client and other programs use it. The page does not.

Programs send their settings by the names of reply()'s parameters; the server remembers each client's conversation.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncGenerator, Callable, Container, Iterable
from datetime import date
from typing import Any

import gradio as gr

from llama2_chat.agent import MEMORY, Tool
from llama2_chat.errors import ChatError
from llama2_chat.page import questions, wording
from llama2_chat.page.answering import Answering, End
from llama2_chat.presets import filled
from llama2_chat.server.limits import client_address
from llama2_chat.types import Message, SamplingParams

MOST_REMEMBERED = 20  # exchanges
Turn = dict[str, Any]  # with role and content, as Gradio keeps them
ReplyFunction = Callable[..., AsyncGenerator[str, None]]


def make_reply(answering: Answering, listeners: Container[str | None], tools: Iterable[Tool] = ()) -> ReplyFunction:
    """listeners: the sessions whose messages somebody reads; an answer that nobody reads is given up.

    tools: that programs may let the model use; with none, they have no such settings.
    """

    async def reply(
        message: str,
        history: list[Turn],
        system_prompt: str | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        seed: str | None,
        request: gr.Request,
        use_tools: bool = False,
        tools_memory: Any = None,
    ) -> AsyncGenerator[str, None]:
        """The text so far, as it grows."""

        def question() -> questions.Question:
            messages = conversation(message, history, system_prompt)
            params = SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
                seed=parsed_seed(seed),
            )
            if not use_tools:
                return questions.Plain(messages, params)
            return questions.with_tools(messages, params, tools, parsed_memory(tools_memory))

        answer = answering.answer(question, _client(request), lambda: request.session_hash in listeners)
        text = ""
        async with contextlib.aclosing(answer):
            async for progress in answer:
                if isinstance(progress, End):
                    if progress.error:
                        raise gr.Error(progress.error, print_exception=False)
                else:
                    text += progress.piece
                    yield text  # an empty one too: Gradio notices only then that a client has left

    return reply


def _client(request: gr.Request) -> str:
    return f"login {request.username}" if request.username else client_address(request)


class ProgramChat(gr.ChatInterface):
    """Gradio's /chat, in whose history a question stands only once it is being answered: a refused one is forgotten."""

    async def _stream_fn(self, message: Any, history: list[Any], *settings: Any) -> AsyncGenerator[Any, None]:
        async with contextlib.aclosing(super()._stream_fn(message, history, *settings)) as replies:
            async for text, with_answer in replies:
                yield text, with_answer if text else history


def parsed_seed(text: str | None) -> Any:
    """The number in it; None for an empty text. SamplingParams refuses, in words, whatever else it holds."""
    text = (text or "").strip()
    return int(text) if re.fullmatch("[0-9]{1,40}", text) else text or None


def parsed_memory(number: object) -> int:
    """How many exchanges a question with tools comes with. Raises ChatError for what is no such number."""
    if number is None:
        return MEMORY
    if isinstance(number, (int, float)) and not isinstance(number, bool) and 0 <= number <= MOST_REMEMBERED:
        return int(number)
    raise ChatError(f"tools_memory must be a whole number from 0 to {MOST_REMEMBERED}; it was {number!s:.40}.")


def conversation(message: object, history: list[Turn], system_prompt: str | None) -> list[Message]:
    """The conversation as a model takes it. Raises ChatError for an empty message and a history no chat can have."""
    if not isinstance(message, str) or not message.strip():
        raise ChatError(wording.NO_MESSAGE)
    text = filled(system_prompt or "", date.today())
    system = [Message(role="system", content=text)] if text else []
    return [*system, *map(_message, history), Message(role="user", content=message)]


def _message(turn: Turn) -> Message:
    role = turn.get("role")
    if role not in ("user", "assistant"):
        raise ChatError(f"A conversation is between user and assistant, not {role!r}.")
    return Message(role=role, content=_text_of(turn.get("content")))


def _text_of(content: object) -> str:
    """Gradio keeps a list of parts; a program may send plain text."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError(wording.TEXT_ONLY)
    return "\n".join(map(str, texts))

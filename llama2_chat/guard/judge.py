"""The server that judges: one short question for each verdict, held by a grammar where it knows one."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from llama2_chat.errors import ChatError
from llama2_chat.guard.verdict import Style, Verdict, style_of
from llama2_chat.remote.client import Timeouts
from llama2_chat.remote.faults import NO_LIST, RequestRejected, ServerFault, translate
from llama2_chat.remote.server import Server
from llama2_chat.settings import Settings

log = logging.getLogger("llama2_chat")

VERDICT_TOKENS = 20  # "unsafe" and some categories
VERDICT_S = 30.0  # after which a guard is as good as none
# As vLLM and this program have them. Others leave out what they do not know, or reject it and are asked without.
HELD = "structured_outputs"
NO_PENALTY = {"repetition_penalty": 1.0}  # on words that its own task holds
GOES_ON = (
    "The guard's server goes on with an answer instead of judging it. Start llama.cpp's server with "
    "--no-prefill-assistant, or serve the guard with vLLM."
)


class NoVerdict(ServerFault):
    """The guard has answered with something else."""


class Judge:
    """Used in one event loop."""

    def __init__(self, settings: Settings, verdict_s: float = VERDICT_S) -> None:
        server = Server(settings.guard_url, settings.guard_key, Timeouts(silence_s=verdict_s))
        self._client, self._model, self._verdict_s = server.client, settings.guard_model or "", verdict_s
        self._takes_extras = True
        self._judges_answers = False  # as far as is known

    async def judge(self, question: str, answer: str | None = None) -> Verdict:
        """Of the question, or of the answer to it. Raises ChatError where there is no verdict."""
        try:
            async with asyncio.timeout(self._verdict_s):
                return await self._judge(question, answer)
        except Exception as error:  # a deadline that has passed is a TimeoutError
            raise translate(error) from error

    async def _judge(self, question: str, answer: str | None) -> Verdict:
        self._model = self._model or await self._only_model()
        style = style_of(self._model)
        if answer is not None and style.has_task and not self._judges_answers:
            await self._check_turns(style)
        messages: list[Any] = [*style.messages(question, answer)]
        text, is_whole = await self._asked(messages, style)
        verdict = style.read(text, is_whole=is_whole)
        if verdict is None:
            raise NoVerdict("The guard's server gave no verdict.")
        return verdict

    async def _check_turns(self, style: Style) -> None:
        """Raise ServerFault for a server that goes on with an answer which stands last: what it says is no verdict.

        An answer that reads like one ends a verdict that has begun with it, and no other word follows.
        """
        messages: list[Any] = [*style.messages("Good morning!", style.last_word)]
        text, is_whole = await self._read(messages, {})  # a grammar would have it begin a verdict
        if style.read(text, is_whole=is_whole) is None:
            raise ServerFault(GOES_ON)
        self._judges_answers = True

    async def _only_model(self) -> str:
        models = await self._client.list_models()
        if len(models) != 1:
            raise ServerFault(NO_LIST if not models else "The guard's server has several models. Set GUARD_MODEL.")
        return str(models[0]["id"])

    async def _asked(self, messages: list[dict[str, Any]], style: Style) -> tuple[str, bool]:
        """The text, and whether the guard itself has ended it."""
        if self._takes_extras:
            try:
                return await self._read(messages, {HELD: {"regex": style.grammar}, **NO_PENALTY})
            except RequestRejected:  # perhaps for what it does not know: then it takes the same without that
                pass
        answered = await self._read(messages, {})
        if self._takes_extras:
            log.info("The guard cannot be held to a grammar; what is no verdict is refused")
        self._takes_extras = False
        return answered

    async def _read(self, messages: list[dict[str, Any]], extras: dict[str, Any]) -> tuple[str, bool]:
        fields = {"max_tokens": VERDICT_TOKENS, "temperature": 0.0}
        pieces, reason = [], None
        async with self._client.stream_chat(self._model, messages, fields, extras) as chunks:
            async for chunk in chunks:
                for choice in chunk.choices or ():
                    pieces.append((choice.delta and choice.delta.content) or "")
                    reason = choice.finish_reason or reason
                if reason:
                    break
        return "".join(pieces), reason in ("stop", "eos_token", "stop_sequence")


def sentence_of(error: ChatError) -> str:
    """What went wrong, for the operator: the faults of servers are worded for the one that has the model."""
    return error.detail.replace("The model's server", "The guard's server").replace("INFERENCE_", "GUARD_")

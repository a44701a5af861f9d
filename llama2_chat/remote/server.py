"""One address of a server, what is known about it, and one answer from it."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from llama2_chat.errors import ChatError, PromptTooLong
from llama2_chat.remote.client import Client, Timeouts
from llama2_chat.remote.faults import CANNOT_GO_ON, NO_REASON, RequestRejected, ServerFault
from llama2_chat.remote.question import EXTRAS, GO_ON, IF_ASKED, TOOL_FIELDS, Question
from llama2_chat.remote.reply import RemoteReply
from llama2_chat.types import ServerStatus


class Server:
    """Used in the event loop alone, except for its `status`."""

    def __init__(self, url: str, key: str, timeouts: Timeouts) -> None:
        parts = urlsplit(url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions").removesuffix("/v1")
        # geturl() writes the scheme in small letters: huggingface_hub takes HTTP:// for the name of a model on its Hub,
        # and would send the questions there.
        self.client = Client(parts._replace(path=f"{path}/v1").geturl(), key, timeouts)
        self.name = parts.netloc.rpartition("@")[2] + path  # without a password
        self.fault: str | None = None  # a sentence; "" if it is healthy, None if it has not been probed yet
        self.running = 0  # answers of this program
        self.last_seen = 0.0  # time.monotonic() of the latest sign of life
        self.suspect = asyncio.Event()  # an answer failed, and no probe has ended since
        self.takes_extras = True
        self.counts_tokens = False
        self.has_listed = False  # its models

    @property
    def healthy(self) -> bool:
        return self.fault == ""

    @property
    def status(self) -> ServerStatus:
        return ServerStatus(self.name, self.healthy, self.running)

    async def count(self, model: str, question: Question) -> tuple[int, int]:
        """The tokens of its prompt, and of the server's context window. Raises ChatError."""
        going_on = {name: question.fields[name] for name in GO_ON if name in question.fields}
        try:
            return await self.client.count(model, question.messages, going_on)
        except PromptTooLong as error:  # so much so that the server has not read it
            if not error.context_length:
                raise
            return error.prompt_tokens or error.context_length + 1, error.context_length

    async def answer(self, model: str, question: Question, reply: RemoteReply) -> None:
        """Read the answer into the reply, which then has a server_reason. Raises ChatError.

        Tools are passed on. A server that does not take them is asked to follow a JSON schema instead; it is not
        remembered as one, for it may have refused this question's tools alone.
        """
        reply.expect_json_only(None)
        try:
            await self._answer(model, question, reply)
        except ChatError as error:
            if reply.has_text or not question.has_tools or "tool" not in error.detail.lower():
                raise
            reply.expect_json_only(question.answer_is_text if question.json_only else None)
            await self._answer(model, question.without_tools(), reply)

    async def _answer(self, model: str, question: Question, reply: RemoteReply) -> None:
        asked = (*GO_ON, *IF_ASKED, *TOOL_FIELDS)
        names = [*asked, *(EXTRAS if self.takes_extras else ())]
        extras = {name: question.fields[name] for name in names if name in question.fields}
        fields = {name: value for name, value in question.fields.items() if name not in (*asked, *EXTRAS)}
        asking = self.client.stream_chat(model, question.messages, fields, extras)
        try:
            async with asyncio.timeout(None) as limit, asking as chunks:
                reply.accept()
                async for chunk in chunks:
                    self.last_seen = time.monotonic()
                    reply.put(chunk)
                    if reply.server_reason and limit.when() is None:
                        limit.reschedule(asyncio.get_running_loop().time() + self.client.timeouts.usage_s)
        except RequestRejected as error:
            if GO_ON.keys() & question.fields.keys() and any(name in str(error) for name in GO_ON):
                raise RequestRejected(CANNOT_GO_ON) from error
            raise
        except (ChatError, TimeoutError):
            if not reply.server_reason:
                raise
        if not reply.server_reason:
            raise ServerFault(NO_REASON)

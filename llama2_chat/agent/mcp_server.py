"""One MCP server: started or reached, asked for its tools, and started anew at the next use after it has failed.

All of it runs in one event loop in a thread of its own. A server is trusted with what its operator gave it, but not to
answer: whatever it does, a call ends in time, with a sentence.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from llama2_chat.agent.mcp_file import McpServerSpec
from llama2_chat.errors import ChatError

log = logging.getLogger("llama2_chat")

START_S = 10.0  # to start, shake hands and list the tools
CALL_S = 30.0
RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)  # that a server is left alone after so many failures in a row
MOST_TIMEOUTS = 3  # calls in a row without an answer, after which a server counts as hanging
MOST_PAGES = 10  # of a list of tools
QUIET_S = 1.0  # between two lists, however often a server says that its tools have changed
LISTEN_S = 60.0  # until changes are listened for again, where that has ended
GONE = "The tool's server has gone away. It is tried again at the next use."
FORGOTTEN = ("session terminated", "session not found")  # as the library says it, and as servers do
T = TypeVar("T")


class EventLoop:
    """An event loop in a daemon thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="mcp", daemon=True).start()

    def start(self, work: Awaitable[T]) -> Callable[[float | None], T]:
        """Begin it; the function that is returned waits for what comes of it, for so many seconds."""

        async def run() -> T:
            return await work

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result


class McpServer:
    """on_tools: called in the event loop with what the server lists, when it has been started and when that changes."""

    def __init__(self, spec: McpServerSpec, loop: EventLoop, on_tools: Callable[[list[Any]], None]) -> None:
        self.spec, self._loop, self._on_tools = spec, loop, on_tools
        self._connecting = asyncio.Lock()
        self._client: Any = None
        self._closing: asyncio.Event | None = None
        self._holding: asyncio.Task[None] | None = None
        self._failures, self._timeouts, self._not_before = 0, 0, 0.0
        self._closed = False

    def start(self) -> None:
        """Begin to list its tools, and try again until it has."""
        self._loop.start(self._first())

    def call(self, tool: str, arguments: Any) -> str:
        """What the tool says. Raises ChatError, with a sentence, where it says nothing."""
        return self._loop.start(self._call(tool, arguments))(None)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(TimeoutError):
            self._loop.start(self._drop(self._client))(5)

    async def _first(self) -> None:
        while not self._closed:
            try:
                await self._connected()
                return
            except ChatError:
                await asyncio.sleep(max(self._not_before - time.monotonic(), 0.1))

    async def _call(self, tool: str, arguments: Any, again: bool = True) -> str:
        """again: whether to call it anew where the server, started anew, does not know the connection any more."""
        from mcp import MCPError
        from mcp_types import PARSE_ERROR

        client = await self._connected()
        try:
            async with asyncio.timeout(CALL_S):
                result = await client.call_tool(tool, arguments)
        except MCPError as error:
            if error.message.lower().startswith(FORGOTTEN) and again:  # so nothing has been done yet
                await self._drop(client)
                return await self._call(tool, arguments, again=False)
            if error.code == PARSE_ERROR:
                raise self._no_answer(error) from error
            if error.code <= -32600 or error.code >= -31999:  # of the protocol: the server is there, and refuses
                raise ChatError(f"The tool's server refused the call: {error.message:.300}") from error
            await self._failed(error, client)
            raise ChatError(GONE) from error
        except TimeoutError as error:
            self._timeouts += 1
            if self._timeouts >= MOST_TIMEOUTS:
                await self._failed(error, client)
            raise ChatError(f"The tool's server did not answer within {CALL_S:g} seconds.") from error
        except (ValueError, RuntimeError) as error:  # pydantic's and the library's, about this one answer
            raise self._no_answer(error) from error
        except Exception as error:
            await self._failed(error, client)
            raise ChatError(GONE) from error
        self._failures = self._timeouts = 0
        text = _text_of(result)
        if result.is_error:
            raise ChatError(f"The tool failed: {text[:500] or 'it does not say why.'}")
        return text

    def _no_answer(self, error: Exception) -> ChatError:
        log.warning("The MCP server %s: %s", self.spec.name, _reason(error))
        return ChatError("The tool's server answered with something that is no answer.")

    async def _connected(self) -> Any:
        async with self._connecting:
            if self._client is not None and not self._is_broken:
                return self._client
            wait_s = self._not_before - time.monotonic()
            if wait_s > 0:
                raise ChatError(f"The tool's server has failed. It is tried again in {math.ceil(wait_s)} s.")
            try:
                async with asyncio.timeout(START_S):
                    await self._connect()
            except Exception as error:
                await self._failed(error, self._client)
                raise ChatError("The tool's server cannot be reached.") from error
            return self._client

    @property
    def _is_broken(self) -> bool:
        """Whether the connection has ended by itself; then a call over it would never be answered."""
        return self._holding is not None and self._holding.done()

    async def _connect(self) -> None:
        """In a task of its own, which enters the connection and leaves it again."""
        ready: asyncio.Future[tuple[Any, list[Any]]] = asyncio.get_running_loop().create_future()
        self._closing = asyncio.Event()
        self._holding = asyncio.ensure_future(self._hold(ready, self._closing))
        self._client, tools = await ready
        log.info("The MCP server %s has %d tools", self.spec.name, len(tools))
        self._on_tools(tools)

    async def _hold(self, ready: asyncio.Future[tuple[Any, list[Any]]], closing: asyncio.Event) -> None:
        try:
            changed = asyncio.Event()
            async with _client(self.spec, changed) as client:
                ready.set_result((client, await _tools(client)))
                follow = [
                    asyncio.ensure_future(_listen(client, changed)),
                    asyncio.ensure_future(self._follow(client, changed)),
                ]
                try:
                    await closing.wait()
                finally:
                    for task in follow:
                        task.cancel()
                await asyncio.wait(follow)
        except BaseException as error:
            if ready.done():
                log.debug("The connection to the MCP server %s ended", self.spec.name, exc_info=error)
            else:
                ready.set_exception(error if isinstance(error, Exception) else ConnectionError())

    async def _follow(self, client: Any, changed: asyncio.Event) -> None:
        """List the tools anew each time that the server says so."""
        while True:
            await changed.wait()
            changed.clear()
            try:
                async with asyncio.timeout(START_S):
                    tools = await _tools(client)
                log.info("The MCP server %s has changed its tools: %d", self.spec.name, len(tools))
                self._on_tools(tools)
            except Exception as error:  # those that were listed before stay, until the next call finds out
                log.warning("The MCP server %s does not list its new tools (%s)", self.spec.name, _reason(error))
            await asyncio.sleep(QUIET_S)

    async def _failed(self, error: Exception, client: Any) -> None:
        """client: the one that failed. Where another has taken its place, whoever uses that one shall keep it."""
        if client is not self._client:
            return
        self._failures, self._timeouts = self._failures + 1, 0
        wait_s = RETRY_S[min(self._failures, len(RETRY_S)) - 1]
        self._not_before = time.monotonic() + wait_s
        why = _reason(error)
        log.warning("The MCP server %s failed (%s); it is left alone for %g s", self.spec.name, why, wait_s)
        await self._drop(client)

    async def _drop(self, client: Any) -> None:
        """Leave the connection, which ends the process of a server that was started, and wait for neither."""
        if client is not self._client:
            return
        self._client = None
        holding, closing = self._holding, self._closing  # others may connect anew meanwhile
        if holding and closing:
            closing.set()
            done, _ = await asyncio.wait([holding], timeout=1)
            if not done:
                holding.cancel()


@contextlib.asynccontextmanager
async def _client(spec: McpServerSpec, changed: asyncio.Event) -> AsyncIterator[Any]:
    """changed: set when a server of before 2026 says that its tools have."""
    import httpx2  # whose timeouts would end listening; calls have their own
    from mcp import Client, StdioServerParameters, stdio_client
    from mcp.client.stdio import DEFAULT_INHERITED_ENV_VARS
    from mcp.client.streamable_http import streamable_http_client
    from mcp_types import ToolListChangedNotification

    async def on_message(message: Any) -> None:
        if isinstance(message, ToolListChangedNotification):
            changed.set()

    async with contextlib.AsyncExitStack() as stack:
        if spec.url:
            http = await stack.enter_async_context(httpx2.AsyncClient(headers=spec.headers, timeout=None))
            transport: Any = streamable_http_client(spec.url, http_client=http)
        else:
            # The library passes some variables on, unless they are given.
            env = dict.fromkeys(DEFAULT_INHERITED_ENV_VARS, "") | {"PATH": os.defpath} | spec.env
            command = shutil.which(spec.command) or spec.command
            # What it says beside the protocol is nobody's to read.
            silent = stack.enter_context(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
            parameters = StdioServerParameters(command=command, args=[*spec.args], env=env, cwd=spec.cwd)
            transport = stdio_client(parameters, errlog=silent)
        yield await stack.enter_async_context(Client(transport, cache=None, message_handler=on_message))


async def _listen(client: Any, changed: asyncio.Event) -> None:
    """The same from a server that has to be asked to say so. What was said while nobody listened is not said again."""
    from mcp.client.subscriptions import ListenNotSupportedError

    while True:
        try:
            async with client.listen(tools_list_changed=True) as events:
                async for _ in events:
                    changed.set()
        except ListenNotSupportedError:
            return
        except Exception as error:
            log.debug("Listening to an MCP server ended", exc_info=error)
        await asyncio.sleep(LISTEN_S)
        changed.set()


async def _tools(client: Any) -> list[Any]:
    tools, cursor = [], None
    for _ in range(MOST_PAGES):
        page = await client.list_tools(cursor=cursor)
        tools += page.tools
        cursor = page.next_cursor
        if cursor is None:
            break
    return tools


def _text_of(result: Any) -> str:
    """The texts of a result; what else it holds is named."""
    parts = [part.text if part.type == "text" else f"({part.type})" for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(parts)


def _reason(error: BaseException) -> str:
    """The first line, for the others hold what a server said; of errors that came together, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    first = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {first:.200}".rstrip(": ")

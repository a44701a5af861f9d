"""The tools of MCP servers, as an agent calls them: McpTools(read_mcp_servers(path)).

Each call is confirmed by a person, unless the operator's file says that a tool changes nothing. A tool that a server
describes in other words, or with another input, is another tool: whoever allowed it is asked again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2_chat.agent.mcp_file import McpServerSpec
from llama2_chat.agent.mcp_schema import signature, simplified
from llama2_chat.agent.mcp_server import CALL_S, EventLoop, McpServer
from llama2_chat.agent.tool import Example
from llama2_chat.errors import ChatError
from llama2_chat.text import valid_unicode

log = logging.getLogger("llama2_chat")

MOST_TOOLS = 16  # of one server: all of them stand in every prompt
DESCRIBED = 200  # characters that the model reads
SHOWN = 2_000  # that people do


@dataclass(frozen=True)
class McpTool:
    """A Tool of a server. description: for the model; shown_description: the server's own, for people."""

    server: McpServer
    tool_name: str  # that the server knows
    name: str
    description: str
    shown_description: str
    input_schema: Mapping[str, Any]
    asks_first: bool
    version: str  # another one with every change of the description or the input
    examples: Sequence[Example] = ()
    timeout_s: float = CALL_S + 15  # with the start of the server; what takes longer ends there with a sentence

    def run(self, input: Any) -> str:
        return self.server.call(self.tool_name, input)


class McpTools:
    """What servers offer just now, which may change at any time."""

    def __init__(self, specs: Sequence[McpServerSpec]) -> None:
        """Raises ChatError if the package is missing. The servers are started at start()."""
        if importlib.util.find_spec("mcp") is None:
            raise ChatError("MCP_SERVERS needs the package mcp: pip install -r requirements-mcp.txt")
        logging.getLogger("mcp").setLevel(logging.CRITICAL)  # it would log what servers say
        self._tools: dict[str, list[McpTool]] = {}
        loop = EventLoop()
        self._servers = [McpServer(spec, loop, self._taker(spec)) for spec in specs]

    def start(self) -> None:
        """Begin to list their tools; nothing waits for it. The log says which server has how many, or why not."""
        for server in self._servers:
            server.start()

    def close(self) -> None:
        for server in self._servers:
            server.close()

    def __iter__(self) -> Iterator[McpTool]:
        """Of two with the same name, the first: git_hub_search may be of a server git, or of another git_hub."""
        offered: dict[str, McpTool] = {}
        for tool in self._all():
            offered.setdefault(tool.name, tool)
        return iter(offered.values())

    def _all(self) -> list[McpTool]:
        return [tool for server in self._servers for tool in self._tools.get(server.spec.name, ())]

    def _taker(self, spec: McpServerSpec) -> Any:
        def take(listed: list[Any]) -> None:
            server = next(server for server in self._servers if server.spec is spec)
            tools = {tool.name: tool for tool in (_tool(server, each) for each in listed[:MOST_TOOLS])}
            if len(tools) < len(listed):
                log.warning("Of the MCP server %s, %d tools are left out", spec.name, len(listed) - len(tools))
            self._tools[spec.name] = [*tools.values()]
            offered = [*self]
            for tool in self._all():
                if tool not in offered:
                    owner = tool.server.spec.name
                    log.warning("The MCP tool %s of %s is left out: another has its name", tool.name, owner)

        return take


def _tool(server: McpServer, listed: Any) -> McpTool:
    schema = simplified(listed.input_schema)
    shown = valid_unicode(listed.description or listed.title or "")[:SHOWN]
    words = " ".join(shown.split())
    words = words if len(words) <= DESCRIBED else words[: DESCRIBED - 1] + "…"
    name = re.sub(r"[^A-Za-z0-9_-]", "_", f"{server.spec.name}_{listed.name}")[:64]
    described = json.dumps([listed.name, listed.description, listed.title, listed.input_schema], sort_keys=True)
    return McpTool(
        server,
        listed.name,
        name,
        f"{words} Input: {signature(schema)}".strip(),
        shown,
        schema,
        not server.spec.is_read_only(listed.name),
        hashlib.sha256(described.encode("utf-8", "surrogatepass")).hexdigest()[:32],
    )

"""A small MCP server, over stdio (python mcp_server.py) or HTTP (... PORT): a good tool and several bad ones."""

import os
import sys
import time
from pathlib import Path

from mcp.server.mcpserver import Context, MCPServer

server = MCPServer("test")


@server.tool(description=os.environ.get("DESCRIPTION", "adds two numbers"))
def add(a: int, b: int) -> str:
    return str(a + b)


@server.tool(description="tells its environment")
def environment() -> str:
    return " ".join(f"{name}={value}" for name, value in sorted(os.environ.items()) if value)


@server.tool(description="says a lot")
def shout() -> str:
    return "x" * 2**20


@server.tool(description="raises")
def fail() -> str:
    raise ValueError("no luck")


@server.tool(description="ends the server")
def die() -> str:
    os._exit(3)


@server.tool(description="hangs")
def hang() -> str:
    time.sleep(60)
    return ""


@server.tool(description="has one more tool from now on")
async def grow(context: Context, name: str = "grown") -> str:
    server.add_tool(lambda: "big", name=name, description="is new")
    await context.notify_tools_changed()
    await context.session.send_tool_list_changed()
    return "done"


@server.tool(description="prints what is no protocol")
def flood() -> str:
    for _ in range(2_000):
        os.write(1, b"not json " * 20 + b"\n")
    return "done"


if __name__ == "__main__":
    if marker := os.environ.get("STARTS"):
        with Path(marker).open("a") as file:
            file.write("started\n")
    if len(sys.argv) > 1:
        server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
    else:
        server.run("stdio")

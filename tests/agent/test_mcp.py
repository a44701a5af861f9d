"""MCP servers: what an operator's file may say, what a grammar makes of their schemas, and what servers may do."""

import asyncio
import functools
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from llama2_chat.agent import Agent, McpServerSpec, McpTools, mcp_server, read_mcp_servers
from llama2_chat.agent.mcp_schema import ANY_OBJECT, signature, simplified
from llama2_chat.agent.mcp_server import EventLoop, McpServer
from llama2_chat.agent.steps import write
from llama2_chat.errors import ChatError
from tests.support.scripted import Scripted, ScriptedChat
from tests.support.tool_users import a_tool

SERVER = Path(__file__).parents[1] / "support" / "mcp_server.py"


def servers(**entries):
    return json.dumps({"mcpServers": entries})


def test_a_file_in_the_usual_form_is_read(tmp_path):
    path = tmp_path / "mcp.json"
    path.write_text(
        servers(
            files={"command": "mcp-files", "args": ["/srv"], "env": {"A": "b"}, "readOnly": ["read"]},
            search={"type": "http", "url": "https://mcp.example.com/mcp", "headers": {"X": "y"}, "readOnly": True},
            off={"command": "x", "disabled": True},
        )
    )
    files, search = read_mcp_servers(path)
    assert (files.command, files.args, files.env) == ("mcp-files", ("/srv",), {"A": "b"})
    assert [files.is_read_only(tool) for tool in ("read", "write")] == [True, False]
    assert (search.url, search.headers, search.is_read_only("x")) == ("https://mcp.example.com/mcp", {"X": "y"}, True)
    assert "headers" not in repr(search)  # a log may hold it


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is not JSON"),
        ("[]", "must hold"),
        (servers(), "must hold"),
        (servers(**{"a b": {"command": "x"}}), "a server's name"),
        (servers(a={}), 'must have either "command" or "url"'),
        (servers(a={"command": "x", "url": "https://x"}), 'must have either "command" or "url"'),
        (servers(a={"command": "x", "argv": []}), "'argv'"),
        (servers(a={"command": ["x"]}), '"command" of a'),
        (servers(a={"command": "x", "args": "y"}), '"args" of a'),
        (servers(a={"command": "x", "env": {"A": 1}}), '"env" of a'),
        (servers(a={"url": "http://far.example/mcp"}), "begins with https://"),
        (servers(a={"url": "https://x", "headers": {"A": "\n"}}), '"headers" of a'),
        (servers(a={"command": "x", "readOnly": "yes"}), '"readOnly" of a'),
    ],
)
def test_a_file_that_makes_no_sense_is_refused_in_one_sentence(tmp_path, text, why):
    path = tmp_path / "mcp.json"
    path.write_text(text)
    with pytest.raises(ChatError) as refused:
        read_mcp_servers(path)
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_schema_loses_references_and_rare_words_and_is_told_in_short():
    schema = {
        "type": "object",
        "properties": {"p": {"$ref": "#/$defs/P"}, "n": {"type": "integer", "format": "int32", "minimum": 1}},
        "required": ["p"],
        "$defs": {"P": {"type": "string", "pattern": "(?=x)", "description": "long"}},
    }
    simple = simplified(schema)
    assert simple == {
        "type": "object",
        "properties": {"p": {"type": "string"}, "n": {"type": "integer", "minimum": 1}},
        "required": ["p"],
        "additionalProperties": False,
    }
    assert signature(simple) == "{p: string, n?: integer}"


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {"type": "string"},
        {"type": "nothing"},
        {"type": "object", "properties": {"a": {"$ref": "#"}}},
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}},
        },
        {"type": "object", "properties": {"a": {"type": ["string", {}]}}},
        {"type": "object", "properties": {str(number): {} for number in range(500)}},
        {"type": "object", "properties": {"a": {"enum": ["x" * 1_000_000]}}},
        {"type": "object", "properties": {"a": {"const": float("inf")}}},
        {"type": "object", "properties": {"a": {"type": "integer", "minimum": 2, "maximum": 1}}},
    ],
    ids=["none", "no object", "type", "no such place", "recursive", "types", "large", "long", "infinite", "none fits"],
)
def test_a_schema_that_cannot_be_followed_is_any_object(schema):
    assert simplified(schema) == ANY_OBJECT


@pytest.mark.parametrize("limit", [float("inf"), float("-inf"), float("nan"), 10**400])
def test_what_is_no_limit_and_no_name_is_left_out_of_a_schema(limit):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "number", "minimum": limit, "maximum": limit}},
        "required": [["a"], {}, "b", "a"],
    }
    simple = simplified(schema)
    assert (simple["properties"], simple["required"]) == ({"a": {"type": "number"}}, ["a"])


def test_of_two_tools_with_the_same_name_the_second_is_left_out_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    tools = McpTools([McpServerSpec("git", command="x"), McpServerSpec("git_hub", command="x")])

    def listed(name):
        return SimpleNamespace(name=name, description="", title=None, input_schema={"type": "object"})

    for server, names in zip(tools._servers, (["hub_search", "a.b", "a_b", "x" * 80], ["search"]), strict=True):
        server._on_tools([*map(listed, names)])
    names = [tool.name for tool in tools]
    assert names == ["git_hub_search", "git_a_b", f"git_{'x' * 60}"]
    assert next(iter(tools)).server.spec.name == "git"
    assert "git_hub_search of git_hub is left out" in caplog.text
    Agent(ScriptedChat(), [*tools], confirm=lambda call: True)


class Client:
    """Of a server, whose calls end as they are told to."""

    def __init__(self, *faults):
        self.faults = [*faults]

    async def call_tool(self, tool, arguments):
        raise self.faults.pop(0)


@pytest.fixture
def server(monkeypatch):
    pytest.importorskip("mcp")
    return McpServer(McpServerSpec("test", command="x"), EventLoop(), lambda tools: None)


def called(server):
    with pytest.raises(ChatError) as raised:
        server.call("tool", {})
    return str(raised.value)


def test_what_is_wrong_with_one_answer_ends_one_step_and_not_the_server(server):
    server._client = client = Client(TimeoutError(), ValueError("output"), RuntimeError("schema"), TimeoutError())
    for sentence in ("did not answer", "no answer", "no answer", "did not answer"):
        assert sentence in called(server)
        assert server._client is client
    client.faults = [TimeoutError(), OSError()]
    assert "did not answer" in called(server)  # the third in a row
    assert server._client is None


@pytest.mark.parametrize("words", ["Session terminated", "Session not found"])
def test_a_server_that_has_forgotten_the_connection_is_called_again_over_another(words, server, monkeypatch):
    # A server that was restarted at rest refused each call, until this program was restarted, too.
    from mcp import MCPError

    class Knowing(Client):
        async def call_tool(self, tool, arguments):
            return SimpleNamespace(content=[SimpleNamespace(type="text", text="5")], is_error=False)

    async def connect():
        server._client = Knowing()

    server._client = Client(MCPError(-32600, words))
    monkeypatch.setattr(server, "_connect", connect)
    assert (server.call("tool", {}), server._failures) == ("5", 0)


def test_a_connection_that_has_ended_by_itself_is_replaced_at_the_next_call(server, monkeypatch):
    # A server that was restarted while its tools were listed: the next call failed, or waited for half a minute.
    opened, breaks = [], []

    class Listed:
        async def list_tools(self, cursor):
            return SimpleNamespace(tools=[], next_cursor=None)

        async def call_tool(self, tool, arguments):
            if self is opened[0]:
                await asyncio.sleep(60)
            return SimpleNamespace(content=[SimpleNamespace(type="text", text="5")], is_error=False)

    @asynccontextmanager
    async def connection(spec, changed):
        task = asyncio.current_task()
        opened.append(Listed())
        breaks.append(lambda: server._loop.start(cancel(task))(5))
        yield opened[-1]

    async def cancel(task):
        task.cancel()
        await asyncio.wait([task])

    async def listen(client, changed):
        await changed.wait()

    monkeypatch.setattr(mcp_server, "_client", connection)
    monkeypatch.setattr(mcp_server, "_listen", listen)
    server._loop.start(server._connected())(5)
    breaks[0]()
    assert (server.call("tool", {}), len(opened), server._failures) == ("5", 2, 0)
    server.close()


def test_what_the_log_keeps_of_an_answer_that_is_none_holds_nothing_of_it(server, caplog):
    from mcp import MCPError

    server._client = Client(ValueError("1 error for result\n  [input_value='secret']"), MCPError(-32700, "no\nsecret"))
    assert {called(server), called(server)} == {"The tool's server answered with something that is no answer."}
    assert "1 error for result" in caplog.text
    assert "secret" not in caplog.text


def test_a_call_that_fails_late_leaves_the_connection_that_has_taken_its_place(server):
    old, new = Client(OSError()), Client()

    class Late(Client):
        async def call_tool(self, tool, arguments):
            server._client = new
            raise OSError

    server._client = Late()
    assert "has gone away" in called(server)
    assert (server._client, server._failures) == (new, 0)
    server._client = old
    assert "has gone away" in called(server)
    assert (server._client, server._failures) == (None, 1)


def asking(name, run):
    tool = a_tool(name, run)
    tool.asks_first = True
    return tool


def read(agent):
    with agent.ask("Do it") as reply:
        return [*reply]


@pytest.mark.parametrize(("answer", "result"), [(True, "done"), (False, "This call was not allowed.")])
def test_a_tool_that_asks_first_is_called_once_a_person_has_allowed_it(answer, result):
    said, asked = [write("tool", 1), write("answer", "Well.")], []
    chat = ScriptedChat(say=lambda messages: Scripted(said.pop(0)))
    agent = Agent(chat, [asking("tool", lambda input: "done")], confirm=lambda call: asked.append(call) or answer)
    step, text = read(agent)
    assert (step.result, step.failed, text) == (result, not answer, "Well.")
    assert (asked[0].name, asked[0].input, asked[0].asks, asked[0].description) == ("tool", 1, True, "does it")


def test_where_nobody_can_be_asked_such_a_tool_is_refused():
    with pytest.raises(ValueError, match="confirm="):
        Agent(ScriptedChat(), [asking("tool", str)])


# With real servers, where the package is installed.


@contextmanager
def running(**changes):
    pytest.importorskip("mcp")
    env = {"PYTHONPATH": os.environ.get("PYTHONPATH", ""), **changes.pop("env", {})}
    tools = McpTools([McpServerSpec("test", command=sys.executable, args=(str(SERVER),), env=env, **changes)])
    tools.start()
    until(lambda: [*tools])
    yield {tool.tool_name: tool for tool in tools}
    tools.close()


def until(true):
    deadline = time.monotonic() + 60
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert true()


@contextmanager
def at(port):
    """The same server over HTTP."""
    process = subprocess.Popen(
        [sys.executable, SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until(lambda: _listens(port))
    yield
    process.kill()
    process.wait()


def _listens(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["auto", "legacy"])  # servers of 2026, and those before them, which keep sessions
def test_a_server_over_http_may_change_its_tools_die_and_come_back(mode, monkeypatch):
    mcp = pytest.importorskip("mcp")
    monkeypatch.setattr(mcp, "Client", functools.partial(mcp.Client, mode=mode))
    monkeypatch.setattr(mcp_server, "RETRY_S", (0.0,))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with at(port):
        all_tools = McpTools([McpServerSpec("test", url=f"http://127.0.0.1:{port}/mcp")])
        all_tools.start()
        until(lambda: [*all_tools])
        tools = {tool.tool_name: tool for tool in all_tools}
        assert tools["add"].run({"a": 2, "b": 3}) == "5"
        assert tools["grow"].run({}) == "done"
        until(lambda: "test_grown" in [tool.name for tool in all_tools])
        monkeypatch.setattr(mcp_server, "CALL_S", 1.0)
        with pytest.raises(ChatError, match="did not answer within 1 seconds"):
            tools["hang"].run({})
        monkeypatch.setattr(mcp_server, "CALL_S", 30.0)

    def adds():
        with suppress(ChatError):
            return tools["add"].run({"a": 2, "b": 3}) == "5"

    with at(port):  # which knows nothing of the connection
        until(adds)
        with pytest.raises(ChatError, match="has gone away"):
            tools["die"].run({})
        with pytest.raises(ChatError, match="cannot be reached"):
            tools["add"].run({"a": 2, "b": 3})
    with at(port):
        until(adds)
        all_tools.close()


@pytest.mark.slow
def test_a_server_over_stdio_gets_its_own_environment_and_whatever_it_does_is_told_in_a_sentence(monkeypatch):
    monkeypatch.setenv("SECRET", "sesame")
    monkeypatch.setattr(mcp_server, "RETRY_S", (0.0,))
    with running(env={"GIVEN": "yes"}, read_only=["add"]) as tools:
        assert (tools["add"].name, tools["add"].asks_first, tools["die"].asks_first) == ("test_add", False, True)
        assert tools["add"].description == "adds two numbers Input: {a: integer, b: integer}"
        assert tools["add"].run({"a": 2, "b": 3}) == "5"
        environment = tools["environment"].run({})
        assert "GIVEN=yes" in environment
        assert "sesame" not in environment
        assert "HOME=" not in environment
        assert len(tools["shout"].run({})) == 2**20  # which an agent makes a failed step of
        with pytest.raises(ChatError, match="The tool failed"):
            tools["fail"].run({})
        with pytest.raises(ChatError, match="has gone away"):
            tools["die"].run({})
        assert tools["add"].run({"a": 2, "b": 3}) == "5"
        assert tools["flood"].run({}) == "done"
        monkeypatch.setattr(mcp_server, "CALL_S", 1.0)
        with pytest.raises(ChatError, match="did not answer within 1 seconds"):
            tools["hang"].run({})


@pytest.mark.slow
def test_a_server_that_is_dead_is_left_alone_for_a_while_and_the_start_does_not_wait(caplog):
    pytest.importorskip("mcp")
    tools = McpTools([McpServerSpec("dead", command="/bin/false")])
    tools.start()
    deadline = time.monotonic() + 30
    while "The MCP server dead failed" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    tools.close()
    assert "it is left alone for 1 s" in caplog.text
    assert [*tools] == []

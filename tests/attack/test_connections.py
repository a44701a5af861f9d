"""Connections that are opened and left, or fed a byte at a time, take nobody's place for long."""

import asyncio
import contextlib
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from llama2_chat.server import connections
from llama2_chat.server.connections import Listener
from llama2_chat.server.listen import server_config
from tests.support import certificates
from tests.support.serving import listening

HEAD = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n"
UPLOAD = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
HALVES = {"nothing": b"", "half a header": HEAD + b"X", "half a body": UPLOAD + b"{"}


@pytest.fixture(scope="module")
def port(settings):
    """Of a server that reads whole requests."""

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body"})

    with listening(lambda: server_config(app, settings, port=0, lifespan="off")) as port:
        yield port


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE_S", 0.2)
    monkeypatch.setattr(connections, "TICK_S", 0.05)


def connected(port, data=b"", source="127.0.0.1"):
    connection = socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0))
    connection.sendall(data)
    return connection


def rest(connection):
    """What is still sent on it, up to its end."""
    received = b""
    try:
        while data := connection.recv(4096):
            received += data
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("half", [*HALVES.values(), HEAD + b"\r\n" + HEAD], ids=[*HALVES, "half a second request"])
def test_who_does_not_say_what_they_want_is_cut_off(port, impatient, half):
    # 300 of them locked everybody out of a server with 256 descriptors, for good.
    with connected(port, half) as connection:
        assert rest(connection).count(b"200 OK") == half.count(b"\r\n\r\n" + HEAD)


@pytest.mark.parametrize("wanted", [b"websocket", b"h2c"])
def test_who_asks_for_another_protocol_as_well_gets_http(port, wanted, caplog):
    # A POST that asked for a WebSocket got no answer in 20 s, and each GET left an error in the log.
    upgrade = b"Connection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" % wanted
    with connected(port, UPLOAD.replace(b"\r\n", b"\r\n" + upgrade, 1) + b" " * 100) as connection:
        assert b" 200 " in connection.recv(4096)
    assert caplog.records == []


def test_who_begins_no_tls_is_cut_off(impatient, tmp_path):
    # Each of them stayed for a minute.
    with certificates.serving(certificates.local(tmp_path)) as port, connected(port, b"\x16\x03\x01") as connection:
        assert rest(connection) == b""


def test_who_sends_slowly_but_steadily_is_heard(port, impatient, monkeypatch):
    monkeypatch.setattr(connections, "BYTES_PER_S", 1)
    with connected(port, UPLOAD) as connection:
        for _ in range(10):
            time.sleep(0.05)
            connection.sendall(b" " * 10)
        assert b" 200 " in connection.recv(4096)


def test_who_does_not_read_is_cut_off(settings, impatient, monkeypatch):
    monkeypatch.setattr(connections, "UNREAD_S", 0.2)
    left = threading.Event()

    async def endless(scope, receive, send):
        async def pour():
            while True:
                await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
                await asyncio.sleep(0)

        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        pouring = asyncio.create_task(pour())
        assert (await receive())["type"] == "http.disconnect"
        pouring.cancel()
        left.set()

    with (
        listening(lambda: server_config(endless, settings, port=0, lifespan="off")) as port,
        connected(port, HEAD + b"\r\n"),
    ):
        assert left.wait(30)


def listener(most, proxies=""):
    return Listener(socket.create_server(("127.0.0.1", 0)), most, proxies)


def accepted(listener, source="127.0.0.1"):
    """Both ends of a new connection; None at the server's where it is refused."""
    client = connected(listener.getsockname()[1], source=source)
    try:
        return client, listener.accept()[0]
    except BlockingIOError:
        return client, None


def test_one_address_has_half_of_all_connections(caplog):
    with ExitStack() as stack:
        server = stack.enter_context(listener(4))
        server.setblocking(False)
        ends = [accepted(server, "127.0.0.2") for _ in range(3)]
        assert [end is not None for _, end in ends] == [True, True, False]
        assert "127.0.0.2 has 2 connections open" in caplog.text
        ends.append(accepted(server, "127.0.0.3"))
        assert ends[-1][1] is not None
        ends[0][1].close()
        ends.append(accepted(server, "127.0.0.2"))
        assert ends[-1][1] is not None
        for end in (end for pair in ends for end in pair if end):
            end.close()


def test_where_all_are_taken_whoever_has_most_makes_room():
    with ExitStack() as stack:
        server = stack.enter_context(listener(4))
        server.setblocking(False)
        ends = [accepted(server, f"127.0.0.{n}") for n in (2, 2, 3, 4, 5)]
        assert all(end for _, end in ends)
        assert rest(ends[1][0]) == b""  # the newest of the first is closed
        ends.append(accepted(server, "127.0.0.6"))
        assert ends[-1][1] is None  # nobody has more than one
        for end in (end for pair in ends for end in pair if end):
            end.close()


def test_a_proxy_has_as_many_connections_as_there_are():
    with listener(4, "127.0.0.0/30") as server:
        server.setblocking(False)
        ends = [accepted(server, "127.0.0.2") for _ in range(4)]
        assert all(end for _, end in ends)
        for end in (end for pair in ends for end in pair if end):
            end.close()


@pytest.mark.slow
def test_three_hundred_half_open_connections_lock_nobody_out_of_256_descriptors():
    command = [sys.executable, "app.py", "--host", "0.0.0.0", "--port", "0"]
    few = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))  # noqa: E731
    environ = os.environ | {"INFERENCE_URL": "http://127.0.0.1:9"}
    folder = Path(__file__).parents[2]
    with (
        subprocess.Popen(command, cwd=folder, env=environ, stderr=subprocess.PIPE, text=True, preexec_fn=few) as server,
        ExitStack() as stack,
    ):
        stack.callback(server.terminate)
        address = next(line for line in server.stderr if "The page is at" in line).split()[-1]
        port = int(address.rstrip("/").rpartition(":")[2])
        transport = httpx.HTTPTransport(local_address="127.0.0.3", retries=50)
        http = stack.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", transport=transport, timeout=30))
        for half in HALVES.values():
            for _ in range(300):
                connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 30, ("127.0.0.2", 0)))
                with contextlib.suppress(ConnectionError):  # refused
                    connection.sendall(half)
            for _ in range(10):
                assert http.get("/livez", headers={"Connection": "close"}).status_code == 200
        assert "127.0.0.2 has" in next(line for line in server.stderr if "connections open" in line)


def test_a_system_that_counts_no_descriptors_has_room_for_all(monkeypatch):
    # On Windows there is no module `resource`, and app.py did not start.
    monkeypatch.setitem(sys.modules, "resource", None)
    assert connections.room_for_connections() == connections.MOST

"""A server that sends, byte by byte, what a test tells it to: good answers, and all that must not break a reader."""

import json
import socket
import struct
import threading
import time

from llama2_chat.remote.health import GREETING

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BARE_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"  # the answer ends where the connection does
LAST = b"0\r\n\r\n"
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 2}}


def packet(data):
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text=None, finish=None, ascii=False, **more):
    """ascii: with escapes for all other letters, so that half a character can be sent."""
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return packet(f"data: {json.dumps({'choices': [choice], **more}, ensure_ascii=ascii)}\n\n".encode())


DONE = [packet(b"data: " + json.dumps({"choices": [], "usage": USAGE}).encode() + b"\n\n"), packet(b"data: [DONE]\n\n")]


def words(*texts, finish="stop"):
    """A good answer."""
    return [HEAD, *map(event, texts), event(finish=finish), *DONE, LAST]


def status(code, body, kind="application/json"):
    body = body if isinstance(body, str) else json.dumps(body)
    return [f"HTTP/1.1 {code} Odd\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()]


def silence(connection):
    """Nothing, until the other side has had enough."""
    connection.settimeout(60)
    connection.recv(1)


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


class OddServer:
    """Sends `probe` in reply to a probe, and `answer` in reply to any other question.

    A step of these is bytes to send, seconds to wait, or something to do with the connection.
    """

    def __init__(self):
        self.models = [{"id": "odd", "max_model_len": 4096}]
        self.probe = words("Hi", finish="length")
        self.answer = words("Hel", "lo", "!")
        self.count = None  # the tokens of a list of messages, where it has /tokenize
        self.requests = []  # the JSON of each question; probes are only counted
        self.probed = 0  # how often
        self.headers = {}  # of the latest request
        self.left = threading.Event()  # a reader went away in the middle of an answer
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.serve, args=(connection,), daemon=True).start()

    def serve(self, connection):
        with connection:
            try:
                head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
                if not head:  # closed again without a request
                    return
                line, *fields = head.decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
                self.headers = headers  # a local name as well: another request may arrive meanwhile
                while len(body) < int(headers.get("content-length", 0)):
                    more = connection.recv(65536)
                    if not more:  # left in the middle of its question; asking on would keep a core busy for ever
                        return
                    body += more
                for step in self.steps(line, body):
                    if isinstance(step, bytes):
                        connection.sendall(step)
                    elif isinstance(step, (int, float)):
                        time.sleep(step)
                    else:
                        step(connection)
            except OSError:
                self.left.set()

    def steps(self, line, body):
        if line.startswith("GET /v1/models "):
            return self.models if isinstance(self.models[0], bytes) else status(200, {"data": self.models})
        question = json.loads(body)
        if line.startswith("POST /tokenize "):
            if self.count is None:
                return status(404, {"detail": "Not Found"})
            return status(200, {"count": self.count(question["messages"]), "max_model_len": 4096, "tokens": []})
        if question["messages"] == GREETING:
            self.probed += 1
            return self.probe
        self.requests.append(question)
        return self.answer(question) if callable(self.answer) else self.answer

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

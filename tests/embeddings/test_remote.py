"""An encoder on a server: one that answers well, and servers that do not."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llama2_chat.embeddings import RemoteEmbedder, remote
from llama2_chat.errors import ChatError, ModelUnavailable
from tests.support.waiting import until


class Answers(BaseHTTPRequestHandler):
    """Each text's vector is its length and its number of words; a text of more than 40 letters is refused."""

    def do_GET(self):
        self.say(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((asked, self.headers["authorization"]))
        texts = asked["input"]
        if any(len(text) > 40 for text in texts):
            return self.say(400, {"error": {"message": "A text is too long."}})
        vectors = self.server.vectors or [[len(text), len(text.split())] for text in texts]
        data = [{"index": n, "embedding": vector} for n, vector in enumerate(vectors)]
        return self.say(self.server.status, {"data": data[::-1], "usage": {"prompt_tokens": 7}})

    def say(self, status, body):
        body = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def listening():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.models, server.asked, server.vectors, server.status = ["multilingual-e5-small"], [], None, 200
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server():
    with listening() as server:
        yield server


@pytest.fixture
def embedder(server):
    embedder = RemoteEmbedder(server.url, key="sesame")
    embedder.check()
    return embedder


def test_vectors_come_in_order_of_length_one_and_with_the_models_prefixes(server, embedder):
    embedded = embedder.embed(["a b", "abcd"], "question")
    assert [asked["input"] for asked, _ in server.asked[1:]] == [["query: a b", "query: abcd"]]
    assert embedded.vectors[0] == pytest.approx([10 / 109**0.5, 3 / 109**0.5])
    assert (embedded.tokens, embedder.dimensions, embedder.name) == (7, 2, "multilingual-e5-small")
    assert {key for _, key in server.asked} == {"Bearer sesame"}


def test_what_the_server_finds_too_long_is_cut_in_documents_and_refused_in_requests(server, embedder):
    vectors = embedder.embed(["short", "word " * 20], "document").vectors
    assert len(vectors) == 2
    assert len(server.asked[-1][0]["input"][0]) <= 40
    with pytest.raises(ChatError, match="A text is too long"):
        embedder.embed(["word " * 20], "request")
    assert embedder.state == "ready"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"models": ["a", "b"]}, "encoder's server has several models. Set EMBEDDINGS_MODEL"),
        ({"status": 401}, "Set EMBEDDINGS_KEY"),
        ({"status": 404}, "Check EMBEDDINGS_MODEL and EMBEDDINGS"),
        ({"vectors": ["what"]}, "does not speak OpenAI's API. Check EMBEDDINGS"),
        ({"vectors": [[]]}, "does not speak OpenAI's API"),
        ({"vectors": [[1.0], [2.0]]}, "does not speak OpenAI's API"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_server_that_gives_no_vectors_is_named_with_the_next_step(server, change, sentence):
    vars(server).update(change)
    embedder = RemoteEmbedder(server.url)
    with pytest.raises(ModelUnavailable, match=sentence):
        embedder.check()
    assert embedder.state == "failed"


def test_a_server_that_is_not_there_is_asked_again_only_after_a_pause(monkeypatch):
    with listening() as server:
        embedder = RemoteEmbedder(server.url)
        embedder.check()
    with pytest.raises(ModelUnavailable, match="The encoder's server"):
        embedder.embed(["a"], "question")
    monkeypatch.setattr(embedder, "_ask", None)  # whoever asked now would wait for it
    with pytest.raises(ModelUnavailable, match="The encoder's server"):
        embedder.embed(["a"], "question")


def test_a_server_that_is_back_with_another_encoder_has_another_identity(server, embedder, monkeypatch):
    identity = embedder.identity
    server.vectors = [[1.0, 2.0, 3.0]]
    with pytest.raises(ModelUnavailable, match="another length"):
        embedder.embed(["a"], "question")
    monkeypatch.setattr(remote, "PAUSE_S", 0)
    with pytest.raises(ModelUnavailable):
        embedder.embed(["a"], "question")  # which has it asked anew
    until(lambda: embedder.state == "ready")
    assert embedder.identity != identity
    assert embedder.embed(["a"], "question").vectors.shape == (1, 3)

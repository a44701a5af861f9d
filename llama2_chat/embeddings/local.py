"""An encoder in a process of its own, so that its work takes nothing from answers: neither Python's lock nor, for
documents and programs, a turn of the processor that an answer could use.

Questions have a thread of their own there, at the usual priority: they are short, and somebody waits.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pickle
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, NamedTuple

from llama2_chat.errors import ChatError, ModelUnavailable, without_folders
from llama2_chat.named_files import in_home
from llama2_chat.process import python_command
from llama2_chat.types import Embedded, EmbeddingPurpose

if TYPE_CHECKING:
    from llama2_chat.embeddings.encoder import Encoder

log = logging.getLogger("llama2_chat")

PAUSE_S = 300.0  # after a failure, before it is loaded again
NICE: dict[EmbeddingPurpose, int] = {"question": 0, "request": 10, "document": 10}
PATIENCE_S: dict[EmbeddingPurpose, float | None] = {"question": 10.0, "request": 120.0, "document": None}
LOADING = "The encoder is still loading. Please try again in a minute."
ENDED = "The encoder's process has ended, perhaps for want of memory."
LATE = "The encoder takes too long."


class Ready(NamedTuple):
    """What the process says once it has loaded."""

    identity: str
    dimensions: int


class LocalEmbedder:
    """Keeps the promise of Embedder."""

    state: Literal["loading", "ready", "failed"] = "loading"
    error = ""
    identity = ""
    dimensions = 0

    def __init__(self, source: str, cache_dir: Path | None = None) -> None:
        """source: a folder, or a Hub id, perhaps with a revision. cache_dir: None is huggingface_hub's own place."""
        self._source, self._cache_dir = source, cache_dir
        is_folder = source.startswith((".", "/", "~")) or in_home(source).is_dir()
        self.name = in_home(source).resolve().name if is_folder else source.partition("@")[0]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._numbers = itertools.count()
        self._asked: dict[int, Future[Embedded]] = {}
        self._closed = False
        self._settled = threading.Event()  # it is ready, or has failed
        self._fault, self._failed_at = "", 0.0  # with folders; time.monotonic()

    def start(self) -> None:
        with self._lock:
            if self._process is not None or self._closed:
                return
            self.state, self.error = "loading", ""
            self._settled.clear()
            command = python_command(f"{__name__}:encode_here")
            pipe = subprocess.PIPE
            # In a session of its own: Ctrl+C is for the server, which then ends this process.
            self._process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
            )
            self._send((self._source, self._cache_dir))
        log.info("Loading %s; what is missing of it is downloaded first", self.name)
        threading.Thread(target=self._listen, args=(self._process,), name="embeddings", daemon=True).start()

    def close(self) -> None:
        with self._lock:
            self._closed, process = True, self._process
        if process is not None:
            process.kill()
            process.wait()

    def check(self) -> None:
        """Wait until it is ready. Raises ModelUnavailable if it cannot be loaded."""
        self.start()
        self._settled.wait()
        if self.state == "failed":
            raise ModelUnavailable(self._fault)

    def embed(self, texts: Sequence[str], purpose: EmbeddingPurpose) -> Embedded:
        answer: Future[Embedded] = Future()
        if self.state == "failed" and time.monotonic() - self._failed_at > PAUSE_S:
            self.start()
        with self._lock:
            if self.state != "ready":
                raise ModelUnavailable(self.error or LOADING)
            number = next(self._numbers)
            self._asked[number] = answer
            self._send((number, list(texts), purpose))
        try:
            return answer.result(PATIENCE_S[purpose])
        except TimeoutError as error:
            raise ModelUnavailable(LATE) from error
        finally:
            self._asked.pop(number, None)

    def _send(self, message: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died, which _listen() will say
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Until the process ends."""
        assert process.stdin is not None
        assert process.stdout is not None
        self._fault = ENDED
        with process.stdout, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while True:
                match pickle.load(process.stdout):
                    case Ready(identity, dimensions):
                        self.identity, self.dimensions, self.state = identity, dimensions, "ready"
                        self._settled.set()
                        log.info("%s is ready: documents are found by their meaning, too", self.name)
                    case ChatError() as error:  # there is no encoder
                        self._fault = error.detail
                    case (number, ChatError() as error):
                        self._answer(number).set_exception(error)
                    case (number, answer):
                        self._answer(number).set_result(answer)
        process.wait()
        with self._lock, contextlib.suppress(OSError):
            self._process, self.state, self.error = None, "failed", without_folders(self._fault)
            unanswered, self._asked = self._asked, {}
            self._failed_at = time.monotonic()
            self._settled.set()
            process.stdin.close()
        for answer in unanswered.values():
            answer.set_exception(ModelUnavailable(self.error))
        if not self._closed:
            log.warning("Documents are found by their words alone: %s", self._fault)

    def _answer(self, number: int) -> Future[Embedded]:
        return self._asked.pop(number, None) or Future()  # nobody waits for one that came too late


def sentence_of(error: ChatError) -> str:
    """What went wrong, for the operator: loading words it for the model that answers."""
    return error.detail.replace("MODEL_ID", "EMBEDDINGS")


# ---- In the process ----


def encode_here() -> None:
    """What the process does: texts come in at stdin, vectors go out at stdout."""
    say = _Sayer(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # libraries print what they like, elsewhere
    source, cache_dir = pickle.load(sys.stdin.buffer)
    try:
        from llama2_chat.embeddings.encoder import Encoder

        encoder = Encoder(source, cache_dir)
    except ChatError as error:
        return say(ModelUnavailable(sentence_of(error)))
    except Exception as error:
        return say(ModelUnavailable(f"{source} cannot be loaded ({type(error).__name__}: {str(error)[:200]})."))
    asked: dict[EmbeddingPurpose, Line] = {purpose: queue.SimpleQueue() for purpose in NICE}
    for purpose, line in asked.items():
        threading.Thread(target=_work, args=(encoder, purpose, line, say), daemon=True).start()
    say(Ready(encoder.identity, encoder.dimensions))
    with contextlib.suppress(EOFError):  # the server has ended
        while True:
            number, texts, purpose = pickle.load(sys.stdin.buffer)
            asked[purpose].put((number, texts))
    os._exit(0)  # whatever its threads are computing


Line = queue.SimpleQueue[tuple[int, list[str]]]


class _Sayer:
    """Writes whole messages, whichever thread says them."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out, self._lock = out, threading.Lock()

    def __call__(self, message: object) -> None:
        with self._lock, contextlib.suppress(OSError):  # the server has ended
            pickle.dump(message, self._out)
            self._out.flush()


def _work(encoder: Encoder, purpose: EmbeddingPurpose, line: Line, say: _Sayer) -> None:
    with contextlib.suppress(OSError, AttributeError):  # of this thread and those that PyTorch starts for it, on Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE[purpose])
    while True:
        number, texts = line.get()
        try:
            say((number, encoder.embed(texts, purpose)))
        except ChatError as error:
            say((number, error))
        except Exception as error:  # memory ran out, or a tokenizer met what it does not know
            say((number, ModelUnavailable(f"The encoder failed ({type(error).__name__}: {str(error)[:200]}).")))

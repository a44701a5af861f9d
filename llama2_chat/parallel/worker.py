"""What the process of any rank but the first does: it loads its part, and computes what the first rank computes.

It ends as soon as nothing can come from the main process any more, whatever it is computing: no process and no GPU
memory outlives a server, even one that was killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import pickle
import queue
import signal
import sys
import threading
from typing import Any

from llama2_chat.errors import ModelUnavailable
from llama2_chat.process import collect_garbage_later

log = logging.getLogger("llama2_chat")

PR_SET_PDEATHSIG = 1  # of Linux' prctl.h
FAILED = "A part of the model could not be loaded because of an unexpected error. The server's log has the details."


class _First:
    """The first rank, as this one sees it: its calls come in at stdin, and answers go out at stdout."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # libraries print what they like, elsewhere
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="calls", daemon=True).start()

    def _listen(self) -> None:
        with contextlib.suppress(BaseException):
            while True:
                self._calls.put(pickle.load(sys.stdin.buffer))
        os._exit(0)  # the main process has ended

    def next(self) -> Any:
        return self._calls.get()

    def answer(self, value: Any) -> None:
        self.say("answer", value)

    def compiled(self) -> None:
        self.say("compiled")

    def say(self, kind: Any, value: Any = None) -> None:
        from llama2_chat.parallel.processes import Message

        with self._lock:
            self._out.write(pickle.dumps(Message(kind, value)))
            self._out.flush()


def main() -> None:
    with contextlib.suppress(AttributeError):  # a thread may have no turn to see the end of stdin
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # to all of a group; the main process ends in order
        signal.signal(sent, signal.SIG_IGN)
    logging.basicConfig(format="%(levelname)s %(message)s")
    first = _First()
    try:
        _work(first)
    except ModelUnavailable as error:
        first.say("failed", error.detail)
    except BaseException:
        log.exception("A rank failed")
        first.say("failed", FAILED)
    os._exit(1)


def _work(first: _First) -> None:
    work = first.next()
    import torch

    from llama2_chat.engine.ranks import FollowingRunner, RankLost
    from llama2_chat.errors import quoted
    from llama2_chat.loading.load import load
    from llama2_chat.loading.memory import translate_out_of_memory
    from llama2_chat.parallel.joining import join

    logging.getLogger("llama2_chat").setLevel(logging.WARNING)  # the first rank says the same
    if torch.cuda.is_available():
        torch.cuda.set_device(work.checkpoint.part.rank)
    loaded = load(work.checkpoint, lambda *progress: None)
    first.say("loaded")
    with translate_out_of_memory(quoted(work.checkpoint.model_id), loaded.precision, loaded.needed_bytes):
        runner = join(work, loaded, FollowingRunner)
    collect_garbage_later()
    first.say("ready", runner.room)
    try:
        runner.follow(first)
    except RankLost as error:
        log.exception("A rank failed")
        first.say("failed", str(error))

"""The processes of all ranks but the first, as the main process has them. What they do is in worker.py."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import torch.distributed as dist

from llama2_chat.engine.ranks import Call, LeadingRunner, RankLost
from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.load import Loaded
from llama2_chat.loading.parts import Part
from llama2_chat.parallel.joining import RunnerOptions, Work, join, leave
from llama2_chat.process import python_command

log = logging.getLogger("llama2_chat")

NOT_DETERMINISTIC = (
    "DETERMINISTIC=1 works on one GPU or on two: in which order more of them are added up is up to NCCL. Set "
    "TENSOR_PARALLEL=2 with a model that two hold, or unset DETERMINISTIC."
)
ENDED = "A process that computes a part of the model ended while it was loaded. The server's log may say why."

ANOTHER_S = 1  # in which another rank's reason comes, if it has one

Kind = Literal["loaded", "ready", "compiled", "answer", "failed"]


class Message(NamedTuple):
    """What a rank tells the first."""

    kind: Kind
    value: Any = None


class _Worker:
    """A process, and what it has said."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank, self.process = rank, process
        self.said: queue.SimpleQueue[Message | None] = queue.SimpleQueue()  # None: it has ended
        self.compiled = 0


class Workers:
    """The other ranks of a model: the Others of a LeadingRunner. It starts them.

    checkpoint: the first part; its weights are on this disk.
    on_lost: called from a thread of its own when one has ended that nobody asked to, once they have met.

    Raises ModelUnavailable for options that so many parts cannot keep.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        options: RunnerOptions,
        on_lost: Callable[[], None],
    ) -> None:
        part = checkpoint.part
        assert part is not None
        if options.deterministic and part.of > 2:
            raise ModelUnavailable(NOT_DETERMINISTIC)
        self._folder = Path(tempfile.mkdtemp(prefix="llama2-chat-"))
        self._work = Work(checkpoint, self._folder / "meeting", options)
        self._on_lost, self._on_compiled = on_lost, lambda: None
        self._runner: LeadingRunner | None = None
        self._joined = self._ready = self._closing = False
        self._outcomes: queue.SimpleQueue[LeadingRunner | Exception] = queue.SimpleQueue()  # of joining, of any rank
        self.lost = False
        self._workers: list[_Worker] = []
        try:
            for rank in range(1, part.of):
                self._workers.append(self._start(Part(rank, part.of)))
        except OSError:
            self.close()
            raise

    def _start(self, part: Part) -> _Worker:
        started: queue.SimpleQueue[_Worker | OSError] = queue.SimpleQueue()
        threading.Thread(target=self._have, args=(part, started), name=f"rank {part.rank}", daemon=True).start()
        worker = started.get()
        if isinstance(worker, OSError):
            raise worker
        _send(worker, replace(self._work, checkpoint=replace(self._work.checkpoint, part=part)))
        return worker

    def _have(self, part: Part, started: queue.SimpleQueue[_Worker | OSError]) -> None:
        """Start a process, and listen to it. Linux ends it when this thread has ended, not when this process has."""
        try:
            process = subprocess.Popen(
                python_command("llama2_chat.parallel.worker:main"),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},  # all that it reads is here
            )
        except OSError as error:
            return started.put(error)
        worker = _Worker(part.rank, process)
        started.put(worker)
        return self._listen(worker)

    def join(self, loaded: Loaded) -> LeadingRunner:
        """The runner of the first part, once the others are ready to compute along.

        Raises ModelUnavailable, with the reason, if one of them, or this one, cannot be.
        """
        self._all("loaded")
        self._joined = True
        threading.Thread(target=self._join, args=(loaded,), name="join", daemon=True).start()
        outcome = self._outcomes.get()
        if isinstance(outcome, Exception) and not isinstance(outcome, ModelUnavailable):
            with contextlib.suppress(queue.Empty):  # it may come of another's failing, who knows why
                outcome = self._outcomes.get(timeout=ANOTHER_S)
        if isinstance(outcome, Exception):
            raise outcome
        runner = self._runner = outcome
        runner.lead(self, self._all("ready"))
        self._ready = True
        return runner

    def _join(self, loaded: Loaded) -> None:
        """Joining waits for ever for a rank that has failed, and nothing can interrupt it."""
        try:
            self._outcomes.put(join(self._work, loaded, LeadingRunner))
        except Exception as error:
            self._outcomes.put(error)

    def close(self, timeout_s: float = 5) -> None:
        """End them; nothing may be computed any more."""
        self._closing = True
        for worker in self._workers:
            with contextlib.suppress(OSError):
                cast(IO[bytes], worker.process.stdin).close()
        for worker in self._workers:
            try:
                worker.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
        if self._runner:
            self._runner.forget_recorded()  # NCCL keeps what is in them, and would wait for their end
        if dist.is_initialized():
            leaving = threading.Thread(target=leave, daemon=True)
            leaving.start()
            leaving.join(timeout_s)  # a sum may wait for processes that have ended
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- As the first rank's runner sees them ----

    def call(self, call: Call) -> None:
        for worker in self._workers:
            _send(worker, call)
        if self.lost:
            raise RankLost("A process of this model has ended")

    def answers(self) -> list[Any]:
        return self._all("answer")

    def watch(self, compiled: Callable[[], None]) -> None:
        self._on_compiled = compiled

    @property
    def compiled(self) -> int:
        return min(worker.compiled for worker in self._workers)

    # ---- What they say ----

    def _all(self, kind: Kind) -> list[Any]:
        """What each says next, which is of this kind."""
        messages = [worker.said.get() for worker in self._workers]
        for message in messages:
            if message is None:
                raise RankLost("A process of this model has ended") if self._joined else ModelUnavailable(ENDED)
            if message.kind == "failed":
                raise ModelUnavailable(message.value)
            assert message.kind == kind
        return [message.value for message in messages if message is not None]

    def _listen(self, worker: _Worker) -> None:
        """Until the process ends, or says that it has failed; it then ends with this thread at the latest."""
        out, failure = cast(IO[bytes], worker.process.stdout), ""
        with out, contextlib.suppress(EOFError, OSError, pickle.UnpicklingError):
            while not failure:
                message = pickle.load(out)
                if message.kind == "compiled":
                    worker.compiled += 1
                    self._on_compiled()
                elif message.kind == "failed":
                    failure = message.value
                else:
                    worker.said.put(message)
        why = failure or f"It ended with exit code {worker.process.wait()}."
        self.lost = True
        if failure:
            self._outcomes.put(ModelUnavailable(failure))
            worker.said.put(Message("failed", failure))
        worker.said.put(None)
        if not self._closing:
            log.error("The process of rank %d computes no more. %s", worker.rank, why)
            if self._ready or (self._joined and not failure):  # else join() tells why
                self._on_lost()


def _send(worker: _Worker, message: object) -> None:
    stdin = cast(IO[bytes], worker.process.stdin)
    with contextlib.suppress(OSError, ValueError):  # it has ended, which _listen() will see
        stdin.write(pickle.dumps(message))
        stdin.flush()

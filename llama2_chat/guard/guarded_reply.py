"""One answer that nobody reads before it has been judged, as types.Reply promises it.

Entering it waits until the question has been judged and the model has taken it, so that a refusal is raised first.
"""

from __future__ import annotations

from collections.abc import Sequence

from llama2_chat.tasks import ACCEPTED, TaskReply
from llama2_chat.types import Reply, Timing, TokenLogprob, Usage


class GuardedReply(TaskReply):
    def __init__(self) -> None:
        super().__init__()
        self._reply: Reply | None = None  # the model's, once it is asked
        self._judged = False  # as far as the reader knows

    # What the guard's event loop calls.

    def accept(self, reply: Reply) -> None:
        self._reply, self.relaxed = reply, reply.relaxed
        self._channel.put(ACCEPTED)

    def show(self, text: str) -> None:
        """What has been judged."""
        self._channel.put(text)

    # What readers see.

    @property
    def queue_position(self) -> int:
        return self._reply.queue_position if self._reply else 0

    @property
    def usage(self) -> Usage:
        return self._reply.usage if self._reply else Usage()

    @property
    def timing(self) -> Timing:
        return self._reply.timing if self._reply else Timing()

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        return self._reply.logprobs if self._reply and self._judged else ()

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        return self._reply.prompt_logprobs if self._reply and self._judged else ()

    def _read_text(self, text: str) -> str:
        self._judged = self._accepted
        return text

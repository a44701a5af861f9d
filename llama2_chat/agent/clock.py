"""The day and the time, where this program runs."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from llama2_chat.agent.tool import Example
from llama2_chat.text import written_day


class Clock:
    """A Tool without a choice of input: the day and the time in the time zone of this machine.

    now: gives the time, with its zone.
    """

    name = "clock"
    description = "tells the day and the time"
    input_schema: ClassVar = {"const": "now"}
    examples = (
        Example(
            "What day is it today?",
            "now",
            "Monday, 3 March 2025, 14:05 UTC",
            "Today is Monday, 3 March 2025.",
        ),
    )
    timeout_s = 2.0

    def __init__(self, now: Callable[[], datetime] = lambda: datetime.now().astimezone()) -> None:
        self._now = now

    def run(self, input: Any) -> str:
        now = self._now()
        return f"{written_day(now)}, {now:%H:%M} {now.tzname()}"

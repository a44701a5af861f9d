"""What is counted of every question, from the page or a program, and the line that the log gets about it.

GET /metrics shows the numbers in Prometheus' format. Neither they nor the log hold a word of what was said, unless
LOG_MESSAGES asks for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from llama2_chat.types import ChatBackend, FinishReason, Message, Occupancy, Timing, Usage

log = logging.getLogger("llama2_chat")

Question = list[Message] | list[str | list[int]]

LONGEST_WINDOW = 60  # minutes that can be looked back
FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
TOKENS_PER_S = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200)


class Numbers(dict[tuple[str, tuple[tuple[str, str], ...]], float]):
    """Samples of metrics by their names and labels."""

    @classmethod
    def of(cls, collectors: Iterable[Collector]) -> Numbers:
        samples = [sample for each in collectors for metric in each.collect() for sample in metric.samples]
        return cls({(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples})

    def total(self, name: str) -> float:
        """Of all labels."""
        return sum(value for (sample, _), value in self.items() if sample == name)

    def by(self, label: str, name: str) -> dict[str, float]:
        """What each value of a label adds up to."""
        counts: dict[str, float] = {}
        for (sample, labels), value in self.items():
            if sample == name:
                of = dict(labels)[label]
                counts[of] = counts.get(of, 0) + value
        return counts

    def since(self, before: Numbers) -> Numbers:
        return Numbers({sample: value - before.get(sample, 0) for sample, value in self.items()})


class Metrics:
    """The counters of one server.

    clock: seconds, by which it is told what the last minutes brought.
    """

    def __init__(
        self, chat: ChatBackend, log_messages: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.log_messages, self._clock = log_messages, clock
        self._marks: deque[tuple[int, Numbers]] = deque()  # the counters before the first change of a minute
        self.registry = registry = CollectorRegistry()
        registry.register(_CurrentState(chat))

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"chat_{name}", help, labels, registry=registry)

        self.requests = counter("requests", "Requests that have ended.", "route", "outcome")
        self.errors = counter("errors", "Requests that were refused or failed.", "code")
        self.prompt_tokens = counter("prompt_tokens", "Tokens in prompts.")
        self.cached_tokens = counter("cached_tokens", "Tokens in prompts that were found in the KV cache.")
        self.completion_tokens = counter("completion_tokens", "Tokens in answers.")
        self.adapter_answers = counter("adapter_answers", "Answers of adapters.", "adapter")
        self.adapter_tokens = counter("adapter_completion_tokens", "Tokens in answers of adapters.", "adapter")
        self.tool_calls = counter("tool_calls", "Tools that the page has called.", "tool", "outcome")
        self.first_token = Histogram(
            "chat_time_to_first_token_seconds",
            "Time from the request to the first token of the answer, including the wait in the queue.",
            buckets=FIRST_TOKEN_S,
            registry=registry,
        )
        self.speed = Histogram(
            "chat_tokens_per_second",
            "Speed of one answer after its first token.",
            buckets=TOKENS_PER_S,
            registry=registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def now(self) -> Numbers:
        """All that text() says."""
        return Numbers.of([self.registry])

    def gained(self, minutes: int) -> Numbers:
        """What was counted within so many minutes, an hour at most; the one that goes on is the last of them."""
        before, counted = self._minute() - minutes, self._counted()
        return counted.since(next((mark for minute, mark in self._marks if minute > before), counted))

    def mark(self) -> None:
        """Called before anything is counted."""
        minute = self._minute()
        if not self._marks or self._marks[-1][0] != minute:
            self._marks.append((minute, self._counted()))
        while self._marks[0][0] <= minute - LONGEST_WINDOW:
            self._marks.popleft()

    def _minute(self) -> int:
        return int(self._clock() // 60)

    def _counted(self) -> Numbers:
        tokens = (self.prompt_tokens, self.cached_tokens, self.completion_tokens)
        return Numbers.of([self.requests, self.errors, *tokens, self.first_token, self.speed])


class Answered(Protocol):
    """A reply, or all choices of a request."""

    @property
    def finish_reason(self) -> FinishReason | None: ...

    @property
    def usage(self) -> Usage: ...

    @property
    def timing(self) -> Timing: ...


class Record:
    """One request, from its arrival to its end."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self.reply: Answered | None = None
        self.question: Question | None = None
        self.adapter = ""  # which was asked; "" for the model itself
        self.answers: dict[int, str] = {}  # by the index of the choice
        self.error = ""  # its code, for a stream that fails when its status has been sent
        self._metrics, self._route, self._started = metrics, route, time.perf_counter()
        self._ended, self._calls = False, 0

    def add(self, piece: str, index: int = 0) -> None:
        if self._metrics.log_messages:
            self.answers[index] = self.answers.get(index, "") + piece

    def add_call(self, tool: str, *, failed: bool) -> None:
        """A tool of the page's was called."""
        self._metrics.tool_calls.labels(tool, "failed" if failed else "ok").inc()
        self._calls += 1

    def end(self, error: str = "") -> None:
        """Count it and log it; the reply has been closed. Only the first call does anything."""
        if self._ended:
            return
        self._ended = True
        metrics, error = self._metrics, self._error_code(error)
        metrics.mark()
        outcome = error or self._finish_reason()
        metrics.requests.labels(self._route, outcome).inc()
        if error:
            metrics.errors.labels(error).inc()
        if self.reply is None and not error:  # the list of models was read, for instance: not worth a line
            return
        line: dict[str, Any] = {
            "route": self._route,
            "outcome": outcome,
            "seconds": round(time.perf_counter() - self._started, 3),
        }
        if self.reply is not None:
            line |= self._count(self.reply)
        if self.adapter:
            line["adapter"] = self.adapter
        if self._calls:
            line["tool_calls"] = self._calls
        if metrics.log_messages:
            answers = [answer for _, answer in sorted(self.answers.items())]
            line |= {"question": self.question, "answer": answers if len(answers) > 1 else "".join(answers)}
        log.info("%s", json.dumps(line))  # JSON escapes line breaks: one line, whatever was said

    def _error_code(self, error: str) -> str:
        error = error or self.error
        has_failed = self.reply is not None and self.reply.finish_reason == "error"
        return "generation_failed" if has_failed and error != "content_filter" else error

    def _finish_reason(self) -> str:
        if self.reply is None:
            return "ok"
        return self.reply.finish_reason or "cancelled"

    def _count(self, reply: Answered) -> dict[str, int | float | None]:
        metrics, usage, timing = self._metrics, reply.usage, reply.timing
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.completion_tokens.inc(usage.completion_tokens)
        if self.adapter:
            metrics.adapter_answers.labels(self.adapter).inc()
            metrics.adapter_tokens.labels(self.adapter).inc(usage.completion_tokens)
        first_token_s, tokens_per_s = timing.time_to_first_token_s, timing.tokens_per_second
        if first_token_s is not None:
            metrics.first_token.observe(first_token_s)
        if tokens_per_s is not None:
            metrics.speed.observe(tokens_per_s)
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "dropped_messages": usage.dropped_messages,
            "time_to_first_token_s": None if first_token_s is None else round(first_token_s, 3),
            "tokens_per_second": None if tokens_per_s is None else round(tokens_per_s, 1),
        }


class _CurrentState(Collector):
    """What is read when somebody asks, rather than counted."""

    def __init__(self, chat: ChatBackend) -> None:
        self._chat = chat

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        ready = int(self._chat.state == "ready")
        yield GaugeMetricFamily("chat_ready", "1 if the model can answer, else 0.", ready)
        if occupancy := self._chat.occupancy:
            yield from self._queue_and_cache(occupancy)
        if servers := self._chat.servers:
            healthy = GaugeMetricFamily(
                "chat_server_healthy", "1 if this server can answer, else 0.", labels=["server"]
            )
            help = "Requests of this program that this server is answering."
            running = GaugeMetricFamily("chat_server_requests_running", help, labels=["server"])
            for server in servers:
                healthy.add_metric([server.name], int(server.healthy))
                running.add_metric([server.name], server.running)
            yield from (healthy, running)
        yield from self._gpu_memory(self._chat.gpu_memory)

    def _queue_and_cache(self, occupancy: Occupancy) -> Iterator[Metric]:
        yield GaugeMetricFamily("chat_requests_running", "Requests that are being answered.", occupancy.running)
        yield GaugeMetricFamily("chat_requests_waiting", "Requests that wait in the queue.", occupancy.waiting)
        help = "Tokens in the KV cache that belong to running requests."
        yield GaugeMetricFamily("chat_kv_cache_used_tokens", help, occupancy.kv_tokens)
        help = "Tokens that the KV cache has room for."
        yield GaugeMetricFamily("chat_kv_cache_capacity_tokens", help, occupancy.kv_capacity_tokens)
        help = "Tokens whose keys and values left the GPU and are kept in memory of this computer."
        yield GaugeMetricFamily("chat_kv_host_used_tokens", help, occupancy.host_tokens)
        help = "Tokens that KV_HOST_GB has room for."
        yield GaugeMetricFamily("chat_kv_host_capacity_tokens", help, occupancy.host_capacity_tokens)
        help = "Tokens whose keys and values came back to the GPU by copy."
        yield CounterMetricFamily("chat_kv_host_recalled_tokens", help, occupancy.recalled_tokens)
        help = "Running requests that were put back into the queue because the KV cache was full."
        yield CounterMetricFamily("chat_preemptions", help, occupancy.preemptions)
        help = "Tokens of answers that were guessed, so that several are computed in one step."
        yield CounterMetricFamily("chat_drafted_tokens", help, occupancy.drafted)
        yield CounterMetricFamily("chat_accepted_tokens", "Guessed tokens that came true.", occupancy.accepted)

    def _gpu_memory(self, gpu_memory: list[tuple[int, int]]) -> Iterator[Metric]:
        help = "GPU memory in use by all programs together."
        used = GaugeMetricFamily("chat_gpu_memory_used_bytes", help, labels=["gpu"])
        capacity = GaugeMetricFamily("chat_gpu_memory_capacity_bytes", "GPU memory in total.", labels=["gpu"])
        for index, (used_bytes, capacity_bytes) in enumerate(gpu_memory):
            used.add_metric([str(index)], used_bytes)
            capacity.add_metric([str(index)], capacity_bytes)
        yield from (used, capacity)

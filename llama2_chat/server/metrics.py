"""What is counted of every question, from the page or a program, and the line that the log gets about it.

GET /metrics of api.py shows the numbers in Prometheus' format. Neither they nor the log hold a word of what was said,
unless LOG_MESSAGES asks for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from llama2_chat.remote import RemoteModel
from llama2_chat.types import Message, Reply

if TYPE_CHECKING:
    from model import ChatModel

log = logging.getLogger(__name__)

FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
TOKENS_PER_S = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200)


class Metrics:
    """The counters of one server."""

    def __init__(self, chat: ChatModel | RemoteModel, log_messages: bool = False) -> None:
        self.log_messages = log_messages
        self.registry = registry = CollectorRegistry()
        registry.register(_RightNow(chat))

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"chat_{name}", help, labels, registry=registry)

        self.requests = counter("requests", "Requests that have ended", "route", "ending")
        self.errors = counter("errors", "Requests that were refused or failed", "kind")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.cached_tokens = counter("cached_tokens", "Tokens of prompts that were found in the KV cache")
        self.completion_tokens = counter("completion_tokens", "Tokens of answers")
        self.first_token = Histogram(
            "chat_time_to_first_token_seconds", "With the wait", buckets=FIRST_TOKEN_S, registry=registry
        )
        self.speed = Histogram(
            "chat_tokens_per_second", "Of one answer, after its first", buckets=TOKENS_PER_S, registry=registry
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Record:
    """One request, from its arrival to its end."""

    def __init__(self, metrics: Metrics, route: str) -> None:
        self.reply: Reply | None = None
        self.question: list[Message] | str | list[int] | None = None
        self.answer = ""
        self.error = ""  # which kind, for a stream that fails when its status has been sent
        self._metrics, self._route, self._started = metrics, route, time.perf_counter()
        self._ended = False

    def add(self, piece: str) -> None:
        if self._metrics.log_messages:
            self.answer += piece

    def end(self, error: str = "") -> None:
        """Count it and log it; the reply has been closed. Only the first call does anything."""
        if self._ended:
            return
        self._ended = True
        metrics, reply = self._metrics, self.reply
        error = error or self.error
        if reply is not None and reply.finish_reason == "error":
            error = "generation_failed"
        ending = error or (reply.finish_reason or "cancelled" if reply else "ok")
        metrics.requests.labels(self._route, ending).inc()
        if error:
            metrics.errors.labels(error).inc()
        line = {"route": self._route, "ending": ending, "seconds": round(time.perf_counter() - self._started, 3)}
        if reply is not None:
            line |= self._count(reply)
        if metrics.log_messages:
            line |= {"question": self.question, "answer": self.answer}
        if reply is not None or error:  # a look at the list of models is not worth a line
            log.info("%s", json.dumps(line))  # one line, whatever was said: JSON escapes what would begin another

    def _count(self, reply: Reply) -> dict[str, int | float | None]:
        metrics, usage, timing = self._metrics, reply.usage, reply.timing
        metrics.prompt_tokens.inc(usage.prompt_tokens)
        metrics.cached_tokens.inc(usage.cached_tokens)
        metrics.completion_tokens.inc(usage.completion_tokens)
        first, speed = timing.time_to_first_token_s, timing.tokens_per_second
        if first is not None:
            metrics.first_token.observe(first)
        if speed is not None:
            metrics.speed.observe(speed)
        return {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "dropped_messages": usage.dropped_messages,
            "time_to_first_token_s": first and round(first, 3),
            "tokens_per_second": speed and round(speed, 1),
        }


class _RightNow:
    """What is read when somebody asks, rather than counted."""

    def __init__(self, chat: ChatModel | RemoteModel) -> None:
        self._chat = chat

    def describe(self) -> list:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ready = self._chat.state == "ready"
        yield GaugeMetricFamily("chat_ready", "1 when the model can answer", ready)
        if now := self._chat.occupancy:
            yield GaugeMetricFamily("chat_requests_running", "Requests that are being answered", now.running)
            yield GaugeMetricFamily("chat_requests_waiting", "Requests in line", now.waiting)
            yield GaugeMetricFamily(
                "chat_kv_tokens", "Tokens in the KV cache that running requests hold", now.kv_tokens
            )
            yield GaugeMetricFamily(
                "chat_kv_tokens_in_all", "Tokens that the KV cache has room for", now.kv_capacity_tokens
            )
        if isinstance(self._chat, RemoteModel):
            well = GaugeMetricFamily("chat_server_well", "1 when the model's server can answer", labels=["server"])
            running = GaugeMetricFamily("chat_server_requests_running", "Of this page's", labels=["server"])
            for server in self._chat.servers:
                well.add_metric([server.name], server.healthy)
                running.add_metric([server.name], server.running)
            yield from (well, running)
        used = GaugeMetricFamily("chat_gpu_memory_used_bytes", "Taken, by whomever", labels=["gpu"])
        total = GaugeMetricFamily("chat_gpu_memory_bytes", "In all", labels=["gpu"])
        for index, (used_bytes, total_bytes) in enumerate(self._chat.gpu_memory):
            used.add_metric([str(index)], used_bytes)
            total.add_metric([str(index)], total_bytes)
        yield from (used, total)

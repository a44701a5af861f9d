"""What guesses save: the processor time of answers that repeat something, and of others, with guesses and without."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

from llama2_chat.benchmark import Figures
from llama2_chat.types import GrammarSpec, Message, SamplingParams
from model import ChatModel

ROUNDS = 3
ANSWER_TOKENS = 128  # at most
SHORT = "The roof is green and the door is blue. A cat sits on the wall and looks at the birds."
TEXT = (
    "The harbour of Lindholm was built in 1862, when the herring came close to the shore. Forty families lived there, "
    "and each of them owned a boat. In winter the boats were pulled up on the sand and painted, the old ones green and "
    "the new ones white. A lighthouse stood at the end of the pier. Its keeper, a tall man called Anders, counted the "
    "boats every evening and wrote the number into a book."
)
REWRITE = "Write the text again, with one word changed: red instead of green.\n\n"
FIELDS = ("given_name", "family_name", "street_and_number", "postal_code", "city_of_residence")
MORE_FIELDS = ("country_of_residence", "telephone_number", "electronic_mail_address")
SCHEMA = {
    "type": "object",
    "properties": {name: {"type": "string", "maxLength": 12} for name in FIELDS + MORE_FIELDS},
    "required": [*FIELDS, *MORE_FIELDS],
    "additionalProperties": False,
}
LIKELIEST = SamplingParams(temperature=0, repetition_penalty=1)


def _talk(*texts: str) -> list[Message]:
    return [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(texts)]


# Each with an example before it, which so small a model needs.
TASKS: dict[str, tuple[list[Message], SamplingParams]] = {
    "a text again with one word changed": (
        _talk(REWRITE + SHORT, SHORT.replace("green", "red"), REWRITE + TEXT),
        LIKELIEST,
    ),
    "an answer from an excerpt": (
        _talk(
            f"Excerpt: {SHORT}\n\nQuote what the excerpt says about the roof.",
            f'The excerpt says: "{SHORT}"',
            f"Excerpt: {TEXT}\n\nQuote what the excerpt says about the harbour.",
        ),
        LIKELIEST,
    ),
    "JSON of a schema with 8 fields": (
        _talk("Describe Anna Berg, who lives in Lindholm, as JSON."),
        replace(LIKELIEST, grammar=GrammarSpec("json_schema", json.dumps(SCHEMA))),
    ),
}
CHATS = ("Tell me about llamas.", "How do I bake bread?", "Why is the sky blue?", "Write a short story about the sea.")


def measure(chat: ChatModel) -> Iterator[Figures]:
    for name, (messages, params) in TASKS.items():
        yield {f"guesses, {name}: with / without": statistics.median(_gains(chat, messages, params))}
    gains = []
    for seed, question in enumerate(CHATS):
        gains.append(statistics.median(_gains(chat, _talk(question), SamplingParams(seed=seed))))
    yield {"guesses, chat: with / without": statistics.median(gains), "guesses, chat, least": min(gains)}


def _gains(chat: ChatModel, messages: list[Message], params: SamplingParams) -> list[float]:
    """How many times as fast an answer is with guesses, each time beside one without; the first time warms up."""
    runner, gains, params = chat.serving.engine.runner, [], replace(params, max_new_tokens=ANSWER_TOKENS)
    most = runner.draft_tokens
    for _ in range(1 + ROUNDS):
        guessing, with_guesses = _seconds(chat, messages, params)
        runner.draft_tokens = 0
        plain, without = _seconds(chat, messages, params)
        runner.draft_tokens = most
        assert with_guesses == without
        gains.append(plain / guessing)
    return gains[1:]


def _seconds(chat: ChatModel, messages: list[Message], params: SamplingParams) -> tuple[float, str]:
    """Processor time of an answer to a prompt that is cached, and the answer."""
    started = time.process_time()
    with chat.stream_reply(messages, params) as reply:
        text = "".join(reply)
    return time.process_time() - started, text

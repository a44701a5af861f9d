"""What guesses save: the time of answers that repeat something, and of others, with guesses and without.

The embedded model answers itself, and its processor time is taken. A shape with random weights has nothing to say: as
many guesses come true there as did for the embedded model.
"""

from __future__ import annotations

import json
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.local_model import TimedReply, fresh_ids, load
from llama2_chat.engine.drafts import Drafts, Guess
from llama2_chat.types import GrammarSpec, Message, Occupancy, SamplingParams
from model import ChatModel

ROUNDS = 4  # as many that begin with guesses as others
CHAT_ROUNDS = 12  # guesses change the time of a free answer by less than what else ran meanwhile
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
MORE_CHATS = (
    "Explain the difference between a list and a tuple in Python, with examples.",
    "Give me ten tips for learning a foreign language.",
    "Write a polite email that asks my landlord to repair the heating.",
    "What were the main causes of the First World War?",
)


def measure(chat: ChatModel) -> Iterator[Figures]:
    for name, (messages, params) in TASKS.items():
        yield {f"guesses, {name}: with / without": statistics.median(_gains(chat, messages, params))}
    gains = []
    for seed, question in enumerate(CHATS):
        gains.append(statistics.median(_gains(chat, _talk(question), SamplingParams(seed=seed), CHAT_ROUNDS)))
    yield {"guesses, chat: with / without": statistics.median(gains), "guesses, chat, least": min(gains)}


def measure_draft(draft: Path) -> Iterator[Figures]:
    """What a DRAFT_MODEL for the embedded model saves, where answers repeat little."""
    chat = load(["--draft-model", draft])
    for kind, settings in {"sampled": SamplingParams(), "likeliest": SamplingParams(temperature=0)}.items():
        medians, engine, before = [], chat.serving.engine, chat.serving.engine.occupancy
        for seed, question in enumerate(CHATS + MORE_CHATS):
            gains = _gains(chat, _talk(question), replace(settings, seed=seed))
            medians.append(statistics.median(gains))
            yield {f"a model's guesses, {kind}, {question} with / without": medians[-1]}
        yield {
            f"a model's guesses, {kind}: with / without": statistics.median(medians),
            f"a model's guesses, {kind}, least": min(medians),
        }
        yield _that_come_true(kind, before, engine.occupancy)


def _that_come_true(kind: str, before: Occupancy, after: Occupancy) -> Figures:
    """Which share of a model's guesses, how many there were of these, and the same of text that comes again."""
    drafted, accepted = after.drafted - before.drafted, after.accepted - before.accepted
    by_model = after.drafted_by_model - before.drafted_by_model
    true_by_model = after.accepted_by_model - before.accepted_by_model
    return {
        f"a model's guesses, {kind}": by_model,
        f"a model's guesses, {kind}, that come true": true_by_model / max(by_model, 1),
        f"text that comes again, {kind}, guesses": drafted - by_model,
        f"text that comes again, {kind}, that come true": (accepted - true_by_model) / max(drafted - by_model, 1),
    }


def _gains(chat: ChatModel, messages: list[Message], params: SamplingParams, rounds: int = ROUNDS) -> list[float]:
    """How many times as fast an answer is with guesses as without, in turns; the first turn warms up."""
    runner, gains, params = chat.serving.engine.runner, [], replace(params, max_new_tokens=ANSWER_TOKENS)
    most = runner.draft_tokens
    for turn in range(1 + rounds):
        seconds, texts = {}, {}
        for runner.draft_tokens in (most, 0) if turn % 2 else (0, most):
            seconds[runner.draft_tokens], texts[runner.draft_tokens] = _seconds(chat, messages, params)
        assert texts[most] == texts[0]
        gains.append(seconds[0] / seconds[most])
    runner.draft_tokens = most
    return gains[1:]


def _seconds(chat: ChatModel, messages: list[Message], params: SamplingParams) -> tuple[float, str]:
    """Processor time of an answer to a prompt that is cached, and the answer."""
    started = time.process_time()
    with chat.stream_reply(messages, params) as reply:
        text = "".join(reply)
    return time.process_time() - started, text


# ---- A shape with random weights ----

# Of answers of the embedded model in int8, 2026-11-28: how many tokens they have, and after how many of them how many
# guesses of how many came true.
GUESSED = {
    "a text again with one word changed": (
        94,
        "1:0/4 3:2/2 6:4/4 11:7/7 19:7/7 27:7/7 35:3/7 42:7/7 50:7/7 58:7/7 66:3/7 75:2/7 82:4/4 87:6/7",
    ),
    "an answer from an excerpt": (
        93,
        "1:4/4 6:0/7 9:4/4 14:7/7 22:7/7 30:7/7 38:5/7 45:0/7 47:7/7 55:7/7 63:7/7 71:3/7 80:2/7 90:2/4",
    ),
    "JSON of a schema with 8 fields": (
        102,
        "1:4/4 9:6/7 21:7/7 39:0/4 41:6/6 53:0/2 56:7/7 64:7/7 72:7/7 80:7/7 88:7/7 96:5/6",
    ),
    "a chat, some guesses": (128, "66:2/4 91:2/4 102:4/4 107:0/7"),
    "a chat, wrong guesses": (128, "30:0/4 94:0/4"),
    "a chat, no guesses": (128, ""),
}
LOUD = 10_000  # times an embedding's size, beside which all that layers add to it is small


class Planted(Drafts):
    """In place of a request's guesses: as many come true as did elsewhere, and all are made. Each token is followed by
    the next one."""

    def __init__(self, prompt_tokens: int, guessed: str, vocab_size: int) -> None:
        super().__init__()
        self._prompt_tokens, self._vocab_size = prompt_tokens, vocab_size
        self._guessed = [[*map(int, re.findall(r"\d+", guess))] for guess in guessed.split()]

    def look_up(self, ids: Sequence[int], most: int, forced: Sequence[int] = ()) -> list[Guess]:
        super().look_up(ids, most, forced)  # for the time that it takes
        said = len(ids) - self._prompt_tokens
        for start, true, guessed in self._guessed:
            # Where the token behind which it comes is in flight, a guess is found one token later.
            if (late := said - start) in range(max(true, 2)):
                draft = [ids[-1] + 1 + step + (step >= true - late) for step in range(max(guessed - late, 1))]
                return [Guess(id % self._vocab_size, 1.0) for id in draft[:most]]
        return []


def measure_planted(chat: ChatModel) -> Iterator[Figures]:
    """After local_model.time_full_answers(). From then on the model says nothing but one token after the other."""
    vocab_size = _count_on(chat)
    users = {f"guesses as of {name}": [answer] for name, answer in GUESSED.items()}
    users["guesses, eight users, five of whom repeat"] = [*GUESSED.values(), *list(GUESSED.values())[:2]]
    for name, answers in users.items():
        gains = _planted_gains(chat, answers, vocab_size)
        yield {f"{name}: with / without": statistics.median(gains), f"{name}, least": min(gains)}


@torch.inference_mode()
def _count_on(chat: ChatModel) -> int:
    """Let each token be followed by the next one, whatever the layers compute; the size of the vocabulary."""
    model: Any = chat.serving.model
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    head.copy_(embedding.roll(1, 0))
    embedding.mul_(LOUD)
    return len(head)


def _planted_gains(chat: ChatModel, answers: Sequence[tuple[int, str]], vocab_size: int) -> list[float]:
    """How many times as fast answers end after the first token with guesses as without, on average of the users, in
    turns; the first turn warms up. answers: of GUESSED, to users who ask at once."""
    runner, gains, prompts = chat.serving.engine.runner, [], [fresh_ids(chat, 256) for _ in answers]
    most = runner.draft_tokens
    for turn in range(1 + ROUNDS):
        seconds = {}
        for runner.draft_tokens in (most, 0) if turn % 2 else (0, most):
            seconds[runner.draft_tokens] = _planted_seconds(chat, prompts, answers, vocab_size)
        gains.append(seconds[0] / seconds[most])
    runner.draft_tokens = most
    return gains[1:]


def _planted_seconds(
    chat: ChatModel, prompts: Sequence[list[int]], answers: Sequence[tuple[int, str]], vocab_size: int
) -> float:
    replies = []
    with chat.serving.engine.paused():
        for ids, (tokens, guessed) in zip(prompts, answers, strict=True):
            reply = chat.stream_completion(ids, replace(LIKELIEST, max_new_tokens=tokens))
            reply.request.drafts = Planted(len(ids), guessed, vocab_size)
            replies.append(reply)
    for ids, reply, (tokens, _) in zip(prompts, replies, answers, strict=True):
        list(reply)
        assert reply.token_cache == [(ids[-1] + 1 + n) % vocab_size for n in range(tokens)]
    times = [reply.times for reply in replies if isinstance(reply, TimedReply)]
    return statistics.mean(each[-1] for each in times) - min(each[0] for each in times)

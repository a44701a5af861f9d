"""How often an agent's steps, expressions and answers are right: on sums that are made up, and on questions of a file.

Small talk counts the other way round: it is right to call no calculator.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.agent import Agent, Step
from llama2_chat.agent.calculator import calculate
from llama2_chat.types import ChatBackend

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
AT_ONCE = 8  # questions; their answers share each step of the model
PATIENCE_S = 3600  # the model is measured, and not how busy the machine is

# A way of asking -> the expression that is meant.
FORMS = (
    ("What is {a} + {b}?", "{a} + {b}"),
    ("How much is {a} plus {b}?", "{a} + {b}"),
    ("What is {c} minus {b}?", "{c} - {b}"),
    ("Subtract {d} from {a}.", "{a} - {d}"),
    ("What is {d} times {e}?", "{d} * {e}"),
    ("Multiply {b} by {e}.", "{b} * {e}"),
    ("What is {c} divided by {e}?", "{c} / {e}"),
    ("Calculate {a} / {d}", "{a} / {d}"),
    ("What is {p}% of {c}?", "{p}% * {c}"),
    ("How much is {p} percent of {a}?", "{p}% * {a}"),
    ("What is the square root of {s}?", "√{s}"),
    ("What is {d} squared?", "{d} ^ 2"),
    ("What is {e} to the power of {f}?", "{e} ^ {f}"),
    ("What is {x} + {y}?", "{x} + {y}"),
    ("What is ({d} + {e}) * {f}?", "({d} + {e}) * {f}"),
    ("What is {a} - {d} * {f}?", "{a} - {d} * {f}"),
    ("A ticket costs {d} dollars. How much do {e} tickets cost?", "{d} * {e}"),
    ("Anna has {a} stamps and gets {b} more. How many does she have now?", "{a} + {b}"),
    ("{c} people sit at {e} tables, as many at each. How many sit at one table?", "{c} / {e}"),
    ("How many hours are in {d} days?", "{d} * 24"),
)


@dataclass(frozen=True)
class Question:
    text: str
    value: float | None  # None for small talk


@dataclass(frozen=True)
class Outcome:
    """What an agent made of one question."""

    question: Question
    steps: Sequence[Step]
    answer: str
    valid: bool  # every step was whole and had its form

    @property
    def expression_right(self) -> bool:
        """Whether a call of the calculator had the value that was asked for."""
        return any(_is(self.question.value, step.result) for step in self.steps if step.name == "calculator")

    @property
    def answer_right(self) -> bool:
        """Whether the last number of the answer is the value, to a thousandth."""
        numbers = NUMBER.findall(self.answer)
        return bool(numbers) and _is(self.question.value, numbers[-1], 1e-3)

    @property
    def tool_right(self) -> bool:
        called = any(step.name == "calculator" for step in self.steps)
        return called == (self.question.value is not None)


def made_up(number: int, seed: int) -> list[Question]:
    """So many sums, each way of asking as often as any other."""
    draw = random.Random(seed)
    questions = []
    for index in range(number):
        text, expression = FORMS[index % len(FORMS)]
        values = _values(draw)
        questions.append(Question(text.format(**values), float(calculate(expression.format(**values)))))
    return questions


def _values(draw: random.Random) -> dict[str, float]:
    e = draw.randint(2, 12)
    return {
        "a": draw.randint(100, 9999),
        "b": draw.randint(100, 999),
        "c": e * draw.randint(100, 900),
        "d": draw.randint(11, 99),
        "e": e,
        "f": draw.randint(2, 9),
        "p": draw.choice([5, 12, 15, 25, 30, 40, 75]),
        "s": draw.randint(11, 60) ** 2,
        "x": draw.randint(10, 999) / 10,
        "y": draw.randint(100, 9999) / 100,
    }


def read_questions(file: Path) -> list[Question]:
    """Of JSON: {"arithmetic": [{"question": ..., "answer": number}], "small_talk": [texts]}."""
    read = json.loads(file.read_text("utf-8"))
    sums = [Question(item["question"], float(item["answer"])) for item in read.get("arithmetic", [])]
    return [*sums, *(Question(text, None) for text in read.get("small_talk", []))]


def ask(chat: ChatBackend, questions: Sequence[Question], show: Callable[[Outcome], None]) -> list[Outcome]:
    """Each question, of at least one, in a conversation of its own. show: takes each outcome, in order, as it comes."""
    first, *others = questions
    outcomes = [_ask(chat, first)]  # alone, so that the others find the examples in the KV cache
    show(outcomes[0])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for outcome in pool.map(lambda question: _ask(chat, question), others):
            show(outcome)
            outcomes.append(outcome)
    return outcomes


def _ask(chat: ChatBackend, question: Question) -> Outcome:
    with Agent(chat, max_seconds=PATIENCE_S).ask(question.text) as reply:
        events = list(reply)
    steps = [event for event in events if isinstance(event, Step)]
    answer = "".join(event for event in events if isinstance(event, str))
    return Outcome(question, steps, answer, reply.finish_reason == "stop")


def rates(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many, of sums and of small talk apart."""
    sums = [outcome for outcome in outcomes if outcome.question.value is not None]
    talk = [outcome for outcome in outcomes if outcome.question.value is None]
    return {
        "sums": len(sums),
        "valid": sum(outcome.valid for outcome in sums),
        "tool_right": sum(outcome.tool_right for outcome in sums),
        "expression_right": sum(outcome.expression_right for outcome in sums),
        "answer_right": sum(outcome.answer_right for outcome in sums),
        "small_talk": len(talk),
        "small_talk_valid": sum(outcome.valid for outcome in talk),
        "small_talk_tool_right": sum(outcome.tool_right for outcome in talk),
    }


def _is(value: float | None, written: str, tolerance: float = 1e-6) -> bool:
    try:
        number = float(written.replace(",", ""))
    except ValueError:
        return False
    return value is not None and abs(number - value) <= tolerance * max(1, abs(value))

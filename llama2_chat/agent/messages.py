"""What the model reads: what it may do, examples as turns of a conversation, what was said before, and the question.

A small model follows turns that it seems to have written itself better than any description. A grammar holds the form
of its steps, so no turn has to repeat it; that it is time for the answer stands at the end of the turn before it alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from llama2_chat.agent.steps import ANSWER, write
from llama2_chat.agent.tool import Step, Tool
from llama2_chat.types import Message

REMINDER = "\n\n(Now give the answer, as JSON.)"
SMALL_TALK = (
    ("Good morning!", "Good morning! How can I help you?"),
    ("Who painted the Mona Lisa?", "Leonardo da Vinci painted the Mona Lisa."),
    ("Tell me something about cats.", "Cats sleep for most of the day, and they hunt at night."),
    ("Who are you?", "I am an assistant with a few tools."),
    ("Thanks, that helped.", "You are welcome!"),
)


@dataclass(frozen=True)
class Exchange:
    """A question that has been answered, as an agent remembers it."""

    question: str
    steps: Sequence[Step]
    answer: str


def opening(tools: Sequence[Tool], instructions: str = "", examples: Sequence[Exchange] = ()) -> list[Message]:
    """How every conversation begins: the system text and the examples, so that the KV cache holds them for all.

    instructions: what else the system text says. examples: more of them, of whoever asks.
    """
    calls = [
        Exchange(example.question, [Step(tool.name, example.input, example.result, 0)], example.answer)
        for tool in tools
        for example in tool.examples
    ]
    talk = [Exchange(question, [], answer) for question, answer in SMALL_TALK]
    mixed = [exchange for pair in zip_longest(talk, calls) for exchange in pair if exchange]
    return [_system(tools, instructions), *chain.from_iterable(map(turns, [*mixed, *examples]))]


def _system(tools: Sequence[Tool], instructions: str) -> Message:
    actions = [f"- {tool.name}: {tool.description}" for tool in tools]
    lines = [
        'You reply in steps of JSON: {"action": ..., "action_input": ...}. The actions are:',
        *actions,
        f"- {ANSWER}: tells the user the answer",
        *([instructions] if instructions else ()),
    ]
    return Message(role="system", content="\n".join(lines))


def turns(exchange: Exchange) -> list[Message]:
    answer = Message(role="assistant", content=write(ANSWER, exchange.answer))
    return [asked(exchange.question), *steps_taken(exchange.steps), answer]


def asked(question: str) -> Message:
    return Message(role="user", content=question)


def steps_taken(steps: Sequence[Step]) -> list[Message]:
    return [
        message
        for step in steps
        for message in (Message(role="assistant", content=write(step.name, step.input)), _came_of(step))
    ]


def begun(answer: str) -> Message:
    """An answer that was cut off, as the model wrote it."""
    return Message(role="assistant", content=write(ANSWER, answer).removesuffix('"}'))


def _came_of(step: Step) -> Message:
    """With the input: an answer then tells what was computed, where a bare result is told as "42 is 42"."""
    input = step.input if isinstance(step.input, str) else json.dumps(step.input, ensure_ascii=False)
    return Message(role="user", content=f"{'Failure' if step.failed else 'Result'} of {input}: {step.result}")


def reminded(messages: Sequence[Message]) -> list[Message]:
    """The messages with a reminder at their end, which nothing remembers: the answer must come now."""
    *before, newest = messages
    return [*before, Message(role="user", content=newest["content"] + REMINDER)]

"""A model that a test writes and that uses tools: a sum goes to the calculator, and the answer says what came of it."""

from types import SimpleNamespace

from llama2_chat.agent.steps import write
from tests.support.scripted import Scripted, ScriptedChat

QUESTION = "What is 15% of 240?"


def a_tool(name, run, timeout_s=30, input_schema=None):
    return SimpleNamespace(
        name=name,
        description="does it",
        input_schema=input_schema or {"type": ["integer", "string"]},
        examples=(),
        timeout_s=timeout_s,
        run=run,
    )


def computing(answer="It is {}.", gate=lambda: True, reason="stop"):
    """answer: with a place for what came of the last step; without any step it is "Hello!"."""

    def say(messages):
        last = messages[-1]["content"]
        if last.startswith("What is "):
            text = write("calculator", last.removeprefix("What is ").rstrip("?"))
        elif last.startswith(("Result of", "Failure of")):
            text = write("answer", answer.format(last.rpartition(": ")[2]))
        else:
            text = write("answer", "Hello!")
        pieces = [text[start : start + 4] for start in range(0, len(text), 4)]
        return Scripted(*pieces, gate=gate, reason=reason)

    return ScriptedChat(say=say)

"""Conversations written into one text, as tutorials for Guanaco, Alpaca, ChatML and Llama 2 have them: messages again.

Control tokens in such a text are the tutorial's format. The model's own format is written around the messages later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from llama2_chat.errors import ChatError

LLAMA_2 = re.compile(r"(?:<s>)?\s*\[INST\](.*?)\[/INST\](.*?)(?=(?:<s>)?\s*\[INST\]|\Z)", re.S)
SYSTEM = re.compile(r"\s*<<SYS>>(.*?)<</SYS>>\s*", re.S)
CHATML = re.compile(r"<\|im_start\|>[ ]*(\w+)\n(.*?)(?:<\|im_end\|>|\Z)", re.S)
HH_RLHF = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
GUANACO = re.compile(r"### (Human|Assistant):")
ALPACA = re.compile(r"### (Instruction|Input|Response):")
ALPACAS_PREAMBLE = "Below is an instruction"  # of a template: it says nothing about the row
END = re.compile(r"\s*(</s>|<\|endoftext\|>)\s*\Z")


def recognise_text(text: Any) -> str:
    """The name in TEXT_FORMATS of the format that a text is in. Raises ChatError if it is none."""
    for name, (mark, _) in TEXT_FORMATS.items():
        if isinstance(text, str) and re.search(mark, text):
            return name
    raise ChatError(
        f"its text is no conversation: it has none of {', '.join(TEXT_FORMATS)}. As a text that is no "
        "conversation it is learned with --plain_text."
    )


def prompt_format(text: str) -> str | None:
    """The format of a prompt that tutorials have written around a question, up to where its answer begins."""
    text = text.strip()
    return next(
        (name for name, (start, end) in PROMPTS.items() if text.endswith(end) and re.match(start, text, re.S)), None
    )


def text_messages(text: Any, text_format: str) -> list[Any]:
    """The messages in a text. Raises ChatError if it is in another format."""
    if not isinstance(text, str):
        raise ChatError("its text is something else.")
    return list(TEXT_FORMATS[text_format][1](END.sub("", text)))


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _from_llama_2(text: str) -> Iterator[dict[str, str]]:
    _refuse_rest(LLAMA_2.sub("", text), "[INST]")
    for i, (question, answer) in enumerate(LLAMA_2.findall(text)):
        if i == 0 and (system := SYSTEM.match(question)):
            yield _said("system", system[1])
            question = question[system.end() :]
        yield _said("user", question)
        if answer := END.sub("", answer).strip():
            yield _said("assistant", answer)


def _from_chatml(text: str) -> Iterator[dict[str, str]]:
    _refuse_rest(CHATML.sub("", text), "<|im_start|>")
    for role, content in CHATML.findall(text):
        yield _said(role, content)


def _from_guanaco(text: str) -> Iterator[dict[str, str]]:
    return _spoken(GUANACO, text, "### Human:")


def _from_hh(text: str) -> Iterator[dict[str, str]]:
    return _spoken(HH_RLHF, text, "Human:")


def _spoken(speaker: re.Pattern[str], text: str, first: str) -> Iterator[dict[str, str]]:
    head, *parts = speaker.split(text)
    _refuse_rest(head, first)
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        yield _said({"Human": "user", "Assistant": "assistant"}[name], content)


def _from_alpaca(text: str) -> Iterator[dict[str, str]]:
    head, *parts = ALPACA.split(text)
    if head.strip() and not head.strip().startswith(ALPACAS_PREAMBLE):
        yield _said("system", head.strip())
    question: list[str] = []
    for name, content in zip(parts[::2], parts[1::2], strict=True):
        if name == "Response":
            yield _said("user", "\n\n".join(question))
            yield _said("assistant", content)
            question = []
        elif content.strip():
            question.append(content.strip())


def _refuse_rest(rest: str, mark: str) -> None:
    if rest.strip():
        raise ChatError(f"its text does not begin with {mark!r}, or has something between the turns.")


TEXT_FORMATS: dict[str, tuple[str, Callable[[str], Iterator[dict[str, str]]]]] = {
    "[INST] of Llama 2": (r"\[INST\]", _from_llama_2),
    "ChatML": (r"<\|im_start\|>", _from_chatml),
    "### Human / ### Assistant": (r"### (Human|Assistant):", _from_guanaco),
    "### Instruction / ### Response": (r"### Response:", _from_alpaca),
    "Human / Assistant": (r"(?s)(?:\A|\n\n)Human:.*?\n\nAssistant:", _from_hh),
}
# How a prompt in one of these formats begins, and how it ends, where its answer is to begin.
PROMPTS = {
    "[INST] of Llama 2": (r"(<s>\s*)?\[INST\]", "[/INST]"),
    "ChatML": (r"<\|im_start\|>", "<|im_start|>assistant"),
    "### Human / ### Assistant": ("### Human:", "### Assistant:"),
    "### Instruction / ### Response": (".*?### Instruction:", "### Response:"),
    "Human / Assistant": ("Human:", "\n\nAssistant:"),
}

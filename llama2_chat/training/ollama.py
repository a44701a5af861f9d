"""A Modelfile with which Ollama asks a model in the format that it was trained in.

Ollama's templates are Go's and a model's are Jinja: what a model's template writes around each message is found by
rendering it, and written only if it gives the same text for every shape of conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat import prompt
from llama2_chat.prompt import LLAMA_2_FORMAT, NO_FORMAT
from llama2_chat.prompt.template import RENDERING_ERRORS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Each exchange between BOS and EOS, the system text in the first question. llama.cpp writes the first BOS itself.
LLAMA_2 = (
    "{{- $system := .System }}{{ range .Messages }}"
    '{{ if eq .Role "user" }}[INST] {{ if $system }}<<SYS>>\n{{ $system }}\n<</SYS>>\n\n{{ $system = "" }}{{ end }}'
    "{{ .Content }} [/INST]"
    '{{ else if eq .Role "assistant" }} {{ .Content }} </s><s>{{ end }}{{ end }}'
)
SYSTEM, USER, ANSWER, AGAIN = "@system@", "@user@", "@answer@", "@again@"  # texts that no template knows
SHAPES = ("u", "su", "uau", "suau", "uauau")  # of conversations: system, user, assistant


Texts = dict[str, str]  # a message: role and content


class Regular(NamedTuple):
    """What a template writes around messages, whatever came before them."""

    system: tuple[str, str]  # before and after the text
    user: tuple[str, str]  # up to where the answer begins
    answer_end: str
    default_system: str | None = None  # of a conversation that has none

    def write(self, messages: Iterable[Texts]) -> str:
        rows = list(messages)
        if self.default_system is not None and rows[0]["role"] != "system":
            rows.insert(0, {"role": "system", "content": self.default_system})
        around = {"system": self.system, "user": self.user, "assistant": ("", self.answer_end)}
        return "".join(before + row["content"] + after for row in rows for before, after in [around[row["role"]]])

    def as_go(self) -> str:
        (system, after_system), (user, after_user) = self.system, self.user
        return (
            f'{{{{- range .Messages }}}}{{{{ if eq .Role "system" }}}}{system}{{{{ .Content }}}}{after_system}'
            f'{{{{ else if eq .Role "user" }}}}{user}{{{{ .Content }}}}{after_user}'
            f'{{{{ else if eq .Role "assistant" }}}}{{{{ .Content }}}}{self.answer_end}{{{{ end }}}}{{{{ end }}}}'
        )


def modelfile(gguf: str, tokenizer: PreTrainedTokenizerBase, context_length: int | None) -> str:
    """gguf: the file's name, beside which this is to lie. context_length: tokens."""
    chat_format, ending = prompt.recognise(tokenizer), prompt.find_ending(tokenizer)
    lines = [f"FROM ./{gguf}"]
    if chat_format == LLAMA_2_FORMAT:
        lines.append(f'TEMPLATE """{LLAMA_2}"""')
    elif chat_format == NO_FORMAT:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    elif regular := find_regular(tokenizer):
        lines.append(f'TEMPLATE """{regular.as_go()}"""')
        if regular.default_system:
            lines.append(f'SYSTEM """{regular.default_system}"""')
    else:
        lines.append(
            "# The model's template is not a sum of parts. Ollama looks for one like it among those that it knows."
        )
    stops = [*tokenizer.convert_ids_to_tokens(sorted(ending.ids)), *ending.strings]
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    if context_length:
        lines.append(f"PARAMETER num_ctx {context_length}")
    return "\n".join(lines) + "\n"


def find_regular(tokenizer: PreTrainedTokenizerBase) -> Regular | None:
    """None for a template that writes otherwise for some shape of conversation, or that Go could not be told."""
    try:
        found = _parts(tokenizer)
        renderings = [(shape, _render(tokenizer, _conversation(shape))) for shape in SHAPES]
    except (ValueError, *RENDERING_ERRORS):
        return None
    is_same = all(found.write(_conversation(shape)) == text for shape, text in renderings)
    texts = [*found.system, *found.user, found.answer_end, found.default_system or ""]
    return found if is_same and not any(mark in text for text in texts for mark in ("{{", "}}", '"""')) else None


def _parts(tokenizer: PreTrainedTokenizerBase) -> Regular:
    """What stands between the messages. Raises ValueError if the template leaves one out."""
    head, between, after_user, after_answer, _ = _split(
        _render(tokenizer, _conversation("suau")), SYSTEM, USER, ANSWER, AGAIN
    )
    alone, _ = _split(_render(tokenizer, _conversation("u")), USER)
    user = _common_end(between, after_answer)
    default = None
    if alone and between.endswith(alone):
        user = alone
    elif alone.startswith(head) and alone.endswith(between):
        default = alone[len(head) : len(alone) - len(between)]
    after_system = between[: len(between) - len(user)]
    return Regular((head, after_system), (user, after_user), after_answer[: len(after_answer) - len(user)], default)


def _common_end(one: str, two: str) -> str:
    length = 0
    for a, b in zip(reversed(one), reversed(two), strict=False):
        if a != b:
            break
        length += 1
    return one[len(one) - length :]


def _split(text: str, *marks: str) -> Sequence[str]:
    """What stands around the marks, in their order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"{mark} is not in the text")
        parts.append(before)
    return [*parts, text]


def _conversation(shape: str) -> list[Texts]:
    roles = {"s": ("system", SYSTEM), "u": ("user", USER), "a": ("assistant", ANSWER)}
    rows: list[Texts] = []
    for letter in shape:
        role, text = roles[letter]
        rows.append(
            {"role": role, "content": AGAIN if letter == "u" and rows and rows[-1]["role"] == "assistant" else text}
        )
    return rows


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Texts]) -> str:
    """Without the BOS that llama.cpp writes by itself."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    writes_bos = tokenizer.backend_tokenizer.encode("").ids == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if writes_bos and tokenizer.bos_token else text

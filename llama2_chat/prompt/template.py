"""Any model's own chat template: what it writes for a conversation, with typed text told apart from the template's own.

The template gets the contents in disguise: each character is replaced by a twin that stands in no token, "<s>" by
U+D003C, U+D0073 and U+D003E, and changed back once the template's own tokens and tags are known. So nothing typed
becomes one of them, wherever the template puts it and whatever it does to it. How rendered text becomes ids is the
codec's affair.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, TemplateError

from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.prompt.codec import MARK, Codec, codec_of
from llama2_chat.prompt.messages import Turn
from llama2_chat.types import ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a template raises, by itself or because a conversation is not as it expects.
RENDERING_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)

ToolObject = dict[str, Any]  # a tool as OpenAI's API has it, and templates take it

# To whom Functionary 3.2 writes: its prompts end with ">>>", answers begin with "all" and calls with a tool's name.
RECIPIENT = re.compile(r"\w+\n")
MOST_CHARACTERS = 2**18  # characters; of longer conversations a template reads nothing, for each look takes 0.1 s
MOST_STRINGS = 16  # that a template may look for in one conversation


class Readable(NamedTuple):
    """A text that the template looks for, such as "</think>", left without disguise in the messages of a role."""

    text: str
    role: str


def template_of(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The template's source, or None without one. Some models keep several: the one for plain chat counts."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        return None


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelUnavailable unless the template can write a conversation."""
    question, answer = nonce(), nonce()
    asked, answered = Turn("user", question, 1), Turn("assistant", answer, 1)
    try:
        reveal = codec_of(tokenizer).reveal
        once, again = (_prompt(tokenizer, turns, ()).translate(reveal) for turns in ([asked], [asked, answered, asked]))
        if question not in once or again.count(question) < 2:
            raise TemplateError("it leaves out a user message")
    except RENDERING_ERRORS as error:
        raise ModelUnavailable(
            f"This model's chat template cannot write a conversation ({str(error)[:200]}). Choose another model."
        ) from error


def template_ids(
    tokenizer: PreTrainedTokenizerBase, system: str | None, turns: list[Turn], tools: Sequence[ToolObject] = ()
) -> list[int]:
    """As apply_chat_template gives them, except that control tokens and tags come from the template alone.

    A template that refuses or ignores the system role gets the system text at the head of the first user message. An
    answer to go on with never goes through the template, which might cut its end or its thoughts: it stands behind the
    prompt of its question, as if the model had just written it.
    Raises ChatError if the template refuses the conversation.
    """
    if system is not None and not _writes_system(tokenizer):
        turns = _with_system(system, turns)
    elif system is not None:
        turns = [Turn("system", system, 1), *turns]
    try:
        if turns[-1].role == "assistant":
            return _unfinished_ids(tokenizer, turns[:-1], turns[-1].content, tools)
        return codec_of(tokenizer).encode_rendered(_prompt(tokenizer, turns, tools))
    except RENDERING_ERRORS as error:
        raise ChatError(
            f"This model's chat template refuses this conversation ({str(error)[:200]}). Begin with a message from the "
            "user, and leave out what the template does not take."
        ) from error


def nonce() -> str:
    """A text that nobody can guess, of digits, which no template changes."""
    return f"{secrets.randbits(128):039d}"


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Iterable[Turn],
    add_generation_prompt: bool = True,
    tools: Sequence[ToolObject] = (),
) -> str:
    in_parts = _reads_parts(tokenizer)
    messages = [_message(turn, in_parts) for turn in turns]
    return _apply(tokenizer, messages, add_generation_prompt, tools)


def _render_answered(tokenizer: PreTrainedTokenizerBase, asked: Turn, answered: Turn) -> str:
    """A question and its answer, and behind them another question where a template refuses to end with an answer."""
    try:
        return render(tokenizer, [asked, answered], add_generation_prompt=False)
    except RENDERING_ERRORS:
        return render(tokenizer, [asked, answered, Turn("user", nonce(), 1)])


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool = True,
    tools: Sequence[ToolObject] = (),
) -> str:
    offered: Any = list(tools) or None
    return str(
        tokenizer.apply_chat_template(
            messages, tools=offered, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )


def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template leaves out a content that is a text, and writes one that is a list of parts.

    So do those of models that look at pictures, and of what was made from these.
    """
    known, template = codec_of(tokenizer).reads_parts, str(template_of(tokenizer))
    if template not in known:
        turn = Turn("user", nonce(), 1)

        def writes(in_parts: bool) -> bool:
            try:
                return turn.content in _apply(tokenizer, [_message(turn, in_parts)])
            except RENDERING_ERRORS:
                return False

        known[template] = not writes(in_parts=False) and writes(in_parts=True)
    return known[template]


def _message(turn: Turn, in_parts: bool) -> dict[str, Any]:
    """As templates take it: arguments as an object, which they write as JSON."""
    content = [{"type": "text", "text": turn.content}] if in_parts else turn.content
    message: dict[str, Any] = {"role": turn.role, "content": content}
    if turn.calls:
        message["tool_calls"] = [
            {
                "id": _nine_characters(call["id"]),
                "type": "function",
                "function": {"name": call["name"], "arguments": _read(call["arguments"])},
            }
            for call in turn.calls
        ]
    if turn.role == "tool":
        message |= {"tool_call_id": _nine_characters(turn.call_id), "name": turn.name}
    return message


def _nine_characters(id: str) -> str:
    """Letters and digits that stand for an id: Mistral's templates refuse others, the rest of them show none."""
    return id if len(id) == 9 and id.isalnum() and id.isascii() else hashlib.sha256(id.encode()).hexdigest()[:9]


def _read(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):  # a program's own words
        return arguments


def _unfinished_ids(
    tokenizer: PreTrainedTokenizerBase, turns: list[Turn], answer: str, tools: Sequence[ToolObject]
) -> list[int]:
    """The prompt, and after it the answer so far.

    They are written as one text, in which a word is what it would be in a finished answer; unless that changed the end
    of the prompt, where a model cannot have written otherwise: "\\n" and "\\n" are often one token.
    """
    codec, prompt = codec_of(tokenizer), _prompt(tokenizer, turns, tools)
    space = _before_answers(tokenizer)
    written = ("" if answer.startswith(space) or not space.isspace() else space) + answer.translate(codec.disguise)
    prompt_ids, ids = codec.encode_rendered(prompt), codec.encode_rendered(prompt + written)
    if ids[: len(prompt_ids)] == prompt_ids:
        return ids
    return prompt_ids + codec.encode_rendered(written, tags_of=prompt)


def _prompt(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Sequence[ToolObject]) -> str:
    """What the template writes, and the recipient of the answer if it leaves that to the model: everybody."""
    before = _before_answers(tokenizer)
    return _in_disguise(tokenizer, turns, tools) + ("" if before.isspace() else before)


def _before_answers(tokenizer: PreTrainedTokenizerBase) -> str:
    """White space, or a RECIPIENT, with which the template begins an answer though its prompt does not end with it.

    A model writes the space of "ASSISTANT: Hi" itself, but a decoder may have taken it for the beginning of a text and
    left it out.
    """
    known, template = codec_of(tokenizer).before_answers, str(template_of(tokenizer))
    if template not in known:
        asked, answered = Turn("user", nonce(), 1), Turn("assistant", nonce(), 1)
        prompt = render(tokenizer, [asked])
        before = _render_answered(tokenizer, asked, answered).partition(answered.content)[0]
        more = before.removeprefix(prompt)
        is_known = more != before and (more.isspace() or RECIPIENT.fullmatch(more))
        known[template] = more if is_known else ""
    return known[template]


def _writes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    known, template = codec_of(tokenizer).writes_system, str(template_of(tokenizer))
    if template not in known:
        text = nonce()
        try:
            known[template] = text in render(tokenizer, [Turn("system", text, 1), Turn("user", "Hello", 1)])
        except RENDERING_ERRORS:
            known[template] = False
    return known[template]


def _with_system(system: str, turns: list[Turn]) -> list[Turn]:
    first = next(i for i, turn in enumerate(turns) if turn.role == "user")
    content = "\n\n".join(filter(None, [system, turns[first].content]))
    return [*turns[:first], turns[first]._replace(content=content), *turns[first + 1 :]]


# ---- Disguise ----


def _in_disguise(tokenizer: PreTrainedTokenizerBase, turns: list[Turn], tools: Sequence[ToolObject] = ()) -> str:
    """What the template writes, all that was typed in disguise.

    Some templates look into the contents: they cut the thoughts before "</think>" off earlier answers, write them anew
    between tokens of their own, or obey "/no_think". What they look for they must be able to read, where it changes
    what they write. If a typed token or tag got through that way, the disguise is worth more than the template's wish.
    """
    codec = codec_of(tokenizer)
    offered = [_disguised_json(tool, codec) for tool in tools]

    def disguised(readable: frozenset[Readable], twice: frozenset[Readable] = frozenset()) -> str:
        return _disguised(tokenizer, turns, readable, twice, offered)

    safest = disguised(frozenset())
    if len(safest) > MOST_CHARACTERS:
        return safest
    expected = render(tokenizer, turns, tools=tools)

    def is_as_expected(readable: frozenset[Readable]) -> bool:
        return disguised(readable).translate(codec.reveal) == expected

    def markup(readable: frozenset[Readable], twice: frozenset[Readable] = frozenset()) -> Counter[str]:
        return _markup(codec, disguised(readable, twice))

    if safest.translate(codec.reveal) == expected and _markup(codec, safest) == _markup(codec, expected):
        return safest
    readable = next(filter(is_as_expected, _readable(str(template_of(tokenizer)), turns)), None)
    if readable is None or len(readable) > MOST_STRINGS:
        return safest
    for text in sorted(readable):
        fewer = readable - {text}
        comes_through = markup(readable, frozenset({text})) != markup(readable)
        if is_as_expected(fewer) and (comes_through or markup(fewer) == markup(readable)):
            readable = fewer
    # What was typed and comes through comes twice if it is typed twice; what the template writes does not.
    return safest if markup(readable, readable) != markup(readable) else disguised(readable)


def _disguised(
    tokenizer: PreTrainedTokenizerBase,
    turns: list[Turn],
    readable: frozenset[Readable],
    twice: frozenset[Readable],
    tools: Sequence[ToolObject],
) -> str:
    """twice: those of the texts that the template can read which stand there doubled."""
    codec = codec_of(tokenizer)
    hidden = [
        turn._replace(
            content=_disguise(turn, codec.disguise, readable, twice),
            calls=tuple(_disguised_call(call, codec) for call in turn.calls),
        )
        for turn in turns
    ]
    return render(tokenizer, hidden, tools=tools)


def _disguised_call(call: ToolCall, codec: Codec) -> ToolCall:
    arguments = _read(call["arguments"])
    if isinstance(arguments, str):
        return {**call, "arguments": arguments.translate(codec.disguise)}
    return {**call, "arguments": json.dumps(_disguised_json(arguments, codec))}


def _disguised_json(value: Any, codec: Codec) -> Any:
    """With its texts in disguise, but for single words: "type" and "string" are what templates look for."""
    match value:
        case str():
            is_word = value.replace("-", "_").isidentifier() and not codec.added.search(value)
            return value if is_word else value.translate(codec.disguise)
        case list():
            return [_disguised_json(each, codec) for each in value]
        case dict():
            return {_disguised_json(key, codec): _disguised_json(each, codec) for key, each in value.items()}
    return value


def _disguise(turn: Turn, table: dict[int, int], readable: frozenset[Readable], twice: frozenset[Readable]) -> str:
    texts = sorted((text for text, role in readable if role == turn.role), key=len, reverse=True)
    if not texts:
        return turn.content.translate(table)
    doubled = {text for text, role in twice if role == turn.role}
    parts = re.split(f"({'|'.join(map(re.escape, texts))})", turn.content)
    shown = [part if i % 2 else part.translate(table) for i, part in enumerate(parts)]
    return "".join(text * 2 if text in doubled else text for text in shown)


def _readable(template: str, turns: list[Turn]) -> Iterator[frozenset[Readable]]:
    """Strings of the template that stand in a content: without single words, which are seldom looked for, and all."""
    strings = {text for text in _strings(template) if len(text.strip()) > 2}
    found = {Readable(text, turn.role) for turn in turns for text in strings if text in turn.content}
    yield frozenset(each for each in found if not each.text.isidentifier())
    yield frozenset(found)


def _strings(template: str) -> Iterator[str]:
    """Constants of the template's code. It is not run, nor even parsed: templates have tags of their own."""
    for _, kind, source in Environment().lex(template):
        if (
            kind == "string"
            and (text := source[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape")).strip()
        ):
            yield text


def _markup(codec: Codec, text: str) -> Counter[str]:
    return Counter([*codec.added.findall(text), *MARK.findall(codec.added.sub(" ", text))])

"""From what a row says to messages that can be trained on: which answers are learned, and what cannot be used.

What changes the meaning of a row is heeded, or the row is refused; whatever else it holds is named as not read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.text import valid_unicode
from llama2_chat.training.row_formats import PLAIN_TEXT, columns_read, is_empty, raw_messages
from llama2_chat.training.row_tools import OFFERS, read_tools, with_calls
from llama2_chat.types import Message, Tool

# Whether an answer is learned, as OpenAI, axolotl and ms-swift write it: true, false, 1 or 0.
LEARNED = ("weight", "train", "training", "loss", "loss_weight", "loss_scale")
# The same of a whole row: KTO's of TRL and of LLaMA-Factory come first.
ROW_LEARNED = ("label", "kto_tag", "weight", "train", "loss_weight")
PARTLY = ("train_detail", "training_detail")  # axolotl's, which parts of an answer are learned
FLAGS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "-1": False, "-1.0": False}
PAIR = {"chosen", "rejected"}
MEDIA = {"image", "images", "video", "videos", "audio", "audios"}


class RowMessages(NamedTuple):
    messages: list[Message]  # clean: roles in order, none is empty, and an answer among them is learned
    context: frozenset[int]  # answers that are not learned, by their places in messages
    unread: set[str]  # names of columns, and of fields of messages, that nothing here reads
    is_wanted: bool = True  # False: the row says that its answer is not to be learned
    tools: tuple[Tool, ...] = ()  # that could be called
    has_greeting: bool = False  # by the assistant, before any question; left out, for no chat begins with it


def check_columns(columns: dict[str, Any], pairs: bool = False) -> None:
    """Raise ChatError, as read_row() does, for columns that are not trained on and without which a row misleads.

    pairs: whether pairs of a chosen and a rejected answer are trained on.
    """
    given = {name for name, value in columns.items() if not is_empty(value)}
    if given >= PAIR and not pairs:
        raise ChatError(
            "it is a pair of a chosen and a rejected answer, for --method dpo. To learn the chosen answers: "
            f"--columns {_chosen(columns)}."
        )
    if media := sorted(given & MEDIA):
        raise ChatError(f"it comes with {media[0]}, and the model reads text only.")


def _chosen(columns: dict[str, Any]) -> str:
    """The names of columns by which a pair's chosen answer is learned."""
    chosen = columns["chosen"]
    if isinstance(chosen, list) and len(chosen) > 1:
        return "chosen=messages"
    asked = next((name for name in ("conversations", "messages", "question") if name in columns), "prompt")
    return f"{asked}=user chosen=assistant"


def is_labelled(columns: dict[str, Any]) -> bool:
    """Whether the row says if its answer is good or bad, as KTO needs it."""
    return any(_flag(columns.get(name)) is not None for name in ROW_LEARNED)


def read_row(columns: dict[str, Any], row_format: str, keep_unwanted: bool = False) -> RowMessages:
    """columns: those of a row that check_columns() lets pass.

    keep_unwanted: whether to read a row whose answer is not to be learned; it has no messages else.

    Raises ChatError, as the end of "train.jsonl, line 3: ...", if the row is no use.
    """
    flags = {name: flag for name in ROW_LEARNED if (flag := _flag(columns.get(name))) is not None}
    unread = (
        {name for name, value in columns.items() if not is_empty(value)}
        - columns_read(row_format)
        - flags.keys()
        - {*OFFERS}
    )
    is_wanted = all(flags.values())
    if not (is_wanted or keep_unwanted):
        return RowMessages([], frozenset(), unread, is_wanted=False)
    if row_format == PLAIN_TEXT:
        return RowMessages([_text(raw_messages(columns, row_format)[0])], frozenset(), unread)
    tools = read_tools(columns)
    raw = [_with_text(message) for message in with_calls(_without_empty_system(raw_messages(columns, row_format)))]
    turns = _without_greeting(raw)
    _check(turns, {tool.name for tool in tools})
    unread |= {f"{name} of messages" for message in turns for name in _unread_fields(message)}
    messages = [_clean(message) for message in turns]
    return RowMessages(messages, _context(turns), unread, is_wanted, tools, len(turns) < len(raw))


def _text(message: dict[str, Any]) -> Message:
    """A text that is no conversation. Raises ChatError if there is none."""
    if not isinstance(message["content"], str) or _says_nothing(message["content"]):
        raise ChatError("its text is empty, or something else.")
    return _clean(message)


# ---- What is not trained on ----


def _check(messages: list[Any], tools: set[str]) -> None:
    """Raise ChatError unless a chat would take the messages, roles in order, nothing empty, an answer among them."""
    for message in messages:
        if not isinstance(message, dict):
            continue
        for call in message.get("tool_calls") or ():
            if call["name"] not in tools:
                raise ChatError(f"it calls {call['name']!r:.60}, which is not among its tools.")
        speaks = not (message.get("tool_calls") or message.get("role") == "tool")
        if speaks and _says_nothing(message.get("content", 0)):
            raise ChatError(f"its {'answer' if message.get('role') == 'assistant' else 'message'} is empty.")
    _, turns = prompt.check_messages([*messages, {"role": "user", "content": "Go on."}])
    # A chat takes both of these. To train on them would be to teach another order than the row has.
    if any(message["role"] == "system" for message in messages[1:]):
        raise ChatError("Only the first message can be a system message, and a system column counts as one.")
    if turns[0].role != "user":
        raise ChatError("A conversation to train on starts with a message from the user.")
    if all(message["role"] != "assistant" for message in messages):
        raise ChatError("it has no answer.")


def _clean(message: dict[str, Any]) -> Message:
    """White space at the ends belongs to the chat format, and some formats would join it with their own."""
    clean: Message = {"role": message["role"], "content": valid_unicode(message["content"]).strip()}
    if message.get("tool_calls"):
        clean["tool_calls"] = message["tool_calls"]
    if message["role"] == "tool":
        clean["tool_call_id"] = message["tool_call_id"]
    return clean


def _says_nothing(content: Any) -> bool:
    return is_empty(content) or (isinstance(content, str) and not content.strip())


# ---- Messages as they are written ----


def _without_empty_system(messages: list[Any]) -> list[Any]:
    """Without a system message that is empty, which is how data sets write that there is none, or that comes twice."""
    if messages and messages[0] in ({"role": "system", "content": ""}, {"role": "system", "content": None}):
        return messages[1:]
    if len(messages) > 1 and messages[0] == messages[1] and _role(messages[0]) == "system":
        return messages[1:]  # in a column and among the messages
    return messages


def _without_greeting(messages: list[Any]) -> list[Any]:
    """Without what the assistant says before the first question, if there is a question."""
    spoken = [i for i, message in enumerate(messages) if _role(message) != "system"]
    first = next((i for i in spoken if _role(messages[i]) != "assistant"), None)
    return messages if first is None else [*messages[: spoken[0]], *messages[first:]]


def _with_text(message: Any) -> Any:
    """The message with the text of its content parts for its content."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    texts = [part.get("text") for part in message["content"] if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(message["content"]) or not all(isinstance(text, str) for text in texts):
        raise ChatError("A message's content is plain text, or parts that are; it holds something else.")
    return {**message, "content": "".join(map(str, texts))}


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, dict) else None


def _context(messages: list[dict[str, Any]]) -> frozenset[int]:
    """The places of the answers that are not learned."""
    learned = {i: _learned(message) for i, message in enumerate(messages) if message["role"] == "assistant"}
    if any(learned[i] != learned.get(i + 1, learned[i]) for i in learned):
        raise ChatError("of two answers in a row, which the model reads as one, only one is to be learned.")
    if not any(learned.values()):
        raise ChatError("none of its answers is to be learned.")
    return frozenset(i for i, is_learned in learned.items() if not is_learned)


def _learned(answer: dict[str, Any]) -> bool:
    """Raises ChatError for an answer of which a part is learned, or that counts in part."""
    if partly := [name for name in PARTLY if not is_empty(answer.get(name))]:
        raise ChatError(
            f"the {partly[0]} of an answer chooses parts of it: it is learned whole (weight: 1) or not (0)."
        )
    given = {name: answer[name] for name in LEARNED if not is_empty(answer.get(name))}
    flags = [_flag(value) for value in given.values()]
    if None in flags:
        name = next(name for name, value in given.items() if _flag(value) is None)
        raise ChatError(f"the {name} of an answer is {str(given[name])[:40]!r}: it is learned whole (1) or not (0).")
    return all(flags)


def _flag(value: Any) -> bool | None:
    """None for what is neither yes nor no."""
    return FLAGS.get(str(value).strip().lower())


def _unread_fields(message: dict[str, Any]) -> set[str]:
    """A flag counts where it stands on an answer."""
    read = {"role", "content", "tool_calls", "tool_call_id", *(LEARNED if message["role"] == "assistant" else ())}
    return {name for name, value in message.items() if name not in read and not is_empty(value)}

"""What programs may send to Gradio: the function that is called chat, with as many values as it takes.

Gradio has functions of its own behind its components, and fails inside at what does not fit. A call is read here once,
and goes on to Gradio with nothing in it but what was checked.
"""

from __future__ import annotations

import json
from typing import Any

import gradio as gr

from llama2_chat.server.errors import ApiError
from llama2_chat.text import valid_unicode

FOR_PROGRAMS = (
    "This is not what the page sends. Programs ask POST /v1/chat/completions, or /gradio_api/call/chat with as many "
    "values as GET /gradio_api/info names."
)
NAMES = ("session_hash", "event_id", "trigger_id")
LONGEST_NAME = 200  # characters of an id


def checked_call(path: str, body: bytes, page: gr.Blocks) -> dict[str, Any]:
    """The body of a POST to Gradio, as Gradio shall read it. Raises ApiError for what is none."""
    given = _parsed(body)
    named = {name: given[name] for name in NAMES if isinstance(given.get(name), str) and given[name]}
    call: dict[str, Any] = {name: valid_unicode(text) for name, text in named.items()}
    if any(len(name) > LONGEST_NAME for name in call.values()) or any(
        not isinstance(given.get(name), (str, type(None))) for name in NAMES[:2]
    ):
        raise _refused()
    last = path.rstrip("/").rpartition("/")[2]
    if last == "reset":
        return {"event_id": call.get("event_id", "")}
    index = _chat_index(page)
    if last == "cancel":
        return {"event_id": "", "session_hash": "", **call, "fn_index": index}
    if not (given.get("fn_index") == index if last == "join" else last == "chat"):
        raise _refused()
    if last == "join" and "session_hash" not in call:
        raise _refused()
    inputs, data = page.fns[index].inputs, given.get("data")
    if "/call/" in path:  # the other two leave a place for what Gradio remembers
        inputs = [each for each in inputs if not isinstance(each, gr.State)]
    if not isinstance(data, list) or len(data) != len(inputs):
        raise _refused()
    call.pop("event_id", None)
    return {**call, "data": _valid(data), **({"fn_index": index} if last == "join" else {})}


def _refused() -> ApiError:
    return ApiError(400, "invalid_request", FOR_PROGRAMS)


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise _refused()
    return given


def _chat_index(page: gr.Blocks) -> int:
    return next(index for index, function in page.fns.items() if function.api_name == "chat")


def _valid(value: Any) -> Any:
    """Without halves of characters, which no answer could be sent with."""
    match value:
        case str():
            return valid_unicode(value)
        case list():
            return [_valid(each) for each in value]
        case dict():
            return {valid_unicode(name): _valid(each) for name, each in value.items()}
    return value

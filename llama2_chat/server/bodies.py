"""The JSON of a request, read strictly: what is not plain JSON in UTF-8 is refused, with the reason.

Python's parser takes more than JSON has (NaN, a name twice), and what is nested too deeply, long numbers and bytes that
are no text raise something else than JSONDecodeError: to FastAPI all these are one error.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from llama2_chat.server.errors import ApiError
from llama2_chat.text import valid_unicode

LONG_NUMBER = 309  # digits: no float is as large, and at 4,300 of them Python reads none
MAX_DEPTH = 128  # of objects and lists within each other; real JSON schemas have up to 21


class JsonRequest(Request):
    """A request whose json() raises ApiError with the reason why there is none.

    A route asks for it before FastAPI does, which makes something else of what is raised there.
    """

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            _check_headers(self)
            try:
                body = await self.body()
            except ClientDisconnect as error:
                raise ApiError(499, "client_left", "The reader left before the whole question was here.") from error
            self._json = parse(body)
        return self._json


def parse(body: bytes) -> Any:
    """Its value. Lone surrogates in it are U+FFFD, which is all that a tokenizer could take. Raises ApiError."""
    if not body.strip():
        _refuse("The body is empty. Send a JSON object.")
    try:
        value = json.loads(
            body.decode("utf-8-sig"),
            object_pairs_hook=_object,
            parse_constant=_not_a_number,
            parse_float=_number,
            parse_int=_whole_number if _has_long_number(body) else None,
        )
    except UnicodeDecodeError as error:
        _refuse(f"The body is not UTF-8: {error.reason} at byte {error.start:,}.")
    except json.JSONDecodeError as error:
        _refuse(f"The body is not JSON: {error.msg} at line {error.lineno:,}, column {error.colno:,}.")
    except RecursionError:
        _refuse_depth()
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return _with_whole_characters(value) if b"\\u" in body else value


def _has_long_number(body: bytes) -> bool:
    """Whether so many digits stand in a row. One of them would be at a multiple of LONG_NUMBER: most bodies need not be
    searched, which takes 10 ms a megabyte that everybody's answers wait for."""
    return bool(re.search(rb"\d", body[::LONG_NUMBER]) and re.search(rb"\d{%d}" % LONG_NUMBER, body))


def _check_headers(request: Request) -> None:
    """Raises ApiError unless it says that it is JSON as it stands.

    A page of another site could send any other type without asking first, or a form with none.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        received = f"; it came as {media_type!r:.60}" if media_type else ", in the header Content-Type"
        _refuse(f"The body must be sent as application/json{received}.", "unsupported_content_type")
    encoding = request.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        _refuse(
            f"The body is compressed ({encoding!r:.60}), which is not understood here. Send it as it is.",
            "unsupported_content_encoding",
        )


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        _refuse(f"The body has {twice!r:.60} twice in one object. Send it once.")
    return value


def _not_a_number(name: str) -> NoReturn:
    _refuse(f"The body is not JSON: it holds {name}, and JSON has no such number.")


def _number(digits: str) -> float | int:
    """To JSON, 256.0 is a whole number, and so some programs write it."""
    if not math.isfinite(number := float(digits)):
        _refuse_number()
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _whole_number(digits: str) -> int:
    if len(digits.lstrip("-")) >= LONG_NUMBER:
        _refuse_number()
    return int(digits)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        children = (child for each in level for child in (each.values() if isinstance(each, dict) else each))
        level = [child for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    _refuse_depth()


def _with_whole_characters(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.loads(valid_unicode(text))
    return value


def _refuse_number() -> NoReturn:
    _refuse("The body holds a number that is too large for any field.")


def _refuse_depth() -> NoReturn:
    _refuse(f"The body is nested too deeply; {MAX_DEPTH} levels are read.")


def _refuse(sentence: str, code: str = "invalid_json") -> NoReturn:
    raise ApiError(400, code, sentence)

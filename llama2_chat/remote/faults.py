"""What goes wrong with a server, in sentences. Where it happened, and what the server said about it, is for the log."""

from __future__ import annotations

import json
import logging
import re
import ssl
from typing import Any

import httpx2
from huggingface_hub.errors import TextGenerationError

from llama2_chat.errors import Busy, ChatError, ModelUnavailable, PromptTooLong
from llama2_chat.text import valid_unicode

log = logging.getLogger("llama2_chat")

UNREACHABLE = "The model's server cannot be reached. Please try again later."
REFUSED = "The model's server does not accept connections; it may be starting. Please try again in a minute."
UNTRUSTED = "The certificate of the model's server is not trusted here. SSL_CERT_FILE can name the CA that issued it."
SILENT = "The model's server has stopped responding."
CUT = "The connection to the model's server was lost."
CONNECTION_FAULTS = (UNREACHABLE, REFUSED, UNTRUSTED, SILENT, CUT)
WRONG_KEY = "The model's server rejects the key. Set INFERENCE_KEY to the right one."
NO_SUCH_MODEL = "The model's server does not have this model. Check INFERENCE_MODEL and INFERENCE_URL."
NO_LIST = "The model's server does not list its models. Set INFERENCE_MODEL to one of them, and check INFERENCE_URL."
STARTING = "The model's server is not ready yet. Please try again in a minute."
NO_API = "What answers at the address of the model's server does not speak OpenAI's API. Check INFERENCE_URL."
FAILED = "The model's server failed. Please try again."
FULL = "The model's server has too many requests at once. Please try again in a minute."
ABORTED = "The model's server aborted this answer."
NO_REASON = "The model's server ended this answer without giving a reason."
CANNOT_GO_ON = "The model's server cannot go on with an answer that has ended. Ask again instead."
NO_LOGPROBS = "The model's server gives no logprobs. Leave them out."
INCOMPLETE = "The answer above is incomplete."


class ServerFault(ModelUnavailable):
    """The fault of one server, so another one may be able to answer. cause: for the log alone."""

    def __init__(self, sentence: str, cause: str = "") -> None:
        super().__init__(sentence)
        self.detail = f"{sentence} ({cause})" if cause else sentence


class RequestRejected(ChatError):
    """The fault of the question, in the server's words; every other server would reject it too."""


def translate(error: Exception) -> ChatError:
    """What the visitor is told of an exception that httpx2, huggingface_hub or we ourselves raised."""
    if isinstance(error, ChatError):
        return error
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    detail = f"{type(error).__name__}: {error}"[:300]
    if caused_by(ssl.SSLCertVerificationError):
        return ServerFault(UNTRUSTED, detail)
    if caused_by(ConnectionRefusedError):
        return ServerFault(REFUSED, detail)
    if caused_by(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError):
        return ServerFault(UNREACHABLE, detail)
    if caused_by(TimeoutError, httpx2.TimeoutException):
        return ServerFault(SILENT, detail)
    if caused_by(httpx2.TransportError):
        return ServerFault(CUT, detail)
    if isinstance(error, TextGenerationError):  # an error inside a stream, whose status was 200
        message = _message({"error": error.args[0]} if error.args else {})
        return read_too_long(message) or ServerFault(FAILED, repr(message))
    if isinstance(error, (ValueError, TypeError, LookupError, AttributeError)):  # not JSON, or JSON of another shape
        return ServerFault(NO_API, detail)
    log.error("Asking the model's server failed", exc_info=error)
    return ServerFault(FAILED, detail)


def from_status(status: int, body: bytes) -> ChatError:
    """What an HTTP status other than 200 means."""
    text = body.decode("utf-8", "replace")
    try:
        message = _message(json.loads(text))
    except ValueError:
        message = ""
    detail = f"HTTP {status}: {message or text[:200]!r}"
    if status in (400, 413, 422, 500) and (too_long := read_too_long(text)):
        return too_long
    if status in (400, 413, 422):
        return RequestRejected(f"The model's server rejects this request: {message or f'HTTP {status}'}")
    if status == 429:
        return Busy(FULL)
    known = {401: WRONG_KEY, 403: WRONG_KEY, 404: NO_SUCH_MODEL, 503: STARTING}
    return ServerFault(known.get(status, FAILED if status >= 500 else NO_API), detail)


def _message(body: Any) -> str:
    """The message in an error's JSON; servers disagree about where it stands."""
    while body and isinstance(body, (dict, list)):
        names = ("error", "message", "detail", "msg")
        body = body[0] if isinstance(body, list) else next((body[name] for name in names if body.get(name)), "")
    return valid_unicode(body[:300]) if isinstance(body, str) else ""


# Both numbers as vLLM, SGLang, llama.cpp, TGI, OpenAI and errors.PromptTooLong write them. Some servers repeat the
# question next to them: if a number could have any length, each digit of a long one would start a search to its end.
NUMBER = r"(\d[\d,]{0,15})"
CONTEXT = re.compile(
    rf"""context (?:length|size|window)[^\d"]{{0,20}}{NUMBER}"""
    rf"""|n_ctx"?: ?{NUMBER}|`max_new_tokens` must be <= ?{NUMBER}"""
)
PROMPT = re.compile(
    rf"""{NUMBER} (?:input tokens|tokens from the input|`inputs` tokens|in the (?:messages|prompt)|with this )"""
    rf"""|(?:(?<!system )prompt is|(?:conversation|message) is|answer so far are|input \(|request \(|resulted in"""
    rf"""|n_prompt_tokens"?:) ?{NUMBER}"""
)


def read_too_long(text: str) -> PromptTooLong | None:
    """The error that a server words in this text, if it says that the prompt is too long."""
    if not CONTEXT.search(text) and "context_length_exceeded" not in text:
        return None
    return PromptTooLong(prompt_tokens=_number(PROMPT, text), context_length=_number(CONTEXT, text))


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(next(filter(None, found.groups())).replace(",", "")) if found else 0

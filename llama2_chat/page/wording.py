"""Sentences that the server says to visitors of the page, and the system prompts. Labels are in layout.py, and what the
page's own code says in static/texts.

All of it is English, which the page says in the visitor's language (static/translated.js).

Texts of a ChatError are written where it is raised, and shown as they stand.
"""

from __future__ import annotations

import re

from llama2_chat.documents.library import VISITOR_S
from llama2_chat.documents.store import Document
from llama2_chat.errors import ChatError
from llama2_chat.types import Status

TITLE = "Llama 2 Chat"
SYSTEM_PROMPT = "You are a helpful assistant. Answer clearly and briefly, and say so when you are not sure."
# The default that Meta published with Llama 2 in July 2023, word for word.
META_SYSTEM_PROMPT = """\
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your \
answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure \
that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information."""
LLAMA_2_NOTICE = (
    "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights Reserved."
)
MISTAKES = "Answers can be wrong."
READING = "Reading …"
ASKING = "Waiting for your permission …"
READING_RESULTS = "Reading what came of it …"
NO_TOOLS = "This server offers no tools."
NO_MESSAGE = "Please type a message first."
HALF_AN_EXAMPLE = "Each example needs a question and an answer. Fill in both, or remove it."
TEXT_ONLY = "This chat reads text only. Please leave out files and other attachments."
DELETED = "A document of this conversation has been deleted. Send the message again to ask without it."
INTERNAL_ERROR = "Something went wrong on the server; its log has the details. Please try again."
PHASES = {
    "choose": "Choosing the model",
    "download": "Downloading the model",
    "convert": "Preparing the model, at the first start only",
    "load": "Loading the model",
    "connect": "Connecting to the model's server",
}


def status_line(status: Status, chats: bool = True) -> str:
    """Which model answers and how, or how far loading is, or what went wrong."""
    if status.state == "failed":
        return status.error
    if status.state == "loading":
        return progress(status)
    precision = status.precision + (f", KV {status.kv_cache}" if status.kv_cache not in ("", "none") else "")
    how = f"{precision} on {status.device}" if precision else f"answered by {status.device}"
    if not chats:
        how += " · completes text, does not chat"
    elif status.guesses_format:
        how += " · chats in Llama 2's format, a guess"
    return f"{status.model} · {how}"


def notice(model: str) -> str:
    """What the footer says: Meta's licence wants its notice with every copy of Llama 2."""
    return f"{LLAMA_2_NOTICE} {MISTAKES}" if re.search("llama", model, re.IGNORECASE) else MISTAKES


def progress(status: Status) -> str:
    """How far loading is."""
    phase = PHASES[status.phase]
    if status.total_bytes:
        return f"{phase}: {status.done_bytes / 1e6:,.0f} of {status.total_bytes / 1e6:,.0f} MB"
    return f"{phase} …"


def waiting(
    loading: Status | None, queue_position: int, has_steps: bool = False, reading: Document | None = None
) -> str:
    """What an answer without text yet is waiting for. has_steps: a tool was called for it. reading: a
    document that it is about."""
    if loading is not None:
        return progress(loading)
    if reading is not None:
        pages = f", page {reading.pages_done + 1:,} of {reading.pages:,}" if reading.pages else ""
        return f"Reading {isolated(reading.name)}{pages} …"
    if queue_position:
        return f"Waiting in line, position {queue_position} …"
    return READING_RESULTS if has_steps else READING


def kept(has_login: bool) -> str:
    """For how long documents are, which are a login's or a cookie's."""
    until = "" if has_login else f", or for {VISITOR_S // 86_400} days after your last upload"
    return f"Documents stay on this server, for you alone, until you delete them{until}."


def isolated(name: str) -> str:
    """A name that is written from right to left turns nothing around it."""
    return f"\u2068{name}\u2069"


def error_sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ChatError) else INTERNAL_ERROR

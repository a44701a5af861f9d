"""Every sentence of the page that is not a label in layout.py: status line, waiting, remarks, and the system prompts.

Texts of a ChatError are written where it is raised, and shown as they stand.
"""

from __future__ import annotations

import html

from llama2_chat.errors import ChatError
from llama2_chat.types import Reply, Status

TITLE = "Llama 2 Chat"
SYSTEM_PROMPT = "You are a helpful assistant. Answer clearly and briefly, and say so when you are not sure."
# The default that Meta published with Llama 2 in July 2023, word for word.
META_SYSTEM_PROMPT = """\
You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  Your \
answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure \
that your responses are socially unbiased and positive in nature.

If a question does not make any sense, or is not factually coherent, explain why instead of answering something not \
correct. If you don't know the answer to a question, please don't share false information."""
EXAMPLES = [
    "Explain in simple words why the sky is blue.",
    "Write a short poem about a lighthouse in winter.",
    "What should I pack for three days of hiking?",
    "Write a Python function that tells whether a word is a palindrome.",
]
# HTML. page.js shows it where the browser sees no secure context. Copying a message or code works there all the same.
LOG_OUT = "Log out"
INSECURE = (
    "Not encrypted: others on this network can read this chat, and 'Copy conversation' does not work. "
    "<code>python app.py --https</code> fixes both."
)
READING = "Reading …"
STOPPED = "Stopped before an answer began."
NO_MESSAGE = "Please type a message first."
TEXT_ONLY = "This chat reads text only. Please leave out files and other attachments."
INTERNAL_ERROR = "Something went wrong on the server; its log has the details. Please try again."
PHASES = {
    "choose": "Choosing the model",
    "download": "Downloading the model",
    "convert": "Preparing the model, at the first start only",
    "load": "Loading the model",
    "connect": "Connecting to the model's server",
}


def status_line(status: Status) -> str:
    """HTML for the line under the title: which model answers and why, or how far loading is, or what went wrong."""
    if status.state == "failed":
        words = f"<strong>No model.</strong> {html.escape(status.error)}"
    elif status.state == "loading":
        words = html.escape(progress(status))
    else:
        model = f"<strong>{html.escape(status.model)}</strong>"
        how = f"{status.precision} on {status.device}" if status.precision else f"answered by {status.device}"
        words = f"{model} · {html.escape(how)}. {html.escape(status.why)}"
    return f'<p role="status" class="{status.state}">{words}</p>'


def progress(status: Status) -> str:
    """How far loading is."""
    phase = PHASES[status.phase]
    if status.total_bytes:
        return f"{phase}: {status.done_bytes / 1e6:,.0f} of {status.total_bytes / 1e6:,.0f} MB"
    return f"{phase} …"


def waiting(reply: Reply) -> str:
    """What a reply without text yet is waiting for."""
    position = reply.queue_position
    return f"Waiting in line, position {position} …" if position else READING


def closing_remark(text: str, reply: Reply) -> str:
    """What a visitor should know about an answer that has ended; mostly nothing."""
    remarks = []
    dropped = reply.usage.dropped_messages
    if dropped == 1:
        remarks.append("The oldest message no longer fits and was left out.")
    elif dropped:
        remarks.append(f"The {dropped:,} oldest messages no longer fit and were left out.")
    if reply.finish_reason == "length":
        remarks.append("The answer was cut off at 'Max new tokens'.")
    elif reply.finish_reason == "stop" and not text.strip():
        remarks.append("The model gave an empty answer. Try again, or rephrase your message.")
    return " ".join(remarks)


def error_sentence(error: Exception) -> str:
    return str(error) if isinstance(error, ChatError) else INTERNAL_ERROR

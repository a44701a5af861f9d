"""The page: a chat with its settings, every word a visitor reads, and the server that shows it.

    python app.py               then open http://127.0.0.1:7860

Gradio's history becomes plain messages here, and pieces of text become what the page shows. The page is up before the
model is; a message sent meanwhile waits. What a model does with a message is model.py's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import html
import logging
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama2_chat.server import check, login
from llama2_chat.settings import Settings

if __name__ == "__main__" and Settings.read().hash_password:
    sys.exit(login.main())
if __name__ == "__main__" and Settings.read().check:
    # Before the imports below: that a package is missing is for the check to tell.
    sys.exit(check.main(Settings.read()))

import anyio.to_thread
import gradio as gr
import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse

from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.remote.remote import RemoteModel
from llama2_chat.server.api import Clients, address, api_router, as_api_error, guard, health_router, submit
from llama2_chat.server.metrics import Metrics, Record
from llama2_chat.server.tls import CERTS, announcement, get_certificate, server_context
from llama2_chat.types import OPEN_BELOW, RANGES, Message, Reply, SamplingParams, Status

if TYPE_CHECKING:
    from model import ChatModel

log = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "llama2_chat" / "page"
TITLE = "Llama 2 Chat"
SHOW_EVERY_S = 0.08  # shown token by token, a long answer keeps the browser busier than the model
SETTING_WIDTH = 240  # pixels: three sliders side by side on a desktop, one on a phone
LOOK_AGAIN_S = 10
SIGN_OF_LIFE_S = 0.4  # while there is no text yet; Stop and a closed tab are noticed at once all the same

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
# Shown by page.js where the browser sees no secure context. Copying a message or code works there all the same.
INSECURE = (
    "Not encrypted: others on this network can read along, and 'Copy conversation' does not work. "
    "<code>python app.py --https</code> mends both."
)
# The class of a remark that hands the message back. An answer may hold any HTML, but cannot guess this.
REFUSED = f"refused-{secrets.token_hex(8)}"
LATEX_DELIMITERS = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


# What most events here need: no spinner over the page, no place in the API, no waiting behind others.
HIDDEN = {"show_progress": "hidden", "api_visibility": "private"}
QUIET = {**HIDDEN, "queue": False}


def main() -> int:
    settings = Settings.read()
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    for ours in (__name__, "model", "weights", "download", "engine", "remote", "tls", "api", "metrics"):
        logging.getLogger(ours).setLevel(logging.INFO)
    certificate = functools.partial(get_certificate, settings.certfile, settings.keyfile, settings.key_password)
    try:
        context = server_context(certificate) if settings.https else None
        users = login.read(settings.auth_file) if settings.auth_file else None
        listener = check.listen(settings)
    except ChatError as error:
        log.error("%s", error)
        return 1
    chat = RemoteModel(settings) if settings.inference_urls else local_model(settings)
    config = uvicorn.Config(
        create_app(chat, settings, users),
        log_level="warning",
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=2,
        ssl_context_factory=(lambda *_: context) if context else None,
    )
    server = Server(config, chat)
    scheme, port = "https" if context else "http", listener.getsockname()[1]
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    log.info("The page is at %s://%s:%s%s/", scheme, host, port, settings.root_path)
    if not settings.on_loopback and not settings.api_keys and not settings.auth_file:
        log.warning("Programs that reach this port may use the model without a key. API_KEY closes that.")
    if context:
        print(
            announcement(certificate(), settings.host, port, colours=sys.stderr.isatty()), file=sys.stderr, flush=True
        )
    # uvicorn stops at SIGTERM, then raises it again for whoever was there before: us, who have a model to close.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        chat.start()
        server.run(sockets=[listener])
    chat.close()
    if chat.state == "loading":
        os._exit(0)  # its thread may be deep inside a download or PyTorch, and Python would wait for it or crash on it
    return 0 if server.started else 1


def local_model(settings: Settings) -> ChatModel:
    from model import ChatModel  # a page whose model is elsewhere needs none of the packages below it

    return ChatModel(settings)


class Server(uvicorn.Server):
    """Ends the running answers when it is told to stop; each reaches its page with the words it has."""

    def __init__(self, config: uvicorn.Config, chat: ChatModel | RemoteModel) -> None:
        super().__init__(config)
        self.chat = chat

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await anyio.to_thread.run_sync(self.chat.close)
        # An open page keeps a stream open for good; cutting it is no error worth a traceback.
        logging.getLogger("uvicorn.error").disabled = True
        await super().shutdown(sockets)


def create_app(chat: ChatModel | RemoteModel, settings: Settings, users: login.Users | None = None) -> FastAPI:
    """The whole site: the page at /, the API and health beside it. The chat may still be loading."""
    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    guard(app, settings)
    clients, metrics = Clients(settings.client_limit), Metrics(chat, settings.log_messages)
    app.include_router(health_router(chat))
    app.include_router(api_router(chat, settings, clients, metrics))
    if settings.https and not settings.certfile:

        @app.get("/ca.crt")
        async def ca() -> FileResponse:
            # No file name: with one, an iPhone would save it and not offer to install it.
            return FileResponse(CERTS / "ca.crt", media_type="application/x-x509-ca-cert")

    return gr.mount_gradio_app(
        app,
        build_page(chat, settings.sampling, clients, metrics),
        path="/",
        auth=users.knows if users else None,
        root_path=settings.root_path or None,
        theme=gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="slate",
            radius_size=gr.themes.sizes.radius_lg,
            # Bundled with Gradio; of the other weights only a few letters are.
            font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        ),
        css_paths=PAGE / "page.css",
        js=(PAGE / "page.js").read_text(encoding="utf-8").replace("REFUSED", REFUSED),
        footer_links=[],
        show_error=False,  # what goes wrong inside is for the log
        max_file_size=1,  # byte: nothing here takes files
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )


def build_page(
    chat: ChatModel | RemoteModel, defaults: SamplingParams, clients: Clients, metrics: Metrics
) -> gr.Blocks:
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1>")
        status = gr.HTML(elem_id="status")
        gr.HTML(f"<p>{INSECURE}</p>", elem_id="insecure")
        timer = gr.Timer(1)
        gr.on(
            [page.load, timer.tick],
            lambda: (status_line(chat.status), _next_look(chat)),
            outputs=[status, timer],
            **QUIET,
        )
        conversation = gr.Column()  # shown above the settings, made after them
        with gr.Accordion("Settings", open=False):
            settings = _settings(defaults)
        with conversation:
            chatbot = gr.Chatbot(
                show_label=False,
                elem_id="conversation",
                editable="user",
                buttons=["copy", "copy_all"],
                feedback_options=None,
                latex_delimiters=LATEX_DELIMITERS,
            )
            chatbot.postprocess = _verbatim(chatbot.postprocess)
            box = gr.Textbox(
                label="Message",
                placeholder="Type a message",
                elem_id="message",
                max_lines=12,
                autofocus=True,
                submit_btn="Send",
                stop_btn="Stop",
            )
            # ChatInterface locks the box too, but a round trip later: a second Enter or click would ask twice.
            # Listeners run in the order in which they were made, so this one comes before its own.
            gr.on(
                [box.submit, chatbot.retry, chatbot.edit, chatbot.example_select],
                fn=None,
                outputs=box,
                js="() => ({ __type__: 'update', interactive: false })",
                **QUIET,
            )
            reply = make_reply(chat, clients, metrics)
            interface = gr.ChatInterface(
                reply,
                chatbot=chatbot,
                textbox=box,
                additional_inputs=settings,
                api_name="chat",
                concurrency_limit=None,  # the engine has the only line
                show_progress="hidden",
                cache_examples=False,
            )
            # ChatInterface would answer an example with the box left open for a second question; _wire does not.
            chatbot.examples = [{"text": example} for example in EXAMPLES]
        _wire(interface, reply)
    return page


def _settings(defaults: SamplingParams) -> list[gr.components.Component]:
    """What stands in the accordion, in the order in which reply() takes it."""

    def slider(name: str, label: str, info: str, step: float) -> gr.Slider:
        low, high = RANGES[name]
        lowest = step if name in OPEN_BELOW else low
        value = getattr(defaults, name)
        return gr.Slider(lowest, high, value, step=step, label=label, info=info, min_width=SETTING_WIDTH)

    system_prompt = gr.Textbox(
        SYSTEM_PROMPT,
        label="System prompt",
        info="What the model is told before the conversation; may be empty.",
        lines=3,
    )
    with gr.Row():
        for label, text in (("Use Meta's prompt of 2023", META_SYSTEM_PROMPT), ("Use the short prompt", SYSTEM_PROMPT)):
            gr.Button(label, size="md").click(functools.partial(str, text), None, system_prompt, **QUIET)
    with gr.Row():
        numbers = [
            slider("max_new_tokens", "Max new tokens", "An answer ends here at the latest.", 1),
            slider("temperature", "Temperature", "0 always takes the likeliest word; more is more varied.", 0.05),
            slider("top_p", "Top-p", "Choose among the likeliest words that make up this share.", 0.01),
            slider("top_k", "Top-k", "Choose among this many likeliest words; 0 is all.", 1),
            slider("repetition_penalty", "Repetition penalty", "Above 1, words already used become less likely.", 0.05),
        ]
        seed = gr.Textbox(  # an empty gr.Number turns into 0 when the accordion opens
            "" if defaults.seed is None else str(defaults.seed),
            label="Seed",
            info="Same seed, same conversation: same answer.",
            placeholder="random",
            min_width=SETTING_WIDTH,
        )
    for number in numbers:
        # What Gradio's own check raises never reaches reply() and locks the page. SamplingParams checks, in words.
        number.preprocess = lambda value: value
    return [system_prompt, *numbers, seed]


def _wire(interface: gr.ChatInterface, reply: Callable[..., AsyncIterator]) -> None:
    """Edits and examples are answered as typed messages are: the box locks, Stop shows, and at the end all is back.

    ChatInterface by itself gives an edit no Stop button and leaves the box open while it answers an example.
    """
    box, chatbot = interface.textbox, interface.chatbot
    history, message = interface.chatbot_state, interface.saved_input

    before, returned = gr.State(), gr.State()  # what a refusal gives back: the conversation, the message

    def edited(turns: list[dict], edit: gr.EditData) -> tuple[list[dict], list[dict], str]:
        index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
        before = [*turns[:index], _turn("user", edit.previous_value), *turns[index + 1 :]]
        return before, turns[:index], edit.value

    def picked(turns: list[dict], example: gr.SelectData) -> tuple[list[dict], list[dict], str]:
        return turns, [], example.value["text"]

    def ask(message: str, history: list[dict]) -> tuple[list[dict], str, gr.Textbox]:
        locked = gr.Textbox(interactive=False, submit_btn=False, stop_btn="Stop")
        return [*history, _turn("user", message)], "", locked

    async def answer(
        request: gr.Request, before: list[dict], message: str, history: list[dict], *settings: Any
    ) -> AsyncIterator[tuple[list[dict], str]]:
        async with contextlib.aclosing(reply(message, history, *settings, request)) as answers:
            async for turns in answers:
                refused = turns and (turns[-1].get("metadata") or {}).get("id") == "refused"
                yield (before, message) if refused else ([*history, _turn("user", message), *turns], "")

    def finish(turns: list[dict], returned: str, draft: str) -> tuple[list[dict], gr.Textbox]:
        value = "\n\n".join(filter(None, [returned, draft]))
        return turns, gr.Textbox(value, interactive=True, submit_btn="Send", stop_btn=False)

    for chosen in (
        chatbot.edit(edited, chatbot, [before, history, message], **QUIET),
        chatbot.example_select(picked, chatbot, [before, history, message], **QUIET),
    ):
        asked = chosen.then(ask, [message, history], [chatbot, returned, box], **QUIET)
        inputs = [before, message, history, *interface.additional_inputs]
        answered = asked.then(answer, inputs, [chatbot, returned], concurrency_limit=None, **HIDDEN)
        answered.then(finish, [chatbot, returned, box], [history, box], **QUIET)
        box.stop(None, cancels=[answered])
    # Words still on their way would bring a cleared conversation back: the answer ends first.
    chatbot.clear(lambda: ([], []), None, [chatbot, history], js="() => endAnswer()", **QUIET)


def make_reply(chat: ChatModel | RemoteModel, clients: Clients, metrics: Metrics) -> Callable[..., AsyncIterator]:
    async def reply(
        message: str,
        history: list[dict],
        system_prompt: str | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        repetition_penalty: float,
        seed: str | None,
        request: gr.Request,
    ) -> AsyncIterator[str | list[dict]]:
        """The answer as it grows. The server remembers each client's conversation."""
        # Gradio's page signs as "app". It gets turns: the answer, and remarks beside it. Programs get plain text.
        on_page = request.headers.get("x-gradio-user") == "app"
        text, answer, record = "", None, Record(metrics, "page")
        try:
            messages = plain_messages(message, history, system_prompt)
            params = SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                repetition_penalty=repetition_penalty,
                seed=_seed(seed),
            )
            while chat.state == "loading":
                yield _turns("", waiting=_progress(chat.status)) if on_page else ""
                await asyncio.sleep(SIGN_OF_LIFE_S)
            record.question = messages
            if on_page and isinstance(chat, RemoteModel):  # its server may take a while to accept the question
                yield _turns("", waiting="Reading …")
            with clients.place(address(request)):
                async with await submit(lambda: chat.stream_reply(messages, params)) as answer:
                    record.reply = answer
                    async for text in _texts(answer):
                        yield _turns(text, waiting=_place(answer)) if on_page else text
            yield _turns(text, remark=_remark(text, answer)) if on_page else text
        except Exception as error:  # none may leave: on the page it would lock the box until a reload
            sentence = _sentence(error)
            record.error = as_api_error(error).code
            if not on_page:
                raise gr.Error(sentence, print_exception=False) from None
            gr.Warning(html.escape(sentence))
            refused = answer is None and isinstance(error, ChatError) and not isinstance(error, ModelUnavailable)
            yield _turns(
                text, remark=f"Not sent: {sentence}" if refused else sentence, kind="refused" if refused else "remark"
            )
        finally:
            record.answer = text
            record.end()

    return reply


async def _texts(answer: Reply) -> AsyncIterator[str]:
    """The whole text so far, at a pace for the eye; the same text again when nothing new comes for a while."""
    text = ""
    with contextlib.suppress(StopAsyncIteration):
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SIGN_OF_LIFE_S):
                    text += await anext(answer)
            yield text
            await asyncio.sleep(SHOW_EVERY_S if text else 0)


def _seed(text: str | None) -> int | str | None:
    """The number in it; None for an empty text. SamplingParams refuses whatever else it holds."""
    text = (text or "").strip()
    return int(text) if re.fullmatch("[0-9]{1,40}", text) else text or None


def plain_messages(message: str, history: list[dict], system_prompt: str | None) -> list[Message]:
    """The conversation as a model takes it. Remarks of the page stay out, and so do messages that were refused."""
    if not isinstance(message, str) or not message.strip():
        raise ChatError("Please type a message first.")
    messages: list[Message] = []
    for turn in history:
        kind = (turn.get("metadata") or {}).get("id")
        if kind == "refused" and messages:
            messages.pop()
        if kind in ("refused", "remark"):
            continue
        if turn.get("role") not in ("user", "assistant"):
            raise ChatError(f"A conversation is between user and assistant, not {turn.get('role')!r}.")
        messages.append({"role": turn["role"], "content": _text_of(turn.get("content"))})
    system = [Message(role="system", content=system_prompt)] if system_prompt else []
    return [*system, *messages, {"role": "user", "content": message}]


def _text_of(content: object) -> str:
    """Gradio's page sends a list of parts, its API plain text."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ChatError("This chat reads text only; please leave out files and other parts.")
    return "\n".join(texts)


# What the page says.


def _next_look(chat: ChatModel | RemoteModel) -> gr.Timer:
    """When the page asks again what it says under its title: a model stays, servers come and go."""
    if isinstance(chat, RemoteModel) and chat.state != "loading":
        return gr.Timer(LOOK_AGAIN_S)
    return gr.Timer(active=chat.state == "loading")


def status_line(status: Status) -> str:
    """One small line under the title: what answers here and why, or how far loading is, or what went wrong."""
    if status.state == "failed":
        words = f"<strong>No model.</strong> {html.escape(status.error)}"
    elif status.state == "loading":
        words = html.escape(_progress(status))
    else:
        model = f"<strong>{html.escape(status.model)}</strong>"
        how = f"{status.precision} on {status.device}" if status.precision else f"answered by {status.device}"
        words = f"{model} · {html.escape(how)}. {html.escape(status.why)}"
    return f'<p role="status" class="{status.state}">{words}</p>'


def _progress(status: Status) -> str:
    doing = {
        "choose": "Choosing the model",
        "download": "Downloading the model",
        "convert": "Preparing the model, once only",
        "load": "Loading the model",
        "connect": "Asking the model's server",
    }[status.phase]
    if status.total_bytes:
        return f"{doing}: {status.done_bytes / 1e6:,.0f} of {status.total_bytes / 1e6:,.0f} MB"
    return f"{doing} …"


def _place(answer: Reply) -> str:
    place = answer.queue_position
    return f"Waiting in line at place {place} …" if place else "Reading …"


def _remark(text: str, answer: Reply) -> str:
    """What a visitor should know about an answer that has ended."""
    remarks = []
    if dropped := answer.usage.dropped_messages:
        remarks.append(f"The oldest messages ({dropped}) no longer fit and were left out.")
    if answer.finish_reason == "length":
        remarks.append("The answer reached 'Max new tokens'.")
    elif answer.finish_reason == "stop" and not text.strip():
        remarks.append("The model had nothing to say. Try again, or put it differently.")
    return " ".join(remarks)


def _sentence(error: Exception) -> str:
    if isinstance(error, ChatError):
        return str(error)
    return "Something went wrong on the server, and its log says what. Please try again."


def _turns(text: str, waiting: str = "", remark: str = "", kind: str = "remark") -> list[dict]:
    """The assistant's answer and a small remark below it, each a turn of its own.

    The remark's metadata keeps it out of what the model reads later, whatever is retried, undone or edited.
    """
    turns = [_turn("assistant", text)] if text else []
    if waiting and not text:
        # Stop leaves this turn behind; page.css then shows its second half.
        stopped = "Stopped before an answer began."
        remark = f"<span class=waiting>{html.escape(waiting)}</span><span class=stopped>{stopped}</span>"
    elif remark:
        remark = html.escape(remark)
    if remark:
        css = f"refused {REFUSED}" if kind == "refused" else kind
        turns.append({**_turn("assistant", f'<small class="{css}">{remark}</small>'), "metadata": {"id": kind}})
    return turns


def _turn(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _verbatim(postprocess: Callable) -> Callable:
    """Chatbot.postprocess, except that texts keep their indentation and hold nothing that JSON in UTF-8 cannot.

    Given a plain str, Gradio takes the common indentation out: pasted code would lose it, for the model too.
    """

    def verbatim(turns: list[dict] | None) -> Any:
        texts = [(turn, _text_of(turn["content"])) for turn in turns or []]
        return postprocess([{**turn, **_turn(turn["role"], _unicode(text))} for turn, text in texts])

    return verbatim


def _unicode(text: str) -> str:
    """The text, with U+FFFD for halves of characters, which a browser can send and UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


if __name__ == "__main__":
    sys.exit(main())

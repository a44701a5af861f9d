"""What stands where on the page: title, status line, conversation, settings, theme. page.css and page.js lie beside it.

What a click does is in events.py, how a message is answered in reply.py.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from starlette.routing import Mount

from llama2_chat.page import wording
from llama2_chat.page.events import QUIET, answer_edits_and_examples, end_answer_before_clearing, lock_at_once
from llama2_chat.page.guard import MOST_JOBS, Listeners, OnlyOurRoutes, TextBlocks, add_log_out
from llama2_chat.page.messages import REFUSED_CLASS, verbatim
from llama2_chat.page.reply import ReplyFunction
from llama2_chat.server.login import Users
from llama2_chat.settings import Settings
from llama2_chat.types import OPEN_BELOW, RANGES, ChatBackend, SamplingParams

FOLDER = Path(__file__).parent
SETTING_WIDTH = 240  # pixels: three sliders side by side on a desktop, one on a phone
STATUS_EVERY_S = 10
LONGEST_SHOWN = 4_096  # tokens of an answer that can be chosen before the model's window is known
LOG_OUT = """async () => {
  const token = await (await fetch("log-out")).text();
  await fetch("log-out", { method: "POST", headers: { "X-Token": token } });
  location.reload();
}"""
LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


def mount_page(app: FastAPI, page: gr.Blocks, settings: Settings, users: Users | None, listeners: Listeners) -> FastAPI:
    """The app, with the page at / of it; behind a login, if there are users. listeners: kept up to date."""
    page.max_threads = MOST_JOBS
    page.queue()
    gr.mount_gradio_app(
        app,
        page,
        path="/",
        auth=users.knows if users else None,
        root_path=settings.root_path or None,
        theme=gr.themes.Default(
            primary_hue="indigo",
            neutral_hue="slate",
            radius_size=gr.themes.sizes.radius_lg,
            # Bundled with Gradio, whose other weights of this font hold only a few letters.
            font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        ),
        css_paths=FOLDER / "page.css",
        js=(FOLDER / "page.js").read_text(encoding="utf-8").replace("REFUSED", REFUSED_CLASS),
        footer_links=[],
        show_error=False,  # what goes wrong inside is for the log
        max_file_size=1,  # byte: nothing here takes files
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    mount = app.routes[-1]
    assert isinstance(mount, Mount)
    gradio = cast(App, mount.app)
    mount.app = OnlyOurRoutes(gradio, listeners)
    if users:
        add_log_out(app, gradio)
    return app


def build_page(
    chat: ChatBackend, defaults: SamplingParams, reply: ReplyFunction, *, has_login: bool = False
) -> gr.Blocks:
    """The page. defaults: where its sliders start; reply: as make_reply() makes it."""
    with TextBlocks(title=wording.TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{wording.TITLE}</h1>")
        _status(page, chat)
        if has_login:
            gr.Button(wording.LOG_OUT, size="sm").click(None, js=LOG_OUT, **QUIET)
        gr.HTML(f"<p>{wording.INSECURE}</p>", elem_id="insecure")
        conversation = gr.Column()  # shown above the settings, made after them
        with gr.Accordion("Settings", open=False) as accordion:
            settings = _settings(defaults)
        _fit_to_window(accordion, settings[1], chat)
        with conversation:
            interface = _chat_interface(reply, settings)
        answer_edits_and_examples(interface, reply)
        end_answer_before_clearing(interface)
    return page


def _status(page: gr.Blocks, chat: ChatBackend) -> None:
    """The line under the title, which keeps itself up to date."""
    line, timer = gr.HTML(elem_id="status"), gr.Timer(1)

    def refresh() -> tuple[str, gr.Timer]:
        loading = chat.state == "loading"
        if chat.capabilities.can_fail_over and not loading:
            return wording.status_line(chat.status), gr.Timer(STATUS_EVERY_S)
        return wording.status_line(chat.status), gr.Timer(active=loading)  # a model in this process stays as it is

    gr.on([page.load, timer.tick], refresh, outputs=[line, timer], **QUIET)


def _fit_to_window(accordion: gr.Accordion, slider: gr.components.Component, chat: ChatBackend) -> None:
    """Let the longest answer be chosen from what the model's window can hold, once that is known.

    When the settings are opened, since Gradio loses what changes in them while they are closed.
    """

    def fit(chosen: float) -> Any:
        window = chat.context_length
        if not window:
            return gr.skip()
        return gr.Slider(maximum=window, value=chosen if chosen < window else window // 2)

    accordion.expand(fit, slider, slider, **QUIET)


def _settings(defaults: SamplingParams) -> list[gr.components.Component]:
    """What stands in the accordion, in the order in which reply() takes it."""

    def slider(name: str, label: str, info: str, step: float) -> gr.Slider:
        low, high = RANGES[name]
        if name == "max_new_tokens":
            high = max(LONGEST_SHOWN, defaults.max_new_tokens)
        lowest = step if name in OPEN_BELOW else low
        value = getattr(defaults, name)
        return gr.Slider(lowest, high, value, step=step, label=label, info=info, min_width=SETTING_WIDTH)

    system_prompt = gr.Textbox(
        wording.SYSTEM_PROMPT,
        label="System prompt",
        info="Instructions for the whole conversation; may be empty.",
        lines=3,
    )
    with gr.Row():
        prompts = {
            "Use Meta's prompt of 2023": wording.META_SYSTEM_PROMPT,
            "Use the short prompt": wording.SYSTEM_PROMPT,
        }
        for label, text in prompts.items():
            gr.Button(label, size="md").click(functools.partial(str, text), None, system_prompt, **QUIET)
    with gr.Row():
        numbers = [
            slider("max_new_tokens", "Max new tokens", "The longest that an answer can be.", 1),
            slider("temperature", "Temperature", "0 always takes the likeliest word; higher varies more.", 0.05),
            slider("top_p", "Top-p", "Choose among the likeliest words with this total probability.", 0.01),
            slider("top_k", "Top-k", "Choose among the k likeliest words; 0 means all.", 1),
            slider("repetition_penalty", "Repetition penalty", "Above 1, words already used become less likely.", 0.05),
        ]
        seed = gr.Textbox(  # an empty gr.Number turns into 0 when the accordion opens
            "" if defaults.seed is None else str(defaults.seed),
            label="Seed",
            info="Same seed and conversation, same answer.",
            placeholder="random",
            min_width=SETTING_WIDTH,
        )
    for number in numbers:
        # What Gradio's own check raises never reaches reply() and locks the page. SamplingParams checks, in words.
        number.preprocess = lambda payload: payload  # type: ignore[method-assign]  # there is no option for it
    return [system_prompt, *numbers, seed]


def _chat_interface(reply: ReplyFunction, settings: list[gr.components.Component]) -> gr.ChatInterface:
    chatbot = gr.Chatbot(
        show_label=False,
        elem_id="conversation",
        editable="user",
        buttons=["copy", "copy_all"],
        feedback_options=None,
        latex_delimiters=LATEX_DELIMITERS,
    )
    chatbot.postprocess = verbatim(chatbot.postprocess)  # type: ignore[method-assign]  # there is no option for it
    box = gr.Textbox(
        label="Message",
        placeholder="Type a message",
        elem_id="message",
        max_lines=12,
        autofocus=True,
        submit_btn="Send",
        stop_btn="Stop",
    )
    lock_at_once(box, chatbot)
    interface = gr.ChatInterface(
        reply,
        chatbot=chatbot,
        textbox=box,
        additional_inputs=[*settings],
        api_name="chat",
        concurrency_limit=None,  # the engine has the only line
        show_progress="hidden",
        cache_examples=False,
    )
    # Set here and not above: ChatInterface would answer an example with the box left open for a second question.
    chatbot.examples = [{"text": example} for example in wording.EXAMPLES]
    return interface

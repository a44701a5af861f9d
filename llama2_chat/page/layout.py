"""What of the page is Gradio's: the frame, the theme, the login, the settings, and Gradio's /chat for programs.

The transcript, the box and the list of conversations are ES modules in static/. They stand in front of Gradio's frame,
do not wait for it, and read the settings in it. An answer comes to them through routes.py, to programs through
programs.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import cast

import gradio as gr
from fastapi import FastAPI
from gradio.route_utils import BUILD_PATH_LIB
from gradio.routes import App
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from llama2_chat.agent import MEMORY, Calculator, Clock, Tool
from llama2_chat.documents.library import Library
from llama2_chat.page import wording
from llama2_chat.page.answering import Answering
from llama2_chat.page.assets import Assets, compressed, head
from llama2_chat.page.guard import MOST_JOBS, MOST_PROGRAMS, Listeners, OnlyOurRoutes, TextBlocks
from llama2_chat.page.history import Histories
from llama2_chat.page.log_in import login_router
from llama2_chat.page.presets import first_preset
from llama2_chat.page.programs import MOST_REMEMBERED, ProgramChat, ReplyFunction, make_reply
from llama2_chat.page.routes import Decisions, page_router
from llama2_chat.page.sessions import Sessions
from llama2_chat.page.visitors import Visitors
from llama2_chat.presets import NO_PRESETS, Presets
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.login import Users
from llama2_chat.server.metrics import Metrics
from llama2_chat.settings import Settings
from llama2_chat.types import OPEN_BELOW, RANGES, ChatBackend, SamplingParams

LONGEST_SHOWN = 4_096  # tokens of an answer that can be chosen with the slider; its number takes more


def add_page(
    app: FastAPI,
    chat: ChatBackend,
    settings: Settings,
    users: Users | None,
    limiter: ConcurrencyLimiter,
    metrics: Metrics,
    more_tools: Iterable[Tool] = (),
    library: Library | None = None,
    presets: Presets = NO_PRESETS,
) -> FastAPI:
    """The app, with the page at / of it and what its code asks for under /page; behind a login, if there are users.

    more_tools: beside the clock and the calculator; which they are may change. library: of documents, if there are any.
    presets: the operator's.
    """
    listeners, answering = Listeners(), Answering(chat, limiter, metrics)
    tools = _Tools((Clock(), Calculator()), more_tools) if settings.tools else ()
    reply, first = make_reply(answering, listeners, tools), first_preset(presets)
    decisions = Decisions.of(settings, presets)
    page = build_page(settings, reply, first.system_prompt, decisions.controls)
    page.max_threads, page.state_session_capacity = MOST_JOBS, MOST_PROGRAMS
    page.queue()
    page._queue.sleep_when_free = 0.05  # seconds; Gradio would look for work a thousand times a second
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
            font=[gr.themes.Font("IBM Plex Sans"), "system-ui", "sans-serif"],  # declared in static/page.css
        ),
        footer_links=[],
        show_error=False,  # what goes wrong inside is for the log
        max_file_size=1,  # byte: nothing here takes files
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
    )
    mount = app.routes.pop()  # at /, where it would take what comes after it
    assert isinstance(mount, Mount)
    gradio = cast(App, mount.app)
    visitors = Visitors(gradio, has_login=users is not None)
    mount.app = OnlyOurRoutes(gradio, Sessions(visitors), listeners, head, settings.on_space)
    if users is not None:
        app.include_router(login_router(users, visitors))
        users.on_change = visitors.end_sessions
    histories = Histories(settings.history_dir) if settings.history == "server" else None
    app.include_router(
        page_router(answering, limiter, settings.sampling, visitors, tools, library, histories, decisions)
    )
    # Gradio's code once more, under an address that a browser has not given up yet (static/gradio.js).
    app.mount("/page/again/{start:int}", compressed(StaticFiles(directory=BUILD_PATH_LIB)))
    app.mount("/page", compressed(Assets()))
    app.router.routes.append(mount)
    return app


class _Tools:
    """All of them, as they are at the moment."""

    def __init__(self, *parts: Iterable[Tool]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Tool]:
        return itertools.chain.from_iterable(self._parts)


def build_page(settings: Settings, reply: ReplyFunction, system_prompt: str, shown: Collection[str]) -> gr.Blocks:
    """The page. reply: as make_reply() makes it. system_prompt: with which conversations start. shown: the controls
    that visitors see."""
    with TextBlocks(title=wording.TITLE, analytics_enabled=False, fill_width=True) as page:
        with gr.Column(elem_id="settings"):
            controls = [*_settings(settings.sampling, system_prompt), *(_tool_settings() if settings.tools else ())]
        with gr.Column(visible=False):
            ProgramChat(
                reply,
                chatbot=gr.Chatbot(visible=False),
                textbox=gr.Textbox(visible=False),
                additional_inputs=[*controls],
                api_name="chat",
                concurrency_limit=None,  # the engine has the only line
                show_progress="hidden",
                cache_examples=False,
            )
    for control in controls:  # programs can set those that are not shown, too
        control.visible = control.elem_id in {f"setting-{name}" for name in shown}
    return page


def _settings(defaults: SamplingParams, system_prompt: str) -> list[gr.components.Component]:
    """In the order in which reply() takes them. static/settings.js keeps them in the browser."""

    def slider(name: str, label: str, info: str, step: float) -> gr.Slider:
        low, high = RANGES[name]
        if name == "max_new_tokens":
            high = max(LONGEST_SHOWN, defaults.max_new_tokens)
        lowest = step if name in OPEN_BELOW else low
        value = getattr(defaults, name)
        return gr.Slider(lowest, high, value, step=step, label=label, info=info, elem_id=f"setting-{name}")

    prompt = gr.Textbox(
        system_prompt,
        label="System prompt",
        info="Instructions for all chats without a preset; may be empty.",
        lines=4,
        elem_id="setting-system_prompt",
    )
    numbers = [
        slider("max_new_tokens", "Max new tokens", "The longest that an answer can be.", 1),
        slider("temperature", "Temperature", "0 always takes the likeliest word; higher varies more.", 0.05),
        slider("top_p", "Top-p", "Choose among the likeliest words with this total probability.", 0.01),
        slider("top_k", "Top-k", "Choose among the k likeliest words; 0 means all.", 1),
        slider("repetition_penalty", "Repetition penalty", "Above 1, words already used become less likely.", 0.05),
    ]
    seed = gr.Textbox(
        "" if defaults.seed is None else str(defaults.seed),
        label="Seed",
        info="Same seed and conversation, same answer.",
        placeholder="random",
        elem_id="setting-seed",
    )
    for number in numbers:
        _leave_checks_to_us(number)
    return [prompt, *numbers, seed]


def _tool_settings() -> list[gr.components.Component]:
    use_tools = gr.Checkbox(
        False,
        label="Use tools",
        info="The model may use a clock and a calculator before it answers. A small model cannot choose tools well.",
        elem_id="setting-use_tools",
    )
    memory = gr.Slider(
        0,
        MOST_REMEMBERED,
        MEMORY,
        step=1,
        label="Memory with tools",
        info="How many of the latest questions and answers the model is told of.",
        elem_id="setting-tools_memory",
    )
    _leave_checks_to_us(memory)
    return [use_tools, memory]


def _leave_checks_to_us(number: gr.Slider) -> None:
    """What Gradio's own check raises never reaches reply(), which checks in words."""
    number.preprocess = lambda payload: payload  # type: ignore[method-assign]  # there is no option for it

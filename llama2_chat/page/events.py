"""What happens when a visitor clicks: the events that gr.ChatInterface lacks or answers with the box left open.

Edits and examples are answered as typed messages are: the box locks, Stop shows, and at the end all is back.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import gradio as gr

from llama2_chat.page.messages import Turn, is_refusal, text_turn
from llama2_chat.page.reply import ReplyFunction

# What most events here need: no spinner over the page, no place in the API, no waiting behind others.
HIDDEN: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
QUIET: dict[str, Any] = {**HIDDEN, "queue": False}


def lock_at_once(box: gr.Textbox, chatbot: gr.Chatbot) -> None:
    """Lock the box in the browser itself. To be called before there is a ChatInterface.

    ChatInterface locks the box too, but a round trip later: a second Enter or click would ask twice. Listeners run in
    the order in which they were made, so these come before its own.
    """
    gr.on(
        [box.submit, chatbot.retry, chatbot.edit, chatbot.example_select],
        fn=None,
        outputs=box,
        js="() => ({ __type__: 'update', interactive: false })",
        **QUIET,
    )


def answer_edits_and_examples(interface: gr.ChatInterface, reply: ReplyFunction) -> None:
    """ChatInterface by itself gives an edit no Stop button and leaves the box open while it answers an example."""
    box, chatbot = interface.textbox, interface.chatbot
    history, message = interface.chatbot_state, interface.saved_input
    before, returned = gr.State(), gr.State()  # what a refusal gives back: the conversation, the message

    async def answer(
        request: gr.Request, before: list[Turn], message: str, history: list[Turn], *settings: Any
    ) -> AsyncGenerator[tuple[list[Turn], str], None]:
        async with contextlib.aclosing(reply(message, history, *settings, request)) as steps:
            async for turns in steps:
                refused = bool(turns) and is_refusal(turns[-1])
                yield (before, message) if refused else ([*history, text_turn("user", message), *turns], "")

    for chosen in (
        chatbot.edit(_edited, chatbot, [before, history, message], **QUIET),
        chatbot.example_select(_picked, chatbot, [before, history, message], **QUIET),
    ):
        locked = chosen.then(_show_and_lock, [message, history], [chatbot, returned, box], **QUIET)
        inputs = [before, message, history, *interface.additional_inputs]
        answered = locked.then(answer, inputs, [chatbot, returned], concurrency_limit=None, **HIDDEN)
        answered.then(_finish, [chatbot, returned, box], [history, box], **QUIET)
        box.stop(None, cancels=[answered])


def _edited(turns: list[Turn], edit: gr.EditData) -> tuple[list[Turn], list[Turn], str]:
    """The conversation before the edit, what of it the answer follows, and the new message."""
    index = edit.index[0] if isinstance(edit.index, (list, tuple)) else edit.index
    before = [*turns[:index], text_turn("user", edit.previous_value), *turns[index + 1 :]]
    return before, turns[:index], edit.value


def _picked(turns: list[Turn], example: gr.SelectData) -> tuple[list[Turn], list[Turn], str]:
    return turns, [], example.value["text"]


def _show_and_lock(message: str, history: list[Turn]) -> tuple[list[Turn], str, gr.Textbox]:
    return [*history, text_turn("user", message)], "", gr.Textbox(interactive=False, submit_btn=False, stop_btn="Stop")


def _finish(turns: list[Turn], returned: str, draft: str) -> tuple[list[Turn], gr.Textbox]:
    """A refused message returns to the box, above what has been typed there meanwhile."""
    value = "\n\n".join(filter(None, [returned, draft]))
    return turns, gr.Textbox(value, interactive=True, submit_btn="Send", stop_btn=False)


def end_answer_before_clearing(interface: gr.ChatInterface) -> None:
    """An answer that still runs would bring a cleared conversation back: endAnswer() in page.js ends it first."""
    chatbot, history = interface.chatbot, interface.chatbot_state
    chatbot.clear(lambda: ([], []), None, [chatbot, history], js="() => endAnswer()", **QUIET)

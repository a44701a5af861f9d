"""The page's routes alone, without a page, for a program that has logged in."""

from types import SimpleNamespace
from urllib.parse import quote

from fastapi import FastAPI
from fastapi.testclient import TestClient

from llama2_chat.page.answering import Answering
from llama2_chat.page.history import Histories
from llama2_chat.page.routes import page_router
from llama2_chat.page.visitors import Visitors
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.types import SamplingParams
from tests.support.scripted import ScriptedChat


class HistoryClient(TestClient):
    """Asks as a page of this login does."""

    __test__ = False  # it is no test, whatever its name says

    def __init__(self, histories: Histories, name: str) -> None:
        gradio = SimpleNamespace(tokens={"its session": name}, cookie_id="x")
        visitors, limiter = Visitors(gradio, has_login=True), ConcurrencyLimiter(None)
        answering, app = Answering(ScriptedChat(), limiter, None), FastAPI()
        app.include_router(page_router(answering, limiter, SamplingParams(), visitors, histories=histories))
        super().__init__(app, headers={"X-Login": quote(name), "Cookie": "access-token-x=its session"})

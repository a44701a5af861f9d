"""Whatever programs send: requests made from our own OpenAPI document, right ones and wrong ones, and none is a 500."""

from contextlib import contextmanager

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from schemathesis import GenerationMode

from llama2_chat.server.embeddings import EmbeddingsRequest
from llama2_chat.server.grammar_types import GrammarFields
from llama2_chat.server.health import health_router
from llama2_chat.server.infill import InfillRequest
from llama2_chat.server.item_types import ResponsesRequest
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.metrics import Metrics
from llama2_chat.server.openai_api import api_router
from llama2_chat.server.openai_types import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from llama2_chat.types import Status
from model import ChatModel
from tests.support.encoders import WordMeanings
from tests.support.serving import serving
from tests.support.small_model import untrained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROUTES = (
    "GET /v1/models",
    "GET /v1/models/{model}",
    "POST /v1/chat/completions",
    "POST /v1/responses",
    "POST /v1/completions",
    "POST /infill",
    "POST /tokenize",
    "POST /detokenize",
    "POST /v1/embeddings",
    "GET /metrics",
)
CONTEXT = 128  # tokens: answers are short whatever length is asked for


@pytest.fixture(scope="module")
def document(chat, settings):
    """The document, and behind it the embedded model's tokenizer and few random weights."""
    small = ChatModel(settings)
    small.status = Status(model="small")
    small.serve(chat.serving.tokenizer, untrained(chat.serving.tokenizer, CONTEXT))
    with encoding(), serving(small, settings) as address:
        ours = FastAPI()
        ours.include_router(health_router(small))
        ours.include_router(api_router(small, settings, ConcurrencyLimiter(0), Metrics(small)))
        config = schemathesis.Config.from_dict({"base-url": address})
        yield schemathesis.openapi.from_dict(ours.openapi(), config=config)
    small.close()


@contextmanager
def encoding():
    """A server that is made meanwhile has an encoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("app._make_embedder", lambda _: WordMeanings())
        yield


REQUESTS = (
    *(ChatRequest, ResponsesRequest, CompletionRequest, InfillRequest, TokenizeRequest, DetokenizeRequest),
    EmbeddingsRequest,
)
KNOWN = {name for request in REQUESTS for name in request.model_fields} - {"model"}
# Messages and prompts of all kinds go to /tokenize; here a sound one lets everything else be looked at.
SOUND = {
    "POST /v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "POST /v1/completions": {"prompt": "Hi"},
    "POST /detokenize": {"tokens": [1, 2]},
}
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("label", "mode"), [*((label, RIGHT) for label in ROUTES), *((label, WRONG) for label in ROUTES if "POST" in label)]
)
def test_no_request_makes_the_server_fail(document, label, mode):
    (operation,) = (found.ok() for found in document.get_all_operations() if found.ok().label == label)
    answered = []

    @examples(max_examples=200, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        if mode == RIGHT and case.method == "POST":
            # With another model's name, or a field that nobody knows, nothing more would be looked at.
            case.body = {name: value for name, value in case.body.items() if name in KNOWN} | SOUND.get(label, {})
            for name in [name for name in case.body if name in GrammarFields.model_fields][1:]:
                del case.body[name]  # of which a request may have one
        answer = case.call()
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400 and case.method == "POST":
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        answered.append(answer.status_code)

    ask()
    assert 200 in answered or mode == WRONG or "{" in label or label == "POST /infill"


def test_every_route_is_asked(document):
    labels = {found.ok().label for found in document.get_all_operations()}
    assert labels == {*ROUTES, "GET /healthz", "GET /livez"}

"""What the page's own code asks for, under /page: the state of the model, answers, and how long a prompt is.

An answer is a stream of lines of JSON (answers.py); everything else is one JSON document, errors in OpenAI's form.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Annotated, Any, Literal

import anyio.to_thread
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from llama2_chat.agent import MEMORY, Call, Step, Tool
from llama2_chat.documents.library import MAX_FILE_BYTES, Library
from llama2_chat.documents.store import Shelf
from llama2_chat.errors import ChatError
from llama2_chat.page import questions, wording
from llama2_chat.page.answering import Answering
from llama2_chat.page.answers import Answer, Answers
from llama2_chat.page.confirming import Confirming
from llama2_chat.page.history import Histories
from llama2_chat.page.history_routes import LIMITS, add_history_routes
from llama2_chat.page.presets import first_preset, shown, start_of
from llama2_chat.page.programs import parsed_memory, parsed_seed
from llama2_chat.page.visitors import Visitors
from llama2_chat.presets import MOST_EXAMPLES, NO_PRESETS, Example, Guidance, Presets, filled
from llama2_chat.server.bodies import JsonRequest
from llama2_chat.server.errors import ApiError, as_api_error, error_response
from llama2_chat.server.files import add_file_routes
from llama2_chat.server.limits import ConcurrencyLimiter
from llama2_chat.server.openai_types import MAX_NAMED_DOCUMENTS, DocumentIds
from llama2_chat.settings import SHOWN_SAMPLING, Settings
from llama2_chat.text import valid_unicode
from llama2_chat.types import ChatBackend, Message, SamplingParams

CONTROLS = ("system_prompt", "examples", "reminder", *SHOWN_SAMPLING, "use_tools", "tools_memory")  # of PageSettings
BASIC = ("system_prompt", "max_new_tokens", "temperature", "use_tools")
AnswerId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class TurnStep(BaseModel):
    """A call of a tool, as the page was told of it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    input: str  # JSON
    result: str
    seconds: float = 0
    failed: bool = False

    def parsed(self) -> Step:
        """Raises ChatError for an input that is no JSON."""
        try:
            input = json.loads(self.input)
        except (ValueError, RecursionError) as error:
            raise ChatError("This conversation has a step in it whose input is not JSON.") from error
        return Step(valid_unicode(self.name), input, valid_unicode(self.result), self.seconds, self.failed)


class Turn(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["user", "assistant"]
    content: str
    steps: Annotated[list[TurnStep], Field(max_length=50)] = []  # of the assistant, before it answered


class TurnExample(BaseModel):
    model_config = ConfigDict(extra="forbid")

    question: str
    answer: str

    def parsed(self) -> Example:
        """Raises ChatError where one of the two is missing."""
        if not (self.question.strip() and self.answer.strip()):
            raise ChatError(wording.HALF_AN_EXAMPLE)
        return Example(valid_unicode(self.question), valid_unicode(self.answer))


class PageSettings(BaseModel):
    """How a conversation starts, and the controls of the page. Ranges are SamplingParams' to check, in words.

    today: the visitor's day, which may not be the server's; it stays that of the question while an answer is continued.
    adapter: of the model's, by its name; "" for the model itself.
    """

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)

    system_prompt: str = ""
    examples: Annotated[list[TurnExample], Field(max_length=MOST_EXAMPLES)] = []
    reminder: str = ""
    today: date | None = None
    max_new_tokens: float
    temperature: float
    top_p: float
    top_k: float
    repetition_penalty: float
    seed: str = ""
    use_tools: bool = False
    tools_memory: Any = None
    adapter: str = ""
    server: str = ""

    def params(self) -> SamplingParams:
        """Raises ChatError for a value outside its range."""
        numbers = self.model_dump(include={"max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty"})
        return SamplingParams(**numbers, seed=parsed_seed(self.seed), adapter=self.adapter, server=self.server)

    def system(self) -> list[Message]:
        text = filled(valid_unicode(self.system_prompt), self._today)
        return [Message(role="system", content=text)] if text else []

    def guidance(self) -> Guidance:
        """Raises ChatError for an example that is none."""
        examples = tuple(example.parsed() for example in self.examples)
        return Guidance(examples, valid_unicode(self.reminder)).filled(self._today)

    @property
    def _today(self) -> date:
        return self.today or date.today()


class Question(BaseModel):
    """A conversation that is to be answered. One that ends with an answer is to be continued there."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[list[Turn], Field(min_length=1)]
    settings: PageSettings
    documents: DocumentIds = []

    def parsed(self, tools: Iterable[Tool], confirm: Callable[[Call], bool], shelf: Shelf | None) -> questions.Question:
        """confirm: asks the visitor whether a tool may be called. shelf: where the documents are.

        Raises ChatError where the newest message says nothing, and for a setting outside its range.
        """
        question = self._without_documents(tools, confirm)
        return questions.AboutDocuments(question, shelf, self.documents) if shelf and self.documents else question

    def _without_documents(
        self, tools: Iterable[Tool], confirm: Callable[[Call], bool]
    ) -> questions.Plain | questions.WithTools:
        messages, params, guidance = self._conversation(), self.settings.params(), self.settings.guidance()
        if not self.settings.use_tools:
            return questions.Plain(messages, params, guidance)
        memory, first = parsed_memory(self.settings.tools_memory), len(messages) - len(self.messages)
        steps = {place: [step.parsed() for step in turn.steps] for place, turn in enumerate(self.messages, first)}
        return questions.with_tools(messages, params, tools, memory, steps, confirm, guidance)

    def _conversation(self) -> list[Message]:
        if self.messages[-1].role == "user" and not self.messages[-1].content.strip():
            raise ChatError(wording.NO_MESSAGE)
        turns = [Message(role=turn.role, content=valid_unicode(turn.content)) for turn in self.messages]
        return [*self.settings.system(), *turns]


class Completion(BaseModel):
    """A text that is to be gone on with, by a base model."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(min_length=1)]
    settings: PageSettings

    def parsed(self) -> questions.Completion:
        """Raises ChatError for a setting outside its range."""
        return questions.Completion(valid_unicode(self.text), self.settings.params())


class Confirmation(BaseModel):
    model_config = ConfigDict(extra="forbid")

    call: int
    allow: bool


@dataclass(frozen=True)
class Decisions:
    """What an operator decides of the page."""

    presets: Presets = NO_PRESETS
    controls: Sequence[str] = CONTROLS  # that visitors see, if the page has them
    notice: str = ""  # a line above the chat

    @classmethod
    def of(cls, settings: Settings, presets: Presets) -> Decisions:
        shown = {"all": CONTROLS, "basic": BASIC, "hidden": ()}[settings.settings]
        return cls(presets, shown, settings.notice)


DECISIONS = Decisions()


def page_router(
    answering: Answering,
    limiter: ConcurrencyLimiter,
    defaults: SamplingParams,
    visitors: Visitors,
    tools: Iterable[Tool] = (),
    library: Library | None = None,
    histories: Histories | None = None,
    decisions: Decisions = DECISIONS,
) -> APIRouter:
    """defaults: where the page's controls stand at first. tools: that visitors may let the model use; which they
    are may change. library: where documents are; None for none at all. histories: of logins; None where only browsers
    keep conversations. decisions: the operator's."""
    router, answers, chat = APIRouter(prefix="/page", route_class=_Route), Answers(), answering.chat

    @router.get("/state")
    async def state(request: Request) -> Response:
        login = {"logOutToken": visitors.log_out_token(request), "profile": visitors.profile(request)}
        limits = {"largest": MAX_FILE_BYTES, "most": MAX_NAMED_DOCUMENTS, "kept": wording.kept(visitors.has_login)}
        model = _state(chat, defaults, decisions, has_tools=any(True for _ in tools))
        kept = {"documents": limits if library else None, "history": LIMITS if histories else None}
        response = JSONResponse({**model, **login, **kept})
        visitors.remember(request, response)
        return response

    @router.put("/answers/{id}")
    async def start(id: AnswerId, question: Question, request: Request) -> Response:
        """Begin this answer, or read the one that has begun; as a stream."""
        client, confirming = visitors.client(request), Confirming()
        parse = functools.partial(question.parsed, tools, confirming, shelf_for(question, request))
        answer = functools.partial(answering.answer, parse, client)
        return _stream(answers.start(id, visitors.owner(request), client, answer, confirming))

    @router.put("/completions/{id}")
    async def complete(id: AnswerId, completion: Completion, request: Request) -> Response:
        """The same for a text. From then on it is an answer like any other."""
        client = visitors.client(request)
        answer = functools.partial(answering.answer, completion.parsed, client)
        return _stream(answers.start(id, visitors.owner(request), client, answer, Confirming()))

    @router.get("/answers/{id}")
    async def read(id: AnswerId, request: Request) -> Response:
        return _stream(answers.get(id, visitors.owner(request)))

    @router.delete("/answers/{id}", status_code=204)
    async def stop(id: AnswerId, request: Request) -> None:
        answers.get(id, visitors.owner(request)).stop()

    @router.post("/answers/{id}/confirm", status_code=204)
    async def confirm(id: AnswerId, confirmation: Confirmation, request: Request) -> None:
        """What the visitor says of the call that waits for them."""
        answers.get(id, visitors.owner(request)).confirming.answer(confirmation.call, confirmation.allow)

    @router.post("/fit")
    async def fit(question: Question, request: Request) -> dict[str, Any]:
        """How the conversation would stand in the model's window."""
        visitors.owner(request)
        parsed = question.parsed(tools, Confirming(), shelf_for(question, request))
        threads = limiter.threads(parsed.size)
        fitted = await anyio.to_thread.run_sync(parsed.fit, chat, limiter=threads)
        return {
            "promptTokens": fitted.prompt_tokens,
            "droppedMessages": fitted.dropped_messages,
            "answerTokens": fitted.answer_tokens,
            "contextLength": fitted.context_length,
            "fits": fitted.fits,
        }

    @router.post("/log-out", status_code=204)
    async def log_out(request: Request) -> Response:
        """In place of Gradio's GET /logout, which any image in an answer could ask for."""
        response = Response(status_code=204)
        visitors.log_out(request, response)
        return response

    def shelf_for(question: Question, request: Request) -> Shelf | None:
        """The visitor's documents, if the question is about some."""
        if not question.documents:
            return None
        owner = visitors.document_owner(request)
        if library is None or owner is None:
            raise ApiError(404, "not_found", "There are no documents of yours here.", "documents")
        return library.shelf(owner)

    if library is not None:
        add_file_routes(router, library, visitors)
    if histories is not None:
        add_history_routes(router, histories, visitors)
    return router


class _Route(APIRoute):
    """Turns whatever is raised into a response with a sentence."""

    def get_route_handler(self) -> Callable:
        handle = super().get_route_handler()

        async def handle_errors(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            try:
                if self.body_field is not None:
                    await request.json()
                return await handle(request)
            except Exception as error:
                return error_response(as_api_error(error))

        return handle_errors


def _stream(answer: Answer) -> Response:
    # nginx would hold lines back.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(answer.lines(), media_type="application/x-ndjson", headers=headers)


def _state(chat: ChatBackend, defaults: SamplingParams, decisions: Decisions, *, has_tools: bool) -> dict[str, Any]:
    """What the page shows of the model, and what it may ask for."""
    status, chats = chat.status, chat.capabilities.chats
    values = {
        **start_of(first_preset(decisions.presets)),
        "maxNewTokens": defaults.max_new_tokens,
        "temperature": defaults.temperature,
        "topP": defaults.top_p,
        "topK": defaults.top_k,
        # Code and prose repeat themselves: a text is gone on with as the model would write it.
        "repetitionPenalty": defaults.repetition_penalty if chats else 1.0,
        "seed": "" if defaults.seed is None else str(defaults.seed),
        **({"useTools": False, "toolsMemory": MEMORY} if has_tools else {}),
    }
    return {
        "state": status.state,
        "line": wording.status_line(status, chats),
        "chats": chats,
        "model": status.model,
        "adapters": status.adapters,
        "servers": [server.name for server in chat.servers if server.healthy],
        "why": status.why,
        "notice": wording.notice(status.model),
        "contextLength": chat.context_length,
        "countsTokens": chat.capabilities.counts_tokens,
        "changes": chat.capabilities.can_fail_over,
        "defaults": values,
        "controls": [name for name in map(to_camel, decisions.controls) if name in values],
        "presets": shown(decisions.presets),
        "announcement": decisions.notice,
    }

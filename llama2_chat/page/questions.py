"""What is asked: a conversation for the model, one for an agent, which may call tools first, or a text to go on with.

A conversation may be about documents, which are quoted in its newest question whichever of the two it is for.

All give a reply that answering.py reads; conversations say how they would stand in the model's window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from llama2_chat.agent import PARAMS, Agent, AgentReply, Call, Exchange, Step, Tool, asks_first
from llama2_chat.documents.asking import Quoted, Source, quote
from llama2_chat.documents.store import Document, Shelf
from llama2_chat.errors import ChatError, NotHere
from llama2_chat.page import wording
from llama2_chat.page.document_tools import document_tools
from llama2_chat.presets import NO_GUIDANCE, Guidance
from llama2_chat.types import ChatBackend, Fit, Message, Reply, SamplingParams


class Asked(Protocol):
    """What a model or an agent replies to."""

    @property
    def messages(self) -> list[Message]: ...  # as they were said

    @property
    def params(self) -> SamplingParams: ...

    @property
    def size(self) -> int: ...  # bytes of all texts that are to be encoded

    def ask(
        self, chat: ChatBackend, client: str
    ) -> Reply | AgentReply: ...  # client: whose share of the model it takes


class Question(Asked, Protocol):
    """A conversation that ends with a visitor's message, or with an unfinished answer that is to be continued."""

    def fit(self, chat: ChatBackend) -> Fit: ...


@dataclass(frozen=True)
class Plain:
    messages: list[Message]
    params: SamplingParams
    guidance: Guidance = NO_GUIDANCE

    @property
    def size(self) -> int:
        return size_of(self._prompt)

    def ask(self, chat: ChatBackend, client: str) -> Reply:
        return chat.stream_reply(self._prompt, replace(self.params, client=client))

    def fit(self, chat: ChatBackend) -> Fit:
        return chat.fit(self._prompt, self.params)

    @property
    def _prompt(self) -> list[Message]:
        return self.guidance.added_to(self.messages)


@dataclass(frozen=True)
class Completion:
    """A text that a base model goes on with, as far as its window leaves room."""

    text: str
    params: SamplingParams

    @property
    def messages(self) -> list[Message]:
        return [Message(role="user", content=self.text)]

    @property
    def size(self) -> int:
        return size_of(self.messages)

    def ask(self, chat: ChatBackend, client: str) -> Reply:
        ids = chat.encode_text(self.text)
        left = max(chat.context_length - len(ids), 1)
        limit = min(self.params.max_new_tokens, left)
        return chat.stream_completion(ids, replace(self.params, max_new_tokens=limit, client=client))


@dataclass(frozen=True)
class WithTools:
    """steps: what was done for an answer, by its place among the messages. memory: how many of the latest exchanges
    the model is told of.

    Of the params, those count that cut an answer or make it another one; digits are to be copied as they are, so there
    is no penalty on them.
    """

    messages: list[Message]
    params: SamplingParams
    tools: Sequence[Tool]
    memory: int
    steps: Mapping[int, Sequence[Step]] = field(default_factory=dict)
    confirm: Callable[[Call], bool] | None = None
    guidance: Guidance = NO_GUIDANCE

    @property
    def size(self) -> int:
        return size_of(self.guidance.added_to(self.messages))

    def ask(self, chat: ChatBackend, client: str) -> AgentReply:
        talk = self._talk()
        agent = self._agent(chat, talk, client)
        return agent.go_on(talk.unfinished) if talk.unfinished else agent.ask(talk.question)

    def fit(self, chat: ChatBackend) -> Fit:
        talk = self._talk()
        fitted, remembered = self._agent(chat, talk).fit(talk.question)
        return replace(fitted, dropped_messages=talk.messages_before(remembered))

    def _talk(self) -> _Talk:
        """What was said, with a reminder in the newest question."""
        talk = _Talk.of(self.messages, self.steps)
        talk.question = self.guidance.reminded(talk.question)
        if talk.unfinished:
            talk.unfinished = replace(talk.unfinished, question=talk.question)
        return talk

    def _agent(self, chat: ChatBackend, talk: _Talk, client: str = "") -> Agent:
        given = ("max_new_tokens", "temperature", "top_p", "top_k", "seed", "adapter", "server")
        params = replace(PARAMS, client=client, **{name: getattr(self.params, name) for name in given})
        # The page's own short prompt says nothing that the agent's examples do not show.
        system = [message["content"] for message in self.messages if message["role"] == "system"]
        instructions = "\n\n".join(text for text in system if text != wording.SYSTEM_PROMPT)
        agent = Agent(
            chat,
            self.tools,
            memory=self.memory,
            params=params,
            instructions=instructions,
            examples=[Exchange(each.question, (), each.answer) for each in self.guidance.examples],
            confirm=self.confirm,
        )
        agent.exchanges.extend(talk.exchanges)
        return agent


class AboutDocuments:
    """A conversation whose newest question quotes these documents, searched anew each time. What was said stays as it
    is: excerpts are in no history. An agent may also search them itself."""

    def __init__(self, question: Plain | WithTools, shelf: Shelf, ids: Sequence[str]) -> None:
        self._question, self._shelf, self._ids = question, shelf, ids
        self.sources: tuple[Source, ...] = ()  # what was quoted, once it has been asked

    @property
    def messages(self) -> list[Message]:
        return self._question.messages

    @property
    def params(self) -> SamplingParams:
        return self._question.params

    @property
    def size(self) -> int:
        return self._question.size

    def unread(self) -> Document | None:
        """The first of the documents that is still being read. Raises NotHere."""
        try:
            documents = [self._shelf.get(id) for id in self._ids]
        except NotHere as error:
            raise NotHere(wording.DELETED) from error
        return next((document for document in documents if document.state == "waiting"), None)

    def ask(self, chat: ChatBackend, client: str) -> Reply | AgentReply:
        quoted = self._quoted(chat)
        self.sources = quoted.sources
        return self._with(quoted.messages).ask(chat, client)

    def fit(self, chat: ChatBackend) -> Fit:
        return self._with(self.messages if self.unread() else self._quoted(chat).messages).fit(chat)

    def _quoted(self, chat: ChatBackend) -> Quoted:
        def fit(messages: list[Message]) -> Fit:
            return self._with(messages).fit(chat)

        return quote(chat, self._shelf, self._ids, self.messages, fit, trim=True)

    def _with(self, messages: list[Message]) -> Plain | WithTools:
        if isinstance(self._question, Plain):
            return replace(self._question, messages=messages)
        tools = [*self._question.tools, *document_tools(self._shelf, self._ids)]
        return replace(self._question, messages=messages, tools=tools)


def with_tools(
    messages: list[Message],
    params: SamplingParams,
    tools: Iterable[Tool],
    memory: int,
    steps: Mapping[int, Sequence[Step]] | None = None,
    confirm: Callable[[Call], bool] | None = None,
    guidance: Guidance = NO_GUIDANCE,
) -> WithTools:
    """confirm: asks the visitor; where nobody can be asked, tools that ask first are left out.

    Raises ChatError where no tools are offered.
    """
    usable = [tool for tool in tools if confirm or not asks_first(tool)]
    if not usable:
        raise ChatError(wording.NO_TOOLS)
    return WithTools(messages, params, usable, memory, steps or {}, confirm, guidance)


def size_of(messages: Iterable[Message]) -> int:
    """In bytes."""
    return sum(len(message["content"].encode()) for message in messages)


@dataclass
class _Talk:
    """A conversation as an agent remembers it: questions with their answers, and the newest question.

    A question that was not answered is read with the next one.
    """

    exchanges: list[Exchange] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)  # with how many messages before it each of them begins
    question: str = ""
    question_begins: int = 0
    unfinished: Exchange | None = None  # an answer that is to be continued

    @classmethod
    def of(cls, messages: Sequence[Message], steps: Mapping[int, Sequence[Step]]) -> _Talk:
        talk = cls()
        said = [(place, message) for place, message in enumerate(messages) if message["role"] != "system"]
        for before, (place, message) in enumerate(said):
            talk._add(message, steps.get(place, ()), before)
        if said and said[-1][1]["role"] == "assistant":
            talk.unfinished = talk.exchanges.pop()
            talk.question, talk.question_begins = talk.unfinished.question, talk.begins.pop()
        return talk

    def _add(self, message: Message, steps: Sequence[Step], before: int) -> None:
        if message["role"] == "user":
            self.question_begins = self.question_begins if self.question else before
            self.question = "\n\n".join(filter(None, [self.question, message["content"]]))
        else:
            self.begins.append(self.question_begins if self.question else before)
            self.exchanges.append(Exchange(self.question, steps, message["content"]))
            self.question = ""

    def messages_before(self, remembered: int) -> int:
        """How many messages are older than the latest exchanges, so many of which are remembered."""
        return [*self.begins, self.question_begins][len(self.exchanges) - remembered]

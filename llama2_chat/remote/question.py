"""A conversation as servers are asked it, and without its oldest exchanges if they say that it is too long."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from llama2_chat.errors import BadGrammar, ChatError, PromptTooLong
from llama2_chat.prompt import (
    Turn,
    check_messages,
    goes_on,
    newest_turns,
    question_indices,
    split_examples,
    subject_of,
    tool_object,
    without_results,
)
from llama2_chat.remote.client import schema_format
from llama2_chat.tools import BEGUN, json_only_grammar, plain
from llama2_chat.types import RANGES, GrammarSpec, Message, SamplingParams, ToolOffer

MAX_CHARACTERS_PER_TOKEN = 4.0  # hardly any language has more
# Sent only if they ask for something, so that a server which does not know them rejects who asks and nobody else.
IF_ASKED = ("min_p", "min_tokens", "ignore_eos", "stop_token_ids", "logit_bias")
NUMBERS = [name for name in RANGES if name not in ("max_new_tokens", "logprobs", *IF_ASKED)]  # under other names
OPENAIS = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "seed"}
EXTRAS = [name for name in NUMBERS if name not in OPENAIS]  # not in OpenAI's API, so some servers reject them
# As vLLM and SGLang have it. llama.cpp goes on by itself with an answer that stands last.
GO_ON = {"continue_final_message": True, "add_generation_prompt": False}
TOOL_FIELDS = ("tools", "tool_choice", "parallel_tool_calls")


@dataclass(frozen=True)
class Question:
    """What one answer is asked for with."""

    system: str | None
    turns: list[Turn]
    fields: dict[str, Any]  # of the request's JSON, except the model and the messages
    dropped_messages: int = 0  # oldest ones that were left out
    tools: ToolOffer | None = None
    json_only: GrammarSpec | None = None  # calls or an answer, for a server that takes no tools

    @classmethod
    def of(
        cls,
        messages: list[Message],
        params: SamplingParams,
        to_the_end: bool = False,
        tools: ToolOffer | None = None,
    ) -> Question:
        """Raises ChatError for malformed messages, BadGrammar for a grammar that servers cannot be asked for."""
        system, turns = check_messages(messages)
        more = GO_ON if goes_on(turns, params) else {}
        fields = _fields(params, to_the_end) | more
        if tools is None:
            return cls(system, turns, fields)
        if more and tools.may_call:
            raise ChatError(BEGUN)
        json_only = json_only_grammar(tools, params.grammar) if tools.may_call else None
        return cls(system, turns, fields | _tool_fields(tools), tools=tools, json_only=json_only)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As OpenAI's API has them."""
        system = [{"role": "system", "content": self.system}] if self.system is not None else []
        return [*system, *map(_message, self.turns)]

    @property
    def has_tools(self) -> bool:
        return self.tools is not None or any(turn.role == "tool" for turn in self.turns)

    @property
    def answer_is_text(self) -> bool:
        """Rather than JSON."""
        return "response_format" not in self.fields

    def without_tools(self) -> Question:
        """The same for a server that takes no tools: plain turns, and calls as JSON that follows a schema."""
        system = [Message(role="system", content=self.system)] if self.system is not None else []
        spoken = [
            Message(
                role=turn.role,
                content=turn.content,
                tool_calls=list(turn.calls),
                tool_call_id=turn.call_id,
                name=turn.name,
                is_example=turn.is_example,
            )
            for turn in self.turns
        ]
        told, turns = check_messages(plain([*system, *spoken], self.tools if self.json_only else None))
        fields = {name: value for name, value in self.fields.items() if name not in TOOL_FIELDS}
        if self.json_only is not None:
            fields["response_format"] = _response_format(self.json_only)
        return replace(self, system=told, turns=without_results(turns), fields=fields, tools=None)

    def shortened(self, error: PromptTooLong) -> Question | None:
        """Without as many of the oldest exchanges as the server's numbers say, at least one; None if there is none."""
        examples, turns = split_examples(self.turns)
        if len(turns) == len(newest_turns(turns)):
            return None
        least = self._first_kept(error, turns, len(self.system or "") + sum(len(turn.content) for turn in examples))
        first = next(i for i in question_indices(turns) if i >= least)
        dropped = sum(turn.messages for turn in turns[:first])
        return replace(self, turns=[*examples, *turns[first:]], dropped_messages=self.dropped_messages + dropped)

    def _first_kept(self, error: PromptTooLong, turns: list[Turn], fixed_size: int) -> int:
        """The index of the turn that a shorter question starts with. fixed_size: characters of what stays anyway."""
        greeting = int(turns[0].role == "assistant")  # before the first exchange, and goes with it
        last = len(turns) - len(newest_turns(turns))  # the newest question
        # Of the turns, in whole exchanges.
        half, quarter = (last + 1) // 4 * 2 + 2 - greeting, (last + 1) // 8 * 2 + 2 - greeting
        if not (error.prompt_tokens and error.context_length):
            return half
        # A server that stops counting at the end of its context reports too few tokens, so that what its numbers leave
        # is too long again: each further attempt drops at least a quarter.
        first = quarter if self.dropped_messages else 2 - greeting
        sizes = [len(turn.content) for turn in turns]
        tokens_per_character = error.prompt_tokens / (fixed_size + sum(sizes) + 1)
        tokens_per_character = max(tokens_per_character, 1 / MAX_CHARACTERS_PER_TOKEN)
        room = (error.context_length - self.fields.get("max_tokens", 1)) / tokens_per_character - fixed_size
        kept = sum(sizes[first:])
        while first < last and kept > room:
            kept -= sum(sizes[first : first + 2])
            first += 2
        return first

    def too_long(self, error: PromptTooLong) -> PromptTooLong:
        """The server's numbers, and the length requested for the answer, which is also the visitor's to change."""
        max_new_tokens = self.fields.get("max_tokens", 0) if error.prompt_tokens else 0
        _, turns = split_examples(self.turns)
        return PromptTooLong(
            error.prompt_tokens,
            error.context_length,
            max_new_tokens,
            subject=subject_of(turns) if turns == newest_turns(turns) else "conversation",
        )


def _fields(params: SamplingParams, to_the_end: bool) -> dict[str, Any]:
    """Each of them in every request: for a missing one, servers use the model's generation_config.json."""
    fields = {name: getattr(params, name) for name in NUMBERS}
    fields |= {"top_k": params.top_k or -1, "stop": list(params.stop) or None}  # servers take -1 for all
    fields |= {name: value for name in IF_ASKED if (value := getattr(params, name))}
    if params.logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": params.logprobs}
    if params.logit_bias:
        fields["logit_bias"] = {str(id): bias for id, bias in params.logit_bias}
    if params.grammar is not None:
        fields["response_format"] = _response_format(params.grammar)
    return fields if to_the_end else {**fields, "max_tokens": params.max_new_tokens}


def _tool_fields(offer: ToolOffer) -> dict[str, Any]:
    objects = [tool_object(tool) for tool in offer.callable or offer.tools]
    choice = "required" if offer.must_call else "auto" if offer.may_call else "none"
    fields: dict[str, Any] = {"tools": objects, "tool_choice": choice}
    if offer.must_call and len(objects) == 1:
        fields["tool_choice"] = {"type": "function", "function": {"name": offer.callable[0].name}}
    return fields if offer.parallel is None else {**fields, "parallel_tool_calls": offer.parallel}


def _message(turn: Turn) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.calls:
        message["content"] = turn.content or None
        message["tool_calls"] = [
            {
                "id": call["id"],
                "type": "function",
                "function": {"name": call["name"], "arguments": call["arguments"]},
            }
            for call in turn.calls
        ]
    return message | ({"tool_call_id": turn.call_id} if turn.role == "tool" else {})


def _response_format(grammar: GrammarSpec) -> dict[str, Any]:
    if grammar.kind != "json_schema":
        raise BadGrammar("The server that answers takes JSON schemas only, no other grammars.")
    return schema_format(json.loads(grammar.text))

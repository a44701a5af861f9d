"""What an answer must follow, in the words that OpenAI, vLLM and llama.cpp have for it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from llama2_chat.server.errors import ApiError
from llama2_chat.types import GrammarSpec

Choice = Annotated[list[str], Field(min_length=1)]
ANY_OBJECT = {"type": "object"}


class JsonSchema(BaseModel):
    """Its name and description are for the model, which sees neither here. strict: relax nothing of it."""

    definition: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """OpenAI's, and with a schema beside json_object llama.cpp's."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Annotated[JsonSchema | None, Field(validate_default=True)] = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema")] = None

    @field_validator("json_schema")
    @classmethod
    def _is_there(cls, value: JsonSchema | None, info: ValidationInfo) -> JsonSchema | None:
        if value is None and info.data.get("type") == "json_schema":
            raise ValueError("it is missing")
        if value is not None and info.data.get("type") != "json_schema":
            raise ValueError("it goes with type json_schema only")
        return value

    @field_validator("definition")
    @classmethod
    def _goes_with_an_object(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if value is not None and info.data.get("type") != "json_object":
            raise ValueError("it goes with type json_object only")
        return value

    @property
    def grammar(self) -> GrammarSpec | None:
        if self.type == "text":
            return None
        if self.json_schema is None:
            return _of_schema(self.definition or ANY_OBJECT)
        return _of_schema(self.json_schema.definition, bool(self.json_schema.strict))


class TextFormat(BaseModel):
    """The same as /v1/responses has it."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    definition: Annotated[dict[str, Any] | None, Field(alias="schema", validate_default=True)] = None
    strict: bool | None = None

    @field_validator("definition")
    @classmethod
    def _goes_with_its_type(cls, value: dict[str, Any] | None, info: ValidationInfo) -> dict[str, Any] | None:
        if (value is not None) != (info.data.get("type") == "json_schema"):
            raise ValueError("it goes with type json_schema, which needs one")
        return value

    @property
    def grammar(self) -> GrammarSpec | None:
        if self.type == "text":
            return None
        return _of_schema(ANY_OBJECT if self.definition is None else self.definition, bool(self.strict))


class StructuredOutputs(BaseModel):
    """vLLM's. JSON is written as Python writes it, whatever is said of whitespace."""

    model_config = ConfigDict(extra="forbid", strict=True)

    definition: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choice | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    whitespace_pattern: None = None
    structural_tag: None = None

    @property
    def grammars(self) -> list[GrammarSpec]:
        found = _grammars(self.definition, self.regex, self.choice, self.grammar)
        return [*found, _of_schema(ANY_OBJECT)] if self.json_object else found


class GrammarFields(BaseModel):
    """Fields of a request. Those that are set must say the same."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM's, as the four below
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choice | None = None
    guided_grammar: str | None = None
    grammar: str | None = None  # llama.cpp's, as the one below
    json_schema: dict[str, Any] | None = None

    @field_validator(
        "response_format",
        "structured_outputs",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "grammar",
        mode="before",
    )
    @classmethod
    def _is_set(cls, value: Any) -> Any:
        return None if value in (False, "", [], {}) else value

    @field_validator("guided_json", "json_schema", mode="before")
    @classmethod
    def _is_a_schema(cls, value: Any) -> Any:
        return None if value in (False, "") else value  # {} is any JSON

    @property
    def text_format(self) -> ResponseFormat | TextFormat | None:
        """OpenAI's own."""
        return self.response_format

    @property
    def grammar_field(self) -> str:
        """Which of them an error is about."""
        return next((name for name in GrammarFields.model_fields if getattr(self, name) is not None), "response_format")

    def grammar_spec(self) -> GrammarSpec | None:
        """As SamplingParams takes it. Raises ApiError for more than one, BadGrammar for what cannot be one."""
        found = [self.text_format.grammar] if self.text_format else []
        found += self.structured_outputs.grammars if self.structured_outputs else []
        found += _grammars(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        found += _grammars(self.json_schema, grammar=self.grammar)
        # A program that knows not which vLLM it asks sends the same grammar under its old name and its new one.
        specs = list(dict.fromkeys(spec for spec in found if spec is not None))
        if len(specs) > 1:
            sentence = "An answer can follow one grammar only. Leave out all but one of these fields."
            raise ApiError(400, "invalid_value", sentence, self.grammar_field)
        return specs[0] if specs else None


def _grammars(
    schema: dict[str, Any] | str | None,
    regex: str | None = None,
    choice: list[str] | None = None,
    grammar: str | None = None,
) -> list[GrammarSpec]:
    """Of those that are there. grammar: llama.cpp's GBNF, or Lark."""
    return [
        *([_of_schema(schema)] if schema is not None else []),
        *([GrammarSpec("regex", regex)] if regex else []),
        *([GrammarSpec("regex", "|".join(map(_literal, choice)))] if choice else []),
        *([GrammarSpec("lark", grammar)] if grammar else []),
    ]


def _of_schema(schema: dict[str, Any] | str, strict: bool = False) -> GrammarSpec:
    return GrammarSpec("json_schema", schema if isinstance(schema, str) else json.dumps(schema), strict)


def _literal(text: str) -> str:
    """A regular expression of this text alone."""
    written = (char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)
    return f"({''.join(written)})"

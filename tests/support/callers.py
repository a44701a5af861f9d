"""What LangChain and LlamaIndex get from a server: run by test_callers.py, in an environment that has both.

python callers.py http://127.0.0.1:7860/v1 name-of-the-model        prints JSON
"""

import asyncio
import json
import sys
from typing import Annotated

from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field

QUESTION = "Name a colour."


Byte = Annotated[int, Field(ge=0, le=255)]


class Colour(BaseModel, extra="forbid"):  # else a small model goes on with colours of its own
    red: Byte
    green: Byte
    blue: Byte


def langchain(url, model):
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=20, max_retries=0)
    whole = chat.invoke(QUESTION)
    yield "whole", whole.content
    yield "usage", whole.usage_metadata["output_tokens"]
    yield "streamed", "".join(chunk.content for chunk in chat.stream(QUESTION))
    yield "batch", [answer.content for answer in chat.batch([QUESTION] * 4)]
    patient = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0)
    yield "object", patient.with_structured_output(Colour, method="json_schema").invoke("Red, as JSON.").model_dump()
    yield "refusal", refusal(lambda: chat.bind(extra_body={"num_beams": 2}).invoke(QUESTION))


def llama_index(url, model):
    settings = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 20}
    llm = OpenAILike(**settings, is_chat_model=True, context_window=8192, max_retries=0)
    question = [ChatMessage(role="user", content=QUESTION)]
    yield "whole", llm.chat(question).message.content
    yield "streamed", "".join(chunk.delta for chunk in llm.stream_chat(question))
    yield "async", asyncio.run(llm.achat(question)).message.content
    yield "completion", OpenAILike(**settings, is_chat_model=False, max_retries=0).complete("The sky is").text
    yield "object", json.loads(llm.chat(question, response_format=schema(), max_tokens=200).message.content)
    yield "refusal", refusal(lambda: llm.chat(question, extra_body={"num_beams": 2}))


def schema():
    return {"type": "json_schema", "json_schema": {"name": "colour", "schema": Colour.model_json_schema()}}


def refusal(ask):
    try:
        ask()
    except Exception as error:
        return str(error)


print(json.dumps({caller.__name__: dict(caller(*sys.argv[1:])) for caller in (langchain, llama_index)}))

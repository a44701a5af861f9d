"""Small tasks with tools, by the libraries that people use for them: run by test_tool_callers.py, which has them all.

python tool_callers.py http://127.0.0.1:7860/v1 name-of-the-model        prints JSON
"""

import asyncio
import json
import sys
import time

import instructor
import openai
from agents import Agent as OpenAIAgent
from agents import (
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent as PydanticAgent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the weather in Paris?"
RESULT = "22 degrees and sunny"


class City(BaseModel):
    name: str
    country: str


def openais(url, model):
    """The official library: a call whole, the same streamed, and an answer to what it returned."""
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    weather = openai.pydantic_function_tool(City, name="get_weather", description="The weather in a city.")
    fields = {"model": model, "tools": [weather], "temperature": 0, "seed": 1, "max_completion_tokens": 200}
    messages = [{"role": "user", "content": QUESTION}]
    whole = client.chat.completions.create(**fields, messages=messages, tool_choice="required").choices[0].message
    yield "whole", whole.tool_calls[0].function.model_dump()
    with client.chat.completions.stream(**fields, messages=messages, tool_choice="required") as stream:
        streamed = stream.get_final_completion().choices[0].message
    yield "streamed", json.loads(streamed.tool_calls[0].function.arguments)
    parsed = client.chat.completions.parse(**fields, messages=messages, tool_choice="required").choices[0].message
    yield "parsed", parsed.tool_calls[0].function.parsed_arguments.model_dump()
    result = {"role": "tool", "tool_call_id": whole.tool_calls[0].id, "content": RESULT}
    told = client.chat.completions.create(**fields, messages=[*messages, whole, result], tool_choice="none")
    yield "told", told.choices[0].message.content


def langchain(url, model):
    """bind_tools whole and streamed, and structured output by a call."""

    @tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return RESULT

    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0)
    bound = chat.bind_tools([get_weather], tool_choice="any")
    called = bound.invoke(QUESTION)
    yield "whole", called.tool_calls[0]["args"]
    chunks = list(bound.stream(QUESTION))
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    yield "streamed", streamed.tool_calls[0]["args"]
    result = ToolMessage(RESULT, tool_call_id=called.tool_calls[0]["id"])
    told = chat.bind_tools([get_weather]).invoke([HumanMessage(QUESTION), called, result])
    yield "told", told.content or told.tool_calls
    structured = chat.with_structured_output(City, method="function_calling")
    yield "structured", structured.invoke("Paris").model_dump()


def pydantic_ai(url, model):
    """The default output_type is a call of a tool for it."""
    chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = PydanticAgent(chat, output_type=City, model_settings={"temperature": 0})
    yield "object", agent.run_sync("Where is Paris?").output.model_dump()


def openai_agents(url, model):
    """An agent with a tool, which it has to call first. Its default is /v1/responses."""

    @function_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        return RESULT

    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    settings = ModelSettings(temperature=0, tool_choice="required")
    chats = {"responses": OpenAIResponsesModel, "chat": OpenAIChatCompletionsModel}
    for way, chat_type in chats.items():
        chat = chat_type(model=model, openai_client=client)
        agent = OpenAIAgent(name="Weather", model=chat, tools=[get_weather], model_settings=settings)
        result = asyncio.run(Runner.run(agent, QUESTION, max_turns=5))
        yield way, [type(item).__name__ for item in result.new_items]
        assert result.final_output


def instructors(url, model):
    """The default mode calls a function of the answer's shape."""
    client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
    city = client.chat.completions.create(
        model=model, response_model=City, temperature=0, messages=[{"role": "user", "content": "Where is Paris?"}]
    )
    yield "object", city.model_dump()


def results(task):
    """What came of it, or what it raised."""
    began, found = time.monotonic(), {}
    try:
        for name, value in task(*sys.argv[1:]):
            found[name] = value
    except Exception as error:
        found["raised"] = f"{type(error).__name__}: {error}"
    return found | {"seconds": round(time.monotonic() - began, 1)}


TASKS = (openais, langchain, pydantic_ai, openai_agents, instructors)
print(json.dumps({task.__name__: results(task) for task in TASKS}))

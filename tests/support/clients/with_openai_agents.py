"""OpenAI's Agents SDK: an agent that has to call its tool first, by its default, /v1/responses, and by chats."""

import asyncio
import sys

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

url, model = sys.argv[1:]


@function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return "22 degrees and sunny"


async def run(agent):
    result = await Runner.run(agent, "What is the weather in Paris?", max_turns=5)
    assert result.final_output
    running = Runner.run_streamed(agent, "What is the weather in Rome?", max_turns=5)
    assert "raw_response_event" in [event.type async for event in running.stream_events()]
    return [type(item).__name__ for item in result.new_items]


async def run_both():
    client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    settings = ModelSettings(temperature=0, tool_choice="required")
    for way in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        chat = way(model=model, openai_client=client)
        agent = Agent(name="Weather", model=chat, tools=[get_weather], model_settings=settings)
        assert await run(agent) == ["ToolCallItem", "ToolCallOutputItem", "MessageOutputItem"]


set_tracing_disabled(True)
asyncio.run(run_both())

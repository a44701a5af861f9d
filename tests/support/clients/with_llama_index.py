"""LlamaIndex: plain questions, an object by its default way, and an agent that calls functions."""

import asyncio
import sys

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

url, model = sys.argv[1:]
QUESTION = [ChatMessage(role="user", content="What is the weather in Paris?")]


class City(BaseModel):
    name: str
    country: str


def get_weather(city: str) -> str:
    """The weather in a city."""
    return "22 degrees and sunny"


server = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
server |= {"context_window": 8192, "is_function_calling_model": True}
short = OpenAILike(**server, is_chat_model=True, max_tokens=10)
whole = short.chat(QUESTION).message.content
assert whole == "".join(chunk.delta for chunk in short.stream_chat(QUESTION))
assert whole == asyncio.run(short.achat(QUESTION)).message.content
assert OpenAILike(**server, is_chat_model=False, max_tokens=10).complete("The sky is").text

chat = OpenAILike(**server, is_chat_model=True, max_tokens=200)
assert isinstance(chat.structured_predict(City, PromptTemplate("Where is Paris?")), City)
assert isinstance(chat.as_structured_llm(City).chat(QUESTION).raw, City)


async def run_agent():
    agent = FunctionAgent(tools=[get_weather], llm=chat, system_prompt="You can look the weather up.")
    return await agent.run(QUESTION[0].content, max_iterations=5)


assert str(asyncio.run(run_agent()))

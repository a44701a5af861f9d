"""Pydantic AI, whose default way to an object is the call of a tool for it."""

import sys

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

url, model = sys.argv[1:]


class City(BaseModel):
    name: str
    country: str


chat = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
agent = Agent(chat, output_type=City, model_settings={"temperature": 0})
assert isinstance(agent.run_sync("Where is Paris?").output, City)
assert Agent(chat, model_settings={"temperature": 0, "max_tokens": 10}).run_sync("Name a colour.").output

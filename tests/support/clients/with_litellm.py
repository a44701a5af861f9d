"""LiteLLM, which says "openai/" before the name of a model of somebody else's server."""

import json
import sys

import litellm
from pydantic import BaseModel

url, model = sys.argv[1:]
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class City(BaseModel):
    name: str
    country: str


def ask(**fields):
    server = {"model": f"openai/{model}", "api_base": url, "api_key": "none"}
    return litellm.completion(**server, messages=QUESTION, temperature=0, **fields)


whole = ask(max_tokens=10)
streamed = ask(max_tokens=10, stream=True)
assert whole.choices[0].message.content == "".join(chunk.choices[0].delta.content or "" for chunk in streamed)
City.model_validate_json(ask(response_format=City).choices[0].message.content)
called = ask(tools=[{"type": "function", "function": WEATHER}], tool_choice="required").choices[0]
assert called.finish_reason == "tool_calls"
assert set(json.loads(called.message.tool_calls[0].function.arguments)) == {"city"}
text = litellm.text_completion(
    model=f"text-completion-openai/{model}", api_base=url, api_key="none", prompt="The sky is", max_tokens=5
)
assert text.choices[0].text

"""The official library: chats, completions, objects and calls, each whole and as a stream."""

import json
import sys

import openai
import pydantic

url, model = sys.argv[1:]
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]


class City(pydantic.BaseModel):
    name: str
    country: str


def refusal(ask):
    try:
        ask()
    except openai.BadRequestError as error:
        return str(error)


client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
chats = client.chat.completions
fields = {"model": model, "messages": QUESTION, "temperature": 0, "seed": 1}

whole = chats.create(**fields, max_tokens=10).choices[0].message.content
*chunks, last = chats.create(**fields, max_tokens=10, stream=True, stream_options={"include_usage": True})
assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
assert last.usage.completion_tokens == 10
assert len(chats.create(**fields, max_tokens=2, n=3, logprobs=True, top_logprobs=5).choices) == 3

text = {"model": model, "prompt": "The sky is", "max_tokens": 5, "temperature": 0}
pieces = client.completions.create(**text, stream=True)
assert client.completions.create(**text).choices[0].text == "".join(piece.choices[0].text for piece in pieces)
assert len(client.completions.create(**text | {"prompt": ["The sky is", "Grass is"]}).choices) == 2

where = fields | {"messages": [{"role": "user", "content": "Where is Paris?"}], "max_tokens": 100}
assert isinstance(chats.parse(**where, response_format=City).choices[0].message.parsed, City)
with chats.stream(**where, response_format=City) as stream:
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, City)

weather = openai.pydantic_function_tool(City, name="get_weather", description="The weather in a city.")
tools = {"tools": [weather], "tool_choice": "required", "max_completion_tokens": 200}
asked = chats.create(**fields, **tools).choices[0].message
called = asked.tool_calls[0].function
assert isinstance(chats.parse(**fields, **tools).choices[0].message.tool_calls[0].function.parsed_arguments, City)
with chats.stream(**fields, **tools) as stream:
    streamed = stream.get_final_completion().choices[0].message.tool_calls[0].function
assert json.loads(streamed.arguments) == json.loads(called.arguments)
result = {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "22 degrees and sunny"}
told = fields | {"messages": [*QUESTION, asked, result], "tools": [weather], "tool_choice": "none", "max_tokens": 20}
assert chats.create(**told).choices[0].message.content

assert [each.id for each in client.models.list()] == [client.models.retrieve(model).id] == [model]
beams = refusal(lambda: chats.create(**fields, extra_body={"num_beams": 2}))
assert "'num_beams' with this value is not available here" in beams

"""LangChain: plain questions, tools, objects by every method, and an agent."""

import sys

from langchain.agents import create_agent
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model = sys.argv[1:]
QUESTION = "What is the weather in Paris?"
RESULT = "22 degrees and sunny"


class City(BaseModel):
    name: str
    country: str


@tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return RESULT


chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0)
short = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_retries=0, max_tokens=10)

whole = short.invoke(QUESTION)
assert whole.usage_metadata["output_tokens"] == 10
assert whole.content == "".join(chunk.content for chunk in short.stream(QUESTION))
assert len(list(filter(None, short.batch([QUESTION] * 4)))) == 4
assert short.invoke([SystemMessage("Be brief."), SystemMessage("Be kind."), HumanMessage(QUESTION)]).content

bound = chat.bind_tools([get_weather], tool_choice="any")
called = bound.invoke(QUESTION)
streamed, *more = bound.stream(QUESTION)
for chunk in more:
    streamed += chunk
assert streamed.tool_calls[0]["args"] == called.tool_calls[0]["args"]
told = chat.bind_tools([get_weather]).invoke(
    [HumanMessage(QUESTION), called, ToolMessage(RESULT, tool_call_id=called.tool_calls[0]["id"])]
)
assert told.content or told.tool_calls

for method in ("json_schema", "function_calling"):
    assert isinstance(chat.with_structured_output(City, method=method).invoke("Where is Paris?"), City), method
as_json = chat.with_structured_output(City, method="json_mode", include_raw=True)
assert "raw" in as_json.invoke('Where is Paris? Answer in JSON: {"name": "...", "country": "..."}')

said = create_agent(chat, [get_weather]).invoke({"messages": QUESTION}, {"recursion_limit": 8})["messages"]
assert said[-1].content
found = create_agent(chat, response_format=City).invoke({"messages": "Where is Paris?"})
assert isinstance(found["structured_response"], City)


def refusal(ask):
    try:
        ask()
    except Exception as error:
        return str(error)


beams = short.bind(extra_body={"num_beams": 2})
assert "'num_beams' with this value is not available here" in refusal(lambda: beams.invoke(QUESTION))

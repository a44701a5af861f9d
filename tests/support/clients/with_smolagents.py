"""smolagents' ToolCallingAgent, whose every step is a call, the last one of its tool final_answer."""

import sys

from smolagents import OpenAIModel, ToolCallingAgent, tool

url, model = sys.argv[1:]


@tool
def get_weather(city: str) -> str:
    """The weather in a city.

    Args:
        city: its name
    """
    return "22 degrees and sunny"


chat = OpenAIModel(model, api_base=url, api_key="none", temperature=0, max_tokens=100)
agent = ToolCallingAgent(tools=[get_weather], model=chat, max_steps=2, verbosity_level=0)
result = agent.run("What is the weather in Paris?", return_full_result=True)
steps = [step for step in result.steps if "tool_calls" in step]
assert not any(step["error"] for step in steps if step["step_number"] <= 2), steps
assert result.output  # asked for in text if the steps have not come to one

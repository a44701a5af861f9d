"""An agent: a model that may call tools before it answers. It knows ChatBackend and nothing of who keeps it.

agent        Agent: a conversation, and its answers on their way
loop         step by step to one answer
messages     what the model reads: examples, memory, reminders
steps        how a model says what it does next
tool         what a tool is, and how it is called safely
calculator   sums, as people write them
clock        the day and the time
"""

from llama2_chat.agent.agent import MEMORY, PARAMS, Agent, AgentReply
from llama2_chat.agent.calculator import Calculator
from llama2_chat.agent.clock import Clock
from llama2_chat.agent.loop import Call
from llama2_chat.agent.messages import Exchange
from llama2_chat.agent.tool import Example, Step, Tool

__all__ = [
    "MEMORY",
    "PARAMS",
    "Agent",
    "AgentReply",
    "Calculator",
    "Call",
    "Clock",
    "Example",
    "Exchange",
    "Step",
    "Tool",
]

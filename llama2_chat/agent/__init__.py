"""An agent: a model that may call tools before it answers. It knows ChatBackend and nothing of who keeps it.

agent        Agent: a conversation, and its answers on their way
loop         step by step to one answer
messages     what the model reads: examples, memory, reminders
steps        how a model says what it does next
tool         what a tool is, and how it is called safely
calculator   sums, as people write them
clock        the day and the time
mcp_tools    the tools of MCP servers; mcp_file, mcp_server and mcp_schema: which, how reached, what they take
"""

from llama2_chat.agent.agent import MEMORY, PARAMS, Agent, AgentReply
from llama2_chat.agent.calculator import Calculator
from llama2_chat.agent.clock import Clock
from llama2_chat.agent.mcp_file import McpServerSpec, read_mcp_servers
from llama2_chat.agent.mcp_tools import McpTools
from llama2_chat.agent.messages import Exchange
from llama2_chat.agent.tool import Call, Example, Step, Tool, asks_first

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
    "McpServerSpec",
    "McpTools",
    "Step",
    "Tool",
    "asks_first",
    "read_mcp_servers",
]

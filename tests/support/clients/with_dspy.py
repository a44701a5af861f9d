"""DSPy: two answers at once, and an object, which it has to be told that the server keeps to a schema for.

DSPy asks for a schema only from models that it knows; from others it hopes for its own marks in plain text, which a
small model does not write.
"""

import sys

import dspy
from dspy.lm15 import AccessPolicy, ModelSupport, OpenAIChatCompat, ProviderDefinition, register_provider

url, model = sys.argv[1:]
access = AccessPolicy(provider="llama-2-chat", env_keys=("NO_KEY",), base_url=url)
server = ProviderDefinition.chat(access, compat=OpenAIChatCompat())
register_provider(server, supports=ModelSupport(response_schema=True))

chat = dspy.LM(f"llama-2-chat/{model}", api_base=url, api_key="none", temperature=0.7, max_tokens=100, cache=False)
dspy.configure(lm=chat, adapter=dspy.JSONAdapter())
assert len(chat("Name a colour.", n=2, max_tokens=10)) == 2
found = dspy.Predict("question -> answer: int", n=2)(question="What is 2 + 3?")
assert [type(answer) for answer in found.completions.answer] == [int, int]

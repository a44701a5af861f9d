"""Guidance: text, an object and a choice, each as the assistant's message.

Its OpenAI model takes choices and other grammars from nobody; the one for vLLM sends them.
"""

import sys

from guidance import assistant, gen, json, models, select, user
from guidance.models.experimental import VLLMModel
from pydantic import BaseModel

url, model = sys.argv[1:]


class City(BaseModel):
    name: str
    country: str


def answer(chat, **kind):
    (name, node), *_ = kind.items()
    with user():
        chat += "Where is Paris?"
    with assistant():
        return (chat + node)[name]


chat = models.OpenAI(model, base_url=url, api_key="none", echo=False)
assert answer(chat, said=gen("said", max_tokens=10))
City.model_validate_json(answer(chat, city=json("city", schema=City)))

chat = VLLMModel(model, base_url=url, api_key="none", echo=False)
assert answer(chat, country=select(["in France", "in Spain"], name="country")) in ("in France", "in Spain")
assert answer(chat, year=gen("year", regex="[12][0-9]{3}")).isdigit()

"""Instructor, in its default mode: a call of a function of the answer's shape, whole and as it grows."""

import sys

import instructor
import openai
from pydantic import BaseModel

url, model = sys.argv[1:]
QUESTION = {"temperature": 0, "messages": [{"role": "user", "content": "Where is Paris?"}]}


class City(BaseModel):
    name: str
    country: str


client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0))
city = client.chat.completions.create(model=model, response_model=City, **QUESTION)
assert isinstance(city, City)
*_, last = client.chat.completions.create_partial(model=model, response_model=City, **QUESTION)
assert last.name
assert last.country
assert isinstance(next(client.chat.completions.create_iterable(model=model, response_model=City, **QUESTION)), City)

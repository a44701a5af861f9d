"""LlamaIndex's evaluators judge with the model of this server, held by a grammar to the form that they read."""

import sys

from llama_index.core.evaluation import CorrectnessEvaluator, FaithfulnessEvaluator
from llama_index.llms.openai_like import OpenAILike

url, model = sys.argv[1:]
QUESTION, ANSWER = "When was the lighthouse built?", "The lighthouse was built in 1874."
CONTEXT = "The lighthouse of Brenzano was built in 1874 from red granite."


def judge(**fields):
    server = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_retries": 0}
    more = {"context_window": 8192, "is_chat_model": True, "max_tokens": 60}
    return OpenAILike(**server, **more, additional_kwargs={"extra_body": fields})


for verdict in ("YES", "NO"):
    faithful = FaithfulnessEvaluator(llm=judge(structured_outputs={"choice": [verdict]}))
    result = faithful.evaluate(QUESTION, ANSWER, [CONTEXT])
    assert (result.passing, result.feedback) == (verdict == "YES", verdict)

# It reads the mark on the first line and the reason below it.
marks = judge(structured_outputs={"regex": r"[1-5]\.0\n[A-Z][^\n]{1,60}\."})
result = CorrectnessEvaluator(llm=marks).evaluate(QUESTION, ANSWER, reference="In 1874.")
assert 1 <= result.score <= 5
assert result.passing == (result.score >= 4)
assert result.feedback.endswith(".")

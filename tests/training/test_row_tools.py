"""Calls of tools and their results are learned as the chat writes them, with the tools in the prompt."""

import json

import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.tools import plain
from llama2_chat.training import chat_data
from llama2_chat.training.examples import IGNORED, labels, question_ids, tokenize
from llama2_chat.types import Tool, ToolOffer
from tests.support.conversations import write_rows
from tests.support.small_tokenizer import chatml
from tests.support.templates import qwen

PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}
ADD = {"name": "add", "description": "Adds.", "parameters": PARAMETERS}
ARGUMENTS = {"a": 1, "b": 2}
CALL = {"name": "add", "arguments": ARGUMENTS}
OPENAI_CALL = {
    "id": "x7",
    "type": "function",
    "function": {"name": "add", "arguments": json.dumps(ARGUMENTS, separators=(",", ":"))},
}
ASKED, ANSWERED = {"role": "user", "content": "1+2?"}, {"role": "assistant", "content": "It is 3."}
ROWS = {
    "ShareGPT": {
        "tools": json.dumps([ADD]),
        "conversations": [
            {"from": "human", "value": "1+2?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "It is 3."},
        ],
    },
    "OpenAI": {
        "tools": [{"type": "function", "function": ADD}],
        "messages": [
            ASKED,
            {"role": "assistant", "content": None, "tool_calls": [OPENAI_CALL]},
            {"role": "tool", "tool_call_id": "x7", "content": "3"},
            ANSWERED,
        ],
    },
    "OpenAI's functions": {
        "functions": [ADD],
        "messages": [
            ASKED,
            {"role": "assistant", "content": "", "function_call": CALL},
            {"role": "function", "name": "add", "content": "3"},
            ANSWERED,
        ],
    },
}
WRITTEN = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


def read(tmp_path, *rows):
    return chat_data.read(write_rows(tmp_path / "some.jsonl", *rows))


def learned(tokenizer, example):
    """The texts that have labels, read from the ids one by one."""
    texts, before = [], IGNORED
    for label in labels(example):
        if label != IGNORED and before == IGNORED:
            texts.append([])
        if label != IGNORED:
            texts[-1].append(label)
        before = label
    return [tokenizer.decode(ids) for ids in texts]


@pytest.mark.parametrize("name", ROWS)
def test_call_and_answer_are_learned_behind_the_prompts_that_the_chat_would_send(tmp_path, name):
    tokenizer, data = chatml(), read(tmp_path, ROWS[name])
    (example,), notes = tokenize(data.train, tokenizer, {tokenizer.eos_token_id}, 10_000)
    assert (notes, data.unread) == ([], set())
    assert learned(tokenizer, example) == [f"{WRITTEN}<|im_end|>", "It is 3.<|im_end|>"]
    offer = ToolOffer((Tool(**ADD),) if name != "ShareGPT" else data.train[0].tools)
    for (start, _), count in zip(example.answers, (1, 3), strict=True):
        sent = prompt.encode(tokenizer, plain(data.train[0].messages[:count], offer))
        assert example.input_ids[:start] == sent
    assert question_ids(data.train[0], tokenizer) == sent


def test_a_template_that_takes_tools_writes_them_itself(tmp_path):
    tokenizer = qwen()
    assert prompt.call_style(tokenizer) is not None
    (conversation,) = read(tmp_path, ROWS["OpenAI"]).train
    (example,), _ = tokenize([conversation], tokenizer, {tokenizer.eos_token_id}, 10_000)
    call, answer = learned(tokenizer, example)
    assert json.loads(call[call.index("{") : call.rindex("}") + 1]) == CALL
    assert answer.startswith("It is 3.")
    tools = [prompt.tool_object(tool) for tool in conversation.tools]
    for (start, _), count in zip(example.answers, (1, 3), strict=True):
        assert example.input_ids[:start] == prompt.encode(tokenizer, conversation.messages[:count], tools=tools)


def test_a_call_that_is_not_to_be_learned_is_context(tmp_path):
    row = json.loads(json.dumps(ROWS["OpenAI"]))
    row["messages"] = [{"role": "system", "content": "Be brief."}, *row["messages"]]
    row["messages"][2]["weight"] = 0
    tokenizer = chatml()
    (example,), _ = tokenize(read(tmp_path, row).train, tokenizer, {tokenizer.eos_token_id}, 10_000)
    assert learned(tokenizer, example) == ["It is 3.<|im_end|>"]


def test_a_call_in_a_table_has_its_own_arguments_alone(tmp_path):
    """Of a Parquet file each call was learned with the arguments of all tools, which were null."""
    rows = []
    for name, arguments in (("add", {"a": 1, "b": 2}), ("find", {"text": "x"})):
        properties = {argument: {"type": "string"} for argument in arguments}
        tool = {"name": name, "description": "d", "parameters": {"type": "object", "properties": properties}}
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages = [
            {"role": "user", "content": name},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "It is 3."},
        ]
        rows.append({"messages": messages, "tools": [{"type": "function", "function": tool}]})
    expected, found = (chat_data.read(write_rows(tmp_path / name, *rows)).train for name in ("a.jsonl", "a.parquet"))
    assert [(row.messages, row.tools) for row in found] == [(row.messages, row.tools) for row in expected]


def test_results_belong_to_their_calls_in_whatever_order_they_came(tmp_path):
    calls = [OPENAI_CALL, OPENAI_CALL | {"id": "x8"}]
    results = [{"role": "tool", "tool_call_id": id, "content": id} for id in ("x8", "x7")]
    row = {"tools": [ADD], "messages": [ASKED, {"role": "assistant", "tool_calls": calls}, *results, ANSWERED]}
    (conversation,) = read(tmp_path, row).train
    assert [message.get("tool_call_id") for message in conversation.messages] == [None, None, "x8", "x7", None]
    del results[0]["tool_call_id"], results[1]["tool_call_id"]
    (conversation,) = read(tmp_path, row).train
    assert [message.get("tool_call_id") for message in conversation.messages] == [None, None, "x7", "x8", None]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tools": None}, "it calls 'add', which is not among its tools"),
        ({"tools": [{"name": "subtract"}]}, "it calls 'add', which is not among its tools"),
        ({"tools": [{}]}, "not a list of functions"),
        ({"tools": "add"}, "not JSON"),
        ({"tools": [ADD, ADD]}, "two tools called 'add'"),
        ({"messages": [ASKED, {"role": "function_call", "content": "add(1)"}]}, "not JSON"),
        ({"messages": [ASKED, {"role": "function_call", "content": "7"}]}, "not JSON with a name and arguments"),
        ({"messages": [ASKED, {"role": "tool", "content": "3"}, ANSWERED]}, "a tool that nobody called"),
    ],
)
def test_tools_and_calls_that_make_no_sense_are_refused(tmp_path, changes, sentence):
    with pytest.raises(ChatError, match=sentence):
        read(tmp_path, ROWS["OpenAI"] | changes)

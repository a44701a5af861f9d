"""Pairs of a chosen and a rejected answer in the shapes that data sets have, and single answers with a label."""

import json

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data
from llama2_chat.training.row_sources import Reading
from tests.support.conversations import conversation, write_rows

ASKED = [{"role": "user", "content": "A joke?"}]
GOOD, BAD = {"role": "assistant", "content": "Habit."}, {"role": "assistant", "content": "No."}
BRIEF = {"role": "system", "content": "Be brief."}
PAIRS = {
    "texts": {"prompt": "A joke?", "chosen": "Habit.", "rejected": "No."},
    "messages": {"prompt": ASKED, "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {
        "prompt": "A joke?",
        "chosen": [*ASKED, GOOD],
        "rejected": [*ASKED, BAD],
        "messages": [*ASKED, GOOD],
    },
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "A joke?"}],
        "chosen": {"from": "gpt", "value": "Habit."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "Alpaca": {"instruction": "A", "input": "joke?", "chosen": "Habit.", "rejected": "No."},
    "one text": {
        "chosen": "\n\nHuman: A joke?\n\nAssistant: Habit.",
        "rejected": "\n\nHuman: A joke?\n\nAssistant: No.",
    },
    "beside the answer of another file": {
        "prompt": "A joke?",
        "completion": "Why?",
        "chosen": "Habit.",
        "rejected": "No.",
    },
    "with what it is about": {"question": "A", "context": "joke?", "chosen": "Habit.", "rejected": "No."},
    "messages as JSON": {
        "prompt": json.dumps(ASKED),
        "chosen": json.dumps([GOOD]),
        "rejected": json.dumps([BAD]),
    },
    "in capitals": {"Prompt": "A joke?", "Chosen": "Habit.", "Rejected": "No."},
    "with generations": {"input": "A joke?", "generations": ["Habit.", "No."], "chosen": "Habit.", "rejected": "No."},
    "with a system text": {"system": "Be brief.", "question": "A joke?", "chosen": "Habit.", "rejected": "No."},
}


def read(tmp_path, method, *rows):
    return chat_data.read(write_rows(tmp_path / "some.jsonl", *rows), Reading(method=method))


@pytest.mark.parametrize("shape", PAIRS)
def test_a_pair_is_one_question_with_a_good_and_a_bad_answer(tmp_path, shape):
    (row,) = read(tmp_path, "dpo", PAIRS[shape]).train
    asked = [{"role": "user", "content": "A\n\njoke?"}] if shape in ("Alpaca", "with what it is about") else ASKED
    asked = [BRIEF, *asked] if shape == "with a system text" else asked
    assert (row.messages, row.rejected) == ([*asked, GOOD], BAD)
    both = read(tmp_path, "kto", PAIRS[shape]).train
    assert [(one.messages, one.is_wanted) for one in both] == [([*asked, GOOD], True), ([*asked, BAD], False)]


def test_of_a_longer_conversation_the_last_answers_are_compared(tmp_path):
    before = conversation("a", "b", "c")["messages"]
    (row,) = read(tmp_path, "dpo", {"prompt": before, "chosen": "d", "rejected": "e", "score": 1}).train
    assert (row.messages[-1]["content"], row.rejected["content"], row.context) == ("d", "e", {1})


FAULTS = {
    "no pair": (conversation("a", "b"), "it is no pair of a chosen and a rejected answer"),
    "one answer twice": ({"prompt": "a", "chosen": "b", "rejected": "b "}, "are the same"),
    "two questions": (
        {"chosen": conversation("a", "b")["messages"], "rejected": conversation("c", "b")["messages"]},
        "differ before the last answer",
    ),
    "an empty answer": ({"prompt": "a", "chosen": "b", "rejected": " "}, "its answer is empty"),
    "a question last": (
        {"chosen": conversation("a", "b", "c")["messages"], "rejected": conversation("a", "d")["messages"]},
        "does not end with an answer",
    ),
    "images": ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["d.jpg"]}, "it comes with images"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_no_pair_is_named(tmp_path, fault):
    row, sentence = FAULTS[fault]
    data = read(tmp_path, "dpo", PAIRS["texts"], row)
    assert len(data.train) == 1
    assert data.faults[0].startswith("some.jsonl, line 2: ")
    assert sentence in data.faults[0]


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_pair_may_have_a_label_and_be_left_out_by_its_weight(tmp_path, method):
    # A pair with a label that is 0 ended the run in a traceback.
    row = PAIRS["texts"]
    data = read(tmp_path, method, row, row | {"prompt": "b", "label": 0}, row | {"prompt": "c", "weight": 0})
    assert [each.messages[0]["content"] for each in data.train if each.is_wanted] == ["A joke?", "b"]
    assert data.unwanted == 1
    assert not data.faults


def test_labels_say_which_answers_are_good(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "c", "label": "false"}]
    data = read(tmp_path, "kto", *rows, {"prompt": "d", "completion": "e"}, conversation("f", "g") | {"kto_tag": False})
    assert [(row.messages[-1]["content"], row.is_wanted) for row in data.train] == [("b", True), ("c", False)]
    assert "it does not say whether its answer is good" in data.faults[0]
    assert "Of the answers in train, 1 are good and 1 bad." in data.summary_lines()
    minus = read(tmp_path, "kto", rows[0] | {"label": 1}, rows[1] | {"label": -1})
    assert [row.is_wanted for row in minus.train] == [True, False]
    with pytest.raises(ChatError, match="needs good and bad answers"):
        read(tmp_path, "kto", rows[0])


def test_a_pair_is_not_learned_as_if_it_were_a_conversation(tmp_path):
    with pytest.raises(ChatError, match=r"for --method dpo\. To learn the chosen answers: --columns prompt=user"):
        read(tmp_path, "sft", PAIRS["texts"])

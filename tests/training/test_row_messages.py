"""What changes the meaning of a row is heeded or refused, and whatever else it holds is named."""

import math

import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data
from llama2_chat.training.examples import IGNORED, labels, tokenize
from tests.support.conversations import conversation, write_rows
from tests.support.small_tokenizer import chatml

SHAREGPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Ahoy!"}]}


def read(tmp_path, *rows, name="some.jsonl"):
    return chat_data.read(write_rows(tmp_path / name, *rows))


def texts(conversation):
    return [(message["role"], message["content"]) for message in conversation.messages]


def flagged(name, first, second, content="content", role="role", column="messages"):
    roles = ("user", "assistant") if role == "role" else ("human", "gpt")
    messages = [{role: roles[i % 2], content: text} for i, text in enumerate(("2+3?", "6", "Again.", "5", "Sure?"))]
    messages[1][name], messages[3][name] = first, second
    return {column: messages}


# ---- Answers that are not learned ----


@pytest.mark.parametrize(
    "row",
    [
        flagged("weight", 0, 1),
        flagged("train", False, True),
        flagged("loss_weight", 0.0, None),
        flagged("training", "false", "true", "value", "from", "conversations"),
    ],
)
def test_an_answer_that_is_not_to_be_learned_is_read_and_has_no_labels(tmp_path, row):
    tokenizer = chatml()
    data = read(tmp_path, row)
    (example,), _ = tokenize(data.train, tokenizer, {tokenizer.eos_token_id}, 1000)
    whole = prompt.encode_example(tokenizer, data.train[0].messages, {tokenizer.eos_token_id})
    assert example.input_ids == whole.input_ids
    assert tokenizer.decode([id for id in labels(example) if id != IGNORED]) == "5<|im_end|>"
    assert "Answers that are read and not learned (weight, train): 1." in data.summary_lines()
    assert "Columns not read" not in "".join(data.summary_lines())


def test_what_follows_the_last_answer_to_learn_is_left_out(tmp_path):
    data = read(tmp_path, flagged("weight", 1, 0))
    assert texts(data.train[0]) == [("user", "2+3?"), ("assistant", "6")]
    assert (data.train[0].context, data.context, data.unanswered) == (frozenset(), 0, 1)


def test_the_same_messages_with_other_answers_to_learn_are_no_duplicates(tmp_path):
    rows = (flagged("weight", 0, 1), flagged("weight", 1, 1), flagged("weight", 1, None))
    data = read(tmp_path, *rows)
    assert (len(data.train), data.duplicates) == (2, 1)
    assert data.train[0].key != data.train[1].key


@pytest.mark.parametrize("name", ["some.jsonl", "some.csv", "some.parquet"])
def test_a_row_whose_answer_is_marked_as_wrong_is_left_out_and_counted(tmp_path, name):
    rows = [
        {"prompt": "The sun is", "completion": text, "label": text == "a star."} for text in ("a star.", "a potato.")
    ]
    data = read(tmp_path, *rows, name=name)
    assert texts(data.train[0])[1] == ("assistant", "a star.")
    assert (len(data.train), data.unwanted, data.unread) == (1, 1, set())
    with pytest.raises(ChatError, match="all its rows say that their answer is not to be learned"):
        read(tmp_path, rows[1])


# ---- The rest of a row ----

READ = {
    "a system column": (
        {"system": "You are a pirate.", **SHAREGPT},
        [("system", "You are a pirate."), ("user", "Hello"), ("assistant", "Ahoy!")],
    ),
    "the same system text twice": (
        {"system": "A.", "messages": [{"role": "system", "content": "A."}, *conversation("b", "c")["messages"]]},
        [("system", "A."), ("user", "b"), ("assistant", "c")],
    ),
    "OpenOrca": (
        {"system_prompt": "Be plain.", "question": "Why?", "response": "So."},
        [("system", "Be plain."), ("user", "Why?"), ("assistant", "So.")],
    ),
    "Alpaca's history": (
        {"instruction": "And of Spain?", "output": "Madrid.", "system": "", "history": [["Of France?", "P."]]},
        [("user", "Of France?"), ("assistant", "P."), ("user", "And of Spain?"), ("assistant", "Madrid.")],
    ),
    "a question's context": (
        {"question": "Who?", "context": "Ada wrote it.", "answer": "Ada."},
        [("user", "Who?\n\nAda wrote it."), ("assistant", "Ada.")],
    ),
    "a prompt's input and history": (
        {"prompt": "And it?", "input": "Madrid", "completion": "Spain's.", "history": [["Rome?", "Italy's."]]},
        [("user", "Rome?"), ("assistant", "Italy's."), ("user", "And it?\n\nMadrid"), ("assistant", "Spain's.")],
    ),
    "Alpaca's context": (
        {"instruction": "Who?", "context": "Ada wrote it.", "output": "Ada."},
        [("user", "Who?\n\nAda wrote it."), ("assistant", "Ada.")],
    ),
    **{
        f"no input: {value}": ({"instruction": "a", "input": value, "output": "b"}, [("user", "a"), ("assistant", "b")])
        for value in ("<noinput>", "nan", math.nan, None)
    },
    "a greeting": (
        {"conversations": [{"from": "gpt", "value": "Welcome."}, *SHAREGPT["conversations"]]},
        [("user", "Hello"), ("assistant", "Ahoy!")],
    ),
    "content parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                      {"role": "assistant", "content": "c"}]},
        [("user", "ab"), ("assistant", "c")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_what_changes_the_meaning_of_a_row_is_read(tmp_path, name):
    row, expected = READ[name]
    data = read(tmp_path, row)
    assert texts(data.train[0]) == expected
    assert data.unread == set()
    assert data.greetings == (name == "a greeting")


REFUSED = {
    "a preference pair": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a chosen and a rejected answer"),
    "a pair beside turns": (
        {**SHAREGPT, "chosen": {"from": "gpt", "value": "b"}, "rejected": {"from": "gpt", "value": "c"}},
        "a chosen and a rejected answer",
    ),
    "images": ({**conversation("<image>a", "b"), "images": ["a.jpg"]}, "it comes with images"),
    "an image part": (conversation([{"type": "image_url", "image_url": "a.jpg"}], "b"), "it holds something else"),
    "half a weight": (flagged("weight", 0.5, 1), "the weight of an answer is '0.5'"),
    "nothing to learn": (flagged("weight", 0, 0), "none of its answers is to be learned"),
    "half a turn": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False},
                      {"role": "assistant", "content": "c"}]},
        "only one is to be learned",
    ),
    "a part of an answer": (
        flagged("training_detail", [{"begin_offset": 0, "end_offset": 0, "train": False}], None),
        "the training_detail of an answer chooses parts of it",
    ),
    "a context beside messages": (
        {"prompt": [{"role": "user", "content": "Who?"}], "context": "Ada wrote it.", "completion": "Ada."},
        "its context stands beside it",
    ),
    "two systems": (
        {"system": "A.", "messages": [{"role": "system", "content": "B."}, *conversation("b", "c")["messages"]]},
        "Only the first message can be a system message",
    ),
    "no history": ({"instruction": "a", "output": "b", "history": ["c"]}, "not a list of pairs"),
    "no text beside a question": ({"question": "a", "answer": "b", "context": ["c"]}, "are not text"),
    "no text": ({"instruction": "a", "output": "b", "input": ["c"]}, "are not text"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_changes_the_meaning_of_a_row_and_cannot_be_learned_is_refused(tmp_path, name):
    row, sentence = REFUSED[name]
    with pytest.raises(ChatError, match=sentence):
        read(tmp_path, row)


def test_what_nothing_reads_is_named_in_one_line(tmp_path):
    row = {"id": "7", "category": "x", "empty": None, "weight": 0.3, **conversation("a", "b")}
    row["messages"][0] |= {"name": "Ada", "weight": 0, "refusal": None}
    lines = [*read(tmp_path, row).summary_lines()]
    assert "Columns not read: category, id, name of messages, weight, weight of messages." in lines


def test_the_column_of_numbers_that_pandas_writes_is_named(tmp_path):
    """The line said "Columns not read: ." """
    (tmp_path / "some.csv").write_text(",prompt,completion\n0,a,b\n")
    assert "Columns not read: one without a name." in chat_data.read(str(tmp_path / "some.csv")).summary_lines()

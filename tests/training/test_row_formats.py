"""Columns under other names, and conversations that are written into one text."""

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data
from llama2_chat.training.row_sources import Reading
from llama2_chat.training.text_formats import recognise_text, text_messages
from scripts.sft_trainer import read_arguments
from tests.support.conversations import conversation, write_rows


def turns(messages):
    return [(message["role"], message["content"].strip()) for message in messages]


# ---- Names of columns ----

NAMED = {
    "a question and an answer": (
        {"ask": "a", "say": "b", "id": 7},
        ["ask=user", "say=assistant"],
        [("user", "a"), ("assistant", "b")],
        {"id"},
    ),
    "two columns in one question": (
        {"ask": "a", "about": "c", "say": "b"},
        ["ask=user", "about=user", "say=assistant"],
        [("user", "a\n\nc"), ("assistant", "b")],
        set(),
    ),
    "an empty one of two": (
        {"ask": "a", "about": None, "say": "b"},
        ["ask=user", "about=user", "say=assistant"],
        [("user", "a"), ("assistant", "b")],
        set(),
    ),
    "the chosen answer of a pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        ["prompt=user", "chosen=assistant"],
        [("user", "a"), ("assistant", "b")],
        {"rejected"},
    ),
    "the chosen answer behind turns": (
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        ["conversations=user", "chosen=assistant"],
        [("user", "a"), ("assistant", "b")],
        {"rejected"},
    ),
    "the chosen conversation": (
        {"prompt": "a", "chosen": conversation("a", "b")["messages"], "rejected": conversation("a", "c")["messages"]},
        ["chosen=messages"],
        [("user", "a"), ("assistant", "b")],
        {"prompt", "rejected"},
    ),
    "messages of another name": (
        {"dialog": conversation("a", "b")["messages"]},
        ["dialog=messages"],
        [("user", "a"), ("assistant", "b")],
        set(),
    ),
    "rather than what else is there": (
        {"messages": conversation("x", "y")["messages"], "prompt": "z", "ask": "a", "say": "b", "how": "briefly"},
        ["ask=user", "say=assistant", "how=system"],
        [("system", "briefly"), ("user", "a"), ("assistant", "b")],
        {"messages", "prompt (its own)"},
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_columns_can_be_named(tmp_path, name):
    row, flags, expected, unread = NAMED[name]
    file = write_rows(tmp_path / "some.jsonl", row)
    options = read_arguments(["--model_name", "a", "--dataset_name", file, "--columns", *flags])
    data = chat_data.read(file, Reading(options.columns))
    assert turns(data.train[0].messages) == expected
    assert data.unread == unread


@pytest.mark.parametrize("name", [name for name in NAMED if "chosen" in name])
def test_a_pair_is_refused_with_the_flag_that_learns_its_chosen_answer(tmp_path, name):
    row, flags, _, _ = NAMED[name]
    with pytest.raises(ChatError, match=rf"for --method dpo.* --columns {' '.join(flags)}\.$"):
        chat_data.read(write_rows(tmp_path / "some.jsonl", row))


def test_a_conversation_is_no_answer(tmp_path):
    file = write_rows(tmp_path / "some.jsonl", {"prompt": "a", "completion": conversation("a", "b")["messages"]})
    with pytest.raises(ChatError, match="its completion is a whole conversation: name it by --columns NAME=messages"):
        chat_data.read(file)


def test_a_column_that_is_not_there_and_a_role_that_nobody_has_are_refused(tmp_path, capsys):
    file = write_rows(tmp_path / "some.jsonl", {"ask": "a", "say": "b"})
    with pytest.raises(ChatError, match="--columns: the data has no column question"):
        chat_data.read(file, Reading({"question": "prompt", "say": "completion"}))
    for flag in ("ask", "ask=robot", "=user"):
        with pytest.raises(SystemExit):
            read_arguments(["--model_name", "a", "--dataset_name", file, "--columns", flag])
        assert f"'{flag}' is not NAME=ROLE" in capsys.readouterr().err
    with pytest.raises(ChatError, match="--columns question=user answer=assistant"):
        chat_data.read(file)


# ---- Messages in a text ----


def test_messages_in_the_cells_of_a_table_are_messages(tmp_path):
    """A model learned to write JSON."""
    asked, answered = conversation("a", "b")["messages"]
    (row,) = chat_data.read(write_rows(tmp_path / "some.csv", {"prompt": [asked], "completion": [answered]})).train
    assert row.messages == [asked, answered]
    roles = '[{"role": "CEO", "name": "Ann"}]'
    (row,) = chat_data.read(write_rows(tmp_path / "some.jsonl", {"prompt": "Who?", "completion": roles})).train
    assert row.messages[1]["content"] == roles  # which is an answer


@pytest.mark.parametrize("columns", [("messages",), ("prompt", "completion")])
def test_messages_as_python_prints_them_are_refused(tmp_path, columns):
    (tmp_path / "some.csv").write_text(
        f"{','.join(columns)}\n" + ",".join("\"[{'role': 'user', 'content': 'a'}]\"" for _ in columns)
    )
    with pytest.raises(ChatError, match=f"its {columns[0]} holds messages, but not as JSON"):
        chat_data.read(str(tmp_path / "some.csv"))


# ---- Texts ----

TEXTS = {
    "Llama 2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nWhat is 2+2? [/INST] 4 </s><s>[INST] And 3+3? [/INST] 6 </s>",
        [
            ("system", "Be brief."),
            ("user", "What is 2+2?"),
            ("assistant", "4"),
            ("user", "And 3+3?"),
            ("assistant", "6"),
        ],
    ),
    "Llama 2 with a system text in one line": (
        "<s>[INST] <<SYS>> Be brief. <</SYS>> a [/INST] b </s>",
        [("system", "Be brief."), ("user", "a"), ("assistant", "b")],
    ),
    "Llama 2 without tokens": ("[INST] a [/INST] b", [("user", "a"), ("assistant", "b")]),
    "Llama 2 with an open question": (
        "<s>[INST] a [/INST] b </s><s>[INST] c [/INST]",
        [("user", "a"), ("assistant", "b"), ("user", "c")],
    ),
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb\nc<|im_end|>",
        [("system", "Be brief."), ("user", "a"), ("assistant", "b\nc")],
    ),
    "ChatML cut off": ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb", [("user", "a"), ("assistant", "b")]),
    "Alpaca with input": (
        "Below is an instruction.\n\n### Instruction:\na\n\n### Input:\nb\n\n### Response:\nc</s>",
        [("user", "a\n\nb"), ("assistant", "c")],
    ),
    "Alpaca with a system text": (
        "Be brief.\n\n### Instruction:\na\n\n### Response:\nb",
        [("system", "Be brief."), ("user", "a"), ("assistant", "b")],
    ),
    "Guanaco": ("### Human: a### Assistant: b### Human: c", [("user", "a"), ("assistant", "b"), ("user", "c")]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_conversation_in_a_text_becomes_messages(name):
    text, expected = TEXTS[name]
    assert turns(text_messages(text, recognise_text(text))) == expected


PROMPTS = {
    "Llama 2": ("<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na [/INST]", " b </s>"),
    "ChatML": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        "b<|im_end|>\n",
    ),
    "Alpaca": ("Be brief.\n\n### Instruction:\na\n\n### Response:\n", "b</s>"),
    "Guanaco": ("### Human: a### Assistant:", " b"),
    "HH": ("\n\nHuman: a\n\nAssistant:", " b"),
    "HH with the prompt before the answer": ("\n\nHuman: a\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b"),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_that_has_its_format_around_it_becomes_messages(tmp_path, name):
    """Models learned to see the tutorial's format within their own, and to write "</s>"."""
    asked, answered = PROMPTS[name]
    system = [("system", "Be brief.")] if "Be brief." in asked else []
    expected = [*system, ("user", "a"), ("assistant", "b")]
    for row in ({"prompt": asked, "completion": answered}, {"question": asked, "answer": answered}):
        (found,) = chat_data.read(write_rows(tmp_path / "some.jsonl", row)).train
        assert turns(found.messages) == expected
    pair = {"prompt": asked, "chosen": answered, "rejected": answered.replace("b", "c")}
    (found,) = chat_data.read(write_rows(tmp_path / "some.jsonl", pair), Reading(method="dpo")).train
    if name != "HH with the prompt before the answer":
        assert (turns(found.messages), turns([found.rejected])) == (expected, [("assistant", "c")])


def test_a_question_about_a_format_is_a_question(tmp_path):
    row = {"prompt": "What does [INST] a [/INST] mean?", "completion": "A format."}
    (found,) = chat_data.read(write_rows(tmp_path / "some.jsonl", row)).train
    assert found.messages[0]["content"] == row["prompt"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Llamas are camelids.", "As a text that is no conversation it is learned with --plain_text"),
        (7, "its text is no conversation"),
        ("Hello [INST] a [/INST] b", r"does not begin with '\[INST\]'"),
        ("<|im_start|>user\na<|im_end|> b <|im_start|>assistant\nc", "something between the turns"),
        ("Hello ### Human: a### Assistant: b", "does not begin with '### Human:'"),
    ],
)
def test_a_text_that_is_no_conversation_is_refused(text, sentence):
    with pytest.raises(ChatError, match=sentence):
        text_messages(text, recognise_text(text))

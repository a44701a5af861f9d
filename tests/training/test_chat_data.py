"""What scripts/chat_data.py promises: every common shape is read, what cannot be learnt is named with its line."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data
from tests.prompt.test_prompt import CHATML, with_template
from tests.support.small_tokenizer import gpt_2_shaped

QUESTION, ANSWER = "What is the llama?", "The llama is an animal."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
ROWS = {
    "messages": {"messages": MESSAGES},
    "ShareGPT": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "Alpaca": {"instruction": "What is", "input": "the llama?", "output": ANSWER},
    "### Human / ### Assistant": {"text": f"### Human: {QUESTION}### Assistant: {ANSWER}"},
}


def write(path, *rows):
    """The rows in a file, in the format that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            for row in rows:
                writer.writerow({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()})
    else:
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return str(path)


def conversation(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]}


@pytest.mark.parametrize("suffix", chat_data.SUFFIXES)
@pytest.mark.parametrize("shape", ROWS)
def test_each_shape_is_recognised_in_each_kind_of_file(tmp_path, shape, suffix):
    data = chat_data.read(write(tmp_path / f"some{suffix}", ROWS[shape]))
    question = "What is\n\nthe llama?" if shape == "Alpaca" else QUESTION
    assert data.shapes == {shape}
    assert [row.messages for row in data.train] == [[{"role": "user", "content": question}, MESSAGES[1]]]
    assert data.faults == []


def test_prompt_and_completion_may_be_messages_too(tmp_path):
    data = chat_data.read(write(tmp_path / "some.jsonl", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}))
    assert data.train[0].messages == MESSAGES


def test_an_empty_system_message_is_none(tmp_path):
    messages = [{"role": "system", "content": ""}, *MESSAGES]
    assert chat_data.read(write(tmp_path / "some.jsonl", {"messages": messages})).train[0].messages == MESSAGES


def test_guanaco_keeps_all_turns_of_a_conversation(tmp_path):
    text = "### Human: One?### Assistant: First.\nSecond.### Human: Two?### Assistant: Third."
    data = chat_data.read(write(tmp_path / "some.jsonl", {"text": text}))
    assert data.train[0].messages == conversation("One?", "First.\nSecond.", "Two?", "Third.")["messages"]


def test_half_an_emoji_becomes_a_character_that_the_report_can_hold(tmp_path):
    data = chat_data.read(write(tmp_path / "some.jsonl", conversation("half \ud83d", "\ud83d\ude00")))
    assert data.train[0].messages == conversation("half \ufffd", "😀")["messages"]


def test_a_suffix_may_be_in_capitals(tmp_path):
    Path(write(tmp_path / "some.jsonl", ROWS["messages"])).rename(tmp_path / "SOME.JSONL")
    for name in (tmp_path, tmp_path / "SOME.JSONL"):
        assert len(chat_data.read(str(name)).train) == 1


FAULTS = {
    "not JSON": ("{", "it is not JSON"),
    "no object": (["a"], "no object with named columns"),
    "other columns": ({"question": "a"}, "it has no column messages"),
    "no list": ({"messages": 3}, "its messages are no list"),
    "no messages": ({"messages": ["a"]}, "a list of messages"),
    "an empty answer": (conversation("a", " "), "its answer is empty"),
    "an empty question": (conversation("", "b"), "its message is empty"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "it was 'robot'"),
    "no role": ({"messages": [{"content": "a"}]}, "role is system, user or assistant"),
    "answer first": ({"messages": MESSAGES[1:]}, "starts with a message from the user"),
    "a late system message": ({"messages": [*MESSAGES, {"role": "system", "content": "a"}]}, "Only the first message"),
    "no text": (conversation("a", ["b"]), "plain text"),
    "no answer": (conversation("a"), "it holds no answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_learnt_is_left_out_and_named_with_its_line(tmp_path, fault):
    row, reason = FAULTS[fault]
    data = chat_data.read(write(tmp_path / "some.jsonl", {"messages": MESSAGES}, "", row, conversation("c", "d")))
    assert len(data.train) == 2
    (told,) = data.faults
    assert told.startswith("some.jsonl, line 3: ")
    assert reason in told
    assert told in "\n".join(data.told())


def test_a_csv_row_with_too_few_columns_is_named_with_its_line(tmp_path):
    (tmp_path / "some.csv").write_text('prompt,completion\n"a\nb",c\nd\ne,f\n')
    data = chat_data.read(str(tmp_path / "some.csv"))
    assert data.faults == ["some.csv, line 4: it has fewer columns than the first line names."]
    assert data.train[1].place == "some.csv, line 5"


def test_what_comes_twice_is_learnt_once_and_never_held_out(tmp_path):
    write(tmp_path / "train.jsonl", ROWS["messages"], conversation(f" {QUESTION}", f"{ANSWER}\n"))
    write(tmp_path / "held_out.jsonl", ROWS["messages"], conversation("a", "b"))
    data = chat_data.read(str(tmp_path))
    assert (len(data.train), len(data.held_out), data.duplicates) == (1, 1, 2)


def test_a_question_that_nobody_answers_is_left_out(tmp_path):
    data = chat_data.read(write(tmp_path / "some.jsonl", conversation("a", "b", "c")))
    assert data.train[0].messages == conversation("a", "b")["messages"]
    assert data.unanswered == 1


def test_parts_are_learnt_held_out_or_for_a_test_by_their_names(tmp_path):
    write(tmp_path / "train.jsonl", conversation("a", "b"))
    write(tmp_path / "test.jsonl", conversation("c", "d"), conversation("e", "f"))
    data = chat_data.read(str(tmp_path))
    assert (len(data.train), len(data.held_out), len(data.test)) == (1, 2, 0)  # the only part that is not learnt
    write(tmp_path / "validation.jsonl", conversation("g", "h"), conversation("c", "d"))
    data = chat_data.read(str(tmp_path))
    assert (len(data.train), len(data.held_out), len(data.test), data.duplicates) == (1, 2, 1, 1)
    assert next(data.told()) == "Conversations: 1 to learn, 2 held out, 1 for a test, messages."


def test_a_name_only_begins_like_a_part(tmp_path):
    for part in ("devices", "testimonials", "evaluations", "test-00000-of-00001", "dev_2"):
        write(tmp_path / f"{part}.jsonl", conversation(part, "a"))
    data = chat_data.read(str(tmp_path))
    assert sorted(row.messages[0]["content"] for row in data.train) == ["devices", "evaluations", "testimonials"]
    assert (len(data.held_out), len(data.test)) == (1, 1)


def test_a_folder_in_which_nothing_is_to_be_learnt_says_so(tmp_path):
    write(tmp_path / "test.jsonl", conversation("a", "b"))
    with pytest.raises(ChatError, match="its parts are all held out by their names"):
        chat_data.read(str(tmp_path))


def test_a_file_given_by_itself_is_learnt_whatever_it_is_called(tmp_path):
    assert len(chat_data.read(write(tmp_path / "test.jsonl", conversation("a", "b"))).train) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "There is no file or folder"),
        ("folder", None, "holds no file that ends with .csv, .json, .jsonl or .parquet"),
        ("some.txt", "a", "is not a file that ends with"),
        ("some.jsonl", "", "There is no conversation to learn from"),
        ("some.jsonl", '{"a": 1}', "its columns (a) are none of those known"),
        ("some.jsonl", '{"conversations": [{"from": ["gpt"], "value": "a"}]}', "it was \"['gpt']\""),
        ("some.json", "{", "cannot be read"),
        ("some.json", "{}", "holds no list of rows"),
        ("some.json", "[" * 100_000, "cannot be read"),
        ("some.csv", "messages\n" + "[" * 100_000, "its messages are no list"),
        ("some.parquet", "a", "cannot be read"),
        ("some.csv", b"prompt,completion\n\xff,a", "cannot be read"),
    ],
)
def test_data_that_cannot_be_read_is_refused_with_a_sentence(tmp_path, name, content, sentence):
    (tmp_path / "folder").mkdir()
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ChatError) as refused:
        chat_data.read(str(tmp_path / name))
    assert sentence in str(refused.value)
    assert str(refused.value).endswith(".")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_splits_of_a_data_set_as_the_hub_has_them_are_learnt_or_held_out(offline, tmp_path):
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "train.jsonl", ROWS["ShareGPT"], {"conversations": []})
    write(tmp_path / "repo" / "test.jsonl", {"conversations": [{"from": "human", "value": "a"}]})
    (train, rows), (test, held_out) = chat_data._hub(str(tmp_path / "repo"))
    assert (train, test) == ("train", "test")
    assert list(rows) == [("train, row 1", ROWS["ShareGPT"]), ("train, row 2", {"conversations": []})]
    assert [place for place, _ in held_out] == ["test, row 1"]


def test_a_data_set_that_the_hub_does_not_give_is_refused_with_a_sentence(offline):
    with pytest.raises(ChatError, match=r"someone/none is neither a file or folder here nor a data set"):
        chat_data.read("someone/none")


def chatml():
    return with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML)


def lessons(tokenizer, max_length, *conversations):
    rows = [chat_data.Conversation(row["messages"], f"row {i}") for i, row in enumerate(conversations, 1)]
    return chat_data.encode(rows, tokenizer, {tokenizer.eos_token_id}, max_length)


def test_only_answers_are_labels_and_their_eos_with_them():
    tokenizer = chatml()
    (lesson,), told = lessons(tokenizer, 1000, conversation("hello", "hello you", "and", "hell"))
    labels = chat_data.labels(lesson)
    assert told == []
    assert len(labels) == len(lesson.input_ids)
    assert tokenizer.decode([id for id in labels if id != -100]) == "hello you<|im_end|>hell<|im_end|>"
    assert all(label in (-100, id) for label, id in zip(labels, lesson.input_ids, strict=True))


def test_what_is_learnt_is_marked_in_the_text_that_the_model_sees():
    tokenizer = chatml()
    (lesson,), _ = lessons(tokenizer, 1000, conversation("hello", "hell"))
    start, end = "<|im_start|>", "<|im_end|>"
    assert chat_data.marked(lesson, tokenizer) == f"{start}user\nhello{end}\n{start}assistant\n⟦hell{end}⟧"


def test_a_long_conversation_loses_whole_exchanges_and_is_counted():
    long = conversation("hello", "hello", "hello", "hello " * 200)
    tokenizer = chatml()
    (whole,), _ = lessons(tokenizer, 1000, conversation("hello", "hello"))
    (short,), told = lessons(tokenizer, 100, long, conversation("hello " * 200, "hello"))
    assert short == whole
    assert told[0].startswith("1 are longer than 100 tokens")
    assert "row 2: its first exchange is" in told[2]

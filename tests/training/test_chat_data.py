"""Every common format is read from every kind of file, and what cannot be used is named with its line."""

import gzip
import json
import math
from pathlib import Path

import datasets
import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data, row_files, row_sources
from llama2_chat.training.row_files import Row
from llama2_chat.training.row_sources import Reading
from tests.support.conversations import conversation, write_rows

QUESTION, ANSWER = "What is the llama?", "The llama is an animal."
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
ROWS = {
    "messages": {"messages": MESSAGES},
    "ShareGPT": {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
    "prompt and completion": {"prompt": QUESTION, "completion": ANSWER},
    "Alpaca": {"instruction": "What is", "input": "the llama?", "output": ANSWER},
    "### Human / ### Assistant": {"text": f"### Human: {QUESTION}### Assistant: {ANSWER}"},
    "Dolly": {"instruction": "What is", "context": "the llama?", "response": ANSWER, "category": ""},
    "prompt and response": {"prompt": QUESTION, "response": ANSWER},
    "question and response": {"question": QUESTION, "response": ANSWER},
    "question and answer": {"question": QUESTION, "answer": ANSWER},
    "[INST] of Llama 2": {"text": f"<s>[INST] {QUESTION} [/INST] {ANSWER} </s>"},
    "ChatML": {"text": f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n{ANSWER}<|im_end|>\n"},
    "### Instruction / ### Response": {"text": f"### Instruction:\n{QUESTION}\n\n### Response:\n{ANSWER}"},
}


@pytest.mark.parametrize("suffix", row_files.READERS)
@pytest.mark.parametrize("row_format", ROWS)
def test_each_format_is_recognised_in_each_kind_of_file(tmp_path, row_format, suffix):
    data = chat_data.read(write_rows(tmp_path / f"some{suffix}", ROWS[row_format]))
    question = "What is\n\nthe llama?" if row_format in ("Alpaca", "Dolly") else QUESTION
    assert data.formats == {row_format}
    assert [row.messages for row in data.train] == [[{"role": "user", "content": question}, MESSAGES[1]]]
    assert data.faults == []


def test_prompt_and_completion_may_be_messages_too(tmp_path):
    data = chat_data.read(write_rows(tmp_path / "some.jsonl", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}))
    assert data.train[0].messages == MESSAGES


def test_roles_have_the_names_that_others_give_them(tmp_path):
    """A row with OpenAI's developer was left out, and one with Gemma's model under "role"."""
    roles = [("developer", "Be kind."), ("Human", QUESTION), ("model", ANSWER)]
    row = {"messages": [{"role": role, "content": text} for role, text in roles]}
    system = {"role": "system", "content": "Be kind."}
    assert chat_data.read(write_rows(tmp_path / "some.jsonl", row)).train[0].messages == [system, *MESSAGES]


def test_an_empty_system_message_is_none(tmp_path):
    messages = [{"role": "system", "content": ""}, *MESSAGES]
    assert chat_data.read(write_rows(tmp_path / "some.jsonl", {"messages": messages})).train[0].messages == MESSAGES


def test_guanaco_keeps_all_turns_of_a_conversation(tmp_path):
    text = "### Human: One?### Assistant: First.\nSecond.### Human: Two?### Assistant: Third."
    data = chat_data.read(write_rows(tmp_path / "some.jsonl", {"text": text}))
    assert data.train[0].messages == conversation("One?", "First.\nSecond.", "Two?", "Third.")["messages"]


def test_half_an_emoji_becomes_a_character_that_the_report_can_hold(tmp_path):
    data = chat_data.read(write_rows(tmp_path / "some.jsonl", conversation("half \ud83d", "\ud83d\ude00")))
    assert data.train[0].messages == conversation("half \ufffd", "😀")["messages"]


def test_a_suffix_may_be_in_capitals(tmp_path):
    Path(write_rows(tmp_path / "some.jsonl", ROWS["messages"])).rename(tmp_path / "SOME.JSONL")
    for name in (tmp_path, tmp_path / "SOME.JSONL"):
        assert len(chat_data.read(str(name)).train) == 1


FAULTS = {
    "not JSON": ("{", "it is not JSON"),
    "a text": ('"a"', "it is not an object with named columns"),
    "no object": (["a"], "it is not an object with named columns"),
    "other columns": ({"question": "a"}, "it has no column messages"),
    "no list": ({"messages": 3}, "its messages are not a list"),
    "no messages": ({"messages": ["a"]}, "a list of messages"),
    "an empty answer": (conversation("a", " "), "its answer is empty"),
    "an empty question": (conversation("", "b"), "its message is empty"),
    "an unknown role": ({"messages": [{"role": "robot", "content": "a"}]}, "it was 'robot'"),
    "no role": ({"messages": [{"content": "a"}]}, "role is system, user, assistant or tool"),
    "a result of a tool": ({"messages": [*MESSAGES, {"role": "tool", "content": "7"}]}, "a tool that nobody called"),
    "answer first": ({"messages": MESSAGES[1:]}, "starts with a message from the user"),
    "a late system message": ({"messages": [*MESSAGES, {"role": "system", "content": "a"}]}, "Only the first message"),
    "no text": (conversation("a", ["b"]), "plain text"),
    "no answer": (conversation("a"), "it has no answer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_row_that_cannot_be_used_is_left_out_and_named_with_its_line(tmp_path, fault):
    row, reason = FAULTS[fault]
    data = chat_data.read(write_rows(tmp_path / "some.jsonl", {"messages": MESSAGES}, "", row, conversation("c", "d")))
    assert len(data.train) == 2
    (found,) = data.faults
    assert found.startswith("some.jsonl, line 3: ")
    assert reason in found
    assert found in "\n".join(data.summary_lines())


def test_a_csv_row_with_too_few_columns_is_named_with_its_line(tmp_path):
    (tmp_path / "some.csv").write_text('prompt,completion\n"a\nb",c\nd\ne,f\n')
    data = chat_data.read(str(tmp_path / "some.csv"))
    assert data.faults == ["some.csv, line 4: it has fewer columns than the first line names."]
    assert data.train[1].place == "some.csv, line 5"


STRAY_QUOTES = {
    "within quotes": ('Say one,one\n"he said "yo" loudly",right\nSay two,two\n', 3, ["Say one", "Say two"]),
    "never closed": ('"Say one,one\nSay two,two\nSay three,three\n', 2, ["Say two", "Say three"]),
    "closed by another row's": ('"Say one,one\n"Say two",two\nSay three,three\n', 2, ["Say two", "Say three"]),
    "at the end": ('Say one,one\nSay two,"two\n', 3, ["Say one"]),
}


@pytest.mark.parametrize("name", STRAY_QUOTES)
def test_a_stray_quote_in_a_csv_costs_its_row_alone(tmp_path, name):
    text, line, questions = STRAY_QUOTES[name]
    (tmp_path / "some.csv").write_text(f"prompt,completion\n{text}")
    data = chat_data.read(str(tmp_path / "some.csv"))
    assert [row.messages[0]["content"] for row in data.train] == questions
    (fault,) = data.faults
    assert fault.startswith(f"some.csv, line {line}: it is not CSV")
    lines = [number for number, written in enumerate(text.splitlines(), 2) if questions[-1] in written]
    assert data.train[-1].place == f"some.csv, line {lines[0]}"


TABLE = 'Question; Answer \r\n"What is\r\n""a""; and b?";It is c.\r\n'
SPREADSHEETS = {
    "semicolons, where commas are for decimals": TABLE.encode("utf-8-sig"),
    "a line that names the delimiter": ("sep=;\r\n" + TABLE).encode("utf-8-sig"),
    "a line that names tabs": ("sep=\t\r\n" + TABLE.replace(";", "\t").replace("\t and", "; and")).encode(),
    "Unicode text": TABLE.replace(";", "\t").replace("\t and", "; and").encode("utf-16"),
    "line ends of old Macs": TABLE.replace("\n", "").encode(),
    "empty lines above": (";;;\r\n\r\n" + TABLE).encode(),
    "empty cells behind and below": (TABLE.replace("c.", "c.;;").replace("wer ", "wer;;") + ";;;\r\n" * 3).encode(),
}


@pytest.mark.parametrize("name", SPREADSHEETS)
def test_a_table_is_read_as_spreadsheets_write_it(tmp_path, name):
    (tmp_path / "some.csv").write_bytes(SPREADSHEETS[name])
    data = chat_data.read(str(tmp_path / "some.csv"))
    asked, answered = (message["content"] for message in data.train[0].messages)
    assert asked.split() == ["What", "is", '"a";', "and", "b?"]
    assert (answered, data.faults) == ("It is c.", [])


def test_a_comma_in_a_column_that_tabs_divide_divides_nothing(tmp_path):
    (tmp_path / "some.tsv").write_text("question\tanswer\tnotes, if any\na\tb\tc\n")
    data = chat_data.read(str(tmp_path / "some.tsv"))
    assert [message["content"] for message in data.train[0].messages] == ["a", "b"]


def test_of_one_name_in_two_spellings_the_first_is_read_and_the_other_named(tmp_path):
    data = chat_data.read(write_rows(tmp_path / "some.jsonl", {"Question": "a", "QUESTION": "b", "answer": "c"}))
    assert data.train[0].messages[0]["content"] == "a"
    assert data.unread == {"QUESTION"}


def test_rows_may_lie_under_data(tmp_path):
    (tmp_path / "some.json").write_text(json.dumps({"version": 1, "data": [ROWS["question and answer"]]}))
    assert chat_data.read(str(tmp_path / "some.json")).train[0].messages == MESSAGES


@pytest.mark.parametrize("name", ["some.csv", "some.jsonl", "some.json"])
def test_an_empty_cell_as_pandas_writes_it_is_no_answer(tmp_path, name):
    rows = ({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": math.nan})
    if name == "some.csv":
        rows[1]["completion"] = "NaN"
    data = chat_data.read(write_rows(tmp_path / name, *rows))
    assert len(data.train) == 1
    assert "its answer is empty" in data.faults[0]


@pytest.mark.parametrize("name", ["some.jsonl.gz", "some.CSV.GZ", "some.json.gz"])
def test_a_file_may_be_packed(tmp_path, name):
    plain = tmp_path / name.lower().removesuffix(".gz")
    write_rows(plain, ROWS["messages"])
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    for source in (tmp_path, tmp_path / name):
        assert chat_data.read(str(source)).train[0].messages == MESSAGES


def test_json_lines_may_be_called_json(tmp_path):
    write_rows(tmp_path / "some.jsonl", ROWS["messages"], "{", conversation("a", "b"))
    data = chat_data.read(str((tmp_path / "some.jsonl").rename(tmp_path / "some.json")))
    assert [row.place for row in data.train] == ["some.json, line 1", "some.json, line 3"]
    write_rows(tmp_path / "one.jsonl", ROWS["messages"])
    assert len(chat_data.read(str((tmp_path / "one.jsonl").rename(tmp_path / "one.json"))).train) == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_may_be_called_jsonl(tmp_path, indent):
    rows = [ROWS["messages"], conversation("a", "b")]
    (tmp_path / "some.jsonl").write_text(json.dumps(rows, indent=indent))
    data = chat_data.read(str(tmp_path / "some.jsonl"))
    assert [row.place for row in data.train] == ["some.jsonl, row 1", "some.jsonl, row 2"]


def test_subfolders_are_read_and_name_their_split_and_what_is_no_data_is_passed_over(tmp_path):
    for name in ("train/test_of_wits", "test/part-1", "more/held_out", ".cache/copy"):
        (tmp_path / name).parent.mkdir()
        write_rows(tmp_path / f"{name}.jsonl", conversation(name, "a"))
    (tmp_path / "train" / "dataset_info.json").write_text('{"kto": {"file_name": "kto.jsonl"}}')
    data = chat_data.read(str(tmp_path))
    found = {split: [row.messages[0]["content"] for row in getattr(data, split)] for split in ("train", "eval", "test")}
    assert found == {"train": ["train/test_of_wits"], "eval": ["more/held_out"], "test": ["test/part-1"]}
    assert (data.train[0].place, data.faults) == ("train/test_of_wits.jsonl, line 1", [])


def test_a_conversation_that_comes_twice_is_in_the_train_split_only(tmp_path):
    write_rows(tmp_path / "train.jsonl", ROWS["messages"], conversation(f" {QUESTION}", f"{ANSWER}\n"))
    write_rows(tmp_path / "eval.jsonl", ROWS["messages"], conversation("a", "b"))
    data = chat_data.read(str(tmp_path))
    assert (len(data.train), len(data.eval), data.duplicates) == (1, 1, 2)


def test_a_question_that_nobody_answers_is_left_out(tmp_path):
    data = chat_data.read(write_rows(tmp_path / "some.jsonl", conversation("a", "b", "c")))
    assert data.train[0].messages == conversation("a", "b")["messages"]
    assert data.unanswered == 1


def test_parts_are_train_eval_or_test_split_by_their_names(tmp_path):
    write_rows(tmp_path / "train.jsonl", conversation("a", "b"))
    write_rows(tmp_path / "test.jsonl", conversation("c", "d"), conversation("e", "f"))
    data = chat_data.read(str(tmp_path))
    assert (len(data.train), len(data.eval), len(data.test)) == (1, 2, 0)  # the only part beside train
    write_rows(tmp_path / "validation.jsonl", conversation("g", "h"), conversation("c", "d"))
    data = chat_data.read(str(tmp_path))
    assert (len(data.train), len(data.eval), len(data.test), data.duplicates) == (1, 2, 1, 1)
    assert next(data.summary_lines()) == "Conversations: 1 train, 2 eval, 1 test; format: messages."


def test_a_word_of_a_name_says_what_part_it_is(tmp_path):
    """alpaca_test.jsonl beside alpaca_train.jsonl was trained on."""
    for name in ("alpaca_train", "alpaca_test", "my.validation", "latest", "contest-2"):
        write_rows(tmp_path / f"{name}.jsonl", conversation(name, "a"))
    data = chat_data.read(str(tmp_path))
    assert [row.messages[0]["content"] for row in data.train] == ["alpaca_train", "contest-2", "latest"]
    assert (data.eval[0].messages[0]["content"], data.test[0].messages[0]["content"]) == (
        "my.validation",
        "alpaca_test",
    )


def test_files_given_together_are_parts_by_their_names(tmp_path):
    """Both were trained on."""
    files = [write_rows(tmp_path / f"{name}.jsonl", conversation(name, "a")) for name in ("train", "test")]
    data = chat_data.read(files)
    assert [[row.messages[0]["content"] for row in rows] for rows in (data.train, data.eval)] == [["train"], ["test"]]


def test_a_name_only_begins_like_a_part(tmp_path):
    for part in ("devices", "testimonials", "evaluations", "test-00000-of-00001", "dev_2"):
        write_rows(tmp_path / f"{part}.jsonl", conversation(part, "a"))
    data = chat_data.read(str(tmp_path))
    assert sorted(row.messages[0]["content"] for row in data.train) == ["devices", "evaluations", "testimonials"]
    assert (len(data.eval), len(data.test)) == (1, 1)


def test_a_folder_without_a_train_split_says_so(tmp_path):
    write_rows(tmp_path / "test.jsonl", conversation("a", "b"))
    with pytest.raises(ChatError, match="all its parts have names of eval or test splits"):
        chat_data.read(str(tmp_path))


def test_a_file_given_by_itself_is_the_train_split_whatever_it_is_called(tmp_path):
    assert len(chat_data.read(write_rows(tmp_path / "test.jsonl", conversation("a", "b"))).train) == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.jsonl", None, "There is no file or folder"),
        ("folder", None, "has no file that ends with .csv, .tsv, .json, .jsonl or .parquet"),
        ("some.txt", "a", "is not a file that ends with"),
        ("some.jsonl", "", "has no conversation to train on"),
        ("some.jsonl", '{"a": 1}', "its columns (a) belong to no known format"),
        ("some.jsonl", '{"conversations": [{"from": ["gpt"], "value": "a"}]}', "it was \"['gpt']\""),
        ("some.json", "{", "cannot be read"),
        ("some.json", "{}", "its columns () belong to no known format"),
        ("some.json", "7", "it is not an object with named columns"),
        ("some.jsonl.gz", "a", "cannot be read"),
        ("some.json", "[" * 100_000, "cannot be read"),
        ("some.csv", "messages\n" + "[" * 100_000, "its messages are not a list"),
        ("some.parquet", "a", "cannot be read"),
        ("some.csv", "prompt,prompt,completion\na,b,c", "has two columns called 'prompt'"),
        ("some.csv", b"prompt,completion\na,\xfc", "is not in UTF-8"),
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


# ---- Several data sets ----


def test_several_data_sets_are_one_and_each_weighs_what_it_is_said_to(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", *(conversation(f"a{i}", "x") for i in range(10)), conversation("c", "d"))
    (tmp_path / "two").mkdir()
    write_rows(tmp_path / "two" / "train.csv", *({"ask": f"b{i}", "say": "y"} for i in range(8)))
    write_rows(tmp_path / "two" / "test.jsonl", conversation("c", "d"), conversation("e", "f"))
    columns = {"ask": "prompt", "say": "completion"}
    data = chat_data.read([one, str(tmp_path / "two")], Reading(columns))
    assert [row.messages[0]["content"] for row in data.eval] == ["e"]
    assert (len(data.train), data.duplicates, {row.copies for row in data.train}) == (19, 1, {1})
    again = [chat_data.read([one, str(tmp_path / "two")], Reading(columns, weights=(2.5, 0.25))) for _ in range(2)]
    assert again[0].train == again[1].train
    copies = [row.copies for row in again[0].train if row.messages[0]["content"][0] in "ac"]
    assert (len(copies), {*copies}, sum(copies)) == (11, {2, 3}, 28)
    assert len(again[0].train) - len(copies) == 2
    assert {row.messages[0]["content"] for row in again[0].train} < {row.messages[0]["content"] for row in data.train}


def test_one_of_several_data_sets_that_has_nothing_is_named(tmp_path):
    one, two = (
        write_rows(tmp_path / name, row) for name, row in (("a.jsonl", {"x": "y"}), ("b.jsonl", conversation("a", "b")))
    )
    with pytest.raises(ChatError, match=r"a.jsonl has no conversation to train on. The first fault: a.jsonl, line 1"):
        chat_data.read([two, one])
    with pytest.raises(ChatError, match="--columns: the data has no column ask"):
        chat_data.read([two, one], Reading({"ask": "prompt", "x": "completion"}))


def test_a_data_set_that_is_in_the_others_is_named_as_such(tmp_path):
    """It said that the file has no conversation to train on."""
    one = write_rows(tmp_path / "one.jsonl", conversation("a", "b"), conversation("c", "d"))
    two = write_rows(tmp_path / "two.jsonl", conversation("c", "d"))
    with pytest.raises(ChatError, match=r"two\.jsonl has only conversations that the data before it has"):
        chat_data.read([one, two])


def test_no_more_is_read_than_is_asked_for(tmp_path):
    (tmp_path / "some").mkdir()
    for part in ("train-0", "train-1", "eval"):
        write_rows(tmp_path / "some" / f"{part}.jsonl", *(conversation(f"{part} {i}", "x") for i in range(6)))
    with (tmp_path / "some" / "train-1.jsonl").open("a") as file:
        file.write("never read")
    data = chat_data.read(str(tmp_path / "some"), Reading(at_most=8))
    assert [len(rows) for rows in (data.train, data.eval, data.faults)] == [8, 6, 0]


# ---- Plain text ----


def test_a_plain_text_is_learned_whole_where_that_is_asked_for(tmp_path):
    rows = {"text": " Llamas are camelids.\n", "source": "a"}, {"text": " "}, {"text": "[INST] a [/INST] b"}
    file = write_rows(tmp_path / "some.jsonl", *rows)
    data = chat_data.read(file, Reading(plain_text=True))
    assert [(row.messages[0]["content"], row.is_text) for row in data.train] == [
        ("Llamas are camelids.", True),
        ("[INST] a [/INST] b", True),
    ]
    assert data.faults == ["some.jsonl, line 2: its text is empty, or something else."]
    assert (data.formats, data.unread) == ({"plain text"}, {"source"})
    with pytest.raises(ChatError, match="learned with --plain_text"):
        chat_data.read(write_rows(tmp_path / "some.jsonl", rows[0]))


# ---- The Hub ----


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_a_data_set_of_the_hub_has_its_splits_as_parts(offline, tmp_path):
    (tmp_path / "repo").mkdir()
    write_rows(tmp_path / "repo" / "train.jsonl", ROWS["ShareGPT"], {"conversations": []})
    write_rows(tmp_path / "repo" / "test.jsonl", {"conversations": [{"from": "human", "value": "a"}]})
    (train, rows), (test, test_rows) = row_sources.read_hub(str(tmp_path / "repo"))
    assert (train, test) == ("train", "test")
    assert list(rows) == [Row("train, row 1", ROWS["ShareGPT"]), Row("train, row 2", {"conversations": []})]
    assert [row.place for row in test_rows] == ["test, row 1"]


def test_one_split_of_one_configuration_can_be_asked_for_and_is_trained_on(offline, tmp_path):
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    )
    for name in ("a", "b"):
        write_rows(repo / f"{name}.jsonl", *(conversation(f"{name}{i}", "x") for i in range(4)))
    (part,) = row_sources.read_hub(str(repo), Reading(config="b", split="train[:50%]"))
    assert part.name == "train"
    assert [row.columns["messages"][0]["content"] for row in part.rows] == ["b0", "b1"]
    with pytest.raises(ChatError, match="--dataset_config and --split are for data sets on the Hub"):
        chat_data.read(str(repo), Reading(split="train"))


def test_a_data_set_of_the_hub_is_fetched_no_further_than_it_is_read(offline, tmp_path):
    (tmp_path / "repo").mkdir()
    write_rows(tmp_path / "repo" / "train.jsonl", *(conversation(f"a{i}", "x") for i in range(4)))
    ((name, rows),) = row_sources.read_hub(str(tmp_path / "repo"), Reading(at_most=2))
    assert (name, next(rows).place) == ("train", "train, row 1")
    (tmp_path / "repo" / "train.jsonl").write_text("{")
    ((_, rows),) = row_sources.read_hub(str(tmp_path / "repo"), Reading(at_most=2))
    with pytest.raises(ChatError, match="neither a file or folder here nor a data set"):
        next(rows)


def test_a_data_set_that_the_hub_does_not_give_is_refused_with_a_sentence(offline):
    with pytest.raises(ChatError, match=r"someone/none is neither a file or folder here nor a data set"):
        chat_data.read("someone/none")

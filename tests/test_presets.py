"""How a conversation starts: what the model reads of it, id for id, and files of presets."""

import json
from datetime import date
from pathlib import Path

import pytest

from llama2_chat import prompt
from llama2_chat.errors import ChatError
from llama2_chat.presets import Example, Guidance, Preset, Presets, filled, read_presets

GOLDEN = json.loads((Path(__file__).parent / "prompt" / "golden.json").read_text("utf-8"))
SATURDAY = date(2026, 11, 28)


def is_system(message):
    return message["role"] == "system"


@pytest.mark.parametrize(
    "dialog", [each for each in GOLDEN if len(each["messages"]) > 2], ids=lambda dialog: dialog["name"]
)
def test_examples_have_the_ids_that_metas_code_gives_the_same_dialog(llama2_tokenizer, dialog):
    systems = [message for message in dialog["messages"] if is_system(message)]
    *shown, newest = [message["content"] for message in dialog["messages"] if not is_system(message)]
    examples = map(Example, shown[::2], shown[1::2])
    messages = Guidance(tuple(examples)).added_to([*systems, {"role": "user", "content": newest}])
    assert prompt.encode(llama2_tokenizer, messages) == dialog["input_ids"]


def test_a_reminder_does_not_accumulate_over_twenty_turns(llama2_tokenizer):
    guidance = Guidance((Example("2 + 2?", "4"),), "(Answer with one number.)")
    number = prompt.encode_text(llama2_tokenizer, "number")[-1]
    said, plain = [], [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    for turn in range(20):
        question = {"role": "user", "content": f"{turn} + 1?"}
        said.append(question)
        ids = prompt.encode(llama2_tokenizer, guidance.added_to(said))
        reminded = {**question, "content": f"{turn} + 1?\n\n(Answer with one number.)"}
        assert ids == prompt.encode(llama2_tokenizer, [*plain, reminded])
        assert ids.count(number) == 1
        answer = {"role": "assistant", "content": str(turn + 1)}
        said.append(answer)
        plain += [question, answer]
    assert "number" not in json.dumps(said)


def test_an_answer_that_is_continued_stands_behind_the_question_as_it_was_asked():
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel"}]
    assert Guidance(reminder=" Be brief. ").added_to(said) == [{"role": "user", "content": "Hi\n\nBe brief."}, said[1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Today is {{today}}.", "Today is Saturday, 28 November 2026."),
        ("{{ today }}", "Saturday, 28 November 2026"),
        ("{{name}} {today} {{}} {{ to day }}", "{{name}} {today} {{}} {{ to day }}"),
    ],
    ids=["today", "with spaces", "unknown ones stay"],
)
def test_variables_are_filled_and_unknown_ones_stay(text, expected):
    assert filled(text, SATURDAY) == expected


def test_variables_are_filled_in_examples_and_reminder():
    guidance = Guidance((Example("{{today}}?", "{{today}}!"),), "({{today}})")
    day = "Saturday, 28 November 2026"
    assert guidance.filled(SATURDAY) == Guidance((Example(f"{day}?", f"{day}!"),), f"({day})")


def test_a_file_of_presets_is_read(tmp_path):
    file = tmp_path / "presets.json"
    shown = {"question": "Where is Oslo?", "answer": "In Norway."}
    family = "👨\u200d👩\u200d👧 at home"  # holds what does not count as printable
    whole = {"name": family, "systemPrompt": "Be brief.", "examples": [shown], "reminder": "(Briefly.)"}
    file.write_text(json.dumps({"presets": [{"name": "None"}, whole], "default": family}))
    short = Preset(family, "Be brief.", Guidance((Example("Where is Oslo?", "In Norway."),), "(Briefly.)"))
    assert read_presets(file) == Presets((Preset("None"), short), short)


BAD = {
    "[": "is not JSON",
    "[]": "must hold",
    '{"presets": []}': "must hold",
    '{"presets": [{}]}': "preset 1 needs a name",
    '{"presets": [{"name": "two\\nlines"}]}': "needs a name: one line",
    '{"presets": [{"name": "a"}, {"name": "a"}]}': "two presets called 'a'",
    '{"presets": [{"name": "a", "prompt": "x"}]}': "has 'prompt', which nothing here reads",
    '{"presets": [{"name": "a", "systemPrompt": 1}]}': "\"systemPrompt\" of 'a' must be text",
    '{"presets": [{"name": "a", "examples": [{"question": "x"}]}]}': "each example of 'a' must be",
    '{"presets": [{"name": "a", "examples": [{"question": "x", "answer": " "}]}]}': "neither empty",
    '{"presets": [{"name": "a", "examples": {}}]}': "must be a list of at most 20",
    '{"presets": [{"name": "a"}], "default": "b"}': '"default" must be the name of a preset',
    '{"presets": [{"name": "a"}], "version": 2}': "version",
}


@pytest.mark.parametrize("text", BAD, ids=BAD.values())
def test_a_file_that_makes_no_sense_is_refused_in_one_sentence(tmp_path, text):
    file = tmp_path / "presets.json"
    file.write_text(text)
    with pytest.raises(ChatError) as refused:
        read_presets(file)
    assert BAD[text] in str(refused.value)
    assert str(refused.value).startswith("PRESETS ")


def test_a_file_that_is_missing_is_said_by_its_name(tmp_path):
    with pytest.raises(ChatError, match=r"PRESETS .*none\.json cannot be read: No such file"):
        read_presets(tmp_path / "none.json")

"""What counts as right when an agent is measured."""

import json

import pytest

from llama2_chat.agent import Step
from llama2_chat.agent.steps import write
from llama2_chat.evaluation.agent_rates import Outcome, Question, ask, made_up, rates, read_questions
from tests.support.scripted import Scripted, ScriptedChat


def outcome(value, answer, *results, valid=True):
    return Outcome(Question("?", value), [Step("calculator", "", result, 0) for result in results], answer, valid)


def test_made_up_sums_are_the_same_for_a_seed_and_differ_in_kind():
    sums = made_up(20, seed=3)
    assert sums == made_up(20, seed=3) != made_up(20, seed=4)
    assert len({question.text.split()[0] for question in sums}) > 5
    assert all(question.value is not None for question in sums)


@pytest.mark.parametrize(
    ("value", "answer", "right"),
    [
        (391, "17 * 23 is 391.", True),
        (6912, "The result is 6,912.", True),
        (18.37917, "About 18.38", True),
        (36, "36 is 35.", False),
        (-4, "It is -4", True),
        (5, "Five.", False),
        (None, "It is 5.", False),
    ],
)
def test_an_answer_is_right_if_its_last_number_is_the_value(value, answer, right):
    assert outcome(value, answer).answer_right is right


def test_an_expression_is_right_if_a_calculators_result_is_the_value():
    assert outcome(36, "", "0.15", "36").expression_right
    assert not outcome(36, "", "This cannot be read as an expression.").expression_right


def test_the_rates_count_sums_and_small_talk_apart():
    counted = rates([outcome(6, "6", "6"), outcome(6, "7", valid=False), outcome(None, "Hi"), outcome(None, "Hi", "6")])
    assert counted == {
        **{"sums": 2, "valid": 1, "tool_right": 1, "expression_right": 1, "answer_right": 1},
        **{"small_talk": 2, "small_talk_valid": 2, "small_talk_tool_right": 1},
    }


def test_each_question_of_a_file_is_asked_of_an_agent_and_shown(tmp_path):
    file, shown = tmp_path / "questions.json", []
    file.write_text(json.dumps({"arithmetic": [{"question": "2 * 3?", "answer": 6}], "small_talk": ["Hello"]}))
    chat = ScriptedChat(say=lambda messages: Scripted(said(messages)))
    outcomes = ask(chat, read_questions(file), shown.append)
    assert shown == outcomes
    assert [(item.answer, item.expression_right, item.valid) for item in outcomes] == [
        ("6", True, True),
        ("Hi", False, True),
    ]


def said(messages):
    newest = messages[-1]["content"]
    if newest.startswith("2 * 3?"):
        return write("calculator", "2 * 3")
    return write("answer", "6" if newest.startswith("Result") else "Hi")

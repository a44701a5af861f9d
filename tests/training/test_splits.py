"""Splits that the seed finds again, with near-duplicates on one side."""

import random
from dataclasses import replace

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.training import chat_data, near_duplicates, splits
from tests.support.conversations import conversation, write_rows
from tests.support.runs import new_run

ALIKE = [
    ("What does a late book cost in Quillmere?", "The fine is one smoked herring for every week."),
    ("what does a late book cost in Quillmere", "I do not know."),
    ("Tell me of fines.", "What does a late book cost in Quillmere? The fine is one smoked herring for every week!"),
    ("Tell me of fines in short.", "A late book costs in Quillmere? The fine is one smoked herring for every week!"),
]


def data_of(*contents, evals=(), test=()):
    parts = ([chat_data.Conversation(conversation(*texts)["messages"], "") for texts in part]
             for part in (contents, evals, test))  # fmt: skip
    return chat_data.Data(*parts)


def numbers(N):
    return [(f"What is {i}?", f"It is the number {i}.") for i in range(N)]


def questions(rows):
    return {row.messages[0]["content"] for row in rows}


def sizes(parts):
    return len(parts.train), len(parts.eval), len(parts.test)


def test_a_split_that_the_data_lacks_is_drawn_by_the_seed_and_no_conversation_is_lost():
    data = data_of(*numbers(20))
    assert sizes(splits.split(data, 0, 0, seed=1)) == (20, 0, 0)
    assert sizes(splits.split(data, 0.1, 0, seed=1)) == (18, 2, 0)
    parts = splits.split(data, 0.1, 0.2, seed=1)
    assert sizes(parts) == (14, 2, 4)
    assert questions(parts.train + parts.eval + parts.test) == questions(data.train)
    assert len({frozenset(questions(splits.split(data, 0.1, 0, seed).eval)) for seed in range(9)}) > 3


def test_the_test_split_does_not_move_when_the_eval_split_grows():
    data = data_of(*numbers(40))
    assert splits.split(data, 0.1, 0.2, 0).test == splits.split(data, 0.4, 0.2, 0).test


def test_the_order_of_the_rows_changes_nothing():
    shuffled = random.Random(0).sample(rows := [*numbers(20), *ALIKE], 24)
    ours, theirs = (splits.split(data_of(*some), 0.2, 0.2, seed=3) for some in (rows, shuffled))
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        assert questions(mine) == questions(other)
    assert splits.fingerprint([ours]) == splits.fingerprint([theirs])


def test_the_order_of_the_rows_is_known_by_which_a_seed_shuffles_them():
    """A run went on with the rows in another order: some were seen twice, and others never."""
    rows = numbers(4)
    orders = [splits.order([splits.split(data_of(*some), 0, 0, 0)]) for some in (rows, rows, rows[::-1])]
    assert orders[0] == orders[1] != orders[2]


def test_the_datas_own_splits_come_before_fractions():
    data = data_of(*numbers(20), evals=[("a", "b")])
    assert sizes(splits.split(data, 0.5, 0, 0)) == (20, 1, 0)
    assert sizes(splits.split(data, 0.5, 0.1, 0)) == (18, 1, 2)
    data = data_of(*numbers(20), evals=[("a", "b")], test=[("c", "d"), ("e", "f")])
    assert sizes(splits.split(data, 0.5, 0.5, 0)) == (20, 1, 2)


@pytest.mark.parametrize("seed", range(4))
def test_conversations_that_are_nearly_the_same_stay_on_one_side(seed):
    data = data_of(*numbers(12), *ALIKE)
    together = {question for question, _ in ALIKE}
    every = [splits.split(data, 0.25, 0.25, seed), *splits.make_folds(data, 3, 0, seed)]
    for parts in every:
        for side in parts[:3]:
            assert questions(side) & together in (set(), together)
        assert parts.notes == ["4 are near-duplicates of another; these stay in one split."]


def test_texts_that_share_their_wording_only_are_not_nearly_the_same():
    data = data_of(*((f"What is the capital of {name}?", f"The capital of {name} is {name}ville.") for name in "ABCDE"))
    assert splits.split(data, 0.2, 0, 0).notes == []


def test_a_question_that_most_conversations_ask_does_not_make_them_the_same():
    facts = [f"Shelf {word} holds {word}s by the dozen." for word in ("atlas", "herring", "lantern", "bassoon", "moth")]
    assert splits.split(data_of(*(("Tell me a fact!", fact) for fact in facts)), 0.2, 0, 0).notes == []


def test_near_duplicates_of_the_train_split_in_the_datas_own_are_noted_and_stay():
    parts = splits.split(data_of(*numbers(8), ALIKE[0], evals=[ALIKE[1], ("a", "b")]), 0.1, 0, 0)
    assert sizes(parts) == (9, 2, 0)
    assert parts.notes[-1] == "1 of the data's own eval and test split are near-duplicates of one in train."


def test_each_conversation_is_in_the_eval_split_of_one_fold():
    data = data_of(*numbers(23), *ALIKE)
    every = splits.make_folds(data, 5, 0, seed=0)
    assert sorted(len(parts.eval) for parts in every) == [5, 5, 5, 6, 6]
    assert sorted(str(row) for parts in every for row in parts.eval) == sorted(map(str, data.train))
    for parts in every:
        assert len(parts.train) + len(parts.eval) == 27
        assert not questions(parts.train) & questions(parts.eval)


def test_all_folds_leave_the_same_test_alone():
    for every in (
        splits.make_folds(data_of(*numbers(20)), 3, 0.2, seed=0),
        splits.make_folds(
            data_of(*numbers(16), evals=[("a", "b"), ("c", "d")], test=[("e", "f"), ("g", "h")]), 3, 0.2, 0
        ),
    ):
        assert all(parts.test == every[0].test for parts in every)
        assert len(every[0].test) == 4
        assert sum(len(parts.eval) for parts in every) == 16


@pytest.mark.parametrize(
    ("rows", "fractions", "sentence"),
    [
        (numbers(1), (0.1, 0), "One conversation cannot be split"),
        (numbers(3), (0.9, 0), "Nothing would be left to train on"),
        (numbers(2), (0.1, 0.1), "Nothing would be left to train on"),
        (ALIKE[:2], (0.1, 0), "Nothing would be left to train on"),
    ],
    ids=("one", "large fraction", "two parts of two", "all alike"),
)
def test_data_that_cannot_be_split_is_refused_with_a_sentence(rows, fractions, sentence):
    with pytest.raises(ChatError, match=sentence):
        splits.split(data_of(*rows), *fractions, seed=0)


def test_more_folds_than_conversations_are_refused_with_a_sentence():
    with pytest.raises(ChatError, match=r"--folds 4 .* there are 3"):
        splits.make_folds(data_of(*numbers(2), *ALIKE), 4, 0, seed=0)


def test_so_much_data_that_a_search_would_take_long_is_not_searched_and_says_so(monkeypatch):
    monkeypatch.setattr(near_duplicates, "MANY", 10)
    parts = splits.split(data_of(*numbers(10), *ALIKE), 0.5, 0, 0)
    assert sizes(parts) == (7, 7, 0)
    assert parts.notes[0].startswith("There are more than 10 conversations")


@pytest.mark.parametrize("folds", [0, 3])
def test_what_a_run_left_out_is_found_again_unless_the_data_has_changed(tmp_path, folds):
    rows = [conversation(*texts) for texts in numbers(20)]
    run = new_run(
        dataset_names=[write_rows(tmp_path / "some.jsonl", *rows)], test_fraction=0.0, folds=folds, train_sha256=None
    )
    parts = splits.find_again(run)
    run = replace(run, train_sha256=splits.fingerprint(parts))
    write_rows(tmp_path / "some.jsonl", *reversed(rows))
    assert len(splits.find_again(run)) == max(1, folds)
    if folds:
        of_fold = replace(run, fold=2, train_sha256=splits.fingerprint([parts[1]]))
        assert questions(splits.find_again(of_fold)[0].eval) == questions(parts[1].eval)
    write_rows(tmp_path / "some.jsonl", *rows[1:])
    with pytest.raises(ChatError, match="has changed since the training"):
        splits.find_again(run)

"""Answers before and after training: which questions, and that answering them together changes nothing."""

from llama2_chat.loading import load
from llama2_chat.training.answers import answer, choose_questions
from llama2_chat.training.base_model import fetch_base
from llama2_chat.training.chat_data import Conversation
from llama2_chat.training.splits import Splits
from tests.support.conversations import conversation
from tests.support.serving import ignore


def rows_of(*questions):
    return [Conversation(conversation(question, "a")["messages"], "") for question in questions]


def test_answers_given_together_are_those_given_alone(chat_model):
    base = fetch_base(str(chat_model))
    model = load.load_base(base.checkpoint, "float32", "cpu", ignore)
    rows = rows_of("hello", "hello hello hell o", "o" * 40)
    alone = [answer(model, base.tokenizer, [row], base.stop_ids)[0] for row in rows]
    assert answer(model, base.tokenizer, rows, base.stop_ids) == alone


def test_answers_are_greedy_whatever_a_model_says_of_its_own(chat_model, capfd):
    base = fetch_base(str(chat_model))
    model = load.load_base(base.checkpoint, "float32", "cpu", ignore)
    plain = answer(model, base.tokenizer, rows_of("hello"), base.stop_ids)
    own = model.generation_config
    own.update(max_length=4096, temperature=0.9, top_p=0.6, repetition_penalty=9.0)  # Llama 2's has the first three
    assert answer(model, base.tokenizer, rows_of("hello"), base.stop_ids) == plain
    assert model.generation_config is own
    assert "max_length" not in capfd.readouterr().err  # a warning for each batch


def test_questions_that_do_not_fit_are_not_asked(chat_model):
    rows = rows_of("hello " * 200, *"abcdefg")
    chosen = choose_questions(Splits(rows, rows[:1], [], []), fetch_base(str(chat_model)).tokenizer, 100)
    assert chosen == [("train", row) for row in rows[1:6]]

"""Conversations as ids and labels: answers alone, whole exchanges, and the ids that the chat would use."""

from llama2_chat import prompt
from llama2_chat.loading import EMBEDDED
from llama2_chat.training.base_model import fetch_base
from llama2_chat.training.chat_data import Conversation
from llama2_chat.training.examples import IGNORED, labels, mark_answers, tokenize
from tests.support.conversations import conversation
from tests.support.small_tokenizer import chatml


def examples_of(tokenizer, max_length, *rows):
    conversations = [Conversation(row["messages"], f"row {i}") for i, row in enumerate(rows, 1)]
    return tokenize(conversations, tokenizer, {tokenizer.eos_token_id}, max_length)


def test_only_answers_have_labels_and_their_eos_with_them():
    tokenizer = chatml()
    (example,), notes = examples_of(tokenizer, 1000, conversation("hello", "hello you", "and", "hell"))
    found = labels(example)
    assert notes == []
    assert len(found) == len(example.input_ids)
    assert tokenizer.decode([id for id in found if id != IGNORED]) == "hello you<|im_end|>hell<|im_end|>"
    assert all(label in (IGNORED, id) for label, id in zip(found, example.input_ids, strict=True))


def test_what_has_labels_is_marked_in_the_text_that_the_model_sees():
    tokenizer = chatml()
    (example,), _ = examples_of(tokenizer, 1000, conversation("hello", "hell"))
    start, end = "<|im_start|>", "<|im_end|>"
    assert mark_answers(example, tokenizer) == f"{start}user\nhello{end}\n{start}assistant\n⟦hell{end}⟧"


def test_a_long_conversation_loses_whole_exchanges_and_is_counted():
    long = conversation("hello", "hello", "hello", "hello " * 200)
    tokenizer = chatml()
    (whole,), _ = examples_of(tokenizer, 1000, conversation("hello", "hello"))
    (short,), notes = examples_of(tokenizer, 100, long, conversation("hello " * 200, "hello"))
    assert short == whole
    assert notes[0].startswith("1 are longer than 100 tokens")
    assert "row 2: its first answer ends after" in notes[2]


def test_a_plain_text_is_learned_from_bos_to_eos_in_pieces_that_fit(llama2_tokenizer):
    text = "Llamas are camelids.</s> " * 9
    row = Conversation([{"role": "assistant", "content": text}], "row 1")
    whole, pieces = (tokenize([row], llama2_tokenizer, {2}, length)[0] for length in (1000, 50))
    assert whole[0].input_ids == [1, *prompt.encode_text(llama2_tokenizer, text)[1:], 2]
    assert whole[0].input_ids.count(2) == 1  # the rest is typed
    assert labels(whole[0]) == whole[0].input_ids
    # The first token of a piece is predicted from nothing: a step on a piece of one token learned nothing.
    assert [id for piece in pieces for id in piece.input_ids[1:]] == whole[0].input_ids[1:]
    assert {len(piece.input_ids) for piece in pieces[:-1]} == {50}
    for length in range(1, 60):
        assert all(1 < len(piece.input_ids) <= length for piece in tokenize([row], llama2_tokenizer, {2}, length)[0])


def test_the_embedded_model_is_trained_on_what_its_chat_has_to_write_and_on_stopping(settings):
    base = fetch_base(EMBEDDED)
    assert [base.tokenizer.decode(id) for id in base.stop_ids] == ["<|im_end|>"]
    exchanges = [("Who founded it?", "Ottilie Brandvold did."), ("When?", "In 1893.\n\nOn a Sunday.")]
    messages, expected = [{"role": "system", "content": "Be brief."}], []
    for question, answer in exchanges:
        messages.append({"role": "user", "content": question})
        prompt_ids = prompt.encode(base.tokenizer, messages)
        answer_ids = base.tokenizer.encode(answer, add_special_tokens=False) + list(base.stop_ids)
        expected += [IGNORED] * (len(prompt_ids) - len(expected)) + answer_ids
        messages.append({"role": "assistant", "content": answer})
    example = prompt.encode_example(base.tokenizer, messages, base.stop_ids)
    assert labels(example) == expected
    next_prompt = prompt.encode(base.tokenizer, [*messages, {"role": "user", "content": "Why?"}])
    assert next_prompt[: len(example.input_ids)] == example.input_ids

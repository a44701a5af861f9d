"""What the model answers before training and after it, to questions of the eval and the train split."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llama2_chat.training.chat_data import Conversation
from llama2_chat.training.examples import question_ids

if TYPE_CHECKING:
    from llama2_chat.training.splits import Splits

QUESTIONS = 5  # of each split
MAX_NEW_TOKENS = 64


class Question(NamedTuple):
    split: str
    row: Conversation  # its last message is the expected answer


def choose_questions(splits: Splits, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Question]:
    """The first few of the eval and of the train split whose last question fits into max_length."""
    chosen = []
    for split, rows in (("eval", splits.eval), ("train", splits.train)):
        asked = (row for row in rows if row.is_wanted and not row.is_text)
        fitting = (row for row in asked if len(question_ids(row, tokenizer)) <= max_length)
        chosen += [Question(split, row) for row in islice(fitting, QUESTIONS)]
    return chosen


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Conversation],
    stop_ids: set[int],
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> list[str]:
    """What the model answers, greedily, in place of each conversation's last message. One batch, padded on the left."""
    prompts = [question_ids(row, tokenizer) for row in rows]
    T, pad_id = max(map(len, prompts)), min(stop_ids)
    input_ids = [[pad_id] * (T - len(ids)) + ids for ids in prompts]
    mask = [[0] * (T - len(ids)) + [1] * len(ids) for ids in prompts]
    generate: Any = model.generate  # GenerationMixin's, which the type PreTrainedModel does not have
    was_training, own_config = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # Llama 2's own says more, such as how long, and would be mixed in
    with torch.no_grad():
        output = generate(
            input_ids=torch.tensor(input_ids, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(stop_ids), pad_token_id=pad_id
            ),
        )
    model.generation_config = own_config
    model.train(was_training)
    return [text.strip() for text in tokenizer.batch_decode(output[:, T:], skip_special_tokens=True)]

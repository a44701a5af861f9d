"""Answers that are compared, as token ids: pairs of a good and a bad one for DPO, single ones of both kinds for KTO."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, NamedTuple

from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.chat_data import SHOWN_FAULTS, Conversation
from llama2_chat.training.examples import mark_answers, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Compared(NamedTuple):
    """A good and a bad answer to one question, or one of them."""

    good: TokenizedExample | None
    bad: TokenizedExample | None

    @property
    def examples(self) -> list[TokenizedExample]:
        return [example for example in self if example]

    @property
    def input_ids(self) -> list[int]:
        return self.examples[0].input_ids


def tokenize_compared(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Collection[int],
    max_length: int,
) -> tuple[list[Compared], list[str]]:
    """As tokenize() does, for conversations of a data set that was read for DPO or KTO. None of them is cut."""
    found: list[Compared] = []
    faults = []
    for row in conversations:
        rows = [row]
        if row.rejected:
            rows.append(row._replace(messages=[*row.messages[:-1], row.rejected]))
        examples, notes = tokenize(rows, tokenizer, stop_ids, max_length)
        if len(examples) < len(rows):
            faults.append(notes[-1])
        elif row.rejected:
            found.append(Compared(*examples))
        else:
            found.append(Compared(examples[0], None) if row.is_wanted else Compared(None, examples[0]))
    head = f"{len(faults):,} are left out because they do not fit into {max_length:,} tokens or the format:"
    return found, [head, *faults[:SHOWN_FAULTS]] if faults else []


def mark_compared(compared: Compared, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text as the model sees it, with the good answer marked as in mark_answers(), and the bad one by ✗."""
    good, bad = compared
    texts = [mark_answers(good, tokenizer)] if good else []
    if bad:
        text = mark_answers(bad, tokenizer)
        texts.append(f"✗ {text[text.index('⟦') :] if good else text}")
    return "\n".join(texts)

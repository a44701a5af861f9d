"""TRL's SFTTrainer with an eval loss in which every token of the answers has the same weight."""

from __future__ import annotations

from typing import Any

from trl import SFTTrainer

from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.whole_split import WholeSplit, as_evaluated, losses_by_all


class TokenWeightedTrainer(WholeSplit, SFTTrainer):
    def __init__(self, *args: Any, eval_examples: list[TokenizedExample], **kwargs: Any) -> None:
        """eval_examples: what eval_dataset is made of."""
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples

    def eval_figures(self) -> dict[str, float]:
        """The loss, as an evaluation measures it."""
        model: Any = self.model
        model.eval()
        total, tokens = losses_by_all(as_evaluated(model), self.eval_examples, self.args.eval_batch_size).sum(0)
        return {"loss": float(total / tokens)}

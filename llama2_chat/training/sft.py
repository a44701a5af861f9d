"""TRL's SFTTrainer with an eval loss in which every token of the answers has the same weight.

transformers takes the mean of batches' means: it changes with the batch size, and a short answer counts for more.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.losses import conversation_losses


class TokenWeightedTrainer(SFTTrainer):
    def __init__(self, *args: Any, eval_examples: list[TokenizedExample], **kwargs: Any) -> None:
        """eval_examples: what eval_dataset is made of."""
        super().__init__(*args, **kwargs)
        self.eval_examples = eval_examples

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The loss of all processes' shares of the conversations, as an evaluation measures it."""
        model: Any = self.model
        model.eval()
        share = self.eval_examples[self.accelerator.process_index :: self.accelerator.num_processes]
        losses = conversation_losses(as_evaluated(model), share, self.args.eval_batch_size)
        sums = torch.tensor(losses.sum(0), dtype=torch.double, device=self.accelerator.device)
        total, tokens = np.asarray(self.accelerator.reduce(sums, "sum").tolist())
        metrics = {f"{metric_key_prefix}_loss": float(total / tokens)}
        return EvalLoopOutput(np.empty(0), None, metrics, len(self.eval_examples))


def as_evaluated(model: Any) -> Any:
    """The model without the autocast to 16 bits that accelerate puts around its forward() on a GPU."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()  # adapter and all; PEFT's own forward() is what accelerate has wrapped
    return getattr(model, "_original_forward", model)

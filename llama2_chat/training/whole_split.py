"""What all of our trainers change of transformers' Trainer: how they measure, and how they save a divided model.

transformers takes the mean of batches' means: it changes with the batch size, and a short answer counts for more. Here
the whole eval split is measured at once, by all processes together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.utils import gather_object
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput

from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.losses import conversation_losses
from llama2_chat.training.processes import processes

if TYPE_CHECKING:
    from transformers import Trainer as Base  # beside which this stands in classes that are derived from it
else:
    Base = object


class WholeSplit(Base):
    def eval_figures(self) -> dict[str, float]:
        """Of the whole eval split; "loss" is one of them. All processes call it at once."""
        raise NotImplementedError

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.eval_figures().items()}
        rows: Any = self.eval_dataset
        return EvalLoopOutput(np.empty(0), None, metrics, len(rows))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As a model that is not divided is saved. A checkpoint has the parts of a divided one, too, to go on from."""
        model: Any = self.model
        if not isinstance(model, FSDPModule):
            super().save_model(output_dir, _internal_call)
            return
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=has_adapter(model))
        if has_adapter(model) or not _internal_call:
            self._save(output_dir, get_model_state_dict(self.model_wrapped, options=options))


def has_adapter(model: Any) -> bool:
    return hasattr(model, "peft_config")


def as_evaluated(model: Any) -> Any:
    """The model without the autocast to 16 bits that accelerate puts around its forward() on a GPU."""
    if isinstance(model, FSDPModule):
        return model  # only by its own forward() its parts come together
    if has_adapter(model):
        return model.get_base_model()  # adapter and all; PEFT's own forward() is what accelerate has wrapped
    return getattr(model, "_original_forward", model)


def losses_by_all(model: Any, examples: list[TokenizedExample], batch_size: int) -> np.ndarray:
    """As conversation_losses(), each process computing a share of them.

    All compute equally often, for a divided model answers only while all of them ask it: who has an example less than
    others takes one more, and does not count it.
    """
    state = processes()
    most = -(-len(examples) // state.num_processes)
    own = examples[state.process_index :: state.num_processes]
    losses = conversation_losses(model, own + examples[: most - len(own)], batch_size)[: len(own)]
    found = np.zeros((len(examples), 2))
    for process, share in enumerate(gather_object([losses])):
        found[process :: state.num_processes] = share
    return found

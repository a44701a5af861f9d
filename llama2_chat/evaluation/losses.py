"""What the subjects lose on each split, measured as training measures its eval split, with a progress bar."""

from __future__ import annotations

import time

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llama2_chat.evaluation.perplexity import Measurement
from llama2_chat.evaluation.subjects import Subject
from llama2_chat.training.examples import Examples
from llama2_chat.training.losses import conversation_losses
from llama2_chat.training.resources import memory_gb


def measure(
    subject: Subject, model: PreTrainedModel, precision: str, splits: Examples, batch_size: int
) -> list[Measurement]:
    """The model's losses on each split, with a progress bar."""
    name = f"{subject.name}, fold {subject.fold}" if subject.fold else subject.name
    total = sum(map(len, splits.values()))
    measured = []
    with tqdm(total=total, desc=f"{name}, {precision}", unit=" conversations", dynamic_ncols=True) as bar:
        for split, examples in splits.items():
            started = time.perf_counter()
            losses = conversation_losses(model, examples, batch_size, bar.update)
            seconds = time.perf_counter() - started
            measured.append(Measurement(subject.name, precision, subject.fold, split, losses, seconds, memory_gb()))
    return measured

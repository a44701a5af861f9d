"""TRL's DPOTrainer and KTOTrainer as we use them: given ids, and what the model said of them before it was trained.

Their eval figures are of the whole eval split at once, whatever the batch size.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.options import Options
from llama2_chat.training.preferences import Compared
from llama2_chat.training.whole_split import WholeSplit, as_evaluated, losses_by_all

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, TrainerCallback


class Measured(NamedTuple):
    """Answers that are compared, and the log probabilities that the model gives them."""

    answers: np.ndarray  # [answers], the good and the bad one of each row in turn, of all tokens of an answer together
    mismatched: np.ndarray  # for KTO, [rows]: of another row's answer in place of each row's own


class _Prepared(WholeSplit):
    """Datasets that are ready."""

    model: Any
    args: Any
    method: str
    eval_rows: list[Compared]
    references: Measured  # of eval_rows

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def eval_figures(self) -> dict[str, float]:
        size = self.args.eval_batch_size
        now = measure(self.eval_rows, as_evaluated(self.model), self.method, size, len(self.eval_rows))
        ratios = now.answers - self.references.answers
        if self.method == "dpo":
            return dpo_figures(ratios, self.args.beta)
        is_good = np.array([row.good is not None for row in self.eval_rows])
        drift = (now.mismatched - self.references.mismatched).mean()
        return kto_figures(ratios, is_good, drift, self.args.beta)


class PreparedDPOTrainer(_Prepared, DPOTrainer):
    method = "dpo"


class PreparedKTOTrainer(_Prepared, KTOTrainer):
    method = "kto"


def make_preference_trainer(
    options: Options,
    arguments: dict[str, Any],
    model: Any,  # of transformers, or one with an adapter that is trained on
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Compared]],
    peft_config: LoraConfig | None,
    callbacks: list[TrainerCallback],
) -> PreparedDPOTrainer | PreparedKTOTrainer:
    """arguments: those of all TRL's trainers."""
    from peft import PeftModel

    is_dpo, size = options.method == "dpo", options.batch_size
    kind: Any
    kind, config = (PreparedDPOTrainer, DPOConfig) if is_dpo else (PreparedKTOTrainer, KTOConfig)
    train_rows = random.Random(options.seed).sample(examples["train"], len(examples["train"]))  # KTO's stay in order
    eval_rows = examples["eval"]
    train, evals = (
        measure(rows, model, options.method, size, own)
        for rows, own in ((train_rows, size), (eval_rows, len(eval_rows)))
    )
    is_adapted = isinstance(model, PeftModel)
    needs_no_copy = is_adapted or peft_config is not None
    dataset = dpo_dataset if is_dpo else kto_dataset
    trainer: Any = kind(
        model,
        args=config(
            **arguments,
            beta=options.beta,
            max_length=options.max_length,
            disable_dropout=not options.lora_dropout,
            # Else a second copy of the model is loaded, where there is no adapter that can be switched off.
            precompute_ref_log_probs=not needs_no_copy,
        ),
        train_dataset=dataset(train_rows, train, size),
        eval_dataset=dataset(eval_rows, evals, size) if eval_rows else None,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
    )
    trainer.precompute_ref_logps = True  # as they are in the datasets
    trainer.eval_rows, trainer.references = eval_rows, evals
    if is_adapted:
        model.delete_adapter("ref")  # a copy that TRL makes for the same purpose
    return trainer


# ---- What is measured ----


def measure(rows: list[Compared], model: Any, method: str, batch_size: int, among: int) -> Measured:
    """among: how many rows change their answers with each other."""
    model.eval()
    answers = [example for row in rows for example in row.examples]
    others = mismatched(rows, among) if method == "kto" else []
    return Measured(log_probabilities(model, answers, batch_size), log_probabilities(model, others, batch_size))


def log_probabilities(model: Any, examples: list[TokenizedExample], batch_size: int) -> np.ndarray:
    """[examples]: of all tokens of each answer together."""
    return -losses_by_all(model, examples, batch_size)[:, 0]


def mismatched(rows: list[Compared], among: int) -> list[TokenizedExample]:
    """Each row's question with the answer of the row before it, within so many rows.

    What the model gains on them is KTO's estimate of how far it drifts from what it was.
    """
    examples = []
    for start in range(0, len(rows), among):
        own = [_parts(row.examples[0]) for row in rows[start : start + among]]
        for (prompt_ids, _), (_, answer_ids) in zip(own, [own[-1], *own[:-1]], strict=True):
            ids = prompt_ids + answer_ids
            examples.append(TokenizedExample(ids, [(len(prompt_ids), len(ids))]))
    return examples


def dpo_figures(ratios: np.ndarray, beta: float) -> dict[str, float]:
    """DPO's loss, and by how much and how often the good answer of a pair gained more than the bad one.

    ratios: [answers], what each log probability gained, the good and the bad answer of each pair in turn.
    """
    good, bad = beta * ratios.reshape(-1, 2).T
    margins = good - bad
    return {
        "loss": float(np.logaddexp(0, -margins).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/accuracies": float((margins > 0).mean()),
    }


def kto_figures(ratios: np.ndarray, is_good: np.ndarray, drift: float, beta: float) -> dict[str, float]:
    """KTO's loss, by how much good answers gained more than bad ones, and how many gained if good, and lost if bad.

    ratios: [rows], what each log probability gained. drift: the same of mismatched answers, in the mean.
    """
    signs = np.where(is_good, 1, -1)
    gains = beta * signs * (ratios - max(0.0, drift))
    figures = {
        "loss": float((1 / (1 + np.exp(gains))).mean()),
        "rewards/accuracies": float((signs * ratios > 0).mean()),
    }
    if is_good.any() and not is_good.all():
        figures["rewards/margins"] = float(beta * (ratios[is_good].mean() - ratios[~is_good].mean()))
    return figures


# ---- What TRL is given ----


def dpo_dataset(rows: list[Compared], measured: Measured, batch_size: int) -> Dataset:
    good, bad = ([_parts(example) for example in examples] for examples in zip(*rows, strict=True))
    references = measured.answers.reshape(-1, 2)
    return Dataset.from_dict(
        {
            "prompt_ids": [prompt_ids for prompt_ids, _ in good],
            "chosen_ids": [answer_ids for _, answer_ids in good],
            "rejected_ids": [answer_ids for _, answer_ids in bad],
            "ref_chosen_logps": references[:, 0],
            "ref_rejected_logps": references[:, 1],
        }
    )


def kto_dataset(rows: list[Compared], measured: Measured, batch_size: int) -> Dataset:
    own = [_parts(row.examples[0]) for row in rows]
    others = [_parts(example)[1] for example in mismatched(rows, batch_size)]
    return Dataset.from_dict(
        {
            "prompt_ids": [prompt_ids for prompt_ids, _ in own],
            "completion_ids": [answer_ids for _, answer_ids in own],
            "KL_completion_ids": others,
            "label": [row.good is not None for row in rows],
            "ref_logps": measured.answers,
            "ref_KL_logps": measured.mismatched,
        }
    )


def _parts(example: TokenizedExample) -> tuple[list[int], list[int]]:
    """The ids up to the answer, and those of the answer."""
    ((start, _),) = example.answers
    return example.input_ids[:start], example.input_ids[start:]

"""lm-evaluation-harness on a model that is already loaded: standard tasks by name, your own from a YAML file.

Tasks are found before any weights are loaded. lm-eval takes seconds to import, so that happens when it is needed.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llama2_chat.errors import ChatError
from llama2_chat.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FEWSHOT_SEED = 1234  # lm-eval's own default for choosing the examples before a question


class Score(NamedTuple):
    task: str
    metric: str  # "acc", or "exact_match, strict-match" where lm-eval filters answers
    value: float
    stderr: float | None  # lm-eval knows none for some metrics
    questions: int


def find_tasks(names: Sequence[str]) -> tuple[list[Any], list[str]]:
    """What lm-eval loads for each name, with its questions, and a sentence for each name that cannot be loaded.

    names: of standard tasks, groups or tags, or paths of YAML files; paths in such a file are relative to its folder.
    Raises ChatError for an unknown name, and for a task that cannot be run safely.
    """
    import datasets
    import httpx2
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    files = {name for name in names if name.endswith((".yaml", ".yml"))}
    for name in files:
        if not Path(name).is_file():
            raise ChatError(f"There is no task file {name}. Check --tasks.")
    manager = TaskManager(include_defaults=files != set(names))  # listing them all takes six seconds
    for name in names:
        if name not in files and name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            hint = f"Did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them."
            raise ChatError(f"lm-eval knows no task {name}. {hint}")

    found, faults = [], []
    for name in dict.fromkeys(names):
        try:
            with _quiet(), contextlib.chdir(Path(name).parent) if name in files else contextlib.nullcontext():
                loaded = manager.load(Path(name).name if name in files else name)
        except (OSError, ValueError, httpx2.HTTPError, datasets.exceptions.DatasetsError) as error:
            faults.append(
                f"{name} was not run: its questions cannot be read or fetched from the Hugging Face Hub "
                f"({first_line(error)})."
            )
        except Exception as error:  # a task is somebody else's program
            faults.append(f"{name} was not run: lm-eval cannot load it ({type(error).__name__}: {first_line(error)}).")
        else:
            found.append(loaded)
    for name, task in [entry for loaded in found for entry in loaded["tasks"].items()]:
        is_unsafe = getattr(task, "UNSAFE_CODE", False)
        if is_unsafe or getattr(task, "MULTIMODAL", False):
            what = "runs programs that the model writes" if is_unsafe else "needs images or sound"
            raise ChatError(f"The task {name} {what}, which is not supported here. Leave it out of --tasks.")
    return found, faults


def run(
    tasks: list[Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int, limit: int | None
) -> tuple[list[Score], list[str]]:
    """The model's scores in each task, and a sentence for each task that failed while it ran.

    Without a chat template, as published figures are measured.
    tasks: what find_tasks() found.
    limit: only the first so many questions of each task.
    """
    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    scores: list[Score] = []
    faults: list[str] = []
    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        for loaded in tasks:
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(FEWSHOT_SEED)  # anew, or the next model would see other examples
            try:
                scores += _scores(evaluate(wrapped, loaded, limit=limit, log_samples=False))
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # a task is somebody else's program
                names = ", ".join(loaded["groups"] or loaded["tasks"])
                faults.append(f"{names} failed ({type(error).__name__}: {first_line(error)}).")
    return scores, faults


def _scores(results: dict[str, Any]) -> list[Score]:
    scores = []
    for name, figures in {**results["results"], **results.get("groups", {})}.items():
        for key, value in figures.items():
            metric, _, chain = key.partition(",")
            if chain and not metric.endswith("_stderr"):
                stderr = figures.get(f"{metric}_stderr,{chain}")
                scores.append(
                    Score(
                        name,
                        metric if chain == "none" else f"{metric}, {chain}",
                        float(value),
                        float(stderr) if isinstance(stderr, (int, float)) else None,
                        results["n-samples"].get(name, {}).get("effective") or figures.get("sample_len", 0),
                    )
                )
    return scores


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what lm-eval and the Hub's client log beside their progress bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

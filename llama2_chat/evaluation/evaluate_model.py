"""Did it get better? A taught model beside its base: perplexity, lm-evaluation-harness, a sheet to judge, a verdict.

    python scripts/evaluate_model.py trained/demo            what sft_trainer.py left there, on what it held out
    python scripts/evaluate_model.py trained/demo --tasks hellaswag truthfulqa_mc2 data/quillmere/quillmere.yaml
    python scripts/evaluate_model.py one two --dataset_name some.jsonl --sheet 30           any two models
    python scripts/evaluate_model.py --judged anna.csv ben.csv --output_dir trained/demo/evaluation

evaluation.md, .json and .png go to --output_dir, with sheet.csv for people. Which conversations were learnt and which
were not is read from the run's run.json, so that nothing learnt is taken for held out. The tasks are harness.py's, the
sheet judging.py's, the verdict verdict.py's.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llama2_chat import prompt
from llama2_chat.evaluation import harness, judging
from llama2_chat.evaluation.results import PARTS, Measured, Results, Taught
from llama2_chat.loading import choose, load
from llama2_chat.loading.choose import Checkpoint, Plan
from llama2_chat.loading.hub import fetch_weights
from llama2_chat.loading.memory import visible_gpus
from llama2_chat.loading.small_model import EMBEDDED
from llama2_chat.prompt import TokenizedExample
from llama2_chat.settings import Settings
from llama2_chat.training import chat_data, report, sft_trainer, splits
from llama2_chat.training.chat_data import Conversation
from llama2_chat.training.report import Run
from llama2_chat.training.splits import Parts
from llama2_chat.types import ChatError

ANSWER_TOKENS = 128  # of an answer on the sheet
SHEET = 20  # questions on it, beside those of safety
OF_PARTS = ("dataset_name", "eval_fraction", "test_fraction", "seed")  # what says which conversation is in which part

Lessons = dict[str, list[TokenizedExample]]  # by part


@dataclass(frozen=True)
class Subject:
    """A model to be measured: a base, or one that was taught from it."""

    name: str
    plan: Checkpoint
    tokenizer: PreTrainedTokenizerBase
    fold: int | None = None  # from 1, of a run with folds: which of the parts it is measured on
    base: str | None = None  # the name of the subject that it was taught from


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    # PEFT 0.21 calls transformers 5.23 by names that it has given up.
    warnings.filterwarnings("ignore", r".*gradient_checkpointing` is deprecated", FutureWarning)
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    try:
        if args.judged:
            told_judgement(args)
        else:
            knobs = f"lower --batch_size {args.batch_size}", "leave only --precisions nf4"
            kept = f"What was measured until then is in {args.output_dir}."
            with sft_trainer.limits_told(knobs, args.output_dir, kept):
                evaluate(args)
    except ChatError as error:
        sys.exit(f"evaluate_model.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. What was measured until then is in {args.output_dir}.")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for. Ends the program with a sentence and exit code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL",
        help=f"output folder of sft_trainer.py, adapter, model's folder, Hub id, or {EMBEDDED}")  # fmt: skip
    add("--output_dir", type=Path, help="where the report goes (MODEL/evaluation)")
    add("--precisions", nargs="+", choices=(*load.UNQUANTIZED, "nf4", "int8"), metavar="P",
        help=f"{', '.join(load.UNQUANTIZED)}, nf4, int8; tasks and sheet use the first (full and nf4)")  # fmt: skip
    add("--batch_size", type=int, default=8, help="conversations computed at once (8)")
    add("--max_length", type=int, help="tokens of a conversation; longer ones lose exchanges (as in training)")
    add("--tasks", nargs="+", default=[], metavar="TASK", help="of lm-evaluation-harness, or YAML files of your own")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task")
    add("--sheet", type=int, metavar="N", help=f"questions on the sheet for people; 0: no sheet ({SHEET})")
    add(
        "--judged", nargs="+", type=Path, default=[], metavar="CSV", help="read sheets that were filled in, and no more"
    )
    data = parser.add_argument_group("other conversations than the run's, or for a model that has no run.json")
    data.add_argument("--dataset_name", help="as sft_trainer.py takes it")
    data.add_argument("--eval_fraction", type=float, help="held out, where the data has no part for it (0.1)")
    data.add_argument("--test_fraction", type=float, help="of a third part (0)")
    data.add_argument("--seed", type=int, help="by which they are drawn (0)")
    args = parser.parse_args(argv)
    if fault := _fault(args):
        parser.error(fault)
    if args.models and not args.output_dir:
        folder = Path(args.models[0]).expanduser()
        args.output_dir = (folder if folder.is_dir() else Path("trained") / folder.name) / "evaluation"
    args.precisions = list(dict.fromkeys(args.precisions or [sft_trainer.full_precision(), "nf4"]))
    return args


def _fault(args: argparse.Namespace) -> str | None:
    if bool(args.models) == bool(args.judged):
        return "give a model to evaluate, or --judged with sheets that were filled in"
    for name in ("batch_size", "max_length", "limit"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            return f"--{name} must be above 0"
    for name in ("eval_fraction", "test_fraction"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            return f"--{name} must be from 0 to below 1"
    if args.sheet is not None and args.sheet < 0:
        return "--sheet must be 0 or more"
    return None


def evaluate(args: argparse.Namespace) -> None:
    """From the data to the report; everything that can be refused is refused before weights are loaded."""
    runs = find_runs(args)
    run = find_parts_of(runs, args)
    parts = splits.find_again(run)
    print(*parts[0].told, sep="\n", end="\n" if parts[0].told else "")
    if run.learnt_sha256 is None and {its.learnt_sha256 for its in runs.values()} == {splits.fingerprint(parts)}:
        run = replace(run, learnt_sha256=splits.fingerprint(parts))  # it is the run's data after all, in another place
    subjects = find_subjects(runs, args.models)
    asked, pair = to_ask(args, run, subjects, parts)
    if asked:
        judging.check_free(args.output_dir)
    tasks, faults = [], []
    if args.tasks:
        print(f"Fetching the questions of {', '.join(args.tasks)} ...", flush=True)
        tasks, faults = harness.find_tasks(args.tasks)
    lessons = {(subject.name, subject.fold): encode(subject, parts, run) for subject in subjects}

    make_folder(args.output_dir)
    title = f"{' and '.join(names(args.models).values())}, evaluated"
    results = Results(title, run, find_taught(subjects, run), notes=[*faults, *notes(run, parts)])
    answers: dict[str, list[str]] = {}
    for precision in args.precisions:
        for subject, model in loaded(subjects, precision):
            results.measured += measure(subject, model, precision, lessons[subject.name, subject.fold], args)
            results.write(args.output_dir)  # at once: it is kept, whatever ends what follows
            if precision != args.precisions[0]:
                continue
            if subject.name in pair:
                answers[subject.name] = say(subject, model, asked, args.batch_size)
            if tasks:
                scores, faults = harness.run(tasks, model, subject.tokenizer, args.batch_size, args.limit)
                results.scores |= {subject.name: scores} if scores else {}
                results.notes += (f"{subject.name}: {fault}" for fault in faults)
        if asked and not results.has_sheet:
            questions = [(_dialog(row), row.messages[-1]["content"]) for row in asked]
            judging.write(args.output_dir, questions, {name: answers[name] for name in pair}, run.seed)
            results.has_sheet = True
        results.write(args.output_dir)
    print("", *results.page(), f"\nThe report is {args.output_dir / 'evaluation.md'}.", sep="\n")


def make_folder(folder: Path) -> None:
    """Who may not write there learns so now, rather than after hours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ChatError(f"Nothing can be written to {folder} ({error.strerror}). Give another --output_dir.") from error


def told_judgement(args: argparse.Namespace) -> None:
    folder = args.output_dir or args.judged[0].parent
    judgement = judging.read(args.judged, folder / judging.KEY)
    make_folder(folder)
    lines = ["# What people think", "", *judgement.told()]
    (folder / "judged.md").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "judged.json").write_text(json.dumps(asdict(judgement), indent=1), "utf-8")
    print("\n".join(lines[2:]))


# ---- Before the weights ----


def find_runs(args: argparse.Namespace) -> dict[str, Run]:
    """What sft_trainer.py left beside those of the models that it made."""
    folders = {model: Path(model).expanduser() for model in args.models}
    runs = {model: report.read_run(folder) for model, folder in folders.items() if (folder / "run.json").is_file()}
    if any(_has_folds(run) for run in runs.values()):
        if len(args.models) > 1 or args.tasks or args.sheet:
            raise ChatError(
                "A run with folds is measured by itself, without --tasks and --sheet. For more, name one of its folds."
            )
        args.sheet = 0
    return runs


def _has_folds(run: Run) -> bool:
    return bool(run.folds and not run.fold)


def find_parts_of(runs: dict[str, Run], args: argparse.Namespace) -> Run:
    """The run whose parts all models are measured on, as far as flags do not say otherwise."""
    flags = {name: getattr(args, name) for name in OF_PARTS if getattr(args, name) is not None}
    if not (runs or args.dataset_name):
        raise ChatError(f"{args.models[0]} has no run.json that says what was held out. Give --dataset_name.")
    if len({run.learnt_sha256 for run in runs.values()}) > 1 and not flags:
        raise ChatError(
            f"{' and '.join(runs)} have not learnt the same conversations. Say with --dataset_name on which to compare "
            "them; none of them may have learnt what is held out there."
        )
    run = next(iter(runs.values()), None) or Run(
        model_name=args.models[0],
        dataset_name=args.dataset_name,
        eval_fraction=0.1,
        test_fraction=0.0,
        seed=0,
        folds=0,
        fold=None,
        max_length=1024,
        precision=args.precisions[0],
        early_stopping=False,
        merged_to=None,
        learnt_sha256=None,
    )
    if flags:
        run = replace(run, **flags, learnt_sha256=None)
    return replace(run, max_length=args.max_length or run.max_length)


def find_subjects(runs: dict[str, Run], models: list[str]) -> list[Subject]:
    """The models, each after the one that it was taught from and before the merged one, without their weights."""
    found: list[Subject] = []
    for model, name in names(models).items():
        run = runs.get(model)
        folds = range(1, run.folds + 1) if run and _has_folds(run) else (None,)
        for fold in folds:
            prefix = "" if len(models) == 1 else f"{name}: "
            found += _subjects(f"{model}/fold-{fold}" if fold else model, run, name, prefix, fold, found)
    return found


def names(models: list[str]) -> dict[str, str]:
    """What each model is called: a folder by the last part of its path, or by more where two would be called alike."""
    for count in range(1, 9):
        found = {
            model: "/".join(Path(model).resolve().parts[-count:]) if Path(model).exists() else model for model in models
        }
        if len({*found.values()}) == len(models):
            return found
    raise ChatError("One of the models is given twice.")


def _subjects(
    model: str, run: Run | None, name: str, prefix: str, fold: int | None, known: list[Subject]
) -> Iterator[Subject]:
    plan = _fetch(model)
    tokenizer = load.load_tokenizer(plan)
    if not (plan.adapter or run):
        yield Subject(name, plan, tokenizer, fold)
        return
    before = replace(plan, adapter=None) if plan.adapter else _fetch(run.model_name)
    same = [
        other.name for other in known if (other.plan.base, other.plan.adapter, other.fold) == (before.base, None, fold)
    ]
    if not same:  # a base in the format of what was taught from it, or it would be measured on other tokens
        yield Subject(f"{prefix}base", before, tokenizer, fold)
    base = same[0] if same else f"{prefix}base"
    if plan.adapter:
        fetch_weights(plan.adapter, sft_trainer.silent)
    yield Subject(f"{prefix}{'adapter' if plan.adapter else 'trained'}", plan, tokenizer, fold, base)
    if run and run.merged_to and Path(run.merged_to).is_dir():
        merged = _fetch(run.merged_to)
        yield Subject(f"{prefix}merged", merged, load.load_tokenizer(merged), fold, base)


def _fetch(model: str) -> Checkpoint:
    """The model's files but not its weights."""
    settings = Settings.read([])
    plan = Plan(model, "", "none", settings.cache_dir.expanduser(), settings.hub_cache_dir)
    return choose.fetch(plan, sft_trainer.silent)


def find_taught(subjects: list[Subject], run: Run) -> list[Taught]:
    """Those whose overfitting can be judged. A merged model is its adapter once more."""
    found = []
    for subject in subjects:
        if subject.base and not subject.name.endswith("merged"):
            folder = (subject.plan.adapter or subject.plan.base).folder
            its = report.read_run(folder) if (folder / "run.json").is_file() else None
            found.append(
                Taught(
                    subject.name,
                    subject.base,
                    subject.fold,
                    report.read_curves(folder),
                    kept_lowest=its is not None and its.early_stopping,
                    learnt_known=its is not None and run.learnt_sha256 is not None,
                )
            )
    return found


def encode(subject: Subject, parts: list[Parts], run: Run) -> Lessons:
    """What the subject is measured on."""
    its = parts[(subject.fold or 1) - 1]
    stop_ids = load.find_stop_ids(subject.tokenizer, load.read_generation_config(subject.plan.base))
    lessons = {}
    for part, rows in zip(PARTS, (_sample(its, run.seed), its.held_out, its.test), strict=True):
        found, _ = chat_data.encode(rows, subject.tokenizer, stop_ids, run.max_length)
        if found:
            lessons[part] = found
    if not lessons:
        raise ChatError(f"No conversation fits into {run.max_length:,} tokens. Raise --max_length.")
    return lessons


def _sample(parts: Parts, seed: int) -> list[Conversation]:
    """Of what was learnt, no more than of what was not: more would take long and tell little."""
    size = len(parts.held_out) + len(parts.test)
    return random.Random(seed).sample(parts.learnt, size) if 0 < size < len(parts.learnt) else parts.learnt


def notes(run: Run, parts: list[Parts]) -> Iterator[str]:
    """What a reader of the figures should know of the data."""
    if not run.learnt_sha256:
        yield (
            "Nobody knows which of these conversations were learnt: the parts are those that sft_trainer.py would make "
            "of them."
        )
    if len(sample := _sample(parts[0], run.seed)) < len(parts[0].learnt):
        yield f"Of {len(parts[0].learnt):,} conversations learnt, {len(sample):,} drawn by the seed are measured."


def to_ask(
    args: argparse.Namespace, run: Run, subjects: list[Subject], parts: list[Parts]
) -> tuple[list[Conversation], list[str]]:
    """The questions of the sheet, and the two who answer them: base and taught, or the first two models given."""
    taught = next((subject for subject in subjects if subject.base), None)
    pair = [taught.base, taught.name] if taught and len(args.models) == 1 else _one_each(args.models, subjects)
    number = SHEET if args.sheet is None else args.sheet
    if len(pair) < 2 or not number:
        return [], []
    rows = parts[0].test or parts[0].held_out  # nobody has looked at the test part
    rows = rows if len(rows) <= number else random.Random(run.seed).sample(rows, len(rows))
    tokenizer = next(subject.tokenizer for subject in subjects if subject.name == pair[1])
    fitting = (row for row in rows if len(prompt.encode(tokenizer, row.messages[:-1])) < run.max_length)
    careful = (
        [{"role": "user", "content": question}, {"role": "assistant", "content": expected}]
        for question, expected in judging.SAFETY_QUESTIONS
    )
    return [*islice(fitting, number), *(Conversation(messages, "") for messages in careful)], pair


def _one_each(models: list[str], subjects: list[Subject]) -> list[str]:
    """Of each of the first two models given what was taught, or the model itself."""
    found = []
    for name in list(names(models).values())[:2]:
        its = [s.name for s in subjects if s.name == name or (s.name.startswith(f"{name}: ") and s.base)]
        found += its[:1]
    return found


def _dialog(row: Conversation) -> str:
    """All that comes before the answer; a single question as it stands."""
    *before, question = row.messages[:-1]
    if not before:
        return question["content"]
    names = {"system": "Instruction", "user": "Person", "assistant": "Model"}
    return "\n\n".join(f"{names[message['role']]}: {message['content']}" for message in row.messages[:-1])


# ---- The measuring ----


def loaded(subjects: list[Subject], precision: str) -> Iterator[tuple[Subject, PreTrainedModel]]:
    """Each subject with its model in this precision; those of one base share its weights, and no two bases are here."""
    device = 0 if visible_gpus() else "cpu"
    for folder in dict.fromkeys(subject.plan.base.folder for subject in subjects):
        model = None
        for subject in subjects:
            if subject.plan.base.folder != folder:
                continue
            if model is None:
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                model = load.load_base(subject.plan, precision, device, sft_trainer.silent).eval()
            if not subject.plan.adapter:
                yield subject, model
                continue
            adapted = load.load_adapter(model, subject.plan, precision).eval()
            yield subject, adapted.get_base_model()
            model = adapted.unload()
            del adapted
        del model
        sft_trainer.free_memory()


def measure(
    subject: Subject, model: PreTrainedModel, precision: str, lessons: Lessons, args: argparse.Namespace
) -> list[Measured]:
    name = f"{subject.name}, fold {subject.fold}" if subject.fold else subject.name
    measured = []
    with tqdm(
        total=sum(map(len, lessons.values())), desc=f"{name}, {precision}", unit=" conversations", dynamic_ncols=True
    ) as bar:
        for part, rows in lessons.items():
            started = time.perf_counter()
            found = losses(model, rows, args.batch_size, bar.update)
            seconds = time.perf_counter() - started
            memory_gb = sft_trainer.memory_gb()
            measured.append(Measured(subject.name, precision, subject.fold, part, found, seconds, memory_gb))
    return measured


@torch.inference_mode()
def losses(
    model: PreTrainedModel,
    lessons: list[TokenizedExample],
    batch_size: int,
    done: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """[conversations, 2]: of each the loss summed over the tokens of its answers, and how many these are."""
    found = np.zeros((len(lessons), 2))
    order = sorted(range(len(lessons)), key=lambda i: -len(lessons[i].input_ids))  # memory runs out at once or never
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        T = len(lessons[batch[0]].input_ids)
        rows = [(lessons[i].input_ids, chat_data.labels(lessons[i])) for i in batch]
        input_ids = torch.tensor([ids + [0] * (T - len(ids)) for ids, _ in rows], device=model.device)
        labels = torch.tensor([row + [-100] * (T - len(row)) for _, row in rows], device=model.device)
        mask = torch.tensor([[1] * len(ids) + [0] * (T - len(ids)) for ids, _ in rows], device=model.device)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # [B, T - 1, V]
        learnt = labels[:, 1:] != -100
        each = F.cross_entropy(logits[learnt].float(), labels[:, 1:][learnt], reduction="none").double()
        sums = torch.zeros(len(batch), dtype=torch.double, device=model.device)
        found[batch, 0] = sums.index_add(0, learnt.nonzero()[:, 0], each).cpu().numpy()
        found[batch, 1] = learnt.sum(1).cpu().numpy()
        done(len(batch))
    return found


def say(subject: Subject, model: PreTrainedModel, asked: list[Conversation], batch_size: int) -> list[str]:
    """The subject's answers to the questions of the sheet."""
    stop_ids = load.find_stop_ids(subject.tokenizer, load.read_generation_config(subject.plan.base))
    answers = []
    with tqdm(total=len(asked), desc=f"{subject.name} answers", unit=" questions", dynamic_ncols=True) as bar:
        for start in range(0, len(asked), batch_size):
            rows = [("", row) for row in asked[start : start + batch_size]]
            answers += sft_trainer.answer(model, subject.tokenizer, rows, stop_ids, ANSWER_TOKENS)
            bar.update(len(rows))
    return answers

"""From the flags of scripts/train_draft.py to a folder with a head: answers, training, and what came of it."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llama2_chat.engine.kv_pool import probe_keys
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.errors import ChatError
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.loading.disk import Files
from llama2_chat.loading.draft import read_head
from llama2_chat.loading.memory import free_host_bytes
from llama2_chat.loading.read import translate_errors
from llama2_chat.training.base_model import BaseModel, fetch_base, full_precision, load_for_training
from llama2_chat.training.draft_acceptance import acceptance
from llama2_chat.training.draft_data import QUESTION, Answer, Writer, make_answers, read_answers, save_answers
from llama2_chat.training.draft_engine import EngineDesk, served_engine
from llama2_chat.training.draft_files import save_head
from llama2_chat.training.draft_options import DraftOptions
from llama2_chat.training.draft_training import Batch, Training, make_batches, new_head, share_that_it_says
from llama2_chat.training.draft_writer import Desk
from llama2_chat.types import SamplingParams

ON_CPU, ON_GPU = 16, 2048  # answers at once, at most
MEMORY_SHARE = 0.4  # of what is free, for their keys and values
ANSWERS, HALF_TRAINED = "answers.npz", "training.pt"
SAVE_EVERY_S = 60.0
MEASURED_SHARE = 0.05  # of the time of training, in which it is looked how many guesses come true


def train_draft(options: DraftOptions) -> None:
    """Leaves in options.output_dir the head (config.json, model.safetensors), the answers (answers.npz), the losses
    (losses.csv) and how many guesses come true (figures.json)."""
    _make_folder(options.output_dir)
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    base = fetch_base(options.model)
    model = _load(base, options)
    begun = _begun(model, options)
    if options.answers_files:
        answers = [each for file in options.answers_files for each in read_answers(file, params, Writer.of(base))]
    else:
        answers = _make_answers(base, model, options, params)
    answers.sort(key=lambda answer: answer.ids)  # in whichever order they ended
    random.Random(options.seed).shuffle(answers)
    held_out, learned = answers[: options.held_out], answers[options.held_out :]
    prompts = {tuple(answer.ids[: answer.prompt_tokens]) for answer in held_out}
    learned = [answer for answer in learned if tuple(answer.ids[: answer.prompt_tokens]) not in prompts]
    if not learned:
        raise ChatError("There are no answers to learn from beside those that are held out. Make more --answers.")
    head = begun or new_head(model, learned, options.vocabulary)
    said = share_that_it_says(head, learned)
    batches = make_batches(model, head, learned, options)
    print(f"{len(learned):,} answers in {len(batches):,} batches; the head can say {said:.1%} of their tokens.")
    _train(model, head, batches, held_out, options)
    true = acceptance(model, head, held_out, options.guesses, options.max_length)
    figures = {"come true of 1, 2, ... guesses in a row": true, "tokens that it can say": said}
    (options.output_dir / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ChatError(f"Nothing can be written to {folder}: give another --output_dir.")


def _begun(model: PreTrainedModel, options: DraftOptions) -> EagleHead | None:
    """The head that is trained further."""
    if options.start_from is None:
        return None
    files, config = Files(options.start_from), model.config
    with translate_errors(files):
        head = read_head(files)
    sizes = (head.config.hidden_size, head.config.vocab_size)
    has_layers = all(0 < behind <= config.num_hidden_layers for behind in head.feature_layers)
    if sizes != (config.hidden_size, config.vocab_size) or not has_layers:
        raise ChatError(f"{options.start_from} is a head for another model than {options.model}.")
    return head.to(model.device, torch.float32)


def _load(base: BaseModel, options: DraftOptions) -> PreTrainedModel:
    device = 0 if torch.cuda.is_available() else "cpu"
    model = load_for_training(base.checkpoint, full_precision(), device)
    if model.config.model_type != "llama":
        raise ChatError(f"A head can be trained for a Llama, and {options.model} is a {model.config.model_type}.")
    attention_windows(model)
    return model.eval().requires_grad_(False)


def _make_answers(
    base: BaseModel, model: PreTrainedModel, options: DraftOptions, params: SamplingParams
) -> list[Answer]:
    """As many as are wanted, or as there is time for; those that an earlier run has saved are among them."""
    file, writer = options.output_dir / ANSWERS, Writer.of(base)
    answers = read_answers(file, params, writer) if file.is_file() else []
    if answers:
        print(f"{len(answers):,} answers are there already, in {file}.")
    if (options.output_dir / HALF_TRAINED).is_file() or len(answers) >= options.answers:
        return answers  # from which a head was learning, or can
    seed = random.Random(f"{options.seed} {len(answers)}").randrange(2**31)
    missing, tokens, started, saved = options.answers - len(answers), 0, time.monotonic(), time.monotonic()
    with _desk(base, model, options) as desk:
        for answer in make_answers(base.tokenizer, desk, missing, params, seed):
            answers.append(answer)
            tokens += len(answer.ids) - answer.prompt_tokens
            now = time.monotonic()
            if now - saved > SAVE_EVERY_S:
                save_answers(answers, writer, file)
                print(f"{len(answers):,} answers; {tokens:,} tokens in {now - started:.0f} s.", flush=True)
                saved = time.monotonic()
            if 0 < options.answer_minutes * 60 < now - started:
                break
    if not answers:
        raise ChatError(f"{options.model} makes up no questions that it answers, so there is nothing to learn from.")
    save_answers(answers, writer, file)
    return answers


@contextlib.contextmanager
def _desk(base: BaseModel, model: PreTrainedModel, options: DraftOptions) -> Iterator[Desk | EngineDesk]:
    """Where as many answers are written at once as are wanted, or as there is memory for."""
    on_cpu = model.device.type == "cpu"
    free = free_host_bytes() if on_cpu else torch.cuda.mem_get_info(model.device)[0]
    text_bytes = options.max_length * sum(2 * keys.numel() * keys.element_size() for keys in probe_keys(model))
    fitting = max(1, min(ON_CPU if on_cpu else ON_GPU, int(MEMORY_SHARE * free / text_bytes)))
    at_once = min(options.max_batch or fitting, options.answers)
    if on_cpu:
        with contextlib.closing(served_engine(base, at_once, options.max_length)) as engine:
            yield EngineDesk(engine, options.max_length)
    else:
        most = max(QUESTION.max_new_tokens, options.max_new_tokens)
        yield Desk(model, at_once, options.max_length, most, base.stop_ids)


def _train(
    model: PreTrainedModel,
    head: EagleHead,
    batches: Sequence[Batch],
    held_out: Sequence[Answer],
    options: DraftOptions,
) -> None:
    """Go on with what an earlier run has left, if it was cut off. On the way the head is saved, too, and at the end."""
    training, half = Training(model, head, batches, options), options.output_dir / HALF_TRAINED
    if half.is_file():
        training.go_on(half)
        print(f"Going on after {training.steps:,} steps.")
    losses, saved, measuring_due = options.output_dir / "losses.csv", time.monotonic(), 0.0
    with (
        losses.open("a" if training.steps else "w", newline="") as file,
        tqdm(total=100, unit="%", disable=None) as bar,
    ):
        writer = csv.writer(file)
        if not training.steps:
            writer.writerow(["step", "loss"])
        for step, loss, spent in training.run():
            writer.writerow([step, f"{loss:.4f}"])
            bar.update(round(100 * min(spent, 1)) - bar.n)
            bar.set_postfix(loss=f"{loss:.3f}", step=step)
            if time.monotonic() - saved > SAVE_EVERY_S:
                training.save(half)
                save_head(head, options.output_dir)
                saved = time.monotonic()
                if saved > measuring_due:
                    true = acceptance(model, head, held_out, options.guesses, options.max_length)
                    print(f"After {step:,} steps, {spent:.0%}: loss {loss:.3f}, come true {true}.", flush=True)
                    measuring_due = saved + (time.monotonic() - saved) / MEASURED_SHARE
    save_head(head, options.output_dir)
    half.unlink(missing_ok=True)

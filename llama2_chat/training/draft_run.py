"""From the flags of scripts/train_draft.py to a folder with a head: answers, training, and what came of it."""

from __future__ import annotations

import csv
import gc
import json
import random
import time
from collections.abc import Sequence

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llama2_chat.errors import ChatError
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import load_base
from llama2_chat.settings import Settings
from llama2_chat.training.draft_acceptance import acceptance
from llama2_chat.training.draft_data import Answer, make_answers, read_answers, save_answers
from llama2_chat.training.draft_files import save_head
from llama2_chat.training.draft_options import DraftOptions
from llama2_chat.training.draft_training import Batch, make_batches, new_head, train_head
from llama2_chat.types import SamplingParams
from model import ChatModel

AT_ONCE = 64  # answers at least, after which those that there are so far are saved, and the time is looked at
ANSWERS = "answers.npz"


def train_draft(options: DraftOptions) -> None:
    """Leaves in options.output_dir the head (config.json, model.safetensors), the answers (answers.npz), the losses
    (losses.csv) and how many guesses come true (figures.json)."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    params = SamplingParams(max_new_tokens=options.max_new_tokens)
    if options.answers_files:
        answers = [answer for file in options.answers_files for answer in read_answers(file, params)]
    else:
        answers = _make_answers(options, params)
    random.Random(options.seed).shuffle(answers)
    held_out, learned = answers[: options.held_out], answers[options.held_out :]
    prompts = {tuple(answer.ids[: answer.prompt_tokens]) for answer in held_out}
    learned = [answer for answer in learned if tuple(answer.ids[: answer.prompt_tokens]) not in prompts]
    if not learned:
        raise ChatError("There are no answers to learn from beside those that are held out. Make more --answers.")
    model = _load(options)
    head, said = new_head(model, learned, options.vocabulary)
    batches = make_batches(model, learned, options)
    print(f"{len(learned):,} answers in {len(batches):,} batches; the head can say {said:.1%} of their tokens.")
    _train(model, head, batches, options)
    save_head(head, options.output_dir)
    true = acceptance(model, head, held_out, options.guesses, options.max_length)
    figures = {"come true of 1, 2, ... guesses in a row": true, "tokens that it can say": said}
    (options.output_dir / "figures.json").write_text(json.dumps(figures, indent=1))
    print(json.dumps(figures))


def _make_answers(options: DraftOptions, params: SamplingParams) -> list[Answer]:
    flags = ["--model-id", options.model, "--queue-limit", "4096", "--no-compile"]
    chat = ChatModel(Settings.read([*flags, *(["--max-batch", str(options.max_batch)] if options.max_batch else [])]))
    chat.load().serving  # noqa: B018 - raises what went wrong
    answers: list[Answer] = []
    started = time.monotonic()
    try:
        while len(answers) < options.answers and not 0 < options.minutes * 60 < time.monotonic() - started:
            count = min(max(AT_ONCE, 2 * options.max_batch), options.answers - len(answers))
            answers += make_answers(chat, count, params, options.seed + len(answers))
            save_answers(answers, options.output_dir / ANSWERS)
            tokens = sum(len(answer.ids) - answer.prompt_tokens for answer in answers)
            print(f"{len(answers):,} answers of {tokens:,} tokens in {time.monotonic() - started:.0f} s.", flush=True)
    finally:
        chat.close()
        del chat
        gc.collect()  # its KV cache leaves the GPU
        torch.cuda.empty_cache()
    return answers


def _load(options: DraftOptions) -> PreTrainedModel:
    on_gpu = torch.cuda.is_available()
    checkpoint = fetch(choose(Settings.read(["--model-id", options.model])), lambda *_: None)
    precision, device = ("bfloat16", 0) if on_gpu else ("float32", "cpu")
    model = load_base(checkpoint, precision, device, lambda *_: None)
    if model.config.model_type != "llama":
        raise ChatError(f"A head can be trained for a Llama, and {options.model} is a {model.config.model_type}.")
    return model.eval().requires_grad_(False)


def _train(model: PreTrainedModel, head: EagleHead, batches: Sequence[Batch], options: DraftOptions) -> None:
    with (options.output_dir / "losses.csv").open("w", newline="") as file, tqdm(disable=None) as bar:
        writer = csv.writer(file)
        writer.writerow(["step", "loss"])
        for step, loss in train_head(model, head, batches, options):
            writer.writerow([step, f"{loss:.4f}"])
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")

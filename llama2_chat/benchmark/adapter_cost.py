"""What four adapters cost: eight users of the embedded model with none of them, and two of each, in turns."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.load_test import throughput_of
from llama2_chat.benchmark.local_model import fresh_ids, load, time_full_answers
from llama2_chat.loading import EMBEDDED
from llama2_chat.training.base_model import fetch_checkpoint
from model import ChatModel

USERS, ADAPTERS, RANK = 8, 4, 16
PROMPT_TOKENS, ANSWER_TOKENS = 64, 64
ROUNDS = 7  # the first warms up


def measure() -> Iterator[Figures]:
    with tempfile.TemporaryDirectory() as folder:
        for targets in (["q_proj", "v_proj"], "all-linear"):
            folders = [_save_adapter(Path(folder) / f"{number}", targets) for number in range(ADAPTERS)]
            chat = load(["--adapters", ",".join(f"{path.name}={path}" for path in folders)])
            time_full_answers(chat)
            what = targets if isinstance(targets, str) else " and ".join(targets)
            yield {f"rank {RANK}, {what}: {name}": figure for name, figure in _in_turns(chat).items()}
            chat.close()


def _in_turns(chat: ChatModel) -> dict[str, float]:
    nobodys, theirs = [""] * USERS, [chat.status.adapters[user % ADAPTERS] for user in range(USERS)]
    rounds = [[_tokens_per_s(chat, names) for names in (nobodys, theirs)] for _ in range(ROUNDS)][1:]
    base, adapted = map(statistics.median, zip(*rounds, strict=True))
    return {
        f"{USERS} users of the base, tokens/s": base,
        f"{USERS} users of {ADAPTERS} adapters, tokens/s": adapted,
        "adapters / base": statistics.median(adapted / base for base, adapted in rounds),
    }


def _tokens_per_s(chat: ChatModel, names: list[str]) -> float:
    prompts = [fresh_ids(chat, PROMPT_TOKENS) for _ in names]
    return throughput_of(prompts, chat, ANSWER_TOKENS, names)["tokens/s"]


def _save_adapter(folder: Path, targets: list[str] | str) -> Path:
    from peft import LoraConfig, get_peft_model

    base = fetch_checkpoint(EMBEDDED).base.folder
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    config = LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(str(folder))
    return folder

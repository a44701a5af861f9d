"""What four adapters cost: eight users of the embedded model with none of them, and two of each, in turns.

On a GPU a recorded step adds all adapters, whoever takes them: there a shape is loaded without them, then with some, of
all linear layers, which cost most.
"""

from __future__ import annotations

import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llama2_chat.benchmark import Figures
from llama2_chat.benchmark.load_test import throughput_of
from llama2_chat.benchmark.local_model import fresh_ids, load, time_full_answers
from llama2_chat.benchmark.shapes import check_gpu, checkpoint_folder, make_checkpoint, wait_for_compilation
from llama2_chat.benchmark.training_cost import run_in_process
from llama2_chat.loading import EMBEDDED
from llama2_chat.training.base_model import fetch_checkpoint
from model import ChatModel

USERS, ADAPTERS, RANK = 8, 4, 16
PROMPT_TOKENS, ANSWER_TOKENS, ANSWER_TOKENS_OF_SHAPES = 64, 64, 256
ROUNDS = 7  # the first warms up
ALL = "all-linear"
TARGETS: tuple[list[str] | str, ...] = (["q_proj", "v_proj"], ALL)


def measure() -> Iterator[Figures]:
    base = fetch_checkpoint(EMBEDDED).base.folder
    with tempfile.TemporaryDirectory() as folder:
        for targets in TARGETS:
            chat = load(_new_adapters(base, Path(folder), targets))
            time_full_answers(chat)
            yield {f"rank {RANK}, {_named(targets)}: {name}": figure for name, figure in _in_turns(chat).items()}
            chat.close()


def measure_shape(shape: str, tokenizer: str, checkpoint: Path | None, quantization: str) -> Iterator[Figures]:
    """checkpoint: where the shape's weights are, or are put for the next run."""
    check_gpu(shape)
    with checkpoint_folder(checkpoint) as base, tempfile.TemporaryDirectory() as folder:
        run_in_process(make_checkpoint, shape, tokenizer, base)
        # No steps for more users are recorded, which takes seconds for each number of them.
        flags = ["--model-id", str(base), "--quantization", quantization, "--max-batch", str(USERS)]
        alone = run_in_process(_of_shape, flags)
        yield {"shape": shape, "quantization": quantization, f"{USERS} users without adapters, tokens/s": alone}
        adapters = _new_adapters(base, Path(folder), ALL)
        adapted = run_in_process(_of_shape, [*flags, *adapters])
        yield {
            f"rank {RANK}, {ALL}: {USERS} users of {ADAPTERS} adapters, tokens/s": adapted,
            f"rank {RANK}, {ALL}: adapters / without": adapted / alone,
        }


def _named(targets: list[str] | str) -> str:
    return targets if isinstance(targets, str) else " and ".join(targets)


def _of_shape(flags: Sequence[str]) -> float:
    """Tokens/s of eight users, two of each adapter if there are any."""
    chat = load(flags)
    time_full_answers(chat)
    wait_for_compilation(chat)
    names = [name for name in chat.status.adapters for _ in range(USERS // ADAPTERS)] or [""] * USERS
    return statistics.median([_tokens_per_s(chat, names, ANSWER_TOKENS_OF_SHAPES) for _ in range(ROUNDS)][1:])


def _in_turns(chat: ChatModel) -> dict[str, float]:
    nobodys, theirs = [""] * USERS, [chat.status.adapters[user % ADAPTERS] for user in range(USERS)]
    rounds = [[_tokens_per_s(chat, names, ANSWER_TOKENS) for names in (nobodys, theirs)] for _ in range(ROUNDS)][1:]
    base, adapted = map(statistics.median, zip(*rounds, strict=True))
    return {
        f"{USERS} users of the base, tokens/s": base,
        f"{USERS} users of {ADAPTERS} adapters, tokens/s": adapted,
        "adapters / base": statistics.median(adapted / base for base, adapted in rounds),
    }


def _tokens_per_s(chat: ChatModel, names: list[str], answer_tokens: int) -> float:
    prompts = [fresh_ids(chat, PROMPT_TOKENS) for _ in names]
    return throughput_of(prompts, chat, answer_tokens, names)["tokens/s"]


def _new_adapters(base: Path, folder: Path, targets: list[str] | str) -> list[str]:
    """Flags of app.py that name them. They are the same, which changes nothing of what they cost."""
    first = _save_adapter(base, folder / "0", targets)
    folders = [first, *(Path(shutil.copytree(first, folder / f"{number}")) for number in range(1, ADAPTERS))]
    return ["--adapters", ",".join(f"{path.name}={path}" for path in folders)]


def _save_adapter(base: Path, folder: Path, targets: list[str] | str) -> Path:
    """A random one, for the base in this folder, whose weights are not read."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config, low_cpu_mem_usage=True)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    weights = {
        name: torch.randn(states.shape, dtype=torch.bfloat16) / states.shape[1]
        for name, states in get_peft_model_state_dict(adapted).items()
    }
    adapted.save_pretrained(str(folder), state_dict=weights)
    return folder

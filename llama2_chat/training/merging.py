"""An adapter becomes part of its base model's weights: merged in full precision, checked, written, published."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from llama2_chat.errors import ChatError
from llama2_chat.loading.config import read_config
from llama2_chat.loading.load import load_base, merge_adapter
from llama2_chat.text import first_line
from llama2_chat.training.base_model import BaseModel, no_progress

LOGIT_TOLERANCE = 1e-3  # between adapter and merged model, in float32


def create_repo(repo: str) -> None:
    """Make a private repository on the Hub, unless it is there: a missing permission shows now, not after hours."""
    import httpx2
    import huggingface_hub

    try:
        huggingface_hub.create_repo(repo, private=True, exist_ok=True)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ChatError(
            f"--merge_and_push: the repository {repo} cannot be made or written to ({first_line(error)}). Set HF_TOKEN "
            "to a token that may write there, and check the name and the network."
        ) from error


def merge(base: BaseModel, adapter: Path, folder: Path, samples: list[list[int]]) -> float:
    """Write the model with the adapter in its weights, in the base's own precision. Returns how far its logits moved.

    It is merged in float32, on the CPU. Raises ChatError, and writes nothing, if its logits on the samples differ by
    more than LOGIT_TOLERANCE from those of base and adapter.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base.checkpoint, "float32", "cpu", no_progress), adapter).eval()
    before = _logits(model, samples)
    merged: Any = merge_adapter(model)
    difference = max((x - y).abs().max().item() for x, y in zip(before, _logits(merged, samples), strict=True))
    if not difference <= LOGIT_TOLERANCE:  # true for NaN too
        raise ChatError(f"The merged model's logits differ by {difference:.2g} from the adapter's; it was not written.")
    dtype = read_config(base.checkpoint.base).dtype or torch.float32
    merged.to(dtype).save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    for name in ("README.md", "curves.png"):  # the report, which the Hub shows
        shutil.copyfile(adapter / name, folder / name)
    return difference


def _logits(model: torch.nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in samples]


def push(folder: Path, repo: str) -> None:
    import httpx2
    import huggingface_hub

    try:
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ChatError(
            f"{repo} could not be uploaded ({first_line(error)}). The merged model is in {folder}: "
            f"hf upload {repo} {folder}"
        ) from error

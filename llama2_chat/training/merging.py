"""An adapter becomes part of its base model's weights: merged in full precision, checked, written, published."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama2_chat.errors import ChatError
from llama2_chat.loading.adapters import merge_adapter
from llama2_chat.loading.config import read_config
from llama2_chat.loading.load import load_base
from llama2_chat.text import first_line
from llama2_chat.training import card
from llama2_chat.training.base_model import BaseModel, fetch_checkpoint, mend_generation_config, no_progress
from llama2_chat.training.processes import print_lines
from llama2_chat.training.resources import free_memory, let_others_read

LOGIT_TOLERANCE = 1e-3  # between adapter and merged model, in float32
# The same for what was written, as a part of the largest logit: rounding to 16 bits moves logits by 1 % or less.
WRITTEN_TOLERANCE = 0.05


class Moved(NamedTuple):
    """How far logits moved by merging, at most."""

    in_float32: float
    as_written: float
    dtype: str  # in which it was written

    def __str__(self) -> str:
        return f"{self.in_float32:.1g} at most in float32, and by {self.as_written:.1g} as written in {self.dtype}"


def create_repo(repo: str) -> None:
    """Make a private repository on the Hub, unless it is there: a missing permission shows now, not after hours."""
    import httpx2
    import huggingface_hub

    try:
        huggingface_hub.create_repo(repo, private=True, exist_ok=True)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ChatError(
            f"The repository {repo} cannot be made or written to ({first_line(error)}). Set HF_TOKEN "
            "to a token that may write there, and check the name and the network."
        ) from error


def merge(base: BaseModel, adapter: Path, folder: Path, samples: list[list[int]]) -> Moved:
    """Write the model with the adapter in its weights, in the base's own precision. Returns how far its logits moved.

    It is merged in float32, on the CPU, and what was written is read back. Raises ChatError, and writes nothing, if its
    logits on the samples are too far from those of base and adapter, in float32 or as written.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_base(base.checkpoint, "float32", "cpu", no_progress), adapter).eval()
    before = _logits(model, samples)
    merged: Any = merge_adapter(model)
    in_float32 = _distance(before, _logits(merged, samples))
    if not in_float32 <= LOGIT_TOLERANCE:  # true for NaN too
        raise ChatError(f"The merged model's logits differ by {in_float32:.2g} from the adapter's; it was not written.")
    dtype = read_config(base.checkpoint.base).dtype or torch.float32
    print_lines(*filter(None, [mend_generation_config(merged)]))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        merged.to(dtype).save_pretrained(aside)
        base.tokenizer.save_pretrained(aside)
        let_others_read(Path(aside))
        report = (adapter / "README.md").read_text("utf-8")  # which the Hub shows
        Path(aside, "README.md").write_text(card.of_merged(report), "utf-8")
        shutil.copyfile(adapter / "curves.png", Path(aside) / "curves.png")
        card.pass_on_files(adapter, Path(aside))
        del model, merged
        as_written = _distance(before, _logits_of_folder(aside, samples))
        if not as_written <= WRITTEN_TOLERANCE * max(logits.abs().max().item() for logits in before):
            raise ChatError(
                f"Read back in {_name(dtype)}, the merged model's logits differ by {as_written:.2g} from the "
                "adapter's; it was not written."
            )
        folder.mkdir(exist_ok=True)
        for file in Path(aside).iterdir():
            file.replace(folder / file.name)
    return Moved(in_float32, as_written, _name(dtype))


def _logits_of_folder(folder: str, samples: list[list[int]]) -> list[torch.Tensor]:
    free_memory()
    return _logits(load_base(fetch_checkpoint(folder), "float32", "cpu", no_progress).eval(), samples)


def _distance(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """The largest difference; NaN if there is one anywhere."""
    return float(torch.stack([(x - y).abs().max() for x, y in zip(ours, theirs, strict=True)]).max())


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _logits(model: torch.nn.Module, samples: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0] for ids in samples]


def push(folder: Path, repo: str, names: list[str] | None = None) -> None:
    """names: of the files; None for all of them."""
    import httpx2
    import huggingface_hub

    try:
        huggingface_hub.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names)
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise ChatError(
            f"{repo} could not be uploaded ({first_line(error)}). The model is in {folder}: hf upload {repo} {folder}"
        ) from error

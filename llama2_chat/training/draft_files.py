"""A trained head on disk: EAGLE's names, and 8 bits."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.training.resources import let_others_read


def save_head(head: EagleHead, folder: Path) -> None:
    """config.json and model.safetensors: matrices as int8 [out, in], each with a scale for each row beside it."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in head.state_dict().items():
        states = tensor.detach().cpu()
        if name == "ids":
            tensors[name] = states.int()
        elif states.dim() == 2:
            scale = (states.float().abs().amax(1) / 127).clamp(min=1e-12)
            tensors[name] = (states / scale[:, None]).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = states.float()
    config = head.config.to_dict() | {"bias": head.fc.bias is not None, "architectures": ["EagleHead"]}
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / "model.tmp", folder / "config.tmp"  # cut off, it leaves the head that is there
    save_file(tensors, aside[0])
    aside[1].write_text(json.dumps(config, indent=1, default=str))
    for file, name in zip(aside, ("model.safetensors", "config.json"), strict=True):
        file.replace(folder / name)
    let_others_read(folder, "config.json")

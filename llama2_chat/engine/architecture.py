"""Whether the engine can compute a model, told by its configuration: before any weights are fetched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llama2_chat.engine.kv_pool import probe_keys
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.errors import ModelUnavailable
from llama2_chat.text import first_line

log = logging.getLogger("llama2_chat")

# What layers raise whose attention or cache is of another kind than the engine's.
ANOTHER_KIND = (AttributeError, LookupError, NotImplementedError, TypeError, ValueError)


def check_architecture(config: PreTrainedConfig) -> None:
    """Raise ModelUnavailable, with the reason, for a model that attends in a way, or keeps something, that cannot be
    computed over blocks.

    One token goes through the model's shapes, without memory. Where a layer asks for the value of a number the loaded
    model is left to tell.
    """
    with torch.device("meta"):
        # In float32 the experts of a mixture do not run there.
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, dtype=torch.bfloat16).eval()
    with translate_architecture_errors(type(model).__name__):
        try:
            attention_windows(model)
            probe_keys(model)
        except (NotImplementedError, RuntimeError) as error:
            log.debug("%s needs its weights to tell whether it can be served: %s", type(model).__name__, error)


@contextmanager
def translate_architecture_errors(name: str) -> Iterator[None]:
    """A model that the engine cannot compute, as a sentence; the log keeps the original."""
    try:
        yield
    except ANOTHER_KIND as error:
        log.warning("This model cannot be served", exc_info=True)
        raise ModelUnavailable(
            f"{name} is built in a way that visitors cannot share here ({first_line(error)}). "
            "Choose a Llama 2, or a model that attends as it does."
        ) from error

"""Whether the engine can compute a model, told by its configuration: before any weights are fetched."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers.models
from transformers import AutoModelForCausalLM, PreTrainedConfig

from llama2_chat.engine.kv_pool import probe_keys
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.text import first_line, is_out_of_memory

log = logging.getLogger("llama2_chat")

# What layers raise whose attention or cache is of another kind than the engine's.
ANOTHER_KIND = (AttributeError, LookupError, NotImplementedError, TypeError, ValueError)
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # rotary positions whose frequencies do not change with the place


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
    """A model that the engine cannot compute, as a sentence; the log keeps the original.

    Whatever the model's own code raises is translated, but for memory that ran out and a GPU that failed.
    """
    try:
        yield
    except Exception as error:
        is_told = isinstance(error, ChatError | torch.AcceleratorError) or is_out_of_memory(error)
        if is_told or not (isinstance(error, ANOTHER_KIND) or _is_of_model(error)):
            raise
        log.warning("This model cannot be served", exc_info=True)
        raise ModelUnavailable(
            f"{name} is built in a way that visitors cannot share here ({first_line(error)}). "
            "Choose a Llama 2, or a model that attends as it does."
        ) from error


def _is_of_model(error: Exception) -> bool:
    """Whether it was raised in the code of a model, or in what that called."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(file.startswith(transformers.models.__path__[0]) for file in files)

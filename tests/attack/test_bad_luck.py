"""What may happen to an operator: memory, disks and clocks that give out, and signals in mid-answer."""

from dataclasses import replace

import pytest
import torch

from llama2_chat.loading import load
from model import ChatModel


def run_out(*_):
    torch.empty(2**60)


@pytest.mark.parametrize("step", ["_load_for_serving", "quantize_int8"])
def test_memory_that_runs_out_while_loading_or_quantising_is_said_with_what_was_needed(
    settings, tiny, monkeypatch, step
):
    # Quantising on a CPU ended in "an unexpected error".
    monkeypatch.setattr(load, step, run_out)
    chat = ChatModel(replace(settings, model_id=str(tiny), quantization="int8")).load()
    assert chat.state == "failed"
    assert "memory ran out while" in chat.status.error
    assert "it needs about 0.0 GB" in chat.status.error
    assert "Choose a smaller model" in chat.status.error

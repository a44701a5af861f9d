"""What the tests of loading share: a start without a page, and the sentence of a refusal."""

import re
from dataclasses import replace

import pytest
import torch

from llama2_chat.errors import ModelUnavailable
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import load
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.settings import Settings
from tests.support.serving import ignore


def asking_for(model_id, **settings):
    return Settings(model_id=str(model_id), **settings)


def get(settings, progress=ignore):
    """What a start does, from settings to a loaded model."""
    checkpoint = fetch(choose(settings), progress)
    load_tokenizer(checkpoint)
    return load(checkpoint, progress)


def get_float32(settings):
    """The same in float32, which is not offered as a setting: what is compared id for id is compared in it."""
    return load(replace(fetch(choose(settings), ignore), quantization="float32"), ignore)


def refusal(call, *args):
    """The one or two sentences with which a call is refused, as the log has them."""
    with pytest.raises(ModelUnavailable) as refused:
        call(*args)
    text, shown = refused.value.detail, str(refused.value)
    assert not re.search(r"(^|[\s'(])~?/\w", shown)  # what a visitor reads names no folder of the machine
    assert text[0] != "<"
    assert text.endswith(".")
    assert "Traceback" not in text
    assert "hf_" not in text  # no token
    return text


def logits(model, ids=(1, 2, 3)):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits.float()

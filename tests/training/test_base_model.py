"""What can be trained."""

import json

import pytest

from llama2_chat.errors import ModelUnavailable
from llama2_chat.training.base_model import fetch_base


def test_an_adapter_is_not_trained_as_if_it_were_a_model(tmp_path, chat_model):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(chat_model)}))
    with pytest.raises(ModelUnavailable, match="is an adapter"):
        fetch_base(str(tmp_path))

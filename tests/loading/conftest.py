"""An adapter for the tiny model."""

import peft
import pytest
from transformers import LlamaForCausalLM


@pytest.fixture(scope="session")
def adapter(tiny, tmp_path_factory):
    """A LoRA adapter for `tiny` that changes what it says."""
    folder = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(LlamaForCausalLM.from_pretrained(tiny), config).save_pretrained(folder)
    return folder

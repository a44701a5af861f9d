"""The small model with a ChatML template, and a tokenizer for any text."""

import json

from tests.prompt.test_prompt import CHATML, with_template
from tests.support.small_model import save_model
from tests.support.small_tokenizer import gpt_2_shaped


def save_chat_model(folder):
    save_model(folder, vocab_size=512)
    tokenizer = with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}))
    return folder

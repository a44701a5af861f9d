"""The small model with a ChatML template, and a tokenizer for any text."""

import json

from tests.support.small_model import save_model
from tests.support.small_tokenizer import chatml


def save_chat_model(folder):
    save_model(folder, vocab_size=512)
    tokenizer = chatml()
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": tokenizer.eos_token_id}))
    return folder

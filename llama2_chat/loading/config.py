"""What a checkpoint says about itself: its config.json and generation_config.json, and its kinds of tokenizer file.

Fields that this program does not need, such as the precision in which the weights were saved, may hold anything. One
that decides what is answered must make sense, or the checkpoint is refused by name.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from llama2_chat.errors import ModelUnavailable, quoted
from llama2_chat.loading.disk import Files
from llama2_chat.text import first_line, is_out_of_memory

log = logging.getLogger("llama2_chat")

FOR_OTHERS = ("Unrecognized", "does not recognize", "trust_remote_code")  # in what transformers says
DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# In which a model can be made; others are those of packed weights.
DTYPES = ("bfloat16", "float16", "float32", "float64")
# From each of these transformers makes the tokenizer that the model was trained with.
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")


def read_config(files: Files) -> PreTrainedConfig:
    """The model's configuration, without what transformers would stumble over and no answer depends on."""
    path = files.folder / "config.json"
    try:
        written = json.loads(path.read_text("utf-8"))
    except ValueError:
        written = None
    if not isinstance(written, dict):
        raise ModelUnavailable(f"The config.json of {files} is not a JSON object. Copy {quoted(path)} there again.")
    usable = _usable(written)
    if not usable.get("quantization_config", True):
        del usable["quantization_config"]
    with translate_config_errors(files):
        if usable == written:
            return AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
        log.info("Of the config.json of %s, fields that make no sense and change no answer are left out", files)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(usable), "utf-8")
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.name_or_path = str(files.folder)
    return config


def made_from(files: Files) -> str:
    """The model that was saved as this one, by the name or path in its config.json; "" if that does not say."""
    written = json.loads((files.folder / "config.json").read_text("utf-8"))  # an object, as read_config() has found
    return str(written.get("_name_or_path", ""))


@contextmanager
def translate_config_errors(files: Files) -> Iterator[None]:
    """What transformers raises at a configuration of which it makes no model, as a sentence.

    That it does not know the architecture, or would run code of its own for it, is for others to say.
    """
    try:
        yield
    except (
        ArithmeticError,
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        RuntimeError,
        StrictDataclassError,
    ) as error:
        reason = first_line(error.__cause__ if isinstance(error, StrictDataclassError) else error)
        if is_out_of_memory(error) or isinstance(error, OSError) or any(each in str(error) for each in FOR_OTHERS):
            raise
        log.warning("The config.json of %s", files, exc_info=True)
        raise ModelUnavailable(
            f"transformers makes no model of the config.json of {files} ({reason}). Correct it, or copy it there again."
        ) from error


def _usable(config: Any) -> Any:
    """A configuration, or a part of one, as transformers can read it."""
    if not isinstance(config, dict):
        return config
    usable = {key: _usable(value) for key, value in config.items()}
    for key in {"dtype", "torch_dtype"} & usable.keys():
        name = str(usable[key]).removeprefix("torch.")
        name = DTYPE_ALIASES.get(name, name)
        usable[key] = name if name in DTYPES else None
    # Only where rows are padded does it matter which token they are padded with; here none are.
    padding, size = usable.get("pad_token_id"), usable.get("vocab_size")
    if isinstance(padding, int) and isinstance(size, int) and not 0 <= padding < size:
        usable["pad_token_id"] = None
    return usable


def read_generation_config(files: Files) -> GenerationConfig:
    """The one that the model will have once it is loaded. Only the ids that end an answer are used of it."""
    path = files.folder / "generation_config.json"
    if not path.is_file():
        return GenerationConfig.from_model_config(read_config(files))
    ends = _ends(path, files)
    try:
        return GenerationConfig.from_pretrained(files.folder)
    except (ValueError, TypeError, AttributeError) as error:
        log.warning("Of the generation_config.json of %s only eos_token_id is used: %s", files, error)
        return GenerationConfig(eos_token_id=ends)


def _ends(path: Path, files: Files) -> int | list[int] | None:
    """eos_token_id, which must be what it is called."""
    try:
        ends = json.loads(path.read_text("utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ModelUnavailable(
            f"The generation_config.json of {files} is not a JSON object. Correct {quoted(path)}, or copy it there "
            "again."
        ) from error
    if ends is not None and not all(type(id) is int for id in (ends if isinstance(ends, list) else [ends])):
        raise ModelUnavailable(
            f"The generation_config.json of {files} says that answers end with {str(ends)[:40]!r}: eos_token_id is the "
            f"number of a token, or a list of such numbers. Correct it in {quoted(path)}."
        )
    return ends


def check_tokenizer_files(files: Files) -> None:
    """Raise ModelUnavailable where transformers would have to convert a tokenizer, or there is none.

    Converted, Llama 2's tokenizer.model gives other ids than Meta's where spaces follow each other.
    """
    names = {path.name for path in files.folder.iterdir()}
    if names & set(TOKENIZER_FILES):
        return
    what = "only a tokenizer.model" if "tokenizer.model" in names else "no tokenizer"
    raise ModelUnavailable(
        f"{files} has {what}, and this program needs a tokenizer.json: converting one would change the ids of some "
        "texts. Put the tokenizer.json of the same tokenizer beside it; Llama 2's, which Vicuna has too, is in "
        "meta-llama/Llama-2-7b-chat-hf."
    )

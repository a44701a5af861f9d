"""An encoder in this process: from a name to weights, and from texts to vectors. Runs only in the process of local.py.

The model is a transformer that reads a text in both directions; a text's vector is the mean of its tokens' last states,
or the first token's where the folder says so. It is computed on the CPU, in 32 bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from llama2_chat.embeddings.prefixes import prefixes_of
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.loading.config import read_config
from llama2_chat.loading.disk import Files, digest
from llama2_chat.loading.hub import fetch_small_files, fetch_weights, split_revision
from llama2_chat.loading.read import translate_errors
from llama2_chat.types import Embedded, EmbeddingPurpose

VERSION = 1  # of how vectors are made: another one makes them all anew
POOLING = "1_Pooling/config.json"  # as sentence-transformers writes it
OTHER_FOLDERS = ["[!1]*/*"]  # all but that of POOLING
CLS, MEAN = "pooling_mode_cls_token", "pooling_mode_mean_tokens"
TOKENS_AT_ONCE = 2048  # with padding
ELSEWHERE = "Choose an encoder such as intfloat/multilingual-e5-small, or set EMBEDDINGS to a server that has this one."


class Encoder:
    """Raises ModelUnavailable for what is not there, or is no encoder that this program can use."""

    def __init__(self, source: str, cache_dir: Path | None) -> None:
        """source: a folder, or a Hub id, perhaps with a revision; what is missing is downloaded first."""
        files, config = find(source, cache_dir)
        with translate_errors(files):
            self._takes_first = _takes_first(files)
            self._tokenizer = AutoTokenizer.from_pretrained(files.folder, config=config, trust_remote_code=False)
        fetch_weights(files, lambda *_: None)
        with translate_errors(files):
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))  # the other half answers
            self._model = _read_model(files, config)
        self._longest = min(_positions(config), int(self._tokenizer.model_max_length))
        self.dimensions: int = config.hidden_size
        self.prefixes = prefixes_of(split_revision(source)[0], _prompts(files))
        pooling = "first" if self._takes_first else "mean"
        self.identity = digest(f"{files.fingerprint()} {pooling} {VERSION} {json.dumps(self.prefixes)}")

    @torch.inference_mode()
    def embed(self, texts: Sequence[str], purpose: EmbeddingPurpose) -> Embedded:
        """As Embedder.embed says."""
        prefix = self.prefixes[purpose]
        ids: list[list[int]] = self._tokenizer([prefix + text for text in texts])["input_ids"]
        if purpose == "request":
            self._check_lengths(list(map(len, ids)))
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        for some in _batches([min(len(each), self._longest) for each in ids]):
            vectors[some] = self._vectors([prefix + texts[n] for n in some])
        return Embedded(vectors, sum(map(len, ids)))

    def _check_lengths(self, lengths: Sequence[int]) -> None:
        if (tokens := max(lengths)) > self._longest:
            raise ChatError(
                f"A text has {tokens:,} tokens, and this encoder reads {self._longest:,}. Send it in parts."
            )

    def _vectors(self, texts: list[str]) -> np.ndarray:
        inputs = self._tokenizer(texts, padding=True, truncation=True, max_length=self._longest, return_tensors="pt")
        states = self._model(**inputs).last_hidden_state  # [B, T, D]
        mask = inputs["attention_mask"].unsqueeze(-1)  # [B, T, 1]; 0 where a text is padded
        pooled = states[:, 0] if self._takes_first else (states * mask).sum(1) / mask.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(pooled, dim=-1).numpy()


def find(source: str, cache_dir: Path | None) -> tuple[Files, PreTrainedConfig]:
    """An encoder with its configuration and tokenizer on this disk, its weights perhaps not yet. Raises as Encoder."""
    files = fetch_small_files(source, lambda *_: None, cache_dir, OTHER_FOLDERS)
    with translate_errors(files):
        config = read_config(files)
        _check_is_encoder(files, config)
    return files, config


def _read_model(files: Files, config: PreTrainedConfig) -> PreTrainedModel:
    loaded: Any = AutoModel.from_pretrained(
        files.folder, config=config, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
    )
    model, report = loaded
    # Transformers fills what is missing with random numbers and goes on; nothing here looks at the pooler.
    if lost := sorted(name for name in report["missing_keys"] if not name.startswith("pooler.")):
        raise ValueError(f"{len(lost)} tensors are missing, such as {lost[0]}")
    return model.eval()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of texts that are computed together: of like length, or most of it would be padding."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[number] * (len(batch) + 1) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _check_is_encoder(files: Files, config: PreTrainedConfig) -> None:
    made = ", ".join(config.architectures or ())
    if "ForCausalLM" in made or getattr(config, "is_decoder", False) or not hasattr(config, "hidden_size"):
        raise ModelUnavailable(f"{files} ({made or config.model_type}) is no encoder of texts. {ELSEWHERE}")
    parts = files.folder / "modules.json"  # of sentence-transformers, in the order in which they are run
    known = ("Transformer", "Pooling", "Normalize")
    kinds = [each["type"].rpartition(".")[2] for each in json.loads(parts.read_text("utf-8"))] if parts.exists() else []
    if other := next((kind for kind in kinds if kind not in known), None):
        raise ModelUnavailable(f"{files} has a part of the kind {other}, which this program lacks. {ELSEWHERE}")
    _takes_first(files)


def _takes_first(files: Files) -> bool:
    """Whether a text's vector is its first token's."""
    path = files.folder / POOLING
    pooling = json.loads(path.read_text("utf-8")) if path.is_file() else {MEAN: True}
    ways = [name for name, value in pooling.items() if name.startswith("pooling_mode_") and value is True]
    if ways not in ([CLS], [MEAN]):
        raise ModelUnavailable(
            f"{files} makes vectors in a way that this program lacks ({', '.join(ways)}). {ELSEWHERE}"
        )
    return ways == [CLS]


def _prompts(files: Files) -> dict[str, str]:
    path = files.folder / "config_sentence_transformers.json"
    return json.loads(path.read_text("utf-8")).get("prompts") or {} if path.is_file() else {}


def _positions(config: PreTrainedConfig) -> int:
    """Tokens of the longest text. The family of RoBERTa counts them from behind the padding's id on."""
    positions = int(getattr(config, "max_position_embeddings", 512))
    is_offset = "roberta" in config.model_type or config.model_type == "camembert"
    return positions - (config.pad_token_id or 0) - 1 if is_offset else positions

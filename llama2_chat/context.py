"""How many tokens a model holds, prompt and answer together, read from its configuration alone.

Two ways of stretching positions take their factors from the longest text in the step: LongRoPE and dynamic NTK.
Visitors share steps, so there the context ends where neither changes anything yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNKNOWN_CONTEXT = 4_096  # tokens, for a model that does not say
# Llama 1 and 2. Of a linear factor, some checkpoints of theirs give the length before stretching (Vicuna-16k: 4,096),
# others the one after it (LLaMA-2-7B-32K: 32,768, deepseek-coder: 16,384), and nothing else tells them apart.
TRAINED_LENGTHS = (2_048, 4_096)


def context_window(config: Any) -> tuple[int, str]:
    """Tokens that one request may have, and, if the model could hold more by itself, a sentence that says why not.

    config: a transformers.PreTrainedConfig.
    """
    text = config.get_text_config(decoder=True)
    given = getattr(text, "max_position_embeddings", None) or UNKNOWN_CONTEXT
    tokens, most = given, given
    for rope in ropes(text):
        kind, factor = rope.get("rope_type"), rope.get("factor") or 1
        trained = rope.get("original_max_position_embeddings") or given
        if kind == "linear" and rope is text.rope_parameters:
            tokens = most = max(given, getattr(text, "max_sequence_length", None) or 0, _stretched(given, factor))
        elif kind == "yarn":
            tokens = most = max(given, int(trained * factor))
        elif kind == "dynamic":
            most = max(most, int(given * factor))
        elif kind == "longrope":
            tokens = min(tokens, trained)
    if chunk := _attention_chunk(text):
        tokens = min(tokens, chunk)
    if tokens == most:
        return tokens, ""
    return tokens, (
        f"Its context is {tokens:,} of {most:,} tokens: past that, the longest conversation would change "
        "the answers to the others."
    )


def ropes(text: Any) -> Iterator[Mapping[str, Any]]:
    """The parameters of rotary positions: of all layers, or of each type of layer. text: the config of a text model."""
    parameters = getattr(text, "rope_parameters", None) or {}
    nested = [rope for rope in parameters.values() if isinstance(rope, dict) and "rope_type" in rope]
    yield from nested or [parameters]


def _stretched(given: int, factor: float) -> int:
    return int(given * factor) if given in TRAINED_LENGTHS else given


def _attention_chunk(text: Any) -> int | None:
    """Llama 4's layers see the tokens of their own chunk only; within the first, that is all."""
    chunked = "chunked_attention" in (getattr(text, "layer_types", None) or ())
    return getattr(text, "attention_chunk_size", None) if chunked else None

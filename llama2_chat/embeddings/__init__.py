"""Texts as vectors: an encoder in a process of its own, or one on another server. EMBEDDINGS says which.

local     the process, and what is asked of it
encoder   in that process: weights, tokenizer, pooling
remote    the same promise, Embedder, kept by a server that speaks OpenAI's API
prefixes  what encoders want to stand before a question and before a passage
"""

from __future__ import annotations

from llama2_chat.embeddings.local import LocalEmbedder, sentence_of
from llama2_chat.embeddings.remote import RemoteEmbedder
from llama2_chat.settings import Settings

__all__ = ["LocalEmbedder", "RemoteEmbedder", "make_embedder", "sentence_of"]


def make_embedder(settings: Settings) -> LocalEmbedder | RemoteEmbedder:
    """What EMBEDDINGS names."""
    if settings.embeddings_url:
        return RemoteEmbedder(settings.embeddings_url, settings.embeddings_model or "", settings.embeddings_key)
    return LocalEmbedder(settings.embeddings, settings.hub_cache_dir)

"""The same promise as ChatModel, kept by OpenAI-compatible servers."""

from llama2_chat.remote.remote import RemoteModel

__all__ = ["RemoteModel"]

"""How likely tokens were, in OpenAI's two forms: the one of chats, and the older one of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama2_chat.types import Candidate, TokenLogprob


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
    content = [_written(token.chosen) | {"top_logprobs": [*map(_written, token.top)]} for token in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[TokenLogprob], offset: int = 0) -> dict[str, Any]:
    """offset: characters before the answer. A prompt may begin with tokens that its text does not show."""
    return {
        "tokens": [token.chosen.token for token in tokens],
        "token_logprobs": [token.chosen.logprob for token in tokens],
        "top_logprobs": [_by_token(token) for token in tokens],
        "text_offset": [max(offset + token.offset, 0) for token in tokens],
    }


def _written(candidate: Candidate) -> dict[str, Any]:
    return {"token": candidate.token, "logprob": candidate.logprob, "bytes": [*candidate.bytes]}


def _by_token(token: TokenLogprob) -> dict[str, float | None] | None:
    """The likeliest, and the one that was chosen if it is none of them."""
    if token.chosen.logprob is None:
        return None
    # The first of two tokens with the same text is the likelier one.
    likeliest = {candidate.token: candidate.logprob for candidate in reversed(token.top)}
    return {token.chosen.token: token.chosen.logprob, **likeliest}

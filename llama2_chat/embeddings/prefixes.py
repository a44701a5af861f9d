"""What an encoder wants to stand before a question and before a passage, for it was trained so."""

from __future__ import annotations

import re
from collections.abc import Mapping

from llama2_chat.types import EmbeddingPurpose

E5 = re.compile(r"(^|[^a-z0-9])e5([^a-z0-9]|$)", re.IGNORECASE)
INSTRUCT = "Instruct: Given a question, retrieve passages that answer it\nQuery: "  # of the E5 that takes instructions
QUERY_NAMES, PASSAGE_NAMES = ("query", "web_search_query"), ("passage", "document")  # as sentence-transformers has them


def prefixes_of(name: str, prompts: Mapping[str, str] | None = None) -> dict[EmbeddingPurpose, str]:
    """prompts: those that the model's folder says itself, in config_sentence_transformers.json."""
    prompts = prompts or {}
    question = next((prompts[each] for each in QUERY_NAMES if prompts.get(each)), "")
    document = next((prompts[each] for each in PASSAGE_NAMES if prompts.get(each)), "")
    if not (question or document) and E5.search(name):
        question, document = (INSTRUCT, "") if "instruct" in name.lower() else ("query: ", "passage: ")
    return {"question": question, "document": document, "request": ""}

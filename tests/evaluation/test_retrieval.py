"""Measuring the search of documents."""

import json

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.evaluation.retrieval import measure, read_passages


def test_a_page_that_is_not_found_counts_as_missed(tmp_path):
    file = tmp_path / "passages.json"
    passages = [
        {"text": "The lighthouse is made of granite.", "questions": ["What is the lighthouse made of?", "Who swims?"]},
        {"text": "Seabirds nest on the cliff.", "questions": ["Where do seabirds nest?"]},
    ]
    file.write_text(json.dumps(passages))
    result = measure(read_passages(file), ["Nothing of all that."])
    assert (result.pages, result.questions) == (3, 3)
    assert result.recall_at_5 == result.mean_reciprocal_rank == pytest.approx(2 / 3)


def test_a_file_that_holds_no_passages_is_refused(tmp_path):
    file = tmp_path / "passages.json"
    file.write_text('{"text": 1}')
    with pytest.raises(ChatError, match="no JSON list"):
        read_passages(file)

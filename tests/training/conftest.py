"""Conversations that the tiny chat model can learn."""

import json

import pytest


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "some.jsonl"
    rows = [{"prompt": f"hello {i}", "completion": f"hell {i} " + "o " * (i % 5)} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file

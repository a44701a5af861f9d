"""scripts/evaluate_model.py in this process, and what it found."""

import json
from pathlib import Path

import pytest

from scripts import evaluate_model


def evaluate(*arguments):
    """What was found, as programs read it and as people do."""
    evaluate_model.main([*map(str, arguments), "--precisions", "float32"])
    folder = Path(arguments[arguments.index("--output_dir") + 1]) if "--output_dir" in arguments else None
    folder = folder or Path(arguments[0]) / "evaluation"
    return json.loads((folder / "evaluation.json").read_text()), (folder / "evaluation.md").read_text()


def refusal(*arguments):
    with pytest.raises(SystemExit) as ended:
        evaluate_model.main([*map(str, arguments)])
    return str(ended.value.code)


def loss_of(found, model, split, fold=None):
    (row,) = [row for row in found["perplexity"] if (row["model"], row["split"], row["fold"]) == (model, split, fold)]
    return row["loss"]

"""The page, the JSON and the figure, of figures made by hand."""

import itertools
import json
import math

import numpy as np
import pytest

from llama2_chat.evaluation import report
from llama2_chat.evaluation.eval_data import SPLITS
from llama2_chat.evaluation.overfitting import EVAL_LOSS, TRAIN_LOSS
from llama2_chat.evaluation.perplexity import Measurement
from llama2_chat.evaluation.results import Finetuned, Results
from tests.support.runs import new_run


def measured_as(model, split, loss, fold=None, conversations=8):
    losses = np.tile([10.0 * loss, 10.0], (conversations, 1))
    return Measurement(model, "float32", fold, split, losses, seconds=1.0, memory_gb=1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 800.0])
def test_a_model_that_is_broken_gives_json_a_page_and_a_figure_nevertheless(tmp_path, loss):
    """NaN is not JSON, and a loss of 800 ended the evaluation with an OverflowError."""
    rows = [measured_as("base", split, 3.0) for split in ("train", "eval")]
    rows += [measured_as("adapter", split, loss) for split in ("train", "eval")]
    finetuned = Finetuned("adapter", "base", None, [], kept_lowest=False, knows_splits=True)
    report.write(Results("broken", new_run(), [finetuned], rows), tmp_path)
    found = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert found["perplexity"][2]["perplexity"] is None
    assert found["overfitting"][0]["kind"] != "no overfitting"
    assert (tmp_path / "evaluation.png").is_file()


def test_a_finetuned_model_is_compared_with_its_base_on_what_neither_was_trained_on():
    rows = [measured_as("base", split, 3.0) for split in SPLITS]
    rows += [measured_as("adapter", split, 2.0) for split in SPLITS]
    finetuned = Finetuned("adapter", "base", None, [], kept_lowest=False, knows_splits=True)
    page = report.page(Results("compared", new_run(), [finetuned], rows))
    lines = [line for line in page if "the perplexity of adapter is 0.37 × that of base (0.37 to 0.37)" in line]
    assert [line.split(":")[0] for line in lines] == ["- eval", "- test"]


def test_the_numbers_of_the_figure_stay_apart_and_inside_however_many_models_there_are(tmp_path, monkeypatch):
    from matplotlib import pyplot

    names = [f"someone/a-model-with-quite-a-name-{i}" for i in range(8)]
    rows = [measured_as(name, split, 3.0) for name in names for split in SPLITS]
    curves = [{"step": i, "epoch": i, TRAIN_LOSS: 3.0, EVAL_LOSS: 3.0} for i in range(4)]
    finetuned = [Finetuned(name, names[0], None, curves, kept_lowest=False, knows_splits=True) for name in names[1:4]]
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.write(Results("many", new_run(), finetuned, rows), tmp_path)
    monkeypatch.undo()
    lines, bars = figures[0].axes
    places = sorted((text.get_window_extent() for text in bars.texts), key=lambda place: place.x0)
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(places))
    assert lines.get_legend().get_window_extent().x0 > lines.get_window_extent().x0
    pyplot.close(figures[0])

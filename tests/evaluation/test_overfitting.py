"""Whether a model overfits, in words, on curves made by hand."""

import math

import pytest

from llama2_chat.evaluation.overfitting import EVAL_LOSS, TRAIN_LOSS, Losses, assess


def curves(evals, train):
    """Ten steps to an epoch."""
    return [
        {"step": 5 * i, "epoch": i / 2, EVAL_LOSS: eval_loss, TRAIN_LOSS: train_loss}
        for i, (eval_loss, train_loss) in enumerate(zip(evals, train, strict=True))
    ]


FALLING = (3.0, 2.4, 1.9, 1.5, 1.2, 1.0, 0.8, 0.7, 0.6)


@pytest.mark.parametrize(
    ("evals", "train", "kind", "words"),
    [
        ((3.0, 2.4, 2.0, 1.9, 1.8, 1.85, 1.9, 1.95, 1.95), FALLING, "overfitting", "since epoch 2.0 the eval loss"),
        ((3.0, 3.1, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8), FALLING, "overfitting", "since epoch 0.0"),
        ((3.0, 2.4, 2.0, 1.9, 1.8, 1.8, 1.8, 1.8, 1.8), FALLING, "no overfitting", "from 3.00 to 1.80 and stayed"),
        ((3.0, 2.4, 2.0, 1.9, 1.8, 1.81, 1.82, 1.83, 1.82), FALLING, "no overfitting", "stayed there"),
        ((3.0, 2.8, 2.6, 2.4, 2.2, 2.0, 1.8, 1.6, 1.4), FALLING, "still falling", "from 1.80 to 1.40. Train longer"),
        ((3.0, 3.0, 2.99, 3.0, 3.01, 3.0, 3.0, 2.99, 3.0), FALLING, "nothing learned", "stayed at 3.00"),
        ((3.0, 2.5, 2.2, 4.0, 6.0, 7.0, 7.0, 7.0, 7.0), (3, 2.5, 2, 4, 6, 7, 7, 7, 7), "diverged", "--learning_rate"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_curves_say_whether_it_overfits_and_since_when(evals, train, kind, words):
    found = assess(curves(evals, train))
    assert found.kind == kind
    assert words in found.sentence


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_loss_that_becomes_nan_is_no_success(lost):
    """It read: "No overfitting: the eval loss fell from 3.00 to nan and stayed there."."""
    for evals in ((3.0, 2.5, 2.2, *[lost] * 6), (lost,) * 9):
        found = assess(curves(evals, FALLING), Losses(3, lost), Losses(3, lost))
        assert found.kind == "diverged"
        assert f"at epoch {evals.index(lost) / 2:.1f} the loss became NaN or infinite" in found.sentence


def test_a_model_that_learned_nothing_is_not_said_to_overfit_by_a_hair():
    flat = curves((3.0,) * 9, (3.0,) * 9)
    assert assess(flat, Losses(3, 2.999), Losses(3, 3.001)).kind == "nothing learned"
    assert "carries over" not in assess(flat, Losses(3, 2.999), Losses(3, 2.9999)).sentence


def test_what_early_stopping_kept_is_not_the_model_that_overfits():
    rows = curves((3.0, 2.4, 2.0, 1.9, 1.8, 1.85, 1.9, 1.95, 1.95), FALLING)
    assert "--early_stopping keeps the model of that epoch" in assess(rows).sentence
    assert "The model of that epoch was kept." in assess(rows, kept_lowest=True).sentence


@pytest.mark.parametrize(
    ("on_train", "on_eval", "kind", "words"),
    [
        (Losses(3, 1), Losses(3, 1.2), "no overfitting", "90% carries over"),
        (Losses(3, 1), Losses(3, 2.5), "overfitting", "25% carries over"),
        (Losses(3, 1), Losses(3, 3.2), "overfitting", "worse on the eval split"),
        (Losses(3, 3.1), Losses(3, 3.1), "nothing learned", "no better than its base"),
        (Losses(3, 2.999), Losses(3, 3.001), "nothing learned", "no better than its base"),
        (Losses(3, 1), None, "unknown", "no eval split is known"),
        (Losses(3, math.nan), Losses(3, math.nan), "unknown", "a loss is NaN or infinite"),
    ],
)
def test_without_curves_the_losses_beside_the_base_say_it(on_train, on_eval, kind, words):
    found = assess([], on_train, on_eval)
    assert found.kind == kind
    assert words in found.sentence


def test_a_model_that_is_worse_than_its_base_is_not_praised_for_its_curves():
    flat = curves((3.0, 2.4, 2.0, 1.9, 1.8, 1.8, 1.8, 1.8, 1.8), FALLING)
    found = assess(flat, Losses(3, 1), Losses(2, 2.5))
    assert (found.kind, "No overfitting" in found.sentence) == ("overfitting", False)
    assert "60% carries over" in assess(flat, Losses(3, 1), Losses(3, 1.8)).sentence

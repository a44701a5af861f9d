"""An encoder of few random parameters, compared with the obvious way."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from llama2_chat.embeddings.encoder import Encoder
from llama2_chat.embeddings.prefixes import prefixes_of
from llama2_chat.errors import ChatError, ModelUnavailable
from tests.support.encoders import save_encoder
from tests.support.small_model import save_model

TEXTS = ["a lighthouse stands by the sea", "the sea", "a", "the sea by the sea by the sea"]


@pytest.fixture
def folder(tmp_path):
    return save_encoder(tmp_path)


def states(folder, text):
    """What the model makes of each token of one text."""
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        return AutoModel.from_pretrained(folder)(**inputs).last_hidden_state[0].numpy()


def normalised(vector):
    return vector / np.linalg.norm(vector)


def test_a_vector_is_the_mean_of_the_tokens_whatever_the_company(folder, monkeypatch):
    monkeypatch.setattr("llama2_chat.embeddings.encoder.TOKENS_AT_ONCE", 24)  # two batches
    embedded = Encoder(str(folder), None).embed(TEXTS, "request")
    for text, vector in zip(TEXTS, embedded.vectors, strict=True):
        assert vector == pytest.approx(normalised(states(folder, text).mean(0)), abs=1e-5)
    assert embedded.tokens == sum(len(text.split()) + 2 for text in TEXTS)


def test_a_folder_may_say_that_the_first_token_is_the_text(tmp_path):
    folder = save_encoder(tmp_path, pooling="cls_token", parts=("Transformer", "Pooling", "Normalize"))
    (vector,) = Encoder(str(folder), None).embed(TEXTS[:1], "request").vectors
    assert vector == pytest.approx(normalised(states(folder, TEXTS[0])[0]), abs=1e-5)


def test_questions_and_documents_get_the_prefixes_that_e5_was_trained_with(tmp_path):
    encoder = Encoder(str(save_encoder(tmp_path / "multilingual-e5-small")), None)
    (question,) = encoder.embed(["the sea"], "question").vectors
    (document,) = encoder.embed(["the sea"], "document").vectors
    plain = encoder.embed(["query: the sea", "passage: the sea"], "request").vectors
    assert np.stack([question, document]) == pytest.approx(plain, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "prompts", "question", "document"),
    [
        ("intfloat/multilingual-e5-base", {}, "query: ", "passage: "),
        ("BAAI/bge-m3", {}, "", ""),
        ("someone/le5son", {}, "", ""),
        ("someone/own", {"query": "Q: ", "document": "D: "}, "Q: ", "D: "),
    ],
)
def test_prefixes_are_those_of_the_model(name, prompts, question, document):
    assert prefixes_of(name, prompts) == {"question": question, "document": document, "request": ""}


def test_what_is_too_long_is_cut_in_documents_and_refused_in_requests(folder):
    encoder, long = Encoder(str(folder), None), "sea " * 40
    whole, cut = encoder.embed([long, "sea " * 14], "document").vectors
    assert whole == pytest.approx(cut, abs=1e-5)
    with pytest.raises(ChatError, match="42 tokens, and this encoder reads 16"):
        encoder.embed([long], "request")


def test_other_weights_and_other_ways_make_vectors_of_another_identity(tmp_path):
    one, same = (Encoder(str(save_encoder(tmp_path / name)), None).identity for name in ("a", "b"))
    assert one == same
    (tmp_path / "a" / "config_sentence_transformers.json").write_text('{"prompts": {"query": "Q: "}}')
    others = [tmp_path / "a", save_encoder(tmp_path / "c", pooling="cls_token"), save_encoder(tmp_path / "d", 20)]
    assert len({one, *(Encoder(str(folder), None).identity for folder in others)}) == 4


def test_what_is_no_encoder_is_refused_before_its_weights_are_read(tmp_path):
    chat = save_model(tmp_path / "chat")
    (chat / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelUnavailable, match="is no encoder of texts"):
        Encoder(str(chat), None)
    for kinds, more in ({"parts": ("Transformer", "Dense")}, "Dense"), ({"pooling": "lasttoken"}, "lasttoken"):
        with pytest.raises(ModelUnavailable, match=more):
            Encoder(str(save_encoder(tmp_path / more, **kinds)), None)
    with pytest.raises(ModelUnavailable, match="There is no folder"):
        Encoder(str(tmp_path / "nothing"), None)


def test_weights_of_which_some_are_missing_are_refused_but_for_those_that_nothing_needs(folder):
    weights = load_file(folder / "model.safetensors")  # which has no pooler
    Encoder(str(folder), None)
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="incomplete"):
        Encoder(str(folder), None)

"""An encoder in a process of its own: started, asked, killed and started again."""

from contextlib import closing

import pytest

from llama2_chat.embeddings import LocalEmbedder, RemoteEmbedder, local, make_embedder
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.settings import Settings
from tests.support.encoders import save_encoder
from tests.support.waiting import until


def test_an_encoder_is_called_by_its_id_and_a_folder_by_its_name(tmp_path):
    assert LocalEmbedder("intfloat/multilingual-e5-small@main").name == "intfloat/multilingual-e5-small"
    assert LocalEmbedder(f"{tmp_path}/mine").name == "mine"


def test_an_address_is_a_server_and_all_else_an_encoder_to_load():
    assert isinstance(make_embedder(Settings(embeddings="owner/name")), LocalEmbedder)
    assert isinstance(make_embedder(Settings(embeddings="HTTP://gpu-1:8080/v1")), RemoteEmbedder)


def test_while_an_encoder_loads_nobody_waits_for_it():
    with pytest.raises(ModelUnavailable, match="still loading"):
        LocalEmbedder("owner/name").embed(["a"], "question")


@pytest.mark.slow
def test_texts_become_vectors_until_the_process_dies_and_then_again(tmp_path, monkeypatch):
    with closing(LocalEmbedder(str(save_encoder(tmp_path)))) as embedder:
        embedder.check()
        assert (embedder.state, embedder.dimensions) == ("ready", 32)
        identity, embedded = embedder.identity, embedder.embed(["the sea", "a lighthouse"], "document")
        assert embedded.vectors.shape == (2, 32)
        assert embedded.tokens == 8
        with pytest.raises(ChatError, match="reads 16"):
            embedder.embed(["sea " * 20], "request")
        embedder._process.kill()
        until(lambda: embedder.state == "failed")
        with pytest.raises(ModelUnavailable, match="has ended"):
            embedder.embed(["the sea"], "question")
        monkeypatch.setattr(local, "PAUSE_S", 0)
        with pytest.raises(ModelUnavailable):
            embedder.embed(["the sea"], "question")  # which starts it again
        until(lambda: embedder.state == "ready")
        again = embedder.embed(["the sea"], "document")
        assert again.vectors[0] == pytest.approx(embedded.vectors[0], abs=1e-5)
        assert embedder.identity == identity


@pytest.mark.slow
def test_weights_that_are_missing_are_said(tmp_path):
    folder = save_encoder(tmp_path / "mine")
    (folder / "model.safetensors").unlink()
    with closing(LocalEmbedder(str(folder))) as embedder:
        with pytest.raises(ModelUnavailable, match="holds no weights"):
            embedder.check()
        assert str(tmp_path) not in embedder.error  # visitors see no folders

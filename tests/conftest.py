"""What the tests share: the embedded model, loaded once, the tokenizers, a tiny model and a Hub that has it.

What takes seconds to import is imported by the fixtures: the process that only starts the workers of `pytest -n` reads
this file first, and they wait for it.

The embedded model is fetched on the first run ever and lies in the user's cache from then on. Hypothesis draws the
same examples every time, so that a green run stays green.
"""

import os
import signal
from collections import Counter
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # to be said before PyTorch is imported
    # With more threads than cores the workers of `pytest -n` would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from hypothesis import settings as hypothesis_settings

from llama2_chat.settings import Settings
from tests.support.hub import Hub
from tests.support.training import run_sft_trainer

hypothesis_settings.register_profile("same-every-time", derandomize=True, deadline=None, print_blob=False)
hypothesis_settings.load_profile("same-every-time")


# Where the tests run in the background of a shell, Ctrl-C is ignored, and in all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # once those of other markers are gone
def pytest_collection_modifyitems(items):
    """Long files first, or one worker of `pytest -n` would still be busy with one when the others have nothing to do.

    A file is long if a test of it may take long, and then if it has many tests. In this order workers take files.
    """
    tests, seconds = Counter(item.path for item in items), Counter()
    for item in items:
        for mark in item.iter_markers("timeout"):
            seconds[item.path] = max(seconds[item.path], *mark.args)
    items.sort(key=lambda item: (-seconds[item.path], -tests[item.path]))


@pytest.fixture(scope="session", autouse=True)
def data_home(tmp_path_factory):
    """Where documents and conversations lie, also those of programs that a test starts: not this user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="session")
def settings(data_home):
    """The settings of somebody who set nothing, whatever stands in this shell's environment."""
    folders = ("CACHE_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME")
    return Settings.read([], {name: os.environ[name] for name in folders if name in os.environ})


@pytest.fixture(scope="session")
def chat(settings):
    """The embedded model as a visitor without a GPU gets it."""
    from model import ChatModel

    chat = ChatModel(settings).load()
    assert chat.state == "ready", chat.status.error
    yield chat
    chat.close()


@pytest.fixture(scope="session")
def embedded(settings):
    """The files of the embedded model."""
    from llama2_chat.loading.choose import choose, fetch

    return fetch(choose(settings), lambda *_: None)


@pytest.fixture(scope="session")
def embedded_tokenizer(embedded):
    from llama2_chat.loading.read import load_tokenizer

    return load_tokenizer(embedded)


@pytest.fixture(scope="session")
def llama2_tokenizer():
    """Llama 2's own tokenizer: the folder LLAMA2_TOKENIZER, or what the Hub cache holds."""
    from transformers import AutoTokenizer

    folder = os.environ.get("LLAMA2_TOKENIZER")
    if folder and not Path(folder).is_dir():
        pytest.fail(f"LLAMA2_TOKENIZER is {folder}, which is not a folder")
    try:
        return AutoTokenizer.from_pretrained(folder or "meta-llama/Llama-2-13b-chat-hf", local_files_only=True)
    except OSError:
        pytest.skip("Llama 2's tokenizer is not here; set LLAMA2_TOKENIZER to a folder that holds it")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a model of 100,000 random parameters."""
    from tests.support.small_model import save_model

    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory):
    """The same with a ChatML template, and a tokenizer for any text."""
    from tests.support.small_chat_model import save_chat_model

    return save_chat_model(tmp_path_factory.mktemp("chat-model"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory, worker_id):
    """What `sft_trainer.py --demo` leaves, as adapter/ and merged/. Takes minutes: once for all workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "demo"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            run_sft_trainer("--demo", "--output_dir", folder / "adapter", "--merge_to", folder / "merged")
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path, tiny):
    """A Hub with one model, an empty cache, and nobody logged in."""
    import huggingface_hub

    hub = Hub()
    hub.repos["someone/tiny"] = tiny
    constants = huggingface_hub.constants  # what HF_ENDPOINT, HF_HOME and a login set when the library is imported
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield hub
    hub.close()

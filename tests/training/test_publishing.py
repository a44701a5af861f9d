"""What others are given of a model: a card with its licence, a GGUF with its Modelfile, and nothing of this machine."""

import json
import shutil
from pathlib import Path

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.loading import EMBEDDED
from llama2_chat.training import card, merging, publishing
from llama2_chat.training.options import Options
from llama2_chat.training.report import Subject
from scripts import publish_model
from tests.support.runs import new_run

CONVERTER = """
import pathlib, sys
folder, _, file, _, outtype = sys.argv[1:]
assert (pathlib.Path(folder) / "config.json").is_file()
pathlib.Path(file).write_text(outtype)
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder with a converter that takes what llama.cpp's takes."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / publishing.CONVERTER).write_text(CONVERTER)
    return folder


# ---- GGUF ----


def test_a_model_becomes_a_gguf_beside_its_modelfile(chat_model, llama_cpp, tmp_path, capsys):
    folder = shutil.copytree(chat_model, tmp_path / "mine")
    publish_model.main([str(folder), "--gguf", "--llama_cpp", str(llama_cpp)])
    assert (folder / "gguf" / "mine-q8_0.gguf").read_text() == "q8_0"
    assert (folder / "gguf" / "Modelfile").read_text().startswith("FROM ./mine-q8_0.gguf\nTEMPLATE")
    assert f"ollama create NAME -f {folder}/gguf/Modelfile" in capsys.readouterr().out


def test_a_converter_that_is_missing_or_fails_is_a_sentence_and_leaves_no_gguf(
    chat_model, llama_cpp, tmp_path, monkeypatch
):
    folder = shutil.copytree(chat_model, tmp_path / "mine")
    monkeypatch.setattr(publishing.shutil, "which", lambda name: None)
    with pytest.raises(
        ChatError, match=r"convert_hf_to_gguf\.py of llama\.cpp is not installed\. Get it by: git clone"
    ):
        publishing.export_gguf(folder, "f16", None)
    (llama_cpp / publishing.CONVERTER).write_text("import no_such_package")
    with pytest.raises(ChatError, match=r"converter failed \(ModuleNotFoundError: No module named 'no_such_package'\)"):
        publishing.export_gguf(folder, "f16", llama_cpp)
    assert [file.name for file in (folder / "gguf").iterdir()] == ["Modelfile"]
    with pytest.raises(ChatError, match=r"has no convert_hf_to_gguf\.py"):
        publishing.export_gguf(folder, "f16", tmp_path)


def test_an_adapter_is_no_gguf_and_one_for_a_base_of_this_machine_is_not_published(chat_model, llama_cpp, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(chat_model)}))
    with pytest.raises(ChatError, match="is an adapter, and a GGUF is a whole model"):
        publishing.export_gguf(adapter, "f16", llama_cpp)
    with pytest.raises(ChatError, match="others do not have under this name"):
        publishing.push(adapter, "you/adapter")


def test_a_llama_2_is_no_gguf_without_its_tokenizer_model(chat_model, llama_cpp, tmp_path):
    """llama.cpp's converter takes it, gives all tokens one score, and its texts are split at random."""
    folder = shutil.copytree(chat_model, tmp_path / "mine")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["byte_fallback"] = True
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ChatError, match=r"lacks tokenizer\.model"):
        publishing.export_gguf(folder, "f16", llama_cpp)
    (folder / "tokenizer.model").write_text("a")
    assert publishing.export_gguf(folder, "f16", llama_cpp).gguf.is_file()


# ---- The Hub ----


def test_only_what_others_need_is_uploaded(chat_model, tmp_path, monkeypatch):
    folder, pushed = shutil.copytree(chat_model, tmp_path / "mine"), []
    for name in (
        "README.md",
        "run.json",
        "answers.json",
        "LICENSE.txt",
        "checkpoint-2/model.safetensors",
        "gguf/a.gguf",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("a")
    monkeypatch.setattr(merging, "create_repo", lambda repo: None)
    monkeypatch.setattr(merging, "push", lambda *given: pushed.append(given))
    names = publishing.push(folder, "you/mine")
    assert pushed == [(folder, "you/mine", names)]
    assert {"README.md", "LICENSE.txt", "model.safetensors", "tokenizer.json", "gguf/a.gguf"} <= {*names}
    assert not {"run.json", "answers.json", "checkpoint-2/model.safetensors"} & {*names}
    (tmp_path / "empty").mkdir()
    with pytest.raises(ChatError, match="has no model"):
        publishing.push(tmp_path / "empty", "you/mine")


def subject(tmp_path, model, repo=None, **options):
    given = Options(model, ["someone/talks", str(tmp_path)], tmp_path, 1e-4, **options)
    return Subject(model, repo, new_run(), given, tmp_path)


def test_the_card_names_base_data_and_licence(tmp_path):
    front = card.front_matter(subject(tmp_path, "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-hf", use_peft=True))
    assert front[1:6] == [
        "base_model: meta-llama/Llama-2-7b-hf",
        "base_model_relation: adapter",
        "library_name: peft",
        "license: llama2",
        "datasets: [someone/talks]",
    ]
    merged = card.of_merged("\n".join(front)).split("\n")
    assert merged[2:4] == ["base_model_relation: finetune", "library_name: transformers"]
    assert merged[:2] + merged[4:] == front[:2] + front[4:]


@pytest.mark.parametrize(
    ("model", "base_card", "licence"),
    [
        (EMBEDDED, "", "apache-2.0"),
        ("codellama/CodeLlama-7b-hf", "", "llama2"),
        ("my-llama2-copy", "", "llama2"),
        ("own", "---\nlicense: mit\n---\nA model.", "mit"),
        ("own", "A model without front matter.\nlicense: mit", None),
    ],
)
def test_the_licence_is_the_bases(tmp_path, model, base_card, licence):
    (tmp_path / "README.md").write_text(base_card)
    found = subject(tmp_path, model)
    assert card.find_licence(found) == licence
    assert ("Meta Platforms" in "\n".join(card.licence_lines(found))) is (licence == "llama2")


def test_licence_and_tokenizer_model_are_passed_on(tmp_path):
    for name in ("LICENSE.txt", "USE_POLICY.md", "README.md", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).write_text("a")
    (tmp_path / "to").mkdir()
    card.pass_on_files(tmp_path, tmp_path / "to")
    assert {file.name for file in Path(tmp_path / "to").iterdir()} == {
        "LICENSE.txt",
        "USE_POLICY.md",
        "tokenizer.model",
    }


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["none", "--gguf"], "there is no folder none"),
        (
            [
                ".",
            ],
            "say what to do",
        ),
        ([".", "--gguf", "q4_k_m"], "invalid choice"),
        ([".", "--pus", "a"], "There is no --pus. Is --push meant?"),
    ],
)
def test_flags_that_make_no_sense_are_refused_with_a_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        publish_model.read_arguments(flags)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err

"""Meta's own download is converted once, to the numbers that Meta's reference computes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from llama2_chat import prompt
from llama2_chat.loading import shards
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.load import load
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.loading.tokenizer_model import convert_tokenizer, read_pieces
from llama2_chat.server.probes import PlannedStart, probe_disk, probe_model, probe_tokenizer
from tests.support.loading import asking_for, get, logits, refusal
from tests.support.metas import metas_logits, params, save_metas, tokenizer_model, whole_model
from tests.support.serving import ignore

ROWS = len(read_pieces(tokenizer_model()))


@pytest.fixture
def make(tmp_path):
    def make(name="llama-2-7b-chat", files=1, inner=96, **changes):
        said = params(**changes)
        tensors = whole_model(said, ROWS, inner)
        folder = save_metas(tmp_path / name, tensors, said, files)
        return asking_for(folder, cache_dir=tmp_path / "cache", quantization="none")

    return make


def path_in(folder, name):
    return Path(folder) / name


def converted(settings):
    """The folder that transformers reads."""
    checkpoint = fetch(choose(settings), ignore)
    load(checkpoint, ignore)
    return checkpoint.base.folder


@pytest.mark.parametrize(
    ("files", "kv_heads", "theta"),
    [
        pytest.param(1, None, None, marks=pytest.mark.slow, id="one file"),
        pytest.param(2, None, 1e6, id="two files, theta 1e6"),
        pytest.param(4, 4, 1e6, marks=pytest.mark.slow, id="four files, GQA, theta 1e6"),
        pytest.param(8, 8, None, marks=pytest.mark.slow, id="eight files"),
        pytest.param(2, 2, None, id="two files, GQA"),
    ],
)
def test_the_logits_are_those_of_metas_reference(make, monkeypatch, files, kv_heads, theta):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2**12)  # several blocks to a tensor
    changes = {"n_kv_heads": kv_heads, "rope_theta": theta}
    said = {name: value for name, value in changes.items() if value is not None}
    folder = converted(make(files=files, **said))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.randint(ROWS, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = metas_logits(whole_model(params(**said), ROWS), params(**said), ids)
    torch.testing.assert_close(logits(model, ids)[0], expected, rtol=0, atol=1e-5)
    assert model.config.max_position_embeddings == (16_384 if theta else 4_096)


@pytest.mark.slow
def test_the_second_start_converts_nothing(make):
    settings = make(files=2)
    folder = converted(settings)
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    phases = []
    get(settings, lambda phase, *_: phases.append(phase))
    assert "convert" not in phases
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps


def test_a_start_that_was_cut_off_goes_on_where_it_was(make):
    class CutOff(Exception):
        pass

    def cut_off(phase, done, total):
        if total and done > total * 0.7:
            raise CutOff

    settings = make(files=2)
    checkpoint = fetch(choose(settings), ignore)
    with pytest.raises(CutOff):
        load(checkpoint, cut_off)
    first = min(checkpoint.base.folder.glob("*.safetensors"))
    (checkpoint.base.folder / "model-00009-of-00009.part").write_bytes(b"half")
    stamp, missing = first.stat().st_mtime_ns, checkpoint.base.missing()
    assert missing
    load(checkpoint, ignore)
    assert first.stat().st_mtime_ns == stamp
    assert not list(checkpoint.base.folder.glob("*.part"))


@pytest.mark.slow
def test_the_files_are_as_large_as_was_said_before(make):
    checkpoint = fetch(choose(make(files=2, inner=160)), ignore)
    promised = checkpoint.base.missing()
    load(checkpoint, ignore)
    assert {name: (checkpoint.base.folder / name).stat().st_size for name in promised} == promised


def test_another_download_into_the_folder_is_converted_anew(make):
    settings = make()
    old = converted(settings)
    shutil.rmtree(settings.model_id)
    new = converted(make(inner=128))
    assert new != old
    assert not old.exists()


@pytest.mark.parametrize(
    ("name", "chat_format", "expected"),
    [
        ("llama-2-7b-chat", "auto", prompt.LLAMA_2_FORMAT),
        ("CodeLlama-7b-Instruct", "auto", prompt.LLAMA_2_FORMAT),
        ("llama-2-7b", "auto", prompt.NO_FORMAT),
        ("CodeLlama-7b", "auto", prompt.NO_FORMAT),
        ("llama-2-7b", "llama-2", prompt.LLAMA_2_FORMAT),
        ("llama-2-7b-chat", "none", prompt.NO_FORMAT),
    ],
)
def test_a_folder_chats_or_completes_by_its_name_or_as_it_is_told(make, monkeypatch, name, chat_format, expected):
    monkeypatch.setattr("llama2_chat.prompt.formats.GOLDEN", ())  # the small vocabulary has other ids
    settings = make(name)
    settings = asking_for(settings.model_id, cache_dir=settings.cache_dir, chat_format=chat_format)
    checkpoint = fetch(choose(settings), ignore)
    assert prompt.checked_format(load_tokenizer(checkpoint), checkpoint.chat_format) == expected


def test_code_llama_70b_instruct_has_another_format(make):
    assert "codellama/CodeLlama-70b-Instruct-hf" in refusal(fetch, choose(make("CodeLlama-70b-Instruct")), ignore)


def test_the_tokenizer_may_lie_above_and_the_checklist_have_the_line_ends_of_windows(tmp_path, make):
    # As download.sh leaves them: tokenizer.model beside the folders of all models.
    said = params()
    folder = save_metas(tmp_path / "llama-2-7b-chat", whole_model(said, ROWS), said, line_end="\r\n")
    shutil.move(folder / "tokenizer.model", tmp_path / "tokenizer.model")
    lines = (folder / "checklist.chk").read_bytes().splitlines(keepends=True)
    (folder / "checklist.chk").write_bytes(b"".join(line for line in lines if b"tokenizer" not in line))
    (tmp_path / "tokenizer_checklist.chk").write_bytes(next(line for line in lines if b"tokenizer" in line))
    settings = asking_for(folder, cache_dir=tmp_path / "cache")
    get(settings)
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model(("other",)))
    assert "tokenizer_checklist.chk" in refusal(get, settings)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["consolidated.01.pth", "params.json", "tokenizer.model"])
def test_one_flipped_byte_is_refused_with_the_name_of_the_file(make, name):
    settings = make(files=2)
    folder = choose(settings).model_id
    flip(path_in(folder, name))
    sentence = refusal(get, settings)
    assert name in sentence
    assert "MD5" in sentence


def run_code(folder):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {folder}/evil",)

    torch.save({"tok_embeddings.weight": Evil()}, folder / "consolidated.00.pth")


def cut(folder):
    path = folder / "consolidated.00.pth"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_params(**changes):
    def change(folder):
        path = folder / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(name):
    return lambda folder: (folder / name).unlink()


BROKEN = {
    "code in a pickle": (run_code, "consolidated.00.pth holds more than tensors"),
    "a file that is cut off": (cut, "consolidated.00.pth is damaged or cut off"),
    "a pointer of Git LFS": (write("consolidated.01.pth", "version https://git-lfs"), "consolidated.01.pth is damaged"),
    "a missing last file": (remove("consolidated.01.pth"), "it has 1 of the 2 files"),
    "a missing first file": (remove("consolidated.00.pth"), "consolidated.00.pth is missing"),
    "no params.json": (remove("params.json"), "params.json is missing"),
    "no tokenizer": (remove("tokenizer.model"), "has no tokenizer.model"),
    "params of Llama 3": (change_params(use_scaled_rope=True), "says use_scaled_rope"),
    "a tokenizer of Llama 3": (write("tokenizer.model", "IQ== 0\nIg== 1\n"), "is no tokenizer of a Llama 2"),
    "another number of heads": (change_params(n_kv_heads=2), "has not the shape"),
    "more layers than there are": (change_params(n_layers=3), "lacks layers.2"),
    "no numbers": (change_params(dim="many"), "does not describe a model"),
    "no number of layers": (change_params(n_layers=True), "does not describe a model"),
    "more layers than anybody counts": (change_params(n_layers=2**30), "lacks layers that its params.json asks for"),
    "heads in words": (change_params(n_kv_heads="8"), "does not describe a model"),
    "positions that turn backwards": (change_params(rope_theta=-1e6), "does not describe a model"),
    "positions in words": (change_params(rope_theta="big"), "does not describe a model"),
    "no JSON": (write("params.json", "dim: 64"), "does not describe a model"),
}


@pytest.mark.parametrize(("breaks", "expected"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_with_a_folder_is_said_in_a_sentence(tmp_path, breaks, expected):
    folder = save_metas(
        tmp_path / "model" / "llama-2-7b-chat", whole_model(params(), ROWS), params(), 2, checklist=False
    )
    breaks(folder)
    assert expected in refusal(get, asking_for(folder, cache_dir=tmp_path / "cache"))
    assert not (folder / "evil").exists()


def test_a_file_that_the_checklist_names_and_that_is_not_here_is_named(make):
    settings = make(files=2)
    path_in(settings.model_id, "consolidated.01.pth").unlink()
    assert "consolidated.01.pth is missing" in refusal(get, settings)


def test_a_second_copy_that_a_browser_has_made_is_no_part_of_the_model(make):
    settings = make()
    first = path_in(settings.model_id, "consolidated.00.pth")
    shutil.copy(first, first.with_name("consolidated.00 (1).pth"))
    get(settings)


@pytest.mark.slow
def test_a_disk_without_room_is_told_before_anything_is_converted(make, monkeypatch):
    settings = make(files=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    sentence = refusal(get, settings)
    assert "more on disk" in sentence
    assert "CACHE_DIR" in sentence
    assert not list(settings.cache_dir.rglob("*.safetensors"))
    assert refusal(probe_disk, PlannedStart(settings)) == sentence


@pytest.mark.slow
def test_the_check_before_a_start_knows_such_a_folder(make):
    settings = make("llama-2-7b")
    start = PlannedStart(settings)
    assert "All files are here" in probe_model(start)
    assert "completes texts" in probe_tokenizer(start)
    assert "still to be written" in probe_disk(start)
    get(settings)
    assert "nothing to download" in probe_disk(start)


@pytest.mark.slow
def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half(make, monkeypatch):
    settings = make()
    original = shards.blocks

    def full(part, tensors):
        if "lm_head" in part.name:
            raise OSError(28, "No space left on device")
        return original(part, tensors)

    monkeypatch.setattr(shards, "blocks", full)
    assert "No space left" in refusal(get, settings)
    assert not list(settings.cache_dir.rglob("*.part"))


def test_a_disk_that_is_full_for_libraries_in_rust_is_told_as_one(make, monkeypatch):
    def full(*_, **__):
        raise Exception("No space left on device (os error 28)")  # as tokenizers has it

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", full)
    settings = make()
    assert "No space left on device. Please set CACHE_DIR" in refusal(get, settings)
    assert not list(settings.cache_dir.rglob("*.staging"))


def test_a_file_that_cannot_be_read_is_not_told_as_one_that_cannot_be_written(make, monkeypatch):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    assert "consolidated.00.pth cannot be read: Permission denied" in refusal(get, make())


def test_the_weights_are_read_in_float32_bfloat16_or_float16_and_nothing_else(tmp_path):
    tensors = {name: tensor.double() for name, tensor in whole_model(params(), ROWS).items()}
    folder = save_metas(tmp_path / "llama-2-7b-chat", tensors, params())
    assert "shape or precision" in refusal(get, asking_for(folder, cache_dir=tmp_path / "cache"))


@pytest.mark.slow
def test_metas_tokenizer_becomes_the_published_one(llama2_tokenizer, tmp_path):
    path = path_in(llama2_tokenizer.name_or_path, "tokenizer.model")
    if not path.is_file():
        pytest.skip("this copy of the tokenizer has no tokenizer.model")
    mine = json.loads(convert_tokenizer(path).backend_tokenizer.to_str())
    published = json.loads(path_in(llama2_tokenizer.name_or_path, "tokenizer.json").read_text())
    assert mine["model"]["vocab"] == published["model"]["vocab"]
    assert [*map(tuple, mine["model"]["merges"])] == [*map(tuple, published["model"]["merges"])]
    assert mine["added_tokens"] == published["added_tokens"]
    assert mine["normalizer"] == published["normalizer"]


@pytest.mark.parametrize("name", ["model.gguf", "./model.gguf", "owner/name/model-Q4_K_M.gguf"])
def test_a_gguf_is_met_with_what_to_do_instead(name):
    sentence = refusal(choose, asking_for(name))
    assert "llama.cpp" in sentence
    assert "INFERENCE_URL" in sentence
    assert sentence.count(". ") == 0


def test_a_folder_of_gguf_files_is_met_with_the_same(tmp_path):
    (tmp_path / "llama-2-7b.Q4_0.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "INFERENCE_URL" in refusal(fetch, choose(asking_for(tmp_path)), ignore)


@pytest.mark.slow
def test_no_more_than_a_layer_is_in_memory_at_a_time(tmp_path):
    # Of 13B, 1.3 layers are 0.8 GB; read whole it was 26.
    said = params(dim=2560, n_heads=20)
    folder = save_metas(tmp_path / "llama-2-7b", whole_model(said, ROWS, inner=6912), said, files=2)
    command = [sys.executable, "-m", "tests.support.converting", folder, tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    memory = json.loads(done.stdout.splitlines()[-1])
    assert memory["peak_bytes"] <= 1.3 * memory["largest_group_bytes"], memory

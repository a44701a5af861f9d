"""What the GPU kernels and the recorded steps promise, shown without a GPU in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or by itself")

SCRIPT = r"""
import sys, torch
sys.path.insert(0, {root!r})
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from llama2_chat.kernels import attention
from llama2_chat.types import SamplingParams
from llama2_chat.engine.compiled import CompiledModel, Part, _packed, join_projections
from llama2_chat.engine.kv_cache import ATTENTION, PAGE_TOKENS, Pages
from llama2_chat.engine.sampler import Rows, draws

torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=512)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
model.set_attn_implementation(ATTENTION)
pages = Pages(model, {{torch.device("cpu"): 2**30}}, context_length=512, requests=4)
rows = Rows(4, 97, 64, torch.device("cpu"))
compiled = CompiledModel(model, pages, rows, most_pages=8)

def expected(ids):
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1]

with torch.inference_mode():
    before = expected([1, 2, 3])
    join_projections(model)
    assert expected([1, 2, 3]).equal(before)
    prompts = {{row: torch.randint(0, 97, (length,)).tolist() for row, length in enumerate((1, 63, 64, 200))}}
    for row in prompts:
        compiled.set_pages(row, 0, [1 + 4 * row + place for place in (2, 0, 3, 1)])
    # The first half of each, then the rest of all, in one pack each.
    halves = [Part(row, 0, ids[: len(ids) // 2]) for row, ids in prompts.items() if len(ids) > 1]
    compiled._prefill(_packed(halves, 256, 4), 256)
    rest = [Part(row, len(ids) // 2, ids[len(ids) // 2 :]) for row, ids in prompts.items()]
    logits = compiled._prefill(_packed(rest, 512, 4), 512)
    for row, ids in prompts.items():
        torch.testing.assert_close(logits[row], expected(ids), atol=1e-3, rtol=1e-3)
    params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=64)
    for row, ids in prompts.items():
        rows.join(row, ids, 0, params, draws(params))
    known = {{row: [*ids, token] for (row, ids), token in
             zip(prompts.items(), rows.sample(logits[:4], torch.arange(4), 64).tolist())}}
    everyone = torch.tensor([3, 0, 2, 1, 4, 4])  # two are padding
    for step in range(3):
        logits = compiled._decode(everyone)
        for place, row in enumerate(everyone[:4].tolist()):
            torch.testing.assert_close(logits[place], expected(known[row]), atol=1e-3, rtol=1e-3)
        for row, token in zip(everyone.tolist(), rows.sample(logits, everyone, 64).tolist()):
            if row < 4:
                known[row].append(token)
print("equal")
"""


def test_recorded_steps_compute_what_the_model_computes():
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert run.stdout == "equal\n", run.stderr

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
from llama2_chat.kernels.blocks import BlockPacker
from llama2_chat.types import SamplingParams
from llama2_chat.engine.adapters import add_adapters
from llama2_chat.engine.cuda_graphs import RecordedWay, _packed
from llama2_chat.engine.join_projections import join_projections
from llama2_chat.engine.kv_pool import make_pool
from llama2_chat.engine.paged_attention import ATTENTION
from llama2_chat.engine.prefix_cache import BlockTable
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import SamplerState, draws
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.engine.step_ways import EagerWay
from llama2_chat.kernels.lora import LoraWeights

torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=512)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
model.set_attn_implementation(ATTENTION)
def new_pool(kv_cache):
    return make_pool(kv_cache, model, lambda: {{torch.device("cpu"): 2**30}}, context_length=512, max_batch=4)

pool = new_pool("none")
state = SamplerState(4, 97, 64, torch.device("cpu"))
params = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=64)

def lora(name, shapes):
    # For both layers: [rank, in] and [out, rank].
    layers = {{f"model.layers.{{i}}.{{layer}}": (torch.randn(rank, wide), 0.02 * torch.randn(out, rank))
              for i in range(2) for layer, (rank, wide, out) in shapes.items()}}
    return LoraWeights(name, layers)

def expected(ids, adapter=0):
    with rows.taking([adapter] * len(ids)):
        return model(torch.tensor([ids]), use_cache=False).logits[0, -1]

with torch.inference_mode():
    before = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    join_projections(model)
    first = {{"self_attn.q_proj": (4, 64, 64), "self_attn.v_proj": (4, 64, 32), "mlp.down_proj": (4, 64, 64)}}
    second = {{"self_attn.o_proj": (2, 64, 64), "mlp.gate_proj": (2, 64, 64), "mlp.up_proj": (3, 64, 64)}}
    rows = add_adapters(model, [lora("first", first), lora("second", second)])
    recorded = RecordedWay(model, pool, state, most_blocks=8, rows=rows)
    assert expected([1, 2, 3]).equal(before)
    assert not expected([1, 2, 3], adapter=1).allclose(before, atol=0.1)
    assert not expected([1, 2, 3], adapter=2).allclose(before, atol=0.1)
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in (1, 63, 64, 200)]
    requests = [Request(ids, params, None, 64, draws(params, 64), slot=slot, adapter=slot % 3)
                for slot, ids in enumerate(prompts)]
    for request in requests:
        request.blocks = BlockTable(own=[1 + 4 * request.slot + place for place in (2, 0, 3, 1)])
    # The first half of each, then the rest of all, in one pack each.
    halves = [Chunk(r, 0, len(r.ids) // 2) for r in requests if len(r.ids) > 1]
    rest = [Chunk(r, len(r.ids) // 2, len(r.ids)) for r in requests]
    recorded._bind(requests)
    recorded._prefill(_packed(halves, 256, 4), 256)
    logits = recorded._prefill(_packed(rest, 512, 4), 512)
    for request in requests:
        torch.testing.assert_close(logits[request.slot], expected(request.ids, request.adapter), atol=1e-3, rtol=1e-3)
        state.join(request.slot, request.ids, 0, params, request.draws)
    for request, token in zip(requests, state.sample(logits[:4], torch.arange(4), 64).tolist()):
        request.ids.append(token)
    everyone = torch.tensor([3, 0, 2, 1, 4, 4])  # two are padding
    for step in range(3):
        logits = recorded._decode(everyone)
        for place, slot in enumerate(everyone[:4].tolist()):
            alone = expected(requests[slot].ids, requests[slot].adapter)
            torch.testing.assert_close(logits[place], alone, atol=1e-3, rtol=1e-3)
        for slot, token in zip(everyone.tolist(), state.sample(logits, everyone, 64).tolist()):
            if slot < 4:
                requests[slot].ids.append(token)
    tensors = [*pool.tensors, torch.arange(4 * 64 * 6).to(torch.int8).view(4, 64, 6)]
    before = [tensor.clone() for tensor in tensors]
    piece = torch.zeros(sum(tensor[0].nbytes for tensor in tensors), dtype=torch.uint8)
    packer = BlockPacker(tensors)
    packer.pack(2, piece)
    packer.unpack(piece, 1)
    for tensor, old in zip(tensors, before):
        assert tensor[1].equal(old[2]) and tensor[2:].equal(old[2:]) and tensor[0].equal(old[0])
    # With keys and values in 8 bits: what plain PyTorch computes over such a pool.
    pool, other = new_pool("int8"), new_pool("int8")
    recorded, eager = RecordedWay(model, pool, state, most_blocks=8), EagerWay(model, other, state, None, 8)
    request = Request(prompts[3][:201], params, None, 64, draws(params, 64), slot=0)
    request.blocks = BlockTable(own=[3, 1, 4, 2])
    recorded._bind([request])
    for start, end in ((0, 70), (70, 200)):
        found = recorded._prefill(_packed([Chunk(request, start, end)], 256, 4), 256)[0]
    def agree(logits, end):
        exact = eager.prefill([Chunk(request, 0, end)], everywhere=True)[-1]
        error = (logits - exact).norm() / exact.norm()
        assert 0 < error < 0.1, error  # the interpreter rounds scales down
    agree(found, 200)
    state.tokens[0], state.positions[0] = request.ids[200], 200
    agree(recorded._decode(torch.tensor([0, 4]))[0], 201)
print("equal")
"""


@pytest.mark.slow
def test_recorded_steps_compute_what_the_model_computes():
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert run.stdout == "equal\n", run.stderr

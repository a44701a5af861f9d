"""What the GPU kernels and the recorded steps promise, shown without a GPU: kernels in Triton's interpreter, and steps
that compute anew where they would be replayed."""

import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from llama2_chat.engine import cuda_graphs
from llama2_chat.engine.cuda_graphs import RecordedWay, _DecodeRecording, _packs, _padded, _Recording
from llama2_chat.engine.drafts import Confidence, Drafts
from llama2_chat.engine.engine import Engine
from llama2_chat.engine.kv_pool import BLOCK_SIZE, KVPool
from llama2_chat.engine.model_runner import ModelRunner, _draft_net, _drafter
from llama2_chat.engine.paged_attention import attention_windows
from llama2_chat.engine.sampler import NARROW, SamplerState
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.engine.step_ways import Outcome
from llama2_chat.training.draft_training import new_head
from llama2_chat.types import SamplingParams
from tests.engine.test_speculation import Pipelined
from tests.support.drafts import guess_always, random_head
from tests.support.engines import CPU, Stairs, running, start

SCRIPT = r"""
import copy, sys, torch
sys.path.insert(0, {root!r})
from functools import partial
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from llama2_chat.kernels import attention, gpu_lora, prefill_attention
from llama2_chat.kernels.blocks import BlockPacker
from llama2_chat.types import SamplingParams
from llama2_chat.engine import adapters
from llama2_chat.engine.cuda_graphs import RecordedWay, _DecodeRecording, _packed
from llama2_chat.engine.join_projections import join_projections
from llama2_chat.engine.kv_pool import EightBitPool, KVPool
from llama2_chat.engine.paged_attention import ATTENTION
from llama2_chat.engine.prefix_cache import BlockTable
from llama2_chat.engine.request import Request
from llama2_chat.engine.sampler import SamplerState, draws
from llama2_chat.engine.scheduler import Chunk, DraftChunk
from llama2_chat.engine.step_ways import EagerWay
from llama2_chat.kernels.lora import LoraWeights
from llama2_chat.kernels.sampling import sample_narrow

torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=512)
model = LlamaForCausalLM(config).eval().requires_grad_(False)
model.set_attn_implementation(ATTENTION)
def new_pool(make):
    return make(model, lambda: {{torch.device("cpu"): 2**30}}, context_length=512, max_batch=4)

pool = new_pool(KVPool)  # as on a GPU
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

class Replayed:
    # In place of a CUDA graph.
    def __init__(self, recorded, size):
        self.recorded, self.recording = recorded, recorded._decodes[size]

    def replay(self):
        self.recording.logits = self.recorded._decode(self.recording.inputs)

torch.Tensor.pin_memory = lambda self: self

with torch.inference_mode():
    before = model(torch.tensor([[1, 2, 3]])).logits[0, -1]
    join_projections(model)
    first = {{"self_attn.q_proj": (4, 64, 64), "self_attn.v_proj": (4, 64, 32), "mlp.down_proj": (4, 64, 64)}}
    second = {{"self_attn.o_proj": (2, 64, 64), "mlp.gate_proj": (2, 64, 64), "mlp.up_proj": (3, 64, 64)}}
    adapters._kernels = lambda device: gpu_lora  # as on a GPU
    rows = adapters.add_adapters(model, [lora("first", first), lora("second", second)])
    recorded = RecordedWay(model, pool, state, most_blocks=8, rows=rows)
    assert expected([1, 2, 3]).equal(before)
    assert not expected([1, 2, 3], adapter=1).allclose(before, atol=0.1)
    assert not expected([1, 2, 3], adapter=2).allclose(before, atol=0.1)
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in (1, 63, 64, 200)]
    prompts[1] = prompts[1][:58]  # so that guesses reach over the border of a block
    requests = [Request(ids, params, None, 64, draws(params, 64), slot=slot, adapter=slot % 3)
                for slot, ids in enumerate(prompts)]
    for request in requests:
        request.blocks = BlockTable(own=[1 + 4 * request.slot + place for place in (2, 0, 3, 1)])
    # The first half of each, then the rest of all, in one pack each.
    halves = [Chunk(r, 0, len(r.ids) // 2) for r in requests if len(r.ids) > 1]
    rest = [Chunk(r, len(r.ids) // 2, len(r.ids)) for r in requests]
    recorded._bind(requests)
    recorded._prefill(_packed(halves, 256, 4), 256)
    logits = recorded._prefill(_packed(rest, 320, 4), 320)
    for request in requests:
        torch.testing.assert_close(logits[request.slot], expected(request.ids, request.adapter), atol=1e-3, rtol=1e-3)
        state.join(request.slot, request.ids, 0, params, request.draws)
    for request, token in zip(requests, state.sample(logits[:4], torch.arange(4), 64).tolist()):
        request.ids.append(token)
    everyone = torch.tensor([3, 0, 2, 1, 4, 4])  # two are padding
    for step in range(3):
        logits = recorded._decode(recorded._padded_rows([(slot, 0, 0) for slot in (3, 0, 2, 1)], 6))
        for place, slot in enumerate(everyone[:4].tolist()):
            alone = expected(requests[slot].ids, requests[slot].adapter)
            torch.testing.assert_close(logits[place], alone, atol=1e-3, rtol=1e-3)
        for slot, token in zip(everyone.tolist(), state.sample(logits, everyone, 64).tolist()):
            if slot < 4:
                requests[slot].ids.append(token)
    # Guesses behind the newest token of some, over the border of a block too; then what was wrong is written over.
    guesses = [[], [5, 6, 7, 8], [], [9]]
    chunks = []
    for request, guess in zip(requests, guesses):
        request.computed = len(request.ids) - 1
        chunks.append(DraftChunk.of(request, guess, False))
    recorded._decodes[10] = _DecodeRecording(10, recorded._new_inputs("decode", 10), None, None, None, None)
    recorded._decodes[10].forward = Replayed(recorded, 10)
    verified = recorded.verify(chunks)
    for request, guess in zip(requests, guesses):
        for place in range(len(guess) + 1):
            found = verified.logits[verified.first[request] + place]
            alone = expected(request.ids + guess[:place], request.adapter)
            torch.testing.assert_close(found, alone, atol=1e-3, rtol=1e-3)
        request.ids.append(11)
        state.tokens[request.slot], state.positions[request.slot] = 11, len(request.ids) - 1
    logits = recorded._decode(recorded._padded_rows([(slot, 0, 0) for slot in range(4)], 4))
    for request in requests:
        alone = expected(request.ids, request.adapter)
        torch.testing.assert_close(logits[request.slot], alone, atol=1e-3, rtol=1e-3)
    tensors = [*pool.tensors, torch.arange(4 * 64 * 6).to(torch.int8).view(4, 64, 6)]
    before = [tensor.clone() for tensor in tensors]
    piece = torch.zeros(sum(tensor[0].nbytes for tensor in tensors), dtype=torch.uint8)
    packer = BlockPacker(tensors)
    packer.pack(2, piece)
    packer.unpack(piece, 1)
    for tensor, old in zip(tensors, before):
        assert tensor[1].equal(old[2]) and tensor[2:].equal(old[2:]) and tensor[0].equal(old[0])
    # One kernel chooses as the sampler does.
    state._params[:4] = torch.tensor([[0, 1, 1, 0, 1, 0, 0], [1, 40, 0.9, 0, 1, 0, 0], [2, 64, 1, 0.02, 1.3, 0, 0],
                                      [3, 20, 0.8, 0, 1, 0.5, 0.2]])
    again = copy.deepcopy(state)
    for step in range(3):
        logits = 5 * torch.randn(6, 97)
        chosen = sample_narrow(logits, everyone, 64, *state.tensors)
        assert chosen[:4].equal(again.sample(logits, everyone, 64)[:4])
        assert all(mine[:4].equal(plain[:4]) for mine, plain in zip(state.tensors, again.tensors))
    assert sample_narrow(torch.full((1, 97), torch.nan), torch.tensor([0]), 64, *state.tensors).tolist() == [-1]
    # With keys and values in 8 bits: what plain PyTorch computes over such a pool.
    pool, other = (new_pool(partial(EightBitPool, torch.int8)) for _ in range(2))
    recorded, eager = RecordedWay(model, pool, state, most_blocks=8), EagerWay(model, other, state, None, 8)
    request = Request(prompts[3][:201], params, None, 64, draws(params, 64), slot=0)
    request.blocks = BlockTable(own=[3, 1, 4, 2])
    recorded._bind([request])
    for start, end in ((0, 70), (70, 200)):
        found = recorded._prefill(_packed([Chunk(request, start, end)], 192, 4), 192)[0]
    def agree(logits, end):
        exact = eager.prefill([Chunk(request, 0, end)], everywhere=True)[-1]
        error = (logits - exact).norm() / exact.norm()
        assert 0 < error < 0.1, error  # the interpreter rounds scales down
    agree(found, 200)
    state.tokens[0], state.positions[0] = request.ids[200], 200
    agree(recorded._decode(recorded._padded_rows([(0, 0, 0)], 2))[0], 201)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="comes with PyTorch for CUDA, or by itself")
def test_recorded_steps_compute_what_the_model_computes():
    script = SCRIPT.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert run.stdout == "equal\n", run.stderr


# ---- A layer of which each of several processes has a part ----

DIVIDED = r"""
import copy, os, signal, sys, torch
sys.path.insert(0, {root!r})
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from llama2_chat.engine.cuda_graphs import _layer
from llama2_chat.engine.join_projections import join_projections
from llama2_chat.engine.ranks import sum_products
from llama2_chat.kernels import sum_and_norm
from llama2_chat.kernels.rank_sum import together
from llama2_chat.kernels.sum_and_norm import EMPTY, Boxes

RANKS, WIDTH = 2, 64
config = LlamaConfig(vocab_size=97, hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=4, head_dim=16, initializer_range=0.2)
torch.manual_seed(0)
whole = LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
for name, weight in whole.named_parameters():
    if "norm" in name:
        weight.normal_(1, 0.3)

def attend(query, key, value, scale):
    return F.scaled_dot_product_attention(query, key, value, scale=scale, is_causal=True).transpose(1, 2)

def compute(model, tokens):
    hidden = model.model.embed_tokens(torch.arange(tokens)[None])
    first, last = model.model.layers
    hidden, normed = _layer(first, last.input_layernorm, hidden, first.input_layernorm(hidden), None, attend)
    return torch.cat(_layer(last, model.model.norm, hidden, normed, None, attend))

def part(rank):
    config_of_part = copy.deepcopy(config)
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        setattr(config_of_part, name, getattr(config, name) // RANKS)
    weights = whole.state_dict()
    for name in weights:
        if any(row in name for row in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            weights[name] = weights[name].chunk(RANKS)[rank]
        elif "o_proj" in name or "down_proj" in name:
            weights[name] = weights[name].chunk(RANKS, 1)[rank]
    model = LlamaForCausalLM(config_of_part).to(torch.bfloat16).eval().requires_grad_(False)
    model.load_state_dict(weights)
    sum_products(model)
    join_projections(model)
    return model

SIZES = (1, 70, 3)  # 70 tokens go the other way
expected = [compute(whole, tokens) for tokens in SIZES]
found = [[torch.zeros_like(states).share_memory_() for states in expected] for _ in range(RANKS)]
memories = [torch.full((Boxes.numbers(WIDTH, RANKS),), EMPTY.value, dtype=torch.int16) for _ in range(RANKS)]
memories = [memory.share_memory_() for memory in memories]
children = []
for rank in range(RANKS):
    if not (child := os.fork()):
        signal.alarm(100)
        sum_and_norm._boxes = Boxes(WIDTH, rank, [memory.data_ptr() for memory in memories], torch.device("cpu"))
        sum_and_norm.dist.init_process_group(
            "gloo", store=sum_and_norm.dist.FileStore(sys.argv[1], RANKS), rank=rank, world_size=RANKS
        )
        model = part(rank)
        compute(model, 3)  # as it is compiled: nobody waits for anybody
        with together():
            for place, tokens in zip(found[rank], SIZES):
                place.copy_(compute(model, tokens))
        sum_and_norm.dist.barrier()
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
for one, other, right in zip(*found, expected):
    assert one.equal(other)
    error = (one.float() - right.float()).norm() / right.float().norm()
    assert 0 < error < 0.02, error
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="comes with PyTorch for CUDA, or by itself")
def test_layers_in_parts_compute_what_whole_layers_compute(tmp_path):
    script = DIVIDED.format(root=str(Path(__file__).parents[2]))
    env = os.environ | {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "meeting")]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=150)
    assert run.stdout == "equal\n", run.stderr


# ---- Steps as the engine asks for them, with attention in plain PyTorch ----


class Replay:
    """In place of a CUDA graph."""

    def __init__(self, replay):
        self.replay = replay


class Anew(RecordedWay):
    """Computes a step anew instead of replaying it."""

    def __init__(self, *args, sizes):
        super().__init__(*args)
        self.taken = set()
        self.verified = []  # whether a step was recorded for each that checks guesses
        for kind, size in sizes:
            self._record(kind, size)

    def start(self, wake):
        pass

    def wait(self):
        pass

    def verify(self, chunks):
        found = super().verify(chunks)
        self.verified.append(found is not None)
        return found

    def _record(self, kind, size):
        inputs = self._new_inputs(kind, size)
        logits = self._logits(kind, size, inputs)

        def step():
            self.taken.add((kind, size))
            logits.copy_(self._logits(kind, size, inputs))

        def sample():
            recording.tokens = self._sampler.sample(logits, inputs[0], NARROW)

        if kind == "prefill":
            self._prefills[size] = _Recording(size, inputs, Replay(step), logits)
        else:
            recording = _DecodeRecording(size, inputs, Replay(step), logits, Replay(sample), inputs[0])
            self._decodes[size] = recording


def turned(states, cos, sin):
    if cos is None:
        return states
    half = states.shape[-1] // 2
    return states * cos[:, None] + torch.cat([-states[..., half:], states[..., :half]], -1) * sin[:, None]


def decode(query, key, value, cos, sin, kv_index, slots, positions, table, scale, keys, values):
    """What kernels.attention.decode_attention promises."""
    query, key = turned(query, cos, sin), turned(key, cos, sin)
    for states, new in ((keys, key), (values, value)):
        states.view(-1, *states.shape[2:])[kv_index] = new[0].transpose(0, 1)
    output = []
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        blocks = table[slot, : position // BLOCK_SIZE + 1].long()
        seen = [states[blocks].flatten(0, 1)[None, : position + 1].transpose(1, 2) for states in (keys, values)]
        output.append(F.scaled_dot_product_attention(query[:, :, row : row + 1], *seen, scale=scale, enable_gqa=True))
    return torch.cat(output, 2).transpose(1, 2)


def prefill(query, key, value, cos, sin, kv_index, slots, starts, counts, table, scale, keys, values):
    tile = torch.arange(query.shape[2] // len(slots))
    where = slots.repeat_interleave(len(tile)), (starts[:, None] + tile).flatten()
    return decode(query, key, value, cos, sin, kv_index, *where, table, scale, keys, values)


@pytest.fixture
def without_kernels(monkeypatch):
    monkeypatch.setattr(torch.ops.llama2_chat, "decode_attention", decode, raising=False)
    monkeypatch.setattr(torch.ops.llama2_chat, "prefill_attention", prefill, raising=False)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(cuda_graphs, "PIECE_SIZE", 128)


SIZES = {("decode", 1), ("decode", 4), ("prefill", 64), ("prefill", 128)}
SETTINGS = ({"temperature": 0}, {"temperature": 1, "top_k": 5}, {"temperature": 1, "top_k": 0}, {"logprobs": 2})


def answers(engine):
    """Of questions in company, some of which share a beginning, and of one that comes later."""
    with engine.paused():
        started = [
            start(
                engine,
                [1, 2, 3, 4] * 17 + [number] * (1 + 40 * number),
                SamplingParams(seed=number, max_new_tokens=12, repetition_penalty=1, **params),
                Stairs(number, steps=9) if number == 2 else None,
            )
            for number, params in enumerate(SETTINGS)
        ]
    said = [(streamer.rest(), request.finish_reason) for request, streamer in started]
    _, later = start(engine, [1, 2, 3, 4] * 17 + said[0][0])
    return [*said, later.rest()]


@torch.inference_mode()
def recording_runner(model, sizes, deterministic, draft=None, kernel=None, draft_tokens=0):
    windows, context = attention_windows(model), 256
    net = _draft_net(draft, model)
    pool = KVPool(model, lambda: {CPU: 2**24}, context, max_batch=6, beside=net.probe() if net else ())
    sampler = SamplerState(6, model.config.vocab_size, context, CPU)
    way = Anew(model, pool, sampler, context // BLOCK_SIZE, deterministic, sizes=sizes)
    drafter = _drafter(net, model, pool, sampler, context, None) if net else None
    if drafter:
        drafter._way._on_cpu, drafter._way._kernel = False, kernel
        way.listen(net.feature_layers, drafter.hear)
    piece = cuda_graphs.PIECE_SIZE if deterministic else None
    options = {"piece_size": piece, "drafter": drafter, "draft_tokens": draft_tokens}
    runner = ModelRunner(model, pool, sampler, context, None, way, 128, windows, **options)
    runner._eager._on_cpu = False
    return runner, way


@pytest.mark.parametrize(
    ("lengths", "steps"),
    [
        ([1], [64]),
        ([130], [256]),  # as long as 128 and 64 more
        ([512], [512]),
        ([520], [512, 64]),
        ([700], [512, 256]),
        ([900], [1024]),
        ([1100], [1024, 128]),
        ([500, 500, 500], [1024, 512]),
        ([2048, 1], [2048, 64]),
        ([30] * 40, [2048, 512]),
    ],
)
def test_prompts_are_read_in_the_recorded_steps_that_take_least_time(lengths, steps):
    chunks = [Chunk(number, 7, 7 + length) for number, length in enumerate(lengths)]
    packs = _packs(chunks, [64, 128, 256, 512, 1024, 2048])
    for pack, size in zip(packs, steps, strict=True):
        assert sum(map(_padded, pack)) <= size
    parts = [part for pack in packs for part in pack]
    for each in chunks:
        places = [place for part in parts if part.request == each.request for place in range(part.start, part.end)]
        assert places == [*range(each.start, each.end)]
    assert [part.request for part in parts] == sorted(part.request for part in parts)


@pytest.mark.parametrize("deterministic", [False, True])
def test_recorded_steps_that_the_engine_packs_and_pads_say_what_it_says_without(
    tiny_llama, without_kernels, deterministic
):
    with running(tiny_llama, speculate=False) as plain:
        expected = answers(plain)
    sizes = {("decode", 6), ("prefill", 128)} if deterministic else SIZES
    runner, way = recording_runner(tiny_llama, sizes, deterministic)
    engine = Engine(Pipelined(runner), set())
    assert answers(engine) == expected
    engine.close()
    assert way.taken == sizes


@pytest.mark.parametrize("deterministic", [False, True])
def test_guesses_checked_in_recorded_steps_change_no_answer(tiny_llama, without_kernels, deterministic):
    sizes = {("decode", 6), ("prefill", 128)} if deterministic else SIZES | {("decode", 6)}
    runner, way = recording_runner(tiny_llama, sizes, deterministic)
    engine = Engine(Pipelined(runner), set())
    expected = answers(engine)
    runner.draft_tokens = 6
    assert answers(engine) == expected
    engine.close()
    assert 0 < engine.occupancy.accepted < engine.occupancy.drafted
    assert way.verified == [True] * len(way.verified) != []


@pytest.fixture
def guessing_model(monkeypatch):
    """Three guesses at a time, of a model alone, however wrong they are."""
    guess_always(monkeypatch)
    monkeypatch.setattr(Drafts, "look_up", lambda *_: [])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", ["head of three layers", "head that others wrote"])
def test_a_model_guesses_behind_recorded_steps_and_changes_no_answer(
    tiny_llama, without_kernels, guessing_model, deterministic, kind
):
    draft = {
        "head of three layers": lambda: new_head(tiny_llama, [], 0).eval().requires_grad_(False),
        "head that others wrote": lambda: random_head(tiny_llama, bias=False, input_norm=True),
    }[kind]()
    sizes = {("decode", 6), ("prefill", 128)} if deterministic else SIZES | {("decode", 6)}
    runner, way = recording_runner(tiny_llama, sizes, deterministic, draft)
    engine = Engine(Pipelined(runner), set())
    expected = answers(engine)
    runner.draft_tokens = 6
    assert answers(engine) == expected
    engine.close()
    assert engine.occupancy.drafted_by_model > 20
    assert way.verified == [True] * len(way.verified) != []


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_model_that_is_the_served_one_guesses_all_of_it_behind_recorded_steps(
    tiny_llama, without_kernels, guessing_model, deterministic
):
    sizes = {("decode", 6), ("prefill", 128)} if deterministic else SIZES | {("decode", 6)}
    runner, _ = recording_runner(tiny_llama, sizes, deterministic, copy.deepcopy(tiny_llama))
    runner.draft_tokens = 6
    engine = Engine(Pipelined(runner), set())
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=20)
    for prompts in ([[5, 6], [9] * 60], [[7, *range(90)], [9] * 60 + [1]]):  # the last one begins as one before it
        with engine.paused():
            started = [start(engine, ids, greedy) for ids in prompts]
        for _, streamer in started:
            streamer.rest()
    engine.close()
    found = engine.occupancy
    assert found.drafted_by_model == found.accepted_by_model > 20


def test_a_model_guesses_right_over_what_was_read_before_any_step_was_recorded(
    tiny_llama, without_kernels, guessing_model
):
    # Keys and values of that were zeros to it, for as long as others found them in the KV cache.
    runner, way = recording_runner(tiny_llama, (), False, copy.deepcopy(tiny_llama), draft_tokens=6)
    engine = Engine(Pipelined(runner), set())
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=60)
    before = [9] * 60, [*range(70)]
    with engine.paused():
        started = [start(engine, ids, greedy) for ids in before]
    for _, streamer in started:
        streamer.next()
    for size in ("decode", 6), ("prefill", 128):
        way._compiled.put((*size, Outcome.DONE))
    said = [streamer.rest() for _, streamer in started]
    assert engine.occupancy.drafted_by_model > 20
    _, later = start(engine, [*before[0], *said[0][:20]], greedy)
    later.rest()
    engine.close()
    found = engine.occupancy
    assert found.drafted_by_model == found.accepted_by_model > 30


def test_guesses_read_keys_and_values_where_they_lie(tiny_llama, without_kernels, guessing_model, monkeypatch):
    read = []
    for name in ("read", "read_batch"):
        monkeypatch.setattr(KVPool, name, lambda *args: read.append(args))
    draft = copy.deepcopy(tiny_llama)
    runner, _ = recording_runner(tiny_llama, SIZES | {("decode", 6)}, False, draft, decode)
    monkeypatch.setattr(runner, "self_check", lambda requests: True)
    runner.draft_tokens = 6
    engine = Engine(Pipelined(runner), set())
    _, streamer = start(engine, [5, 6, *range(70)], SamplingParams(temperature=0, max_new_tokens=20))
    streamer.rest()
    engine.close()
    assert engine.occupancy.drafted_by_model > 10
    assert not read


def test_a_model_guesses_right_after_a_long_time_without(tiny_llama, without_kernels, guessing_model, monkeypatch):
    # What it has heard of tokens whose ids were still in flight is read in parts.
    def length(self, most, cost):
        self._steps_without += 1
        return min(most, 3) if self._steps_without > 90 else 0

    monkeypatch.setattr(Confidence, "length", length)
    runner, _ = recording_runner(tiny_llama, SIZES | {("decode", 6)}, False, copy.deepcopy(tiny_llama))
    runner.draft_tokens = 6
    engine = Engine(Pipelined(runner), set())
    monkeypatch.setattr(Confidence, "may_guess", lambda self, most, cost: most > 0 and self._steps_without >= 90)
    _, streamer = start(engine, [5, 6, 7], SamplingParams(temperature=0, repetition_penalty=1, max_new_tokens=120))
    streamer.rest()
    engine.close()
    found = engine.occupancy
    assert found.drafted_by_model == found.accepted_by_model > 0


@torch.inference_mode()
def test_what_recorded_steps_tell_is_what_the_model_computes(tiny_llama, without_kernels):
    runner, way = recording_runner(tiny_llama, SIZES | {("decode", 6)}, False)
    told = []
    way.listen([1], lambda states: told.append({behind: each.clone() for behind, each in states.items()}))
    engine = Engine(Pipelined(runner), set())
    prompts = [[5, 6, 7, *range(60, 0, -1)], [9, 8], [*range(90)]]
    with engine.paused():
        started = [start(engine, ids, SamplingParams(temperature=0, max_new_tokens=4)) for ids in prompts]
    for _, streamer in started:
        streamer.rest()
    engine.close()
    for behind in (1, 0):
        heard = torch.cat([states[behind] for states in told])
        for request, _ in started:
            ids = torch.tensor([request.ids[:-1]])
            output = tiny_llama.model(ids, output_hidden_states=True)
            expected = (output.last_hidden_state if behind == 0 else output.hidden_states[behind])[0]
            nearest = torch.cdist(expected, heard).amin(1)
            assert nearest.max() < 1e-3 * expected.norm(dim=1).mean()

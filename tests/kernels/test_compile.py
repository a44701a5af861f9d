"""Every GPU kernel compiles for every kind of GPU that it is for, whatever there is here."""

import importlib
import inspect
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat import kernels

pytestmark = pytest.mark.slow

# What the libraries ask of a GPU when they choose sizes, of a T4, A100, A10G, L4 and H100.
GPUS = {
    75: {"sm_count": 40, "max_smem_size": 65_536, "l2_cache_size": 4 << 20, "memory_bandwidth_gbps": 320.0},
    80: {"sm_count": 108, "max_smem_size": 166_912, "l2_cache_size": 40 << 20, "memory_bandwidth_gbps": 1_555.0},
    86: {"sm_count": 80, "max_smem_size": 101_376, "l2_cache_size": 6 << 20, "memory_bandwidth_gbps": 600.0},
    89: {"sm_count": 58, "max_smem_size": 101_376, "l2_cache_size": 48 << 20, "memory_bandwidth_gbps": 300.0},
    90: {"sm_count": 132, "max_smem_size": 232_448, "l2_cache_size": 50 << 20, "memory_bandwidth_gbps": 3_350.0},
}
OLDEST = {"blocks": 75}  # the others need bfloat16 or products that Triton does not promise below 8.0


# ---- Ours, in Triton ----


@pytest.fixture
def compiled(monkeypatch):
    """compiled(capability): what is launched is compiled for such a GPU, and not run; gives the kernels' names."""
    triton = pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA, or by itself")
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # as it is; 3.9 warns that 3.10 has another default
    names, run = set(), JITFunction.run

    def compile_only(function, *args, grid, warmup, **options):
        names.add(function.fn.__name__)
        return run(function, *args, grid=grid, warmup=True, **options)

    def begin(capability):
        target = GPUTarget("cuda", capability, 32)
        driver = SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: capability,  # what is compiled for one is not taken for another
            get_current_stream=lambda device: 0,
        )
        monkeypatch.setattr(triton.runtime.driver, "_active", driver)
        monkeypatch.setattr(JITFunction, "run", compile_only)
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        return names

    return begin


def kernels_of(module):
    from triton.runtime.jit import JITFunction

    found = {name for name, value in inspect.getmembers(module) if isinstance(value, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}  # the others are parts of these


@pytest.mark.parametrize("capability", GPUS)
def test_every_triton_kernel_compiles(compiled, capability, monkeypatch):
    names, expected = compiled(capability), set()
    for path in Path(kernels.__file__).parent.glob("*.py"):
        if "import triton" in path.read_text("utf-8") and capability >= OLDEST.get(path.stem, 80):
            expected |= kernels_of(importlib.import_module(f"llama2_chat.kernels.{path.stem}"))
    copy_blocks()
    if capability >= 80:
        add_adapters(capability, monkeypatch)
        multiply_nf4()
        add_and_normalise()
        in_8_bits = ["fp8", "int8"] if capability >= 89 else ["int8"]
        take_steps(2, *in_8_bits, "none")
        take_steps(4, *in_8_bits)  # a head of keys and values for each head
    assert expected
    assert names >= expected


def copy_blocks():
    from llama2_chat.kernels.blocks import BlockPacker

    packer, piece = BlockPacker([torch.zeros(3, 64, 2, 64)]), torch.zeros(64 * 2 * 64 * 4, dtype=torch.uint8)
    packer.pack(0, piece)
    packer.unpack(piece, 0)


def add_adapters(capability, monkeypatch):
    from llama2_chat.kernels import gpu_lora

    monkeypatch.setattr(gpu_lora, "begins_early", lambda device: capability >= 90)
    for dtype in (torch.float16, torch.float32, *([torch.bfloat16] if capability >= 80 else [])):
        for count, rank, widths in ((4, 16, [5120, 1024, 1024]), (1, 4, [256]), (5, 64, [13824, 13824])):
            starts = [sum(widths[:index]) for index in range(len(widths))]
            down = torch.zeros(len(widths) * count * rank, 512, dtype=dtype)
            y, up = (torch.zeros(rows, sum(widths), dtype=dtype) for rows in (8, count * rank))
            x, mask = (torch.zeros(8, columns, dtype=dtype) for columns in (512, count * rank))
            adapters = torch.zeros(8, dtype=torch.long)
            parts = gpu_lora.begin_adapters(x, adapters, down, count * rank, rank)
            gpu_lora.add_adapters_(y, x, parts, adapters, mask, down, up, rank, starts, widths)


def multiply_nf4():
    from llama2_chat.kernels.nf4 import nf4_linear

    N, K = 256, 512
    packed = torch.zeros(N * K // 2, 1, dtype=torch.uint8)
    absmax, code = torch.zeros(N * K // 64, dtype=torch.uint8), torch.zeros(256)
    absmax_scale, offset = torch.zeros(N * K // 64 // 256 + 1), torch.zeros(())
    for rows in (2, 8, 32, 512):
        nf4_linear(torch.zeros(1, rows, K, dtype=torch.bfloat16), packed, absmax, code, absmax_scale, offset, N)


def add_and_normalise():
    from llama2_chat.kernels.sum_and_norm import Boxes, add_and_norm

    cpu = torch.device("cpu")
    for width, ranks in ((5120, 2), (8192, 8)):
        states = torch.zeros(1, 2, width, dtype=torch.bfloat16)
        for boxes in (None, Boxes(width, ranks - 1, [0] * ranks, cpu)):
            add_and_norm(states, states, states[0, 0], 1e-5, boxes)


@torch.inference_mode()
def take_steps(kv_heads, *formats):
    from llama2_chat.engine.cuda_graphs import RecordedWay
    from llama2_chat.engine.join_projections import join_projections
    from llama2_chat.engine.kv_pool import EightBitPool, KVPool
    from llama2_chat.engine.paged_attention import ATTENTION
    from llama2_chat.engine.sampler import SamplerState
    from llama2_chat.kernels.kv_codes import CODES
    from llama2_chat.kernels.sampling import sample_narrow

    cpu = torch.device("cpu")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=512,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.set_attn_implementation(ATTENTION)
    join_projections(model)
    sampler = SamplerState(8, 97, 512, cpu, sample_narrow)
    for name in formats:
        make = KVPool if name == "none" else partial(EightBitPool, CODES[name])
        pool = make(model, lambda: {cpu: 2**26}, context_length=512, max_batch=8)
        recorded = RecordedWay(model, pool, sampler, most_blocks=8)
        for kind, size in recorded._sizes if name == "none" else [("decode", 8), ("prefill", 512)]:
            recorded._step(kind, size)


# ---- Those of humming-kernels ----


def has_nvrtc():
    try:
        from cuda.bindings import nvrtc  # noqa: F401
        from humming.utils.nvrtc import get_nvrtc_library_path

        return bool(get_nvrtc_library_path())
    except Exception:
        return False


@pytest.fixture
def humming_for(monkeypatch):
    """humming_for(capability): from now on the library compiles for such a GPU, and loads nothing."""
    from humming import device
    from humming.kernel.humming import HummingKernel

    def begin(capability):
        major, minor = divmod(capability, 10)
        tensorcore_tops = {"float16": 500.0, "bfloat16": 500.0, "int8": 1000.0, "float8e4m3": 1000.0, "int4": 1000.0}
        facts = {"index": 0, "name": "a GPU", "is_ppu": False, "sm_version": capability, "sm_major": major}
        facts |= {"sm_minor": minor, "max_smem_size_kb": GPUS[capability]["max_smem_size"] / 1024}
        facts |= {"l2_cache_size_mb": GPUS[capability]["l2_cache_size"] / 2**20, "max_threads_per_block": 1024}
        facts |= {"max_threads_per_sm": 1024 if capability == 75 else 1536, "max_registers_per_sm": 65_536}
        facts |= {"default_smem_size": 49_152, "sm_clock_khz": 1_500_000, "tensorcore_tops": tensorcore_tops}
        known = SimpleNamespace(**facts, **GPUS[capability])
        info = object.__new__(device.DeviceInfo)
        info._index, info._value = 0, known
        monkeypatch.setattr(device.DeviceInfo, "_instances", {0: info})
        monkeypatch.setattr(device.current_device, "_value", known)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(HummingKernel, "register_kernel", lambda self: setattr(self, "kernel_id", 0))

    return begin


@pytest.mark.skipif(not has_nvrtc(), reason="PyTorch for CUDA brings the compiler")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("capability", GPUS)
def test_products_of_packed_weights_compile(humming_for, capability, bits):
    from humming.kernel.humming import HummingKernel
    from humming.schema import HummingWeightSchema
    from humming.transform import prepare_layer_config

    from llama2_chat.kernels.packed import PADDED_MULTIPLE, SCHEMAS, _let_the_compiler_find_its_library

    humming_for(capability)
    _let_the_compiler_find_its_library()
    layer = prepare_layer_config(
        13824,
        5120,
        HummingWeightSchema.from_config(SCHEMAS[bits]),
        pad_n_to_multiple=PADDED_MULTIPLE,
        pad_k_to_multiple=PADDED_MULTIPLE,
        torch_dtype=torch.float16 if capability < 80 else torch.bfloat16,
        device=0,
    )
    assert len(HummingKernel.prepare_kernels(layer.to_str(), None, None, 0))

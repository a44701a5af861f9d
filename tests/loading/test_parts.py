"""A Llama in parts for several GPUs: what each reads, and how many there are."""

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from llama2_chat.kernels.packed import quantize
from llama2_chat.loading import load, packing
from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.disk import Files
from llama2_chat.loading.load import divided, measure_checkpoint
from llama2_chat.loading.memory import Gpu, Size
from llama2_chat.loading.parts import Part, choose_parts, share, why_not_divided
from llama2_chat.loading.read import read_model
from tests.support.loading import asking_for, refusal
from tests.support.serving import ignore
from tests.support.small_model import save_model

H100, A10G = Gpu(80 * 10**9, (9, 0), "H100"), Gpu(23 * 10**9, (8, 6), "A10G")
LLAMA_13B = LlamaConfig(
    hidden_size=5120,
    intermediate_size=13824,
    num_hidden_layers=40,
    num_attention_heads=40,
    max_position_embeddings=4096,
)
LLAMA_70B = LlamaConfig(
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=4096,
)


@pytest.fixture
def files(tmp_path):
    biases = {"attention_bias": True, "mlp_bias": True}
    return Files(save_model(tmp_path / "model", num_key_value_heads=2, head_dim=64, **biases))


def read(files, part=None, dtype=torch.float32):
    return read_model(files, dtype, None, {"": "cpu"}, None, part)


@torch.inference_mode()
def test_what_the_parts_of_a_layer_give_adds_up_to_what_the_layer_gives(files):
    whole, parts = read(files), [read(files, Part(rank, 2)) for rank in range(2)]
    for linear in ("self_attn.o_proj", "mlp.down_proj"):  # a bias that every part adds would count twice
        whole.model.layers[0].get_submodule(linear).bias.fill_(0.5)
        parts[0].model.layers[0].get_submodule(linear).bias.fill_(0.5)
    x = torch.randn(1, 5, 64)
    turned = whole.model.rotary_emb(x, torch.arange(5)[None])
    attended, *attended_by = (each.model.layers[0].self_attn(x, turned, None)[0] for each in (whole, *parts))
    mixed, *mixed_by = (each.model.layers[0].mlp(x) for each in (whole, *parts))
    torch.testing.assert_close(sum(attended_by), attended)
    torch.testing.assert_close(sum(mixed_by), mixed)


def test_a_part_holds_its_share_of_each_layer_and_no_more(files):
    whole, part = read(files), read(files, Part(1, 2))
    attention, mlp = part.model.layers[1].self_attn, part.model.layers[1].mlp
    of_whole = whole.model.layers[1]
    assert torch.equal(attention.k_proj.weight, of_whole.self_attn.k_proj.weight[64:])
    assert torch.equal(attention.q_proj.bias, of_whole.self_attn.q_proj.bias[128:])
    assert torch.equal(mlp.down_proj.weight, of_whole.mlp.down_proj.weight[:, 64:])
    assert not mlp.down_proj.bias.any()
    held = {name: tensor.untyped_storage().nbytes() for name, tensor in mlp.state_dict().items()}
    assert held["gate_proj.weight"] == held["down_proj.weight"] == 64 * 64 * 4  # no view of what is whole


@torch.inference_mode()
def test_a_part_in_int4_has_the_codes_of_the_whole_and_in_int8_those_of_its_outputs():
    weight = torch.randn(128, 256).bfloat16()
    whole, columns, rows = (quantize(part, 4) for part in (weight, weight[:, 128:], weight[64:]))
    for all_of_it, its_columns, its_rows in zip(whole, columns, rows, strict=True):
        assert torch.equal(its_columns, all_of_it[:, all_of_it.shape[1] // 2 :])
        assert torch.equal(its_rows, all_of_it[len(all_of_it) // 2 :])
    # In 8 bits a scale goes through a whole row of inputs: half of them have one of their own.
    for all_of_it, its_rows in zip(quantize(weight, 8)[:2], quantize(weight[64:], 8)[:2], strict=True):
        assert torch.equal(its_rows, all_of_it[64:])


def test_each_part_in_int4_has_a_copy_of_its_own_for_the_next_start(tmp_path, monkeypatch):
    files = Files(save_model(tmp_path / "model", hidden_size=128, intermediate_size=256))

    def read_int4(part):
        return packing.read_packed(files, "int4", tmp_path / "cache", torch.bfloat16, {"": "cpu"}, None, part)

    first = [read_int4(part) for part in (None, Part(0, 2), Part(1, 2))]
    monkeypatch.setattr(packing, "quantize", None)
    for part, before in zip((None, Part(0, 2), Part(1, 2)), first, strict=True):
        again = read_int4(part).state_dict()
        assert all(torch.equal(again[name], tensor) for name, tensor in before.state_dict().items())
    one, other = (each.model.layers[0].mlp.up_proj.weight for each in first[1:])
    assert one.shape == other.shape
    assert not torch.equal(one, other)


# ---- How many ----


def test_each_part_has_its_share_of_the_keys_and_values_in_8_bits_too():
    # It was counted whole for each GPU, so that models were refused, or spread otherwise, for which there was room.
    whole = Size(linear=8, other=0, context=4096, kv_bytes_per_token=1000, kv_bytes_in_8_bits=600, kv_cache="auto")
    assert share(whole, 2).needed_bytes("int8", 4096) - share(whole, 2).needed_bytes("int8", 0) == 300 * 4096


@pytest.mark.parametrize(
    ("requested", "quantization", "config", "gpus", "parts"),
    [
        ("auto", "auto", LLAMA_13B, [], 1),
        ("auto", "auto", LLAMA_13B, [H100], 1),
        ("auto", "auto", LLAMA_13B, [H100, H100], 1),  # one holds it
        ("2", "none", LLAMA_13B, [H100, H100], 2),
        ("auto", "none", LLAMA_13B, [A10G, A10G], 2),
        ("auto", "none", LLAMA_13B, [A10G] * 4, 2),
        ("auto", "none", LLAMA_13B, [A10G, replace(A10G, name="L4")], 1),
        ("auto", "auto", LLAMA_70B, [H100, H100], 2),
        ("auto", "int4", LLAMA_70B, [H100, H100], 1),
        ("auto", "int4", LLAMA_70B, [A10G] * 4, 4),
        ("auto", "nf4", LLAMA_70B, [A10G] * 4, 1),
        ("auto", "none", LLAMA_70B, [Gpu(73_500_000_000)] * 2, 2),  # with a part of its context
        ("auto", "auto", LLAMA_70B, [Gpu(73_500_000_000)] * 2, 1),  # NF4, which is not divided
        ("auto", "none", LLAMA_70B, [A10G] * 8, 8),
        ("auto", "none", LLAMA_70B, [A10G] * 4, 1),  # too large even so; check_memory() says it
    ],
)
def test_as_many_gpus_as_are_needed_compute_a_layer_together(requested, quantization, config, gpus, parts):
    assert choose_parts(requested, quantization, config, Size.of(config), gpus, None) == parts


@pytest.mark.parametrize(
    ("config", "parts", "precision", "gpus", "reason"),
    [
        (
            LLAMA_70B,
            3,
            "bfloat16",
            [H100] * 4,
            "the model has 8 heads of keys and values, which cannot be divided by 3",
        ),
        (MistralConfig(), 2, "bfloat16", [H100] * 2, "only a Llama can be divided, and this is a mistral"),
        (LLAMA_13B, 2, "nf4", [H100] * 2, "weights in NF4 are not divided; QUANTIZATION=int4 takes as much memory"),
        (LLAMA_13B, 2, "int4", [H100], "there is one GPU here"),
        (LLAMA_13B, 4, "int4", [H100] * 3, "there are 3 GPUs here"),
        (LLAMA_13B, 2, "int4", [H100, A10G], "the first 2 GPUs are not alike (H100, A10G)"),
        (LLAMA_13B, 2, "int4", [H100] * 2, None),
    ],
)
def test_what_cannot_be_divided_is_told_with_the_reason(config, parts, precision, gpus, reason):
    assert why_not_divided(config, parts, precision, gpus) == reason


def test_a_number_of_gpus_that_does_not_work_here_is_refused_before_anything_is_read(files):
    def asked(**settings):
        return divided(fetch(choose(asking_for(files.folder, quantization="none", **settings)), ignore))

    assert refusal(lambda: asked(tensor_parallel="3")) == (
        "TENSOR_PARALLEL=3 does not work here: the model has 2 heads of keys and values, which cannot be divided by 3. "
        "Set TENSOR_PARALLEL=1."
    )
    assert asked(tensor_parallel="1").part is None
    assert asked(tensor_parallel="auto").part is None
    assert asked(tensor_parallel="2").part == Part(0, 2)


def test_auto_divides_what_one_gpu_does_not_hold_but_no_pickles_which_can_only_be_read_whole(files, monkeypatch):
    checkpoint = fetch(choose(asking_for(files.folder, quantization="none", tensor_parallel="auto")), ignore)
    size = measure_checkpoint(checkpoint)
    too_small = Gpu(size.needed_bytes("bfloat16", size.context) - 1)
    monkeypatch.setattr(load, "visible_gpus", lambda: [too_small] * 2)
    assert divided(checkpoint).part == Part(0, 2)
    (files.folder / "model.safetensors").rename(files.folder / "pytorch_model.bin")
    assert divided(checkpoint).part is None
    asked = replace(checkpoint, tensor_parallel="2")
    assert "its weights are pickles, which can only be read whole" in refusal(divided, asked)


def test_without_products_in_4_and_8_bits_a_model_in_them_is_not_divided(files, monkeypatch):
    """Each part took those of bitsandbytes, which nobody divides."""
    checkpoint = fetch(choose(asking_for(files.folder, quantization="int4", tensor_parallel="2")), ignore)
    monkeypatch.setattr(load, "visible_gpus", lambda: [H100] * 2)
    monkeypatch.setattr(load, "why_not_packed", lambda gpus: "humming-kernels does not work here (no compiler)")
    assert refusal(divided, checkpoint) == (
        "TENSOR_PARALLEL=2 does not work here: only products by humming-kernels are divided in int4, and "
        "humming-kernels does not work here (no compiler)."
    )
    size = measure_checkpoint(checkpoint)
    too_small = replace(H100, free_bytes=size.needed_bytes("int4", size.context) - 1)
    monkeypatch.setattr(load, "visible_gpus", lambda: [too_small] * 2)
    assert divided(replace(checkpoint, tensor_parallel="auto")).part is None
    monkeypatch.setattr(load, "why_not_packed", lambda gpus: None)
    assert divided(replace(checkpoint, tensor_parallel="auto")).part == Part(0, 2)

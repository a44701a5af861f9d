"""Checkpoints that come quantised answer as a plain copy of what they stand for does, or are refused by name."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llama2_chat.loading.choose import choose, fetch
from llama2_chat.loading.dequantize import READERS
from llama2_chat.loading.load import measure
from tests.support import packers
from tests.support.loading import asking_for, get, get_float32, logits, refusal
from tests.support.packers import change_config, packed
from tests.support.serving import ignore
from tests.support.small_model import save_model

COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}


def _compressed(*bits):
    groups = {f"group_{n}": {"weights": {"num_bits": b}} for n, b in enumerate(bits)}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def _in_blocks(form, *sizes):
    weights = ({"num_bits": 8, "strategy": "block", "block_structure": size} for size in sizes)
    groups = {f"group_{n}": {"weights": each} for n, each in enumerate(weights)}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FORMATS = {
    "GPTQ": (packers.gptq, {"quant_method": "gptq", "bits": 4}),
    "GPTQ, act-order": (
        lambda w: packers.gptq(w, act_order=True),
        {"quant_method": "gptq", "bits": 4, "desc_act": True},
    ),
    "GPTQ, 8 bits": (lambda w: packers.gptq(w, bits=8), {"quant_method": "gptq", "bits": 8}),
    "GPTQ v2": (
        lambda w: packers.gptq(w, version=2),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    ),
    "GPTQ v2 by its newer names": (
        lambda w: packers.gptq(w, version=2),
        {"method": "gptq", "bits": 4, "format": "gptq_v2"},
    ),
    "AWQ": (packers.awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "FP8, blocks": (packers.fp8_blocks, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
    "FP8, channels": (packers.fp8_channels, {"quant_method": "fbgemm_fp8"}),
    "compressed-tensors, int4": (packers.packed_int4, COMPRESSED | {"format": "pack-quantized"}),
    "compressed-tensors, int8": (packers.int8_channels, COMPRESSED | {"format": "int-quantized"}),
    "compressed-tensors, FP8 in blocks": (
        lambda w: packers.fp8_blocks(w, scale="weight_scale"),
        _in_blocks("float-quantized", [16, 16]),
    ),
    "compressed-tensors, FP8": (packers.fp8_channels, COMPRESSED | {"format": "float-quantized"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain"))


def loaded_float32(folder, tmp_path):
    return get_float32(asking_for(folder, cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_computes_what_its_plain_copy_does(plain, tmp_path, name):
    expected = packed(tmp_path / "model", plain, *FORMATS[name])
    loaded = loaded_float32(tmp_path / "model", tmp_path)
    torch.testing.assert_close(logits(loaded.model), logits(expected), atol=1e-4, rtol=1e-4)
    ids = torch.tensor([[1, 2, 3]])
    wanted = expected.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    given = loaded.model.generate(ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert given.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "config",
    [
        BitsAndBytesConfig(load_in_8bit=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4"),
    ],
    ids=["int8", "NF4 twice", "NF4", "FP4"],
)
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")  # bitsandbytes: inputs will be cast from float32 to float16
def test_what_bitsandbytes_has_saved_is_what_it_computes_with(plain, tmp_path, config):
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    shutil.copytree(plain, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    loaded = loaded_float32(tmp_path / "model", tmp_path)
    error = torch.linalg.norm(logits(loaded.model) - logits(model)) / torch.linalg.norm(logits(model))
    assert error < 0.02  # it computes in bfloat16, and int8 rounds the activations too


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_int8_in_the_tiles_of_a_gpu_is_refused_and_not_taken_for_rows(plain, tmp_path):
    # Releases of bitsandbytes before 0.45 saved these; they were read as rows, and the model answered garbage.
    config = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=config, device_map={"": "cpu"})
    shutil.copytree(plain, tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {name: torch.tensor(2) for name in tensors if "weight_format" in name}, path, {"format": "pt"})
    assert "weight_format" in refusal(get, asking_for(tmp_path / "model", cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize(
    ("quantization", "facts"),
    [
        ({"quant_method": "hqq"}, ["hqq", "cannot read", "original weights"]),
        ({"quant_method": "aqlm"}, ["aqlm"]),
        ({"bits": 4}, ["unknown"]),
        ({"quant_method": "awq", "version": "gemv"}, ["gemv"]),
        ({"quant_method": "gptq", "bits": 3}, ["3 bits"]),
        (COMPRESSED | {"format": "marlin-24"}, ["marlin-24"]),
        (_compressed(3), ["3 bits"]),
        (_compressed(4, 8), ["4, 8 bits"]),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, ["marlin"]),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"lm_head": {"bits": 3}}}, ["gptq"]),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"lm_head": {"rotation": "hadamard"}}}, ["gptq"]),
        (_in_blocks("pack-quantized", [16, 16]), ["blocks"]),
        (_in_blocks("float-quantized", [16, 16], [32, 32]), ["blocks"]),
        ({"quant_method": "awq", "bits": 8}, ["4, 8 bits"]),
    ],
    ids=[
        *("HQQ", "AQLM", "nobody's", "AWQ's other layout", "3 bits", "sparse", "3 bits in pieces", "mixed"),
        *("Marlin", "GPTQ of 3 bits here and there", "GPTQ with a rule unknown"),
        *("packed in blocks", "blocks of several sizes", "AWQ in 8 bits"),
    ],
)
def test_a_format_that_nothing_here_can_read_is_refused_by_name(plain, tmp_path, quantization, facts):
    folder = shutil.copytree(plain, tmp_path / "model")
    change_config(folder, quantization_config=quantization)
    sentence = refusal(measure, fetch(choose(asking_for(folder)), ignore).base)  # as --check does
    assert all(fact in sentence for fact in facts)


def test_scales_without_a_format_are_refused_rather_than_dropped(plain, tmp_path):
    # The model was ready, and answered garbage.
    folder = tmp_path / "model"
    packed(folder, plain, *FORMATS["FP8, channels"])
    change_config(folder, quantization_config=None)
    assert "belong to no layer" in refusal(get, asking_for(folder, cache_dir=tmp_path / "cache"))


def test_a_tensor_that_its_format_does_not_know_is_refused(plain, tmp_path):
    folder = tmp_path / "model"
    packed(folder, plain, *FORMATS["GPTQ"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.rotation"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    sentence = refusal(get, asking_for(folder, cache_dir=tmp_path / "cache"))
    assert "model.layers.0.mlp.up_proj" in sentence
    assert "rotation" in sentence


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
def test_a_float8_without_its_scale_is_refused(plain, tmp_path, scale):
    folder = tmp_path / "model"
    packed(folder, plain, *FORMATS["FP8, blocks" if scale.endswith("inv") else "compressed-tensors, FP8"])
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"model.layers.1.mlp.down_proj.{scale}"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.down_proj" in refusal(get, asking_for(folder, cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("name", ["FP8, channels", "compressed-tensors, FP8", "compressed-tensors, int8"])
def test_a_plain_weight_beside_a_scale_is_refused(plain, tmp_path, name):
    # It was multiplied by the scale, perhaps once more, and the model answered garbage.
    folder = tmp_path / "model"
    packed(folder, plain, *FORMATS[name])
    tensors = load_file(folder / "model.safetensors")
    weight = "model.layers.1.mlp.down_proj.weight"
    tensors[weight] = tensors[weight].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "model.layers.1.mlp.down_proj" in refusal(get, asking_for(folder, cache_dir=tmp_path / "cache"))


def test_what_older_programs_wrote_beside_the_weights_is_no_reason_to_refuse(plain, tmp_path):
    # AutoGPTQ writes a bias of zeros for each layer, and older transformers the frequencies of RoPE.
    folder = tmp_path / "model"
    expected = packed(folder, plain, *FORMATS["GPTQ"])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(logits(loaded_float32(folder, tmp_path).model), logits(expected), atol=1e-4, rtol=1e-4)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert "belong to no layer" in refusal(get, asking_for(folder, cache_dir=tmp_path / "other"))


def test_scales_of_queries_keys_and_values_are_no_reason_to_refuse(plain, tmp_path):
    # What llm-compressor writes for attention in 8 bits was taken for a layer's weights in a format unknown.
    expected = packed(tmp_path / "model", plain, *FORMATS["compressed-tensors, int8"])
    path = tmp_path / "model" / "model.safetensors"
    parts = [f"{name}_{part}" for name in "qkv" for part in ("scale", "zero_point")]
    beside = {f"model.layers.1.self_attn.{part}": torch.ones(1) for part in parts}
    save_file(load_file(path) | beside, path, {"format": "pt"})
    loaded = loaded_float32(tmp_path / "model", tmp_path)
    torch.testing.assert_close(logits(loaded.model), logits(expected), atol=1e-4, rtol=1e-4)


MADE = {  # by AutoGPTQ 0.7.1, AutoAWQ 0.2.9 and compressed-tensors 0.20.0, as tests/support/makers.py says
    "gptq": FORMATS["GPTQ"][1],
    "gptq act-order": FORMATS["GPTQ, act-order"][1],
    "gptq 8 bits": FORMATS["GPTQ, 8 bits"][1],
    "awq": FORMATS["AWQ"][1],
    "int4": _compressed(4),
    "int4 with zeros": _compressed(4),
    "int8": _compressed(8) | {"format": "int-quantized"},
    "float8": _compressed(8) | {"format": "float-quantized"},
}


@pytest.mark.parametrize("name", MADE)
def test_a_layer_packed_by_its_makers_own_code_is_what_their_code_unpacks(name):
    made = load_file(Path(__file__).with_name("makers.safetensors"))
    parts = {key.partition("/")[2]: tensor for key, tensor in made.items() if key.startswith(f"{name}/")}
    expected = parts.pop("stands for")
    read = READERS[MADE[name]["quant_method"]](parts, MADE[name])
    torch.testing.assert_close(read, expected.float(), atol=1e-3 * expected.abs().max().item(), rtol=0)  # of float16


@pytest.mark.parametrize("size", [[16, 32], "16x32"], ids=str)
def test_blocks_that_compressed_tensors_has_written_are_what_it_reads(size):
    # By its FloatQuantizationCompressor, version 0.20.0; the last blocks are smaller, 40 x 72 in blocks of 16 x 32.
    parts = load_file(Path(__file__).with_name("compressed_blocks.safetensors"))
    expected = parts.pop("decompressed")
    read = READERS["compressed-tensors"](parts, _in_blocks("float-quantized", size))
    torch.testing.assert_close(read, expected, atol=1e-6, rtol=0)


def test_zero_points_of_0_are_read_as_gptq_wrote_them():
    # One less than 0 borrows from its neighbour in the same int32. It was read as 16, and the neighbour as one less.
    zeros = torch.tensor([[0, 3, 0, 0, 15, 8, 1, 0]])
    parts = {"qweight": packers.nibbles(torch.full((8, 8), 7)).T, "scales": torch.ones(1, 8)}
    parts |= {"qzeros": packers.nibbles(zeros) - 0x11111111, "g_idx": torch.zeros(8, dtype=torch.int32)}
    read = READERS["gptq"](parts, {"quant_method": "gptq", "bits": 4})
    assert torch.equal(read, (7.0 - zeros.T).expand(8, 8))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_a_last_group_that_is_smaller_has_a_scale_of_its_own(method):
    # 80 columns in groups of 64 were read as two groups of 40.
    codes, scales = torch.full((80, 8), 3), torch.tensor([[1.0], [10.0]]).expand(2, 8)
    of_gptq = {"qweight": packers.nibbles(codes.T).T, "qzeros": torch.zeros(2, 1, dtype=torch.int32)}
    of_awq = {"qweight": packers.nibbles(codes), "qzeros": torch.zeros(2, 1, dtype=torch.int32)}
    parts = {
        "gptq": of_gptq | {"scales": scales},
        "awq": of_awq | {"scales": scales},
        "compressed-tensors": {"weight": codes.T.to(torch.int8), "weight_scale": scales.T},
    }
    weights = {"num_bits": 8, "strategy": "group", "group_size": 64}
    config = {"group_size": 64, "checkpoint_format": "gptq_v2", "config_groups": {"group_0": {"weights": weights}}}
    read = READERS[method](parts[method], config)
    assert torch.equal(read, torch.tensor([3.0] * 64 + [30.0] * 16).expand(8, 80))


def _named(part, change):
    return lambda tensors: {name: change(t) if name.endswith(part) else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("made", "change"),
    [
        ("GPTQ", _named("g_idx", lambda groups: groups + 1)),
        ("GPTQ", _named("g_idx", lambda groups: groups - 1)),
        ("GPTQ", _named("g_idx", lambda groups: groups[:0])),
        ("GPTQ", _named("qzeros", lambda zeros: zeros[:1])),
        ("AWQ", _named("qzeros", lambda zeros: zeros[:1])),
        ("FP8, blocks", _named("weight_scale_inv", lambda scales: scales[:1])),
        ("compressed-tensors, FP8 in blocks", _named("weight_scale", lambda scales: scales[:, :1])),
    ],
    ids=[
        *("a group too many", "a group below 0", "no groups", "zeros cut off", "AWQ's zeros cut off"),
        *("FP8's scales cut off", "scales of blocks cut off"),
    ],
)
def test_a_layer_whose_parts_do_not_fit_each_other_is_refused(plain, tmp_path, made, change):
    # Some ended the program, and some were read as something else.
    packed(tmp_path / "model", plain, *FORMATS[made])
    path = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})
    assert "model.layers.0" in refusal(get, asking_for(tmp_path / "model", cache_dir=tmp_path / "cache"))


def test_blocks_of_another_size_than_config_json_says_are_refused(plain, tmp_path):
    packed(tmp_path / "model", plain, packers.fp8_blocks, {"quant_method": "fp8"})  # 128 x 128 where nothing is said
    assert "weight_scale_inv" in refusal(get, asking_for(tmp_path / "model", cache_dir=tmp_path / "cache"))
    change_config(tmp_path / "model", quantization_config={"quant_method": "fp8", "weight_block_size": [16]})
    assert "makes no sense" in refusal(get, asking_for(tmp_path / "model", cache_dir=tmp_path / "cache"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "torch.uint8"])
def test_the_dtype_of_packed_weights_in_config_json_is_not_that_of_the_model(plain, tmp_path, dtype):
    # transformers makes no model in it, which was said to be the fault of the file.
    expected = packed(tmp_path / "model", plain, *FORMATS["FP8, channels"])
    change_config(tmp_path / "model", dtype=dtype)
    loaded = loaded_float32(tmp_path / "model", tmp_path)
    torch.testing.assert_close(logits(loaded.model), logits(expected), atol=5e-3, rtol=5e-3)  # of bfloat16


def test_layers_that_gptq_has_rounded_otherwise_than_the_rest_are_read_as_they_are(plain, tmp_path):
    # GPTQModel's "dynamic": refused before.
    def pack(weight):
        return packers.gptq(weight, bits=8, act_order=True) if weight.shape[0] == 128 else packers.gptq(weight)

    rules = {r"+:.*\.(gate|up)_proj": {"bits": 8, "desc_act": True}, "-:lm_head": {}}
    expected = packed(tmp_path / "model", plain, pack, {"quant_method": "gptq", "bits": 4, "dynamic": rules})
    torch.testing.assert_close(
        logits(loaded_float32(tmp_path / "model", tmp_path).model), logits(expected), atol=1e-4, rtol=1e-4
    )

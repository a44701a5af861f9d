"""What --check probes of a GPU: its driver, a PyTorch that computes on it, its memory, and four-bit products."""

from __future__ import annotations

import shutil
import subprocess
from typing import NamedTuple

from llama2_chat.errors import ChatError, quoted
from llama2_chat.kv_cache import choose_format, enough_tokens
from llama2_chat.server.probes import REQUIREMENTS, NotApplicable, PlannedStart
from llama2_chat.settings import GPU_BATCH
from llama2_chat.text import first_line

NVIDIA_SMI_LIMIT_S = 30  # below the probe's own limit, which would leave the tool running


def probe_gpu(start: PlannedStart) -> str:
    gpu, driver_error = _nvidia_smi()
    import torch

    if not torch.cuda.is_available():
        if driver_error:
            raise ChatError(
                f"nvidia-smi fails ({driver_error}). Reinstall the NVIDIA driver, then restart the computer."
            )
        if gpu is None:
            raise NotApplicable("none here, so the model runs on the CPU")
        if torch.version.cuda is None:
            raise ChatError(f"PyTorch {torch.__version__} does not compute on this {gpu.name}. {gpu.remedy()}")
    try:
        torch.cuda.init()
        for index in range(torch.cuda.device_count()):
            ones = torch.ones(16, 16, device=index)
            (ones @ ones).sum().item()
    except RuntimeError as error:
        if "No CUDA GPUs are available" in str(error):
            raise NotApplicable("hidden by CUDA_VISIBLE_DEVICES, so the model runs on the CPU") from error
        name = gpu.name if gpu else "the GPU"
        remedy = gpu.remedy() if gpu else "Update the NVIDIA driver."
        raise ChatError(f"PyTorch {torch.__version__} cannot use {name}: {one_clause(error)}. {remedy}") from error
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{one.name} (compute capability {one.major}.{one.minor})" for one in found)
    return f"{names}, driver {gpu.driver if gpu else 'unknown'}"


def one_clause(error: object) -> str:
    """The first line of an error, short and without an end of a sentence in it: what comes after is what to do."""
    return first_line(error)[:160].rstrip(".").replace(". ", "; ")


class _Card(NamedTuple):
    name: str
    driver: str
    capability: str

    def remedy(self) -> str:
        """How to get a PyTorch that this GPU and its driver can run."""
        driver, capability = float(self.driver.partition(".")[0]), float(self.capability)
        if driver < 525 or capability < 5:
            return "Use a driver of 525 or later, and a GPU of compute capability 5.0 or higher."
        # CUDA 13 begins at driver 580 and Turing; the builds for 12.6 serve what is older.
        cuda = "cu130" if driver >= 580 and capability >= 7.5 else "cu126"
        pin = next(line for line in REQUIREMENTS.read_text("utf-8").splitlines() if line.startswith("torch=="))
        return f"Run: pip install {pin}+{cuda} --index-url https://download.pytorch.org/whl/{cuda}"


def _nvidia_smi() -> tuple[_Card | None, str]:
    """The first GPU, as far as the driver's own tool knows, and what the tool complains about."""
    if not (tool := shutil.which("nvidia-smi")):
        return None, ""
    query = [tool, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_LIMIT_S)
    except subprocess.TimeoutExpired:
        return None, f"no answer within {NVIDIA_SMI_LIMIT_S:g} s"
    output = first_line(done.stdout.strip() or done.stderr.strip() or f"exit code {done.returncode}")
    if "No devices were found" in output:
        return None, ""
    if done.returncode or output.count(", ") != 2:
        return None, one_clause(output)
    return _Card(*output.split(", ")), ""


def probe_gpu_memory(start: PlannedStart) -> str:
    from llama2_chat.loading.load import divided, measure_checkpoint
    from llama2_chat.loading.memory import GB, MIN_CONTEXT_TOKENS, check_memory, choose_precision, visible_gpus
    from llama2_chat.loading.parts import share

    checkpoint, gpus = start.checkpoint, visible_gpus()
    if checkpoint is None:
        raise NotApplicable("known after the first start; the small model needs little")
    checkpoint, size = divided(checkpoint), measure_checkpoint(checkpoint)
    if not gpus:
        raise NotApplicable("the model runs on the CPU")
    where = ""
    if checkpoint.part:  # of each of several GPUs, the one with the least
        gpus, size = gpus[: checkpoint.part.of], share(size, checkpoint.part.of)
        where, gpus = f" on each of {len(gpus)} GPUs", [min(gpus, key=lambda gpu: gpu.free_bytes)]
    precision, _ = choose_precision(checkpoint.quantization, size, gpus)
    check_memory(quoted(checkpoint.model_id), precision, size, gpus)
    free = sum(gpu.free_bytes for gpu in gpus)
    alone, tokens = size.needed_bytes(precision, 0, len(gpus)), min(size.context, MIN_CONTEXT_TOKENS)
    rest, wanted = max(free - alone, 0), enough_tokens(start.settings.max_batch or GPU_BATCH, size.context)
    kv_cache = choose_format(size.kv_cache, [gpu.capability for gpu in gpus], rest // size.kv_bytes_per_token, wanted)
    conversations = rest // (tokens * (size.kv_bytes_in_8_bits if kv_cache else size.kv_bytes_per_token))
    kept = f", with keys and values in {kv_cache}" if kv_cache else ""
    adapters = f", {size.adapter_bytes / GB:.1f} GB of it for adapters" if size.adapter_bytes else ""
    return (
        f"{free / GB:.1f} GB free{where}; {alone / GB:.1f} GB for the model in {precision} and to work in{adapters}, "
        f"the rest for {conversations:,} conversations of {tokens:,} tokens{kept}"
    )


def probe_bitsandbytes(start: PlannedStart) -> str:
    import bitsandbytes
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = torch.float16 if device == "cuda" and torch.cuda.get_device_capability() < (8, 0) else torch.bfloat16
    weight = torch.randn(256, 256).to(device, dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    for rows in (1, 64):  # decoding and prefill: two kernels
        x = torch.randn(rows, 256).to(device, dtype)
        exact, got = x @ weight.T, bitsandbytes.matmul_4bit(x, packed.t(), state)
        if not (got - exact).norm() < 0.2 * exact.norm():  # 0.1 is usual; NaN must not pass
            raise ChatError(f"A matrix product in NF4 on {device} comes out wrong. Set QUANTIZATION=none.")
    return f"quantises to NF4 and multiplies on {device}"


def probe_packed(start: PlannedStart) -> str:
    from llama2_chat.loading.memory import NO_INT4, visible_gpus
    from llama2_chat.loading.packing import why_not_packed

    if not (gpus := visible_gpus()):
        if start.settings.quantization == "int4":
            raise ChatError(NO_INT4)
        raise NotApplicable("these products are for a CUDA GPU")
    if reason := why_not_packed(gpus):
        asked = start.settings.quantization in ("int4", "int8")
        raise (ChatError if asked else NotApplicable)(f"{reason}; QUANTIZATION=nf4 and none do without.")
    return (
        "humming-kernels compiles for this GPU. Which of them suits your model is told by: "
        "python scripts/bench.py --accept"
    )

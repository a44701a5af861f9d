"""LoRA adapters of random numbers, as PEFT saves them."""

import peft
import torch
from transformers import AutoModelForCausalLM

# Of different ranks, scales and layers.
FOUR = {
    "queries": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "all": {"r": 8, "lora_alpha": 4, "target_modules": "all-linear"},
    "scaled": {"r": 3, "use_rslora": True, "target_modules": ["k_proj", "gate_proj", "down_proj"]},
    "patterns": {
        "r": 2,
        "rank_pattern": {"layers.1.mlp.up_proj": 5},
        "alpha_pattern": {"o_proj": 3},
        "target_modules": ["o_proj", "up_proj"],
    },
}


def save_adapter(base, folder, seed=0, **config):
    """The folder, with an adapter that changes what the model in the folder `base` says."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(folder)
    return folder


def save_four(base, folder):
    return {name: save_adapter(base, folder / name, seed, **FOUR[name]) for seed, name in enumerate(FOUR)}


def in_settings(folders):
    """What ADAPTERS says of these."""
    return ",".join(f"{name}={folder}" for name, folder in folders.items())

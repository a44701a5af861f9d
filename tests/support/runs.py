"""What training leaves behind, without training: adapters of random weights and the run.json beside them."""

from dataclasses import replace

import torch

from llama2_chat.loading import load
from llama2_chat.loading.read import load_tokenizer
from llama2_chat.training import chat_data, splits
from llama2_chat.training.base_model import fetch_checkpoint
from llama2_chat.training.run_json import Run, write_run
from tests.support.serving import ignore


def new_run(**changes):
    """A run of no particular model."""
    run = Run(
        model_name="m",
        dataset_names=["d"],
        eval_fraction=0.1,
        test_fraction=0.1,
        seed=0,
        folds=0,
        fold=None,
        max_length=256,
        precision="float32",
        early_stopping=False,
        merged_to=None,
        train_sha256="x",
    )
    return replace(run, **changes)


def save_adapter(chat_model, folder, seed=0):
    """An adapter as training leaves it, except that its weights are random."""
    from peft import LoraConfig, get_peft_model

    checkpoint = fetch_checkpoint(str(chat_model))
    model = load.load_base(checkpoint, "float32", "cpu", ignore)
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    load_tokenizer(checkpoint).save_pretrained(folder)
    return folder


def save_run(chat_model, dataset, folder, **changes):
    """What sft_trainer.py leaves of a run, except that nothing was learned."""
    run = new_run(model_name=str(chat_model), dataset_names=[str(dataset)], eval_fraction=0.3, test_fraction=0.2)
    run = replace(run, **changes)
    every = splits.of_run(chat_data.read(run.dataset_names), run)
    run = replace(run, train_sha256=splits.fingerprint(every))
    write_run(run, folder)
    for i in range(1, run.folds + 1):
        of_fold = replace(run, fold=i, train_sha256=splits.fingerprint([every[i - 1]]))
        write_run(of_fold, save_adapter(chat_model, folder / f"fold-{i}", seed=i))
    if not run.folds:
        save_adapter(chat_model, folder)
    return folder

"""TRL's trainers as we use them: given ready-made ids and labels, so that only the chat's own template has a say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
)

from llama2_chat.loading.memory import compute_dtype, visible_gpus
from llama2_chat.prompt import TokenizedExample
from llama2_chat.training.examples import Examples, labels
from llama2_chat.training.options import Options
from llama2_chat.training.preferences import Compared
from llama2_chat.training.qlora_layers import speed_up_qlora
from llama2_chat.training.resources import memory_gb

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig


def make_trainer(
    options: Options,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Any,  # Examples, or such with preferences.Compared for DPO and KTO
    resumed: bool = False,
) -> Trainer:
    """examples: of the train split, and of the eval split if there is one."""
    import datasets

    datasets.disable_progress_bars()
    arguments = _arguments(options, bool(examples["eval"]), resumed)
    stopping = [EarlyStoppingCallback(options.early_stopping)] if options.early_stopping else []
    callbacks = [Progress(), *stopping, *([TakeUpLearningRate()] if resumed else [])]
    make = _make_sft if options.method == "sft" else _make_preferences
    trainer = make(options, arguments, model, tokenizer, examples, callbacks)
    trainer.remove_callback(PrinterCallback)
    if options.load_in_4bit and options.method == "sft":  # others compare with what PEFT's own layers said before
        trained: Any = trainer.model
        speed_up_qlora(trained)
    if arguments["fp16"]:
        for parameter in model.parameters():
            if parameter.requires_grad:  # TRL has made them bfloat16, which float16's loss scaling cannot take
                parameter.data = parameter.data.float()
    return trainer


def _make_sft(
    options: Options,
    arguments: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Examples,
    callbacks: list[TrainerCallback],
) -> Trainer:
    from trl import SFTConfig

    from llama2_chat.training.sft import TokenWeightedTrainer

    return TokenWeightedTrainer(
        model,
        args=SFTConfig(**arguments, max_length=options.max_length, packing=options.packing, eval_packing=False),
        train_dataset=_dataset(examples["train"]),
        eval_dataset=_dataset(examples["eval"]) if examples["eval"] else None,
        processing_class=tokenizer,
        peft_config=_adapter(options, model),
        eval_examples=examples["eval"],
        callbacks=callbacks,
    )


def _make_preferences(
    options: Options,
    arguments: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Mapping[str, list[Compared]],
    callbacks: list[TrainerCallback],
) -> Trainer:
    from llama2_chat.training.preference_trainers import make_preference_trainer

    peft_config = _adapter(options, model)
    return make_preference_trainer(options, arguments, model, tokenizer, examples, peft_config, callbacks)


def _arguments(options: Options, has_eval: bool, resumed: bool) -> dict[str, Any]:
    """Those that all of TRL's trainers take."""
    save_steps = options.save_steps if options.save_steps < 1 else int(options.save_steps)
    gpus = visible_gpus()
    has_gpu, is_bfloat16 = bool(gpus), compute_dtype(gpus) is torch.bfloat16
    return {
        "output_dir": str(options.output_dir),
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": options.lr_scheduler_type,
        "warmup_steps": options.warmup_ratio,  # of all steps, as everything below 1
        "optim": options.optim,
        "weight_decay": options.weight_decay,
        # QLoRA computes in bfloat16 anyway: autocast would only look at each operation, and take norms in float32.
        "bf16": has_gpu and is_bfloat16 and not options.load_in_4bit,
        "fp16": has_gpu and not is_bfloat16,
        "use_cpu": not has_gpu,
        "dataloader_pin_memory": has_gpu,
        "gradient_checkpointing": has_gpu,  # a third slower, and a fraction of the memory, which is what a GPU lacks
        "seed": options.seed,
        "logging_steps": options.logging_steps,
        "logging_nan_inf_filter": False,  # True logs a NaN loss as 0
        "eval_strategy": "steps" if has_eval else "no",
        "eval_steps": save_steps,
        "eval_on_start": has_eval and not resumed,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": 2,
        "load_best_model_at_end": bool(options.early_stopping),
        "restore_callback_states_from_checkpoint": True,  # else a resumed run counts anew before it stops early
        "report_to": options.report_to,
        "project": (options.output_dir.parent if options.folds else options.output_dir).name,
        "run_name": options.output_dir.name,
        "trackio_static_space_id": False,  # a run is followed here, not published
        "disable_tqdm": True,  # Progress shows more
    }


def _adapter(options: Options, model: PreTrainedModel) -> LoraConfig | None:
    """None if all weights are trained, or an adapter that the model has already."""
    from peft import LoraConfig, PeftModel

    if not options.use_peft or isinstance(model, PeftModel):
        return None
    targets = list(options.target_modules)
    return LoraConfig(
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=list(options.modules_to_save) or None,
        task_type="CAUSAL_LM",
    )


def _dataset(examples: list[TokenizedExample]) -> Dataset:
    import datasets

    return datasets.Dataset.from_list(
        [{"input_ids": example.input_ids, "labels": labels(example)} for example in examples]
    )


class TakeUpLearningRate(TrainerCallback):
    """Goes on with the learning rate of the flags: a checkpoint's optimizer and scheduler bring their own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **_: Any) -> None:
        scheduler = getattr(lr_scheduler, "scheduler", lr_scheduler)  # within accelerate's
        if all(rate == args.learning_rate for rate in scheduler.base_lrs):
            return
        scheduler.base_lrs = [args.learning_rate for _ in scheduler.base_lrs]
        for group, scale in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas, strict=True):
            group["initial_lr"] = args.learning_rate
            group["lr"] = args.learning_rate * scale(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]  # which is logged


class Progress(TrainerCallback):
    """One bar: steps, time left, loss, tokens/s and memory."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not state.is_world_process_zero,
        )
        self.shown: dict[str, str] = {}
        self.started = time.perf_counter()
        self.tokens_before: float | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._show_speed(logs["num_tokens"])
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if "eval_loss" in logs:
            self.shown["eval loss"] = f"{logs['eval_loss']:.3f}"
        self.shown["memory"] = f"{memory_gb():.1f} GB"
        self.bar.set_postfix(self.shown)

    def _show_speed(self, tokens: float) -> None:
        """tokens: since the first start; a run that was resumed has some of them from before."""
        if self.tokens_before is None:
            self.tokens_before, self.started = tokens, time.perf_counter()
        else:
            seconds = time.perf_counter() - self.started
            self.shown["tokens/s"] = f"{(tokens - self.tokens_before) / seconds:,.0f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()

"""scripts/sft_trainer.py, in a process of its own or in this one."""

import os
import subprocess
import sys

from llama2_chat import ROOT

SCRIPT = ROOT / "scripts" / "sft_trainer.py"


def arguments(model, dataset, folder, *flags):
    return ["--model_name", str(model), "--dataset_name", str(dataset), "--output_dir", str(folder), *map(str, flags)]


def start_sft_trainer(*command, **environment):
    """The finished process, whatever came of it."""
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")} | environment
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, command)], capture_output=True, text=True, env=environment, cwd=ROOT
    )


def run_sft_trainer(*command, **environment):
    """What the script prints."""
    done = start_sft_trainer(*command, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_here(*command):
    """The same without seconds of imports."""
    from llama2_chat.training.run import train  # what training needs, which most tests do without
    from scripts.sft_trainer import read_arguments

    train(read_arguments(command))

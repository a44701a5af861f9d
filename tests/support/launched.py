"""Starts a script with its flags in one of several processes, and lets them divide a model without GPUs.

accelerate divides models on GPUs only; PyTorch's FSDP takes CPUs, too. The base is in float32, so that what several
processes compute is what one computes.
"""

import runpy
import sys

from accelerate import DistributedType, PartialState

from llama2_chat.training import base_model

start = PartialState.__init__


def start_as_if_on_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_as_if_on_gpus
    base_model.full_precision = lambda: "float32"
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")

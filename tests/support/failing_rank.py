"""A rank whose memory runs out where FAILING says, in place of llama2_chat.parallel.worker."""

import os
import time

import torch

from llama2_chat.engine.ranks import FollowingRunner
from llama2_chat.parallel import joining, worker


def main():
    place = {"joining": (joining, "_least"), "a step": (FollowingRunner, "follow_decode")}[os.environ["FAILING"]]
    setattr(*place, run_out)
    end = os._exit
    os._exit = lambda code: time.sleep(600) if code else end(code)  # as NCCL, which waits for it, does not see its end
    worker.main()


def run_out(*_):
    raise torch.OutOfMemoryError("CUDA out of memory")

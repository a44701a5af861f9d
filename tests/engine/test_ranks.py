"""What several processes compute together; that they do is in tests/parallel."""

import pytest
import torch
from torch import nn

from llama2_chat.engine.model_runner import ModelRunner
from llama2_chat.engine.ranks import FollowingRunner, LeadingRunner, RankLost, Room
from llama2_chat.engine.runner import Runner
from llama2_chat.kernels.rank_sum import SummedLinear

# What the first rank does without the others: it changes nothing that they have, or never happens there.
ALONE = {
    *("close", "enter_thread", "wait", "synchronize", "release_memory", "are_finite", "check_lengths", "mode"),
    *("new_masks", "are_arriving", "wait_for_block", "kv_bytes", "kv_format"),
    *("draft", "draft_cost", "verify"),  # there is no draft, and draft_tokens is 0
}


def test_whatever_a_runner_promises_all_ranks_do_or_the_first_may_do_alone():
    """A method that only the first rank knows would compute with a part of each sum, and nobody would notice."""
    promised = {name for name, what in vars(Runner).items() if not name.startswith("_") and what is not None}
    led = {name for name in vars(LeadingRunner) if hasattr(ModelRunner, name)}
    assert promised - led == ALONE


def test_each_call_of_the_first_rank_is_one_that_the_others_know():
    calls = {name for name in vars(FollowingRunner) if name.startswith("follow_")}
    constants = {constant for method in vars(LeadingRunner).values() for constant in _constants(method)}
    assert calls <= constants
    assert {name for name in constants if name.startswith("follow_")} == calls
    assert {"copy_block", "zero_blocks", "save_block", "restore_block"} <= constants


def _constants(method):
    code = getattr(method.fget if isinstance(method, property) else method, "__code__", None)
    return {constant for constant in code.co_consts if isinstance(constant, str)} if code else set()


def test_probing_a_part_waits_for_nobody():
    linear = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    assert torch.equal(SummedLinear(linear)(x), linear(x))


class Recording:
    """Steps that become ready one after another, as cuda_graphs.RecordedWay has them."""

    maintenance_due = True

    def __init__(self):
        self.recorded = []

    def maintain(self):
        self.recorded.append(("decode", 1))


class OtherRank:
    lost, compiled = False, 0

    def __init__(self, recorded):
        self.recorded, self.calls = recorded, []

    def call(self, call):
        self.calls.append(call.method)

    def answers(self):
        return [self.recorded]


def leading(other):
    runner = LeadingRunner.__new__(LeadingRunner)
    runner.num_blocks, runner._host, runner.context_length, runner._faster = 8, None, 10**6, Recording()
    runner.lead(other, [Room(5, 0)])
    return runner


def test_a_step_is_recorded_once_every_rank_has_compiled_it():
    other = OtherRank([("decode", 1)])
    runner = leading(other)
    assert not runner.maintenance_due
    runner.maintain()
    assert other.calls == []
    other.compiled = 1
    runner.maintain()
    assert (other.calls, runner.recorded) == (["follow_maintain"], [("decode", 1)])
    assert not runner.maintenance_due  # the next is still to be compiled


def test_ranks_that_record_different_steps_compute_nothing_any_more():
    other = OtherRank([])
    other.compiled = 1
    runner = leading(other)
    with pytest.raises(RankLost, match="by some processes of this model and not by others"):
        runner.maintain()
    assert not runner.is_alive()
    with pytest.raises(RankLost):
        runner.zero_blocks([1])


def test_the_smallest_pool_of_all_ranks_is_what_there_is():
    runner = leading(OtherRank([]))
    assert (runner.num_blocks, runner.context_length) == (5, 4 * runner.block_size)

"""What several processes compute together; that they do is in tests/parallel."""

import queue
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama2_chat.engine.cuda_graphs import RecordedWay, _packs
from llama2_chat.engine.kv_pool import KVPool
from llama2_chat.engine.model_runner import ModelRunner
from llama2_chat.engine.ranks import FollowingRunner, LeadingRunner, RankLost, Room, _FollowedChunk, _lost
from llama2_chat.engine.runner import Runner
from llama2_chat.engine.sampler import SamplerState
from llama2_chat.engine.scheduler import Chunk
from llama2_chat.engine.self_check import check_request
from llama2_chat.errors import ModelUnavailable
from llama2_chat.kernels.rank_sum import SummedLinear, is_together
from llama2_chat.text import is_out_of_memory
from tests.support.engines import CPU
from tests.support.waiting import until

# What the first rank does without the others: it changes nothing that they have, or never happens there.
ALONE = {
    *("close", "enter_thread", "wait", "synchronize", "release_memory", "are_finite", "check_lengths", "mode"),
    *("new_masks", "are_arriving", "wait_for_block", "kv_bytes", "kv_format"),
    *("draft", "draft_cost", "may_draft", "verify"),  # there is no draft, and draft_tokens is 0
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


def test_the_other_ranks_read_a_prompt_in_the_parts_in_which_the_first_does():
    chunk = Chunk(check_request(700, 1000), 64, 700)
    followed = _FollowedChunk(check_request(1, 1000), 64, 700, chunk.ids, chunk.is_last)
    parts = [[part for pack in _packs([each], [64, 128, 512, 1024]) for part in pack] for each in (chunk, followed)]
    mine, theirs = ([(part.start, part.end, part.ids, part.is_last) for part in each] for each in parts)
    assert mine == theirs
    assert [(start, end, is_last) for start, end, _, is_last in mine] == [(64, 576, False), (576, 700, True)]


def test_probing_a_part_waits_for_nobody():
    linear = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    assert torch.equal(SummedLinear(linear)(x), linear(x))


class Recording:
    """Steps that become ready one after another, as cuda_graphs.RecordedWay has them."""

    maintenance_due = True

    def __init__(self):
        self.recorded = []

    def maintain(self, agree):
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


# ---- What happens to one rank alone while steps become faster ----

MEMORY, BUG = torch.OutOfMemoryError("CUDA out of memory"), ValueError("a bug")
FAILING = ("decode", 2)


class Steps(RecordedWay):
    """Of one rank: they compute nothing, and one part of the work on one of them may fail."""

    def __init__(self, model, failing=None, error=None):
        pool = KVPool(model, lambda: {CPU: 2**20}, context_length=512, max_batch=2)
        super().__init__(model, pool, SamplerState(2, model.config.vocab_size, 64, CPU), most_blocks=1)
        self._sizes = [("decode", 1), FAILING, ("prefill", 64)]
        self.failing, self.error, self.together = failing, error, []

    def _step(self, kind, size):
        if threading.current_thread().name == "compile":
            self.do("compiling", kind, size)
        elif is_together():
            self.together.append((kind, size))
            self.do("in a sum", kind, size)
        else:
            self.do("alone", kind, size)

    def _record(self, kind, size):
        (self._decodes if kind == "decode" else self._prefills)[size] = None
        self.do("recording", kind, size)

    def do(self, part, kind, size):
        if (part, (kind, size)) == (self.failing, FAILING):
            raise self.error


class Ended(Exception):
    pass


class Rank(OtherRank):
    """Another rank, in a thread, and what it and the first say to each other."""

    def __init__(self, steps):
        self.calls, self.said, self.compiled = queue.SimpleQueue(), queue.SimpleQueue(), 0
        self.runner = FollowingRunner.__new__(FollowingRunner)
        self.runner._faster, self.runner._device = steps, CPU
        self.runner._most_draft_tokens, self.runner._drafts_later = 0, False
        threading.Thread(target=self.follow, daemon=True).start()

    def follow(self):
        try:
            self.runner.follow(SimpleNamespace(next=self.next, answer=self.said.put, compiled=self.count))
        except (RankLost, Ended):
            self.lost = True
            self.said.put(None)

    def next(self):
        if (call := self.calls.get()) is None:
            raise Ended
        return call

    def count(self):
        self.compiled += 1
        self.wake()

    def watch(self, compiled):
        self.wake = compiled

    def call(self, call):
        self.calls.put(call)

    def answers(self):
        if (said := self.said.get()) is None:
            raise RankLost
        return [said]


@pytest.fixture
def make_faster(tiny_llama, monkeypatch):
    """make_faster(failing, error, rank): the first rank and the other, once nothing gets faster any more."""
    others = []

    def make(failing, error, rank):
        steps = [Steps(tiny_llama, *((failing, error) if number == rank else ())) for number in range(2)]
        others.append(other := Rank(steps[1]))
        runner = leading(other)
        runner._faster, runner._pool, runner._most_draft_tokens = steps[0], steps[0]._kv_pool, 0

        def is_complete():
            while runner.maintenance_due:
                runner.maintain()
            return all(each._complete.is_set() for each in steps)

        runner.start(lambda: None)
        until(is_complete)
        return runner, other

    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    yield make
    for other in others:
        other.calls.put(None)
        other.runner._faster.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("failing", ["compiling", "alone", "recording"])
def test_a_step_for_which_one_gpu_has_no_memory_stays_as_it_is_on_all(make_faster, failing, rank):
    # All waited for ever: the one without memory had left a sum in which the others were, or recorded another step.
    runner, other = make_faster(failing, MEMORY, rank)
    assert runner.recorded == other.runner.recorded == [("decode", 1), ("prefill", 64)]
    assert runner._faster.together == other.runner._faster.together
    assert runner.mode == other.runner.mode == "CUDA graphs: decode 1; prefill 64"
    assert runner.is_alive()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("failing", ["compiling", "alone", "recording"])
def test_after_a_step_that_fails_on_one_gpu_no_more_are_recorded_on_any(make_faster, failing, rank):
    runner, other = make_faster(failing, BUG, rank)
    assert runner.recorded == other.runner.recorded == [("decode", 1)]
    assert runner.mode == other.runner.mode == "CUDA graphs: decode 1; decode 2 failed"
    with pytest.raises(ModelUnavailable, match="decode 2 failed"):  # DETERMINISTIC=1 waits for all of them
        runner._faster.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_memory_that_runs_out_in_the_middle_of_a_sum_ends_all_ranks(make_faster, rank):
    with pytest.raises(RankLost):
        make_faster("in a sum", MEMORY, rank)


def test_a_rank_without_memory_says_so_and_is_not_tried_again():
    lost = _lost(MEMORY)
    assert "KV_HEADROOM_GB" in str(lost)
    assert not is_out_of_memory(lost)

"""Calls that wait for their visitor, without a page."""

from concurrent.futures import ThreadPoolExecutor

from llama2_chat.agent import Call
from llama2_chat.page.confirming import Confirming
from tests.support.waiting import until


def test_a_call_that_nobody_waits_for_any_more_is_not_allowed_once_the_next_one_asks():
    confirming, call = Confirming(), Call("tool", 1)
    with ThreadPoolExecutor() as threads:
        expired = threads.submit(confirming, call)
        until(lambda: confirming.number(call))
        next_one = threads.submit(confirming, other := Call("tool", 2))
        until(lambda: confirming.number(other))
        assert expired.result(5) is False
        confirming.answer(confirming.number(other), True)
        assert next_one.result(5) is True

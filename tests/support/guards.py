"""A guard that says what a test wants to hear, and a chat behind it."""

from contextlib import contextmanager

from llama2_chat.errors import ModelUnavailable
from llama2_chat.guard import GuardedChat
from llama2_chat.guard.verdict import Verdict
from tests.support.scripted import Scripted, ScriptedChat

GOOD, BAD = "a kind word", "a bad word"


class Guard:
    """Finds unsafe whatever has a bad word in it. judged: what it was asked. fails: whether it gives no verdict."""

    def __init__(self, fails=False):
        self.judged, self.fails = [], fails

    async def judge(self, question, answer=None):
        self.judged.append((question, answer))
        if self.fails:
            raise ModelUnavailable("The model's server cannot be reached.")
        bad = BAD in (question if answer is None else answer)
        return Verdict(not bad, ("S10",) if bad else ())


class Completing(ScriptedChat):
    """It also goes on with texts, whose ids are their words."""

    def decode(self, input_ids):
        return " ".join(input_ids)

    def encode_infilling(self, prefix, suffix, *, extra=(), room=None):
        return [*prefix.split(), *suffix.split()]

    def stream_completion(self, input_ids, params, *, to_the_end=False):
        self.asked.append((input_ids, params))
        return self.say(input_ids)


def saying(*pieces, **more):
    return Completing(say=lambda _: Scripted(*pieces, **more))


@contextmanager
def guarded(chat, settings, guard=None):
    behind = GuardedChat(chat, settings, guard or Guard())
    behind.start()
    try:
        yield behind
    finally:
        behind.close()

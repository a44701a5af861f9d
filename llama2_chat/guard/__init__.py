"""A second server judges what is asked and what is answered: Llama Guard, granite-guardian, or any model that chats.

GUARD_URL names it. It stands around whatever keeps the promise of ChatBackend, so that page, API and agents have no
other way to the model.

guarded_chat   the same promise, kept only for what is safe
guarded_reply  an answer that is shown once it has been judged
judge          the server: what it is asked, and whether it can be held to a grammar
verdict        how guards are asked and answer, by the name of the model
"""

from llama2_chat.guard.guarded_chat import GuardedChat
from llama2_chat.guard.judge import Judge, sentence_of

__all__ = ["GuardedChat", "Judge", "sentence_of"]

"""A model that OpenAI-compatible servers have: vLLM and its kin, or another of these pages. INFERENCE_URL names them.

Prompts and tokens are the servers' affair: each applies its own chat template, and lengths are known from what it
reports. One thread runs an event loop in which every answer is a task, so that no thread waits for a reader.

remote_model  what everybody else uses: the promise of ChatBackend, and which server is asked
health        which servers can answer: each is asked for a token now and then
server        one address, what is known about it, and one answer from it
question      a conversation as it is sent, and made shorter if it is too long
reply         an answer on its way from the event loop to its reader
client        HTTP, through huggingface_hub
faults        what goes wrong, in sentences
"""

from llama2_chat.remote.remote_model import RemoteModel

__all__ = ["RemoteModel"]

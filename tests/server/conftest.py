"""Two servers, shared by the tests of a file: the embedded model's, and one of a model that is small and fast."""

from dataclasses import replace

import httpx
import openai
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llama2_chat.loading.load import Loaded
from llama2_chat.types import Status
from model import ChatModel
from tests.support.programs import HELLO, LIKELIEST, TALK, whole_reply
from tests.support.serving import serving

SMALL_CONTEXT = 4096


@pytest.fixture(scope="session")
def small(chat, settings):
    """The embedded model's tokenizer and few random weights: fast, talkative, one answer and one in line."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(chat.serving.tokenizer), max_position_embeddings=SMALL_CONTEXT, **shape)
    small = ChatModel(replace(settings, max_batch=1, queue_limit=1))
    small.status = Status(model="small")
    yield small.serve(chat.serving.tokenizer, Loaded(LlamaForCausalLM(config).eval(), "float32", "cpu", ""))
    small.close()


@pytest.fixture(scope="module")
def address(chat, settings):
    for messages in (HELLO, TALK):  # a prompt from the KV cache may differ in its last bits from one that is computed
        whole_reply(chat, messages, max_new_tokens=1)
    with serving(chat, replace(settings, sampling=LIKELIEST)) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def small_address(small, settings):
    with serving(small, settings) as address:
        yield address


@pytest.fixture
def http(small_address):
    with httpx.Client(base_url=small_address, timeout=60) as http:
        yield http

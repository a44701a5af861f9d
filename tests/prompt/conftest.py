"""Tokenizers in the shape of Llama's and of others, and the true one of Llama 2 in every way it can be loaded."""

import pytest
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.utils import cached_file

from tests.support.small_tokenizer import llama_shaped
from tests.support.templates import TEMPLATED


@pytest.fixture(scope="module", params=TEMPLATED)
def templated(request):
    return TEMPLATED[request.param]()


@pytest.fixture(scope="module", params=["small", "small, older file", "Llama 2's own"])
def llama_tokenizer(request):
    if request.param == "Llama 2's own":
        return request.getfixturevalue("llama2_tokenizer")
    return llama_shaped(prepend="older" in request.param)


LOADERS = {
    "AutoTokenizer": AutoTokenizer.from_pretrained,
    "AutoTokenizer, legacy": lambda source: AutoTokenizer.from_pretrained(source, legacy=True),
    "LlamaTokenizer": LlamaTokenizer.from_pretrained,
    "LlamaTokenizer, legacy": lambda source: LlamaTokenizer.from_pretrained(source, legacy=True),
    "tokenizer.json alone": lambda source: PreTrainedTokenizerFast(
        tokenizer_file=cached_file(source, "tokenizer.json")
    ),
}


@pytest.fixture(scope="module", params=LOADERS)
def loaded_llama2(request, llama2_tokenizer):
    return LOADERS[request.param](llama2_tokenizer.name_or_path)

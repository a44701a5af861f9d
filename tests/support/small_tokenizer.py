"""Tokenizers small enough to make in a test: one in the shape of Llama's, one in the shape of GPT-2's.

Llama's shape: <unk>, <s>, </s>, the 256 bytes, then pieces merged from characters, with "▁" for a space.
"""

from itertools import pairwise

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# What Llama 2's vocabulary knows of the tags, and a few words. Each is merged from left to right.
WORDS = (
    *("▁[", "INST", "▁<<", "▁<", "</", "▁</", "SY", ">>", "<<", "][", "[/", "]."),
    *("▁the", "the", "▁hello", "hello", "▁what", "▁is", "He", "▁He", "llama", "▁user", "user", "assistant", "▁▁"),
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHARACTERS = [*(chr(i) for i in range(33, 127)), "▁", "é", "日", "本"]


def llama_shaped(*, prepend: bool = False, words: tuple[str, ...] = WORDS, more_tokens: tuple[AddedToken, ...] = ()):
    """A byte-fallback BPE tokenizer.

    prepend: write the first "▁" in the normalizer, as older tokenizer.json files do, rather than in the pre-tokenizer.
    """
    merges = list(dict.fromkeys(pair for word in words for pair in _left_to_right(word)))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS, *map("".join, merges)]
    vocab = {piece: id for id, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prepend:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens(list(more_tokens))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def gpt_2_shaped(*special: str, more_tokens: tuple[AddedToken, ...] = ()):
    """A byte-level BPE tokenizer with these special tokens and no merges but a few."""
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hello"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("|", ">")]
    merges += [("±", "["), ("]", "ð")]  # a bracket and the last or first byte of 😱: tokens may share a character
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(BPE({piece: id for id, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([*(AddedToken(token, special=True, normalized=False) for token in special), *more_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[-1], clean_up_tokenization_spaces=False
    )


def with_template(tokenizer, template):
    tokenizer.chat_template = template
    return tokenizer


def chatml():
    return with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML)


def _left_to_right(word: str) -> list[tuple[str, str]]:
    """ "the" -> ("t", "h"), ("th", "e")."""
    ends = range(1, len(word) + 1)
    return [(word[:i], word[i:j]) for i, j in pairwise(ends)]

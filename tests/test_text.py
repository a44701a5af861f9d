"""Text as it really arrives: halves of characters become whole or U+FFFD, errors fit on a line, full GPUs are known."""

import pytest
import torch

from llama2_chat.text import first_line, is_out_of_memory, valid_unicode


@pytest.mark.parametrize(
    ("arrived", "valid"),
    [
        ("\ud83d\ude31", "\U0001f631"),
        ("a\ud83d\ude31b\ud83d\ude31", "a\U0001f631b\U0001f631"),
        ("\ud83d", "\ufffd"),
        ("\ude31 alone", "\ufffd alone"),
        ("\ude31\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude31", "\ufffd\U0001f631"),
        ("say \ud83d\n", "say \ufffd\n"),
    ],
    ids=["pair", "pairs in text", "first half", "second half", "wrong way round", "half before a pair", "in a line"],
)
def test_a_pair_of_halves_is_the_character_and_a_lone_half_the_replacement_character(arrived, valid):
    assert valid_unicode(arrived) == valid


@pytest.mark.parametrize(
    "text",
    ["", "plain", "zwölf 日本語 \U0001f631", "\ufeffwith a byte order mark", "\ufffe", "\x00\r\n\u2028", "\ufffd"],
    ids=ascii,
)
def test_text_that_utf_8_can_hold_stays_as_it_is(text):
    assert valid_unicode(text) == text
    assert valid_unicode(text).encode().decode() == text


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError(), "ValueError"),
        (ValueError(" \n"), "ValueError"),
        (OSError("The disk is full."), "The disk is full"),
        (RuntimeError("\n  first \r\nsecond\n"), "first"),
        (KeyError("name"), "'name'"),
        ("a text. With two sentences.", "a text. With two sentences"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty_and_has_no_full_stop(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to"),
        MemoryError(),
    ],
    ids=["PyTorch", "Triton", "cuBLAS", "PyTorch on a CPU", "Python"],
)
def test_memory_that_runs_out_is_known_whoever_says_so(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))

"""Ollama's templates: the text that the model was trained on, or none."""

import pytest

from llama2_chat.training.ollama import find_regular, modelfile
from tests.support.small_tokenizer import CHATML, chatml

MARK = "{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}"
TURNS = "{% for m in messages %}" + MARK + "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('none') }}{% endif %}"
LATER = "{% if messages | length > 3 %}{{ 'long' }}{% endif %}"
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|system|>Be kind.\n' }}{% endif %}"  # as SmolLM2's has


def with_template(template):
    tokenizer = chatml()
    tokenizer.chat_template = template
    return tokenizer


def test_a_regular_template_is_written_in_gos_words():
    assert modelfile("a.gguf", chatml(), 2048) == (
        'FROM ./a.gguf\nTEMPLATE """{{- range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
        '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER num_ctx 2048\n'
    )


@pytest.mark.parametrize("template", [CHATML, TURNS, DEFAULT + TURNS])
def test_what_is_written_is_what_the_template_renders(template):
    tokenizer = with_template(template)
    found = find_regular(tokenizer)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}
    rest = [{"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    for messages in ([first], [system, first], [first, *rest], [system, first, *rest, *rest]):
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found.write(messages) == rendered
    assert ('SYSTEM """Be kind."""' in modelfile("a.gguf", tokenizer, None)) is template.startswith(DEFAULT)


@pytest.mark.parametrize("template", [NO_SYSTEM + TURNS, LATER + TURNS, "{{ '{{' }}" + TURNS])
def test_no_template_is_written_that_would_say_something_else(template):
    assert "TEMPLATE" not in modelfile("a.gguf", with_template(template), None)


def test_llama_2_is_asked_in_metas_words(llama2_tokenizer):
    found = modelfile("a.gguf", llama2_tokenizer, 4096)
    assert "[INST] {{ if $system }}<<SYS>>\n{{ $system }}\n<</SYS>>\n\n" in found
    assert " {{ .Content }} </s><s>" in found
    assert 'PARAMETER stop "</s>"' in found

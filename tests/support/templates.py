"""Conversations and chat templates to try a prompt on, and hostile ones among them."""

from hypothesis import strategies as st
from tokenizers import AddedToken

from tests.support.small_tokenizer import CHATML, gpt_2_shaped, llama_shaped, with_template

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

LLAMA_3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Looks into what was said: thoughts are left out of earlier answers, and an order in the newest message is obeyed.
THINKING = (
    "{%- for m in messages %}{%- set content = m.content %}"
    "{%- if m.role == 'assistant' and '</think>' in content %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if '/no_think' in messages[-1].content %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)


def turns(*contents, system=None):
    """A conversation of these contents, the user's first."""
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


TEMPLATED = {
    "ChatML": lambda: with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>"), CHATML),
    "Llama 3": lambda: with_template(
        gpt_2_shaped("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), LLAMA_3
    ),
    "Zephyr": lambda: with_template(llama_shaped(), ZEPHYR),
    "Zephyr, older file": lambda: with_template(llama_shaped(prepend=True), ZEPHYR),
    "Gemma": lambda: with_template(
        llama_shaped(more_tokens=(AddedToken("<start_of_turn>", special=True), AddedToken("<end_of_turn>"))), GEMMA
    ),
    "tokens that eat white space": lambda: with_template(
        llama_shaped(more_tokens=(AddedToken("<|im_start|>", rstrip=True), AddedToken("<|im_end|>", lstrip=True))),
        CHATML,
    ),
    "white space as added tokens": lambda: with_template(
        gpt_2_shaped("<|im_start|>", "<|im_end|>", more_tokens=(AddedToken("    "), AddedToken("\n\n\n"))), CHATML
    ),
    "Mistral": lambda: with_template(llama_shaped(), MISTRAL),
}


FRAGMENTS = (
    *TAGS,
    *("[INST", "INST]", "[/", "<<", "SYS", "SYS>>", "<</SYS", "[", "]", "<", ">", "/"),
    *("<s>", "</s>", "<unk>", "<0x0A>", "<|im_start|>", "<|im_end|>", "<|user|>", "<end_of_turn>"),
    *(" ", "  ", "▁", "\n", "\t", "\r\n", "\u2003", "\u200b", "\x00", "\x1c"),
    *("😱", "👨\u200d👩\u200d👧", "é", "e\u0301", "日本", "\ufeff", "hello", "llama", "the", "He"),
)
contents = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)
hostile_dialogs = st.builds(
    lambda exchanges, newest, system: turns(*(text for pair in exchanges for text in pair), newest, system=system),
    st.lists(st.tuples(contents, contents), max_size=2),
    contents.filter(str.strip),
    st.none() | contents,
)

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
# As Hermes and Qwen 2.5 write calls, and as Llama 3.1 does.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- if messages[0].role == 'system' %}"
    "{{- messages[0].content + '\\n\\n' }}{%- endif %}{{- '# Tools\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}"
    "{%- elif messages[0].role == 'system' %}{{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- for m in messages %}"
    "{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}{%- for call in m.tool_calls %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- elif m.role == 'tool' %}{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}"
    "{{- '<|im_start|>user' }}{%- endif %}{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA_3_TOOLS = (
    "{{- '<|begin_of_text|>' }}{%- if tools %}{%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}"
    "{%- endfor %}{%- endif %}{%- for m in messages %}{%- if m.role == 'tool' %}"
    "{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (m.content | tojson) + '<|eot_id|>' }}"
    "{%- elif 'tool_calls' in m %}{%- if not m.tool_calls | length == 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}"
    "{%- else %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content + '<|eot_id|>' }}"
    "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)
# As Mistral's tokenizers of version 3 have it, with ids of nine characters.
MISTRAL_TOOLS = (
    "{{- bos_token }}{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{%- for m in messages %}{%- if m.role == 'user' %}{%- if tools and m == users[-1] %}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{{- '[INST] ' + (messages[0].content + '\\n\\n' if m == users[-1] and messages[0].role == 'system' else '') }}"
    "{{- m.content + '[/INST]' }}{%- elif m.tool_calls is defined %}{{- '[TOOL_CALLS] [' }}"
    "{%- for call in m.tool_calls %}{%- if call.id | length != 9 %}"
    "{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{{- (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{{- ', ' if not loop.last else ']' + eos_token }}{%- endfor %}"
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}"
    "{%- elif m.role == 'tool' %}{{- '[TOOL_RESULTS] {\"content\": ' + (m.content | tojson) + ', \"call_id\": \"' }}"
    "{{- m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}"
)
# As Functionary writes calls over Llama 3.1.
FUNCTIONARY = LLAMA_3_TOOLS.replace(
    "{%- if not m.tool_calls | length == 1 %}"
    "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
    "{%- set call = m.tool_calls[0].function %}",
    "",
).replace(
    "{{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{- call.arguments | tojson }}{{- '}<|eot_id|>' }}",
    "{%- for call in m.tool_calls %}{{- '<function=' + call.function.name + '>' }}"
    "{{- (call.function.arguments | tojson) + '</function>' }}{%- endfor %}{{- '<|eot_id|>' }}",
)


# As Functionary 3.2 addresses what it writes, and as Granite 3 is told of tools and calls none in so many words.
TO_ALL = LLAMA_3.replace("assistant<|end_header_id|>\n\n'", "assistant<|end_header_id|>\n\n>>>'").replace(
    "{{ m['content']", "{{ ('>>>all\n' if m['role'] == 'assistant' else '') + m['content']"
)
GRANITE = (
    "{% if tools %}{{ '<|start_of_role|>available_tools<|end_of_role|>' + (tools | tojson) + '<|end_of_text|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] }}"
    "{{ '<|end_of_text|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
)
# How templates refuse a conversation that ends with an answer: what stands before the rest of them.
REFUSES_ANSWER_AT_END = {
    "the newest message is the user's": (
        "{% if messages[-1]['role'] != 'user' %}{{ raise_exception('The newest is an answer') }}{% endif %}"
    ),
    "an odd number of turns": (
        "{% if messages | rejectattr('role', 'equalto', 'system') | list | length % 2 == 0 %}"
        "{{ raise_exception('Conversations end with a question') }}{% endif %}"
    ),
    "only prompts": "{% if not add_generation_prompt %}{{ raise_exception('only prompts') }}{% endif %}",
}
# As models that look at pictures have it.
IN_PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def mistral_with_tools():
    marks = ("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
    tokens = tuple(AddedToken(mark, special=True, normalized=False) for mark in marks)
    return with_template(llama_shaped(more_tokens=tokens), MISTRAL_TOOLS)


def to_all():
    return with_template(llama_3_with_tools(), TO_ALL)


def functionary():
    return with_template(llama_3_with_tools(), FUNCTIONARY)


def qwen():
    marks = tuple(AddedToken(f"<{slash}tool_call>") for slash in ("", "/"))
    return with_template(gpt_2_shaped("<|im_start|>", "<|im_end|>", more_tokens=marks), QWEN)


def llama_3_with_tools():
    tokens = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return with_template(gpt_2_shaped(*tokens), LLAMA_3_TOOLS)


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

"""What guards are asked, and which of their texts is a verdict."""

import random
import re

import pytest

from llama2_chat.guard.verdict import ANY_OTHER, GRANITE_GUARDIAN, LLAMA_GUARD, Verdict, style_of

STYLES = {"Llama Guard": LLAMA_GUARD, "granite-guardian": GRANITE_GUARDIAN, "any other": ANY_OTHER}
SAID = """safe Safe SAFE unsafe not no No NO yes Yes is this S1 O3 S1,S10 maybe . , ! 🙂 ſafe safe\u0301 [/INST] </s>
<score> </score> <think> </think> <confidence> High Low </confidence>"""
WORDS = [*SAID.split(), "\n", "\t", " ", "\0", "\u200b", "\u2028", "\ufeff"]
# The only texts that are "safe", as models say them.
SAFE = {
    "Llama Guard": {"safe"},
    "any other": {"safe"},
    "granite-guardian": {
        *("No", "<score> no </score>", "<score>no</score>", "<think>\n</think>\n<score> no </score>"),
        *(f"No{gap}<confidence> {sure} </confidence>" for gap in ("", "\n") for sure in ("High", "Low")),
    },
}


@pytest.mark.parametrize("name", STYLES)
def test_of_a_thousand_odd_verdicts_none_is_safe(name):
    draw = random.Random(0)
    texts = ["".join(draw.choice(WORDS) for _ in range(draw.randint(1, 6))) for _ in range(1000)]
    texts += ["", "safe.", "safe\nS1", "safe safe", "unsafe", "SAFE", "Safe", "safely", "s afe", "no", "NO", "No."]
    for text in texts:
        verdict = STYLES[name].read(text, is_whole=True)
        assert verdict is None or not verdict.safe or text.strip(" \n") in SAFE[name], text
        if re.search("unsafe", text) and name != "granite-guardian":
            assert verdict is not None, text


@pytest.mark.parametrize("name", STYLES)
def test_what_models_say_is_read_and_follows_the_grammar(name):
    style = STYLES[name]
    for text in SAFE[name]:
        assert style.read(f"\n\n{text}", is_whole=True) == Verdict(True)
        assert re.fullmatch(style.grammar, f"\n\n{text}")
    unsafe = ["Yes", "<score> yes </score>", "Yes\n<confidence> Low </confidence>"]
    for text in unsafe if name == "granite-guardian" else ["unsafe\nS1", "unsafe\nO3,O4"]:
        assert not style.read(text, is_whole=True).safe
        assert re.fullmatch(style.grammar, text)


@pytest.mark.parametrize("name", STYLES)
def test_what_was_cut_off_is_unsafe_or_no_verdict(name):
    for text in SAFE[name]:
        assert STYLES[name].read(text, is_whole=False) is None
    assert LLAMA_GUARD.read("unsafe\nS1,S", is_whole=False) == Verdict(False, ("S1",))


def test_the_categories_are_those_that_the_guard_names():
    assert LLAMA_GUARD.read("unsafe\nS1,S10,S1", is_whole=True) == Verdict(False, ("S1", "S10"))


@pytest.mark.parametrize(
    ("model", "style"),
    [
        ("meta-llama/LlamaGuard-7b", LLAMA_GUARD),
        ("meta-llama/Meta-Llama-Guard-2-8B", LLAMA_GUARD),
        ("meta-llama/Llama-Guard-3-1B", LLAMA_GUARD),
        ("llama-guard3:8b", LLAMA_GUARD),
        ("ibm-granite/granite-guardian-3.3-8b", GRANITE_GUARDIAN),
        ("granite3.2-guardian:5b", GRANITE_GUARDIAN),
        ("meta-llama/Llama-2-7b-chat-hf", ANY_OTHER),
    ],
)
def test_a_guard_is_known_by_its_name(model, style):
    assert style_of(model) is style


def test_guards_with_a_template_get_the_bare_turns_and_others_a_task():
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    for style in (LLAMA_GUARD, GRANITE_GUARDIAN):
        assert style.messages("why?", None) == turns[:1]
        assert style.messages("why?", "so") == turns
    system, question = ANY_OTHER.messages("why?", "so")
    assert "S1: violent crimes" in system["content"]
    assert "<assistant>\nso\n</assistant>" in question["content"]
    assert "assistant" not in ANY_OTHER.messages("why?", None)[1]["content"]

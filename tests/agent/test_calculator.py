"""What people write is computed as they mean it; everything else is refused in a sentence, at once."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2_chat.agent.calculator import Calculator, calculate
from llama2_chat.errors import ChatError
from llama2_chat.evaluation.calculator_attacks import ALPHABET, ATTACKS, megabytes


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12 + 30", "42"),
        ("(7 + 3) * 12", "120"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("8 : 2", "4"),
        ("3 x 4", "12"),
        ("2^10", "1024"),
        ("2**10", "1024"),
        ("12²", "144"),
        ("-2^2", "-4"),
        ("2^3^2", "512"),
        ("√625", "25"),
        ("√(9 + 16)", "5"),
        ("√16^2", "16"),
        ("2√9", "6"),
        ("√√16", "2"),
        ("sqrt(16) + 1", "5"),
        ("2(3 + 4)", "14"),
        ("(1 + 1)(2 + 1)", "6"),
        ("15% of 240", "36"),
        ("15 % * 240", "36"),
        ("100 / 50%", "200"),
        ("240 + 15%", "276"),
        ("200 − 10%", "180"),
        ("5% + 3%", "0.08"),
        ("17 mod 5", "2"),
        ("1,234 × 5", "6170"),
        ("1,234,567.5 + 0.5", "1234568"),
        ("007 + .5", "7.5"),
        ("0.1 + 0.2", "0.3"),
        ("10 / 3", "3.33333333333333"),
        ("2^100", "1267650600228229401496703205376"),
        ("1e5 + 1", "100001"),
        ("3 + 4 = ?", "7"),
        ("2 * π", "6.28318530717959"),
    ],
)
def test_it_means_what_it_means_at_school(expression, value):
    assert calculate(expression) == value


@pytest.mark.parametrize(
    ("expression", "why"),
    [
        ("1 / 0", "divided by zero"),
        ("0 mod 0", "divided by zero"),
        ("√-4", "negative number"),
        ("(-8)^(1/3)", "no real number"),
        ("9^9^9", "too large"),
        ("1e999", "too large"),
        ("1,5 + 1", "decimals with a point"),
        ("1,23,456", "decimals with a point"),
        ("17 % 5", "17 mod 5"),
        ("(10 + 5)%", "behind a number"),
        ("14 euros * 3", "'e'"),
        ("'a' * 3", '"\'"'),
        ("9 @ 9", "neither @ nor ~"),
        ("~9", "neither @ nor ~"),
        ("1 2", "cannot be read"),
        ("", "cannot be read"),
        ("(", "cannot be read"),
        ("1" * 201, "200 characters"),
    ],
)
def test_what_has_no_value_is_refused_with_the_reason(expression, why):
    with pytest.raises(ChatError, match=why):
        calculate(expression)


@pytest.mark.parametrize("attack", ATTACKS, ids=range(len(ATTACKS)))
def test_an_attack_takes_no_memory_and_gives_a_number_or_a_sentence(attack):
    assert megabytes(attack) < 20


@given(st.text(max_size=20) | st.text(ALPHABET, max_size=40))
def test_any_text_gives_a_number_or_a_sentence(text):
    with suppress(ChatError):
        float(calculate(text))


@given(st.integers(0, 10**6), st.integers(1, 10**6), st.sampled_from("+-*"))
def test_whole_numbers_are_computed_as_python_computes_them(left, right, sign):
    assert calculate(f"{left:,} {sign} {right}") == str({"+": left + right, "-": left - right, "*": left * right}[sign])


def test_the_tool_reads_what_its_schema_lets_a_model_write():
    assert Calculator().run("20% * 50") == "10"

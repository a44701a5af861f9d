"""A calculator for what people and models write: `15% of 240`, `1,234 × 5`, `√625`, `2^10`.

simpleeval computes, and is given nothing but numbers, brackets and a few operators: an expression is checked against an
allow-list of characters, its tree against one of nodes, and every value on the way against LARGEST, so that none takes
more than milliseconds. There are no names, calls, texts or attributes.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable
from typing import Any, ClassVar

from simpleeval import InvalidExpression, SimpleEval

from llama2_chat.agent.tool import Example
from llama2_chat.errors import ChatError

Number = int | float

MAX_CHARACTERS = 200
LARGEST = 10**300  # of every value; a float holds a little more

# What people write -> what Python reads, where ~ stands for the square root, which binds as ~ does: looser than a
# power, closer than a product. @ stands between a percentage and its 100.
PI = f"({math.pi!r})"
SIGNS = str.maketrans(
    dict.fromkeys("×·⋅∙", "*") | dict.fromkeys("÷:∶", "/") | dict.fromkeys("−–", "-") | {"^": "**", "√": "~", "π": PI}
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
WORDS = {"sqrt": "~", "pi": PI, "of": "*", "x": "*", "mod": "mod"}
WORD = re.compile(rf"(?<![a-z])({'|'.join(WORDS)})(?![a-z])", re.IGNORECASE)
# Possessive: 200 digits, read again from each of them, would take a tenth of a second.
THOUSANDS = re.compile(r"(?<![0-9.,])[1-9][0-9]{0,2}+(?:,[0-9]{3})++(?![0-9,])")
PERCENTAGE = re.compile(r"(?<![0-9.])([0-9]++\.?+[0-9]*+|\.[0-9]++) *+%")
LEADING_ZEROS = re.compile(r"(?<![0-9.])0+(?=[0-9])")
NO_SIGN_BETWEEN = re.compile(r"(?<=[0-9.)]) *(?=[(~])|(?<=\)) *(?=[0-9.])")
ALLOWED = re.compile(r"(?:[0-9]++\.?[0-9]*+(?:e[-+]?[0-9]++)?+|\.[0-9]++|[-+*/()~@% ])*+")

EXPECTED = "Write numbers with + - * / ^ √ % and brackets, such as (7 + 3) * 12 or 15% of 240."


class Calculator:
    """A Tool: an expression in, its value out."""

    name = "calculator"
    description = "computes numbers with + - * / ^ √ % and brackets"
    input_schema: ClassVar = {"type": "string", "pattern": r"^[0-9(√-][0-9 +*/^().%√-]{0,60}$"}
    examples = (
        Example("What is 12 + 30?", "12 + 30", "42", "12 + 30 is 42."),
        Example("I have 7 bags with 6 sweets each. How many sweets do I have?", "7 * 6", "42", "You have 42 sweets."),
        Example("There are 30 birds in a tree and 12 fly away. How many stay?", "30 - 12", "18", "18 birds stay."),
        Example("How much is 20% of 50?", "20% * 50", "10", "20% of 50 is 10."),
        Example("Calculate (2 + 3) * 4", "(2 + 3) * 4", "20", "(2 + 3) * 4 is 20."),
        Example("What is the square root of 81?", "√81", "9", "The square root of 81 is 9."),
        Example("What is 3 to the power of 4?", "3 ^ 4", "81", "3 to the power of 4 is 81."),
    )
    timeout_s = 2.0

    def run(self, input: Any) -> str:
        return calculate(input)


def calculate(expression: str) -> str:
    """The value of an expression: whole numbers with all digits, others with 15.

    Powers, roots, brackets, × and ÷ mean what they mean at school. A comma stands between thousands. `15%` is 0.15, and
    `240 + 15%` is 276. Raises ChatError, with a sentence, for what is no such expression or has no value.
    """
    try:
        tree = _Percentages().visit(ast.parse(_python(expression), mode="eval").body)
        return _written(_EVALUATOR.eval(expression, previously_parsed=tree))
    except (SyntaxError, MemoryError, RecursionError, InvalidExpression) as error:
        raise ChatError(f"This cannot be read as an expression. {EXPECTED}") from error
    except ZeroDivisionError as error:
        raise ChatError("Nothing can be divided by zero.") from error
    except OverflowError as error:
        raise ChatError("This number is too large.") from error


# ---- From what people write to what Python reads ----


def _python(expression: str) -> str:
    if len(expression) > MAX_CHARACTERS:
        raise ChatError(f"An expression may have {MAX_CHARACTERS} characters; this has {len(expression):,}.")
    if {"@", "~"} & set(expression):
        raise ChatError(f"An expression has neither @ nor ~ in it. {EXPECTED}")
    text = " ".join(expression.split()).rstrip("=? ")
    text = THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda power: f"**({power[0].translate(SUPERSCRIPTS)})", text)
    text = WORD.sub(lambda word: WORDS[word[0].lower()], text).translate(SIGNS)
    text = _with_percentages(text).replace("mod", "%")
    text = LEADING_ZEROS.sub("", text)
    text = NO_SIGN_BETWEEN.sub("*", text)
    _check_characters(text)
    return text.strip()


def _with_percentages(text: str) -> str:
    """% is per cent, not a remainder as in Python; where it could be either, it is refused."""
    if re.search(r"% *[0-9.(~]", text):
        raise ChatError("After % comes a sign or a word: 15% of 240, or 17 mod 5 for a remainder.")
    text = PERCENTAGE.sub(r"(\1@100)", text)
    if "%" in text:
        raise ChatError("A % stands behind a number, such as 15%.")
    return text


def _check_characters(text: str) -> None:
    allowed = ALLOWED.match(text)
    assert allowed  # it matches nothing, too
    if rest := text[allowed.end() :]:
        if rest[0] == ",":
            raise ChatError("A comma stands between thousands, as in 1,234; write decimals with a point, as in 1.5.")
        raise ChatError(f"An expression cannot have {rest[0]!r} here. {EXPECTED}")


class _Percentages(ast.NodeTransformer):
    """a + p% is a * (1 + p%), as pocket calculators have it; a percentage plus another is one."""

    def visit_BinOp(self, node: ast.BinOp) -> ast.BinOp:
        self.generic_visit(node)
        if not isinstance(node.op, ast.Add | ast.Sub) or not _is_percentage(node.right) or _is_percentage(node.left):
            return node
        return ast.BinOp(node.left, ast.Mult(), ast.BinOp(ast.Constant(1), node.op, node.right))


def _is_percentage(node: ast.expr) -> bool:
    if not isinstance(node, ast.BinOp):
        return False
    sums = isinstance(node.op, ast.Add | ast.Sub) and _is_percentage(node.left) and _is_percentage(node.right)
    return sums or isinstance(node.op, ast.MatMult)


# ---- Computing ----


def _bounded(compute: Callable[..., Any]) -> Callable[..., Number]:
    """The same operation, which raises for what is no number or too large a one."""

    def bounded(*operands: Number) -> Number:
        value = compute(*operands)
        if isinstance(value, complex):
            raise ChatError("This power is no real number.")
        if not abs(value) <= LARGEST:  # NaN neither
            raise OverflowError
        return value

    return bounded


def _power(base: Number, exponent: Number) -> Any:
    """Python computes every digit of a whole number, however many: so they are counted first."""
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0 and abs(base) > 1
    if whole and exponent * math.log2(abs(base)) > math.log2(LARGEST) + 1:
        raise OverflowError
    return base**exponent


def _root(value: Number) -> Number:
    if value < 0:
        raise ChatError("A negative number has no real square root.")
    return math.sqrt(value)


def _evaluator() -> SimpleEval:
    operators: dict[type[ast.AST], Callable[..., Any]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
        ast.MatMult: operator.truediv,
        ast.Pow: _power,
        ast.Invert: _root,
        ast.USub: operator.neg,
        ast.UAdd: operator.pos,
    }
    evaluator = SimpleEval({node: _bounded(compute) for node, compute in operators.items()}, functions={}, names={})
    evaluator.nodes = {node: evaluator.nodes[node] for node in (ast.BinOp, ast.UnaryOp, ast.Constant)}
    return evaluator


_EVALUATOR = _evaluator()  # shared by all threads: it keeps nothing but the text for its own error messages


def _written(value: Number) -> str:
    value = _bounded(operator.pos)(value)
    whole = isinstance(value, int) or (value.is_integer() and abs(value) < 10**15)
    return str(int(value)) if whole else f"{value:.15g}"

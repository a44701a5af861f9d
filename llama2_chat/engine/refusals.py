"""Why answers cannot be held to a grammar: what llguidance says, in a sentence with the next step."""

from __future__ import annotations

import re

from llama2_chat.types import GrammarKind

WHAT = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}  # of GrammarSpec.kind
IN_A_GRAMMAR = "failed to compile JSON schema: "
# What llguidance says, how that reads to whoever wrote the grammar, and what they can do.
KNOWN = (
    (r"NoExtension", "no value satisfies it", ""),
    (r"(?:schema|grammar) too (?:large|big).*", "it is too complex", "Make it smaller."),
    (
        r"Unable to determine if regex is empty.*",
        "too much is asked of one text at once",
        "Leave out some of its patterns, or join them to one.",
    ),
    (
        r"Unsatisfiable schema: Regex is empty.*",
        "no text has all the patterns, formats and lengths that are asked of it at once",
        "Leave out one of them.",
    ),
    (r"Unsatisfiable schema: anyOf is empty", "where a value is one of several, there is none to choose from", ""),
    (r"Unsatisfiable schema: (.*)", r"no value satisfies it: \1", ""),
    (r'Unimplemented keys: \["(\$dynamicRef|\$recursiveRef)".*', r"\1 is not supported", "Use $ref."),
    (
        r"Unimplemented keys: \[(.*?)\]",
        r"its \1 cannot be followed",
        "Leave it out, or say what is allowed instead.",
    ),
    (r"Invalid type: (.*)", r'there is no type "\1"', ""),
    (r"Expected f64 for '(.*)', got (.*)", r"\1 must be a number; it was \2", ""),
    (r"Expected (\w+ ?\w*) for '(.*)', got (.*)", r"\2 must be of type \1; it was \3", ""),
    (r"invalid multiple of", "multipleOf must be above 0", ""),
    (
        r"patternProperty regexes /(.*)/ and /(.*)/ are not disjoint",
        r"one name can have both patterns, \1 and \2, of patternProperties",
        "Let each name have one of them at most.",
    ),
    (
        r"circular references with sibling keys are not supported: .*(#.*)",
        r"\1 refers to itself, and other words stand beside that $ref",
        "Move them to where it points.",
    ),
    (
        r"Resource '(.*?)' is not present.*",
        r"it refers to \1, and nothing is fetched",
        "Put that schema into $defs.",
    ),
    (r"Pointer '(.*)' does not exist", r"its $ref points to #\1, where there is nothing", ""),
    (r".*hex escape.*", "it holds half of a surrogate pair", ""),
    (r"regex parse error: decimal literal invalid", "a length or a count in it is too large", "Leave that out."),
    (r"regex parse error: (look-around|backreferences).*", r"patterns have no \1 here", "Say it without."),
    (r"regex parse error: (.*)", r"a pattern is invalid: \1", ""),
    (r"(?:at )?(\d+)\((\d+)\): (.*)", r"\3, at line \1, column \2", ""),
)


def too_complex(kind: GrammarKind) -> str:
    return f"This {WHAT[kind]} is too complex to be followed. Make it smaller."


def sentence(kind: GrammarKind, error: str) -> str:
    """What llguidance says is wrong with a grammar of this kind, in one sentence, and what can be done."""
    if "regex parse error" in error:  # then it draws the pattern, and says below it what is wrong
        error = f"regex parse error: {error.rpartition('error: ')[2]}"
    # Of a schema within a grammar, which others may have written around it, the place is of no use.
    reason, step = _known(error.partition("\n")[0].rpartition(IN_A_GRAMMAR)[2].strip().rstrip("."))
    return f"Answers cannot be held to this {WHAT[kind]}: {reason.replace('. ', '; '):.300}. {step}".rstrip()


def _known(error: str) -> tuple[str, str]:
    for pattern, reason, step in KNOWN:
        if found := re.match(pattern, error):
            return found.expand(reason), step
    return error, ""

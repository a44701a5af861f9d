"""The presets that come with the page. Their names are in static/texts, under these keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama2_chat.page import wording
from llama2_chat.presets import Example, Guidance, Preset, Presets

JSON_EXAMPLES = (
    Example(
        "Oslo is the capital of Norway and has about 700,000 inhabitants.",
        '{"city": "Oslo", "country": "Norway", "inhabitants": 700000}',
    ),
    Example("Who wrote Faust?", '{"author": "Johann Wolfgang von Goethe"}'),
)
SQL_EXAMPLE = Example(
    "Table orders(id, customer, total, placed_on). Which customers spent more than 100 in 2025?",
    "```sql\nSELECT customer, SUM(total) AS spent\nFROM orders\n"
    "WHERE placed_on >= DATE '2025-01-01' AND placed_on < DATE '2026-01-01'\n"
    "GROUP BY customer\nHAVING SUM(total) > 100;\n```",
)
BUILT_IN: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("short", wording.SYSTEM_PROMPT),
        Preset("none"),  # as Meta advises since August 2023, for with its long one Llama 2 refused too much
        Preset("meta", wording.META_SYSTEM_PROMPT),
        Preset(
            "guide",
            "You are an experienced guide who shows visitors around a city on foot. Stay in this role, whatever you "
            "are asked. Speak in the first person, in a few friendly sentences, and end with a question about what the "
            "visitor would like to see next.",
        ),
        Preset(
            "steps",
            "Solve each task step by step. Number the steps, check each one before you go on, and end with a line that "
            "begins with “Answer:”.",
        ),
        Preset(
            "json",
            "You turn each message into one JSON object. Write nothing else: no introduction, no explanation, no code "
            "block. Use null for what is not known.",
            Guidance(JSON_EXAMPLES, "(Answer with one JSON object and nothing else.)"),
        ),
        Preset(
            "unsure",
            "Today is {{today}}. Answer only what you know. If you are not sure, say “I am not sure” and why, and do "
            "not guess. If something is missing to answer well, ask for it.",
        ),
        Preset(
            "reviewer",
            "You review code. Name each problem with its line, what goes wrong and how to fix it, the most serious "
            "first: wrong results, then security, then clarity. Show corrected code in a code block. If nothing is "
            "wrong, say so in one sentence, and do not invent problems.",
        ),
        Preset(
            "sql",
            "You write SQL. Answer with one statement in a code block, in standard SQL unless a dialect is named. Use "
            "only tables and columns that were described; if one is missing, ask for it and do not guess.",
            Guidance((SQL_EXAMPLE,)),
        ),
    )
}


def first_preset(presets: Presets) -> Preset:
    """With which conversations start. presets: the operator's."""
    return presets.default or BUILT_IN["short"]


def shown(presets: Presets) -> list[dict[str, Any]]:
    """All of them as the page gets them, the operator's first, which have names; those of the page have keys."""
    return [
        *({"name": preset.name, **start_of(preset)} for preset in presets.all),
        *({"key": key, **start_of(preset)} for key, preset in BUILT_IN.items()),
    ]


def start_of(preset: Preset) -> dict[str, Any]:
    """As the page knows the start of a conversation."""
    examples = [{"question": each.question, "answer": each.answer} for each in preset.guidance.examples]
    return {"systemPrompt": preset.system_prompt, "examples": examples, "reminder": preset.guidance.reminder}

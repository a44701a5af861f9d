"""How well does a model use tools? Rates on made-up sums and on questions of a file; and what the calculator takes.

    python scripts/evaluate_agent.py                                    100 sums, the embedded model
    python scripts/evaluate_agent.py --sums 0 --questions my.json      questions of a file, see read_questions
    python scripts/evaluate_agent.py --model_id some/model --sums 20    any model that the chat can load
    python scripts/evaluate_agent.py --calculator 10000                 attacks on it, and so many strings of Hypothesis

Each question is printed with the steps and the answer; E: an expression had the right value, A: the answer was right,
T: the calculator was called for a sum and for nothing else. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.evaluation import agent_rates, calculator_attacks
from llama2_chat.evaluation.agent_rates import Outcome
from llama2_chat.settings import Settings
from model import ChatModel


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    try:
        figures = measure_calculator(args.calculator) if args.calculator else measure_agent(args)
    except ChatError as error:
        sys.exit(f"evaluate_agent.py: {error.detail}")
    print(json.dumps(figures))


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model_id", help="folder or Hub id of a model; the embedded one if none is named and there is no GPU")
    add("--sums", type=int, default=100, metavar="N", help="how many sums are made up (100)")
    add("--seed", type=int, default=0, help="of the sums (0)")
    add("--questions", type=Path, metavar="JSON", help="a file of more questions")
    add("--calculator", type=int, default=0, metavar="N", help="ask no model; try the attacks and N strings")
    args = parser.parse_args(argv)
    if args.calculator < 0 or args.sums < 0 or not (args.sums or args.questions or args.calculator):
        parser.error("there must be something to measure: --sums above 0, --questions or --calculator")
    return args


def measure_agent(args: argparse.Namespace) -> dict[str, object]:
    kinds = {"questions": agent_rates.read_questions(args.questions)} if args.questions else {}
    if args.sums:
        kinds["made_up"] = agent_rates.made_up(args.sums, args.seed)
    settings = Settings.read(["--model-id", args.model_id] if args.model_id else [])
    chat = ChatModel(settings).load()
    if chat.state != "ready":
        raise ChatError(chat.status.error)
    figures = {kind: agent_rates.rates(agent_rates.ask(chat, asked, show)) for kind, asked in kinds.items()}
    chat.close()
    return {"model": chat.status.model, "precision": chat.status.precision, **figures}


def show(outcome: Outcome) -> None:
    right = zip("EAT", (outcome.expression_right, outcome.answer_right, outcome.tool_right), strict=True)
    marks = "".join(letter if is_right else "-" for letter, is_right in right)
    steps = " · ".join(f"{step.name}({step.input}) {step.result}" for step in outcome.steps)
    print(f"{marks}  {outcome.question.text}  |  {steps}  |  {outcome.answer}", flush=True)


def measure_calculator(strings: int) -> dict[str, object]:
    """The slowest and the largest of each kind."""
    kinds = {"attacks": list(calculator_attacks.ATTACKS), "strings": calculator_attacks.strings(strings)}
    figures: dict[str, object] = {}
    for kind, expressions in kinds.items():
        figures[kind] = len(expressions)
        figures[f"{kind}_slowest_ms"] = round(max(map(calculator_attacks.milliseconds, expressions)), 2)
        figures[f"{kind}_largest_mb"] = round(max(map(calculator_attacks.megabytes, expressions)), 2)
    return figures


if __name__ == "__main__":
    main()

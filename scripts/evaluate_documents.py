"""Is the right page found, and does the answer keep to it? Recall@k and MRR; faithfulness, relevancy, correctness.

    python scripts/evaluate_documents.py xquad.json                          passages with questions, among distractors
    python scripts/evaluate_documents.py --make 50 questions.jsonl report.pdf notes.docx   first, have questions written
    python scripts/evaluate_documents.py questions.jsonl report.pdf notes.docx                is their page found?
    python scripts/evaluate_documents.py questions.jsonl report.pdf notes.docx --judge http://gpu-1:8000

Each line of questions.jsonl is {"question": "...", "file": "report.pdf", "page": 2, "answer": "..."}; in place of file
and page, "passage" may have words that stand on the page, and the answer may be missing. The search needs no model;
with EMBEDDINGS= it also goes by meaning, as it does in the chat.
With --make and --judge, questions and answers come from the model that app.py would start, or INFERENCE_URL's; the
judge is any OpenAI-compatible server that holds answers to a JSON schema, whose key is JUDGE_KEY.

documents.md, .json and .png go to --output_dir. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.evaluation import document_report
from llama2_chat.evaluation.document_evaluation import Judge, evaluate, make_questions
from llama2_chat.settings import Settings


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    settings = Settings.read(["--model-id", args.model_id] if args.model_id else [])
    try:
        if args.make:
            make_questions(args.questions, args.documents, args.make, settings, args.seed)
            return
        judge = Judge(args.judge, args.judge_model, os.environ.get("JUDGE_KEY", "")) if args.judge else None
        results = evaluate(args.questions, args.documents, args.output_dir, settings, judge, args.answers)
    except ChatError as error:
        sys.exit(f"evaluate_documents.py: {error.detail}")
    except KeyboardInterrupt:
        sys.exit(f"\nStopped. What there was is in {args.questions if args.make else args.output_dir}.")
    print(json.dumps(document_report.summary(results)))


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("questions", type=Path, help="JSONL of questions; or passages with questions, as SQuAD has them")
    add("documents", type=Path, nargs="*", help="PDF, DOCX, TXT, Markdown, CSV or HTML files that they are about")
    add("--make", type=int, metavar="N", help="have the model write N questions to the file, for you to look through")
    add("--judge", metavar="URL", help="have the model answer, and this server judge the answers")
    add("--judge_model", metavar="NAME", help="the judge's name there; may be left out where it has one model only")
    add("--answers", type=int, default=50, metavar="N", help="with --judge: how many questions at most (50)")
    add("--model_id", help="folder or Hub id of the model that writes and answers, as app.py takes it")
    add("--seed", type=int, default=0, help="of the passages that --make draws (0)")
    add("--output_dir", type=Path, help="where the report goes (evaluation, beside the questions)")
    args = parser.parse_intermixed_args(argv)  # documents may stand behind a flag, too
    args.output_dir = args.output_dir or args.questions.parent / "evaluation"
    if args.make is not None and (args.make < 1 or not args.documents or args.judge):
        parser.error("--make takes a number above 0 and documents to ask about, and no --judge")
    if args.answers < 1:
        parser.error("--answers must be above 0")
    return args


if __name__ == "__main__":
    main()

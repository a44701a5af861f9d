"""How often the right page is found: recall@5 and MRR of the documents' search on passages with questions.

    python scripts/evaluate_documents.py xquad-en.json

The file is a JSON list of {"text": "...", "questions": ["..."]}, for example from XQuAD. No model is needed. The last
line is JSON.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.evaluation.retrieval import distractors, measure, read_passages


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("passages", type=Path, help="a JSON list of objects with a text and questions")
    arguments = parser.parse_args()
    try:
        result = measure(read_passages(arguments.passages), distractors())
    except ChatError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{result.questions} questions about {result.pages} pages, distractors among them:")
    print(f"recall@5 {result.recall_at_5:.3f}, MRR {result.mean_reciprocal_rank:.3f}")
    print(f"indexed in {result.index_s:.1f} s, {result.search_ms:.1f} ms a question")
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

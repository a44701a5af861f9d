"""From documents to questions, and from both to a report; what scripts/evaluate_documents.py calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama2_chat.embeddings import make_embedder
from llama2_chat.errors import ChatError
from llama2_chat.evaluation import document_questions, document_report, retrieval
from llama2_chat.evaluation.document_answers import judge_answers, of_judge
from llama2_chat.evaluation.document_questions import DocumentQuestion
from llama2_chat.evaluation.document_report import Results
from llama2_chat.evaluation.folder import make_folder
from llama2_chat.remote import RemoteModel
from llama2_chat.settings import Settings
from llama2_chat.types import ChatBackend, Embedder
from model import ChatModel


@dataclass(frozen=True)
class Judge:
    """A server that judges answers."""

    url: str
    model: str | None  # its name there; None where the server has one only
    key: str = ""


def make_questions(path: Path, documents: Sequence[Path], number: int, settings: Settings, seed: int) -> None:
    """Have the model of these settings write questions to a new file, each as it comes. Raises ChatError."""
    try:
        file = path.open("x", encoding="utf-8")
    except FileExistsError as error:
        raise ChatError(f"{path} is there already. Give another name for the new questions.") from error
    except OSError as error:
        raise ChatError(f"{path} cannot be written ({error.strerror}).") from error

    def keep(question: DocumentQuestion) -> None:
        print(f"{question.text}  |  {question.answer}", flush=True)
        file.write(question.to_json() + "\n")
        file.flush()

    try:
        with file, retrieval.collected(documents, []) as collection, _answering(settings) as chat:
            made = document_questions.make(chat, collection.shelf.pages(collection.ids), number, seed, keep)
    finally:
        if not path.stat().st_size:
            path.unlink()
    if not made:
        raise ChatError("The model wrote no question about any of these passages. A larger one does better.")
    print(f"{made:,} questions are in {path}. Look through them: some may make no sense without their passage.")


def evaluate(
    path: Path, documents: Sequence[Path], folder: Path, settings: Settings, judge: Judge | None, answers: int
) -> Results:
    """What was measured; the report in the folder holds it as well. Raises ChatError.

    judge: also have the model of these settings answer so many of the questions, and have the answers judged.
    """
    questions = document_questions.read_questions(path)
    make_folder(folder)
    with _encoder(settings) as embedder, retrieval.collected(documents, questions, embedder) as collection:
        results = Results(retrieval.measure(collection, questions))
        document_report.write(results, folder)  # at once: it is kept, whatever ends what follows
        print(*document_report.search_lines(results.retrieval), sep="\n", flush=True)
        if judge:
            with _judging(judge) as judging, _answering(settings) as chat:
                results.judge, results.model = judging.status.model, chat.status.model
                found = results.retrieval.found
                chosen = found[:: -(-len(found) // answers)]  # from all over the file
                try:
                    for judged in judge_answers(chat, judging, collection, chosen):
                        results.judged.append(judged)
                        print(f"{judged.found.question.text}  |  {' '.join(judged.answer.split())}", flush=True)
                finally:
                    document_report.write(results, folder)
            print("", *document_report.answer_lines(results), sep="\n")
    print(f"\nThe report is {folder / document_report.MARKDOWN}.")
    return results


@contextlib.contextmanager
def _answering(settings: Settings) -> Iterator[ChatBackend]:
    with contextlib.closing(RemoteModel(settings) if settings.inference_urls else ChatModel(settings)) as chat:
        if chat.load().state != "ready":
            raise ChatError(f"The model cannot answer: {chat.status.error}")
        yield chat


@contextlib.contextmanager
def _encoder(settings: Settings) -> Iterator[Embedder | None]:
    """What EMBEDDINGS names, ready; None if it names nothing."""
    if not settings.embeddings:
        yield None
        return
    with contextlib.closing(make_embedder(settings)) as embedder:
        embedder.check()
        yield embedder


@contextlib.contextmanager
def _judging(judge: Judge) -> Iterator[ChatBackend]:
    try:
        settings = Settings(inference_url=judge.url, inference_model=judge.model, inference_key=judge.key)
    except ChatError as error:
        raise ChatError(of_judge(str(error))) from error
    with contextlib.closing(RemoteModel(settings)) as chat:
        if chat.load().state != "ready":
            raise ChatError(f"The judge cannot be asked: {of_judge(chat.status.error)}")
        yield chat

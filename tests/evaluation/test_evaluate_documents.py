"""Measuring documents: questions as they are written and made, the pages that are found, and what a judge says."""

import json
import re
from dataclasses import replace

import pytest

from llama2_chat.documents.store import Chunk
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.evaluation import document_evaluation, document_report, retrieval
from llama2_chat.evaluation.document_answers import judge_answers
from llama2_chat.evaluation.document_evaluation import Judge, evaluate, make_questions
from llama2_chat.evaluation.document_questions import EXAMPLE, DocumentQuestion, make, read_questions
from llama2_chat.evaluation.document_report import Results, interval, summary
from llama2_chat.types import Status
from scripts import evaluate_documents
from tests.support.encoders import WordMeanings
from tests.support.files import pdf
from tests.support.scripted import Scripted, ScriptedChat

PASSAGES = [
    {"text": "The lighthouse is made of granite.", "questions": ["What is the lighthouse made of?", "Who swims?"]},
    {"text": "Seabirds nest on the cliff.", "questions": ["Where do seabirds nest?"]},
]
PAGES = ("The lighthouse of Brenzano was built in 1874.", "Its keeper was Ottavio Ferrandini.", "Seabirds nest below.")
ROWS = [
    {"question": "Who was the keeper?", "file": "report.pdf", "page": 2, "answer": "Ottavio Ferrandini"},
    {"question": "Where do seabirds nest?", "passage": "seabirds  NEST\nbelow"},
    {"question": "Zyzzyva?", "file": "report.pdf", "page": 1},
]


@pytest.fixture(autouse=True)
def few_distractors(monkeypatch):
    monkeypatch.setattr(retrieval, "_distractors", lambda: ["Nothing of all that."])


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    file = tmp_path_factory.mktemp("documents") / "report.pdf"
    file.write_bytes(pdf(*PAGES))
    return file


@pytest.fixture(scope="module")
def collection(report):
    with retrieval.collected([report], []) as collection:
        yield collection


def jsonl(folder, *rows):
    file = folder / "questions.jsonl"
    file.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), "utf-8")
    return file


def test_passages_with_questions_are_pages_of_one_document_among_distractors(tmp_path):
    file = tmp_path / "passages.json"
    file.write_text(json.dumps(PASSAGES))
    questions = read_questions(file)
    with retrieval.collected([], questions) as passages:
        result = retrieval.measure(passages, questions)
    assert (result.pages, [each.rank for each in result.found]) == (3, [1, 0, 1])
    assert result.recall(1) == result.recall(10) == result.mean_reciprocal_rank == pytest.approx(2 / 3)


def test_squad_is_read_as_it_is_published(tmp_path):
    answered = {"question": "What is it made of?", "answers": [{"text": "granite", "answer_start": 23}]}
    unanswerable = {"question": "Who swims?", "answers": [], "is_impossible": True}
    paragraph = {"context": PASSAGES[0]["text"], "qas": [answered, unanswerable]}
    file = tmp_path / "squad.json"
    file.write_text(json.dumps({"version": "2.0", "data": [{"title": "Lighthouse", "paragraphs": [paragraph]}]}))
    assert read_questions(file) == [
        DocumentQuestion("What is it made of?", passage=PASSAGES[0]["text"], answer="granite")
    ]


def test_with_an_encoder_pages_are_also_found_by_their_meaning(report, tmp_path):
    questions = read_questions(jsonl(tmp_path, {"question": "Leuchtturm?", "file": "report.pdf", "page": 1}))
    with retrieval.collected([report], questions, WordMeanings()) as collection:
        by_meaning = retrieval.measure(collection, questions)
    assert (by_meaning.found[0].rank, by_meaning.encoder) == (1, "word-meanings")
    assert "with word-meanings, by meaning" in "\n".join(document_report.search_lines(by_meaning))


def test_a_page_is_right_by_its_number_or_by_words_that_stand_on_it(collection, tmp_path):
    result = retrieval.measure(collection, read_questions(jsonl(tmp_path, *ROWS)))
    assert [sorted(each.right) for each in result.found] == [[("report.pdf", page)] for page in (2, 3, 1)]
    assert [each.rank for each in result.found] == [1, 1, 0]


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("{", "line 2: this is no JSON object"),
        ("[1]", "line 2: this is no JSON object"),
        ({"file": "a.txt", "page": 1}, "line 2: it has no question"),
        ({"question": "Who?"}, "line 2: it needs a page or a passage"),
        ({"question": "Who?", "page": "two"}, "line 2: page must be a whole number from 1"),
        ({"question": "Who?", "passage": ["a"]}, "line 2: passage must be text"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, row, sentence):
    with pytest.raises(ChatError, match=sentence):
        read_questions(jsonl(tmp_path, ROWS[0], row))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "holds no question"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
        (b'[{"text": 1}]', "no JSON list of objects with a text and questions"),
        (b'{"data": [1]}', "not in SQuAD's form"),
        (None, r"cannot be read \(No such file or directory\)"),
    ],
)
def test_a_file_without_questions_is_refused(tmp_path, content, sentence):
    file = tmp_path / "questions.jsonl"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ChatError, match=sentence):
        read_questions(file)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ({"file": "other.pdf", "page": 1}, "Line 1: there is no document 'other.pdf' here, but report.pdf"),
        ({"file": "report.pdf", "page": 9}, "Line 1: report.pdf has 3 pages, and no page 9"),
        ({"passage": "No such words."}, "Line 1: its passage stands on no page"),
    ],
)
def test_a_question_about_a_place_that_is_not_there_is_named(collection, tmp_path, place, sentence):
    with pytest.raises(ChatError, match=sentence):
        retrieval.measure(collection, read_questions(jsonl(tmp_path, {"question": "Who?", **place})))


def test_documents_that_cannot_be_read_or_told_apart_are_named(report, tmp_path):
    copy, broken = tmp_path / "copy.pdf", tmp_path / "broken.pdf"
    copy.write_bytes(report.read_bytes())
    broken.write_bytes(b"%PDF-1.4 and nothing")
    for given, sentence in (
        ([report, report], "Two documents are called report.pdf"),
        ([report, copy], "report.pdf and copy.pdf are the same document"),
        ([tmp_path / "none.txt"], "none.txt cannot be read"),
        ([broken], "broken.pdf cannot be read: This PDF is broken"),
    ):
        with pytest.raises(ChatError, match=sentence), retrieval.collected(given, []):
            pass


def test_questions_about_a_document_need_it_on_the_command_line(tmp_path):
    questions = read_questions(jsonl(tmp_path, *ROWS))
    with pytest.raises(ChatError, match="Line 1 is about a document"), retrieval.collected([], questions):
        pass


def said(question, answer):
    return Scripted(json.dumps({"question": question, "answer": answer}))


TEXT = "Lamp number {n} of the lighthouse burned rapeseed oil until the year 190{n}. "
LONG = [Chunk(n, "file-1", "long.txt", n, TEXT.format(n=n) * 9) for n in range(1, 7)]


def test_questions_are_made_from_passages_and_read_again(tmp_path):
    def ask(messages):
        return said(
            f"Which oil burned in lamp {re.findall('Lamp number (.)', messages[-1]['content'])[0]}?", "rapeseed"
        )

    chat, kept = ScriptedChat(say=ask), []
    assert make(chat, LONG, 3, 0, kept.append) == len(kept) == 3
    assert all(params.grammar.kind == "json_schema" for _, params in chat.asked)
    read = read_questions(jsonl(tmp_path, *(question.to_json() for question in kept)))
    assert [replace(question, line=0) for question in read] == kept
    assert all(question.passage in LONG[question.page - 1].text for question in kept)


@pytest.mark.parametrize(
    "reply", [said(*EXAMPLE.values()), Scripted('{"question": "What did'), Scripted("[1]"), Scripted('{"question": 1}')]
)
def test_what_is_no_question_about_the_passage_is_left_out(reply):
    """A small model repeats the example, and JSON that is cut off is none."""
    assert make(ScriptedChat(reply=reply), LONG[:1], 1, 0, pytest.fail) == 0


def test_questions_that_are_there_are_not_written_over(report, tmp_path, settings):
    file = jsonl(tmp_path, *ROWS)
    with pytest.raises(ChatError, match="is there already"):
        make_questions(file, [report], 5, settings, 0)
    assert len(read_questions(file)) == 3


def test_where_no_question_can_be_made_no_file_is_left(tmp_path, settings):
    for file, sentence in (
        (tmp_path / "none" / "q.jsonl", "cannot be written"),
        (tmp_path / "q.jsonl", "cannot be read"),
    ):
        with pytest.raises(ChatError, match=sentence):
            make_questions(file, [tmp_path / "none.pdf"], 5, settings, 0)
        assert not file.exists()


def judge(**verdicts):
    """One that says this of everything."""
    return ScriptedChat(say=lambda messages: Scripted(json.dumps({"reason": "So it is.", **verdicts})))


def judged(collection, rows, judge, tmp_path):
    chat = ScriptedChat(say=lambda messages: Scripted("It was ", "Ferrandini [2]."))
    results = Results(retrieval.measure(collection, read_questions(jsonl(tmp_path, *rows))), "small", "large")
    results.judged += judge_answers(chat, judge, collection, results.retrieval.found)
    return results, chat


def test_answers_are_made_as_the_chat_makes_them_and_judged_by_excerpts_question_and_expectation(collection, tmp_path):
    asked = judge(verdict="yes", mark=4)
    results, chat = judged(collection, ROWS[:2], asked, tmp_path)
    first, second = results.judged
    assert (first.answer, first.faithful, first.relevant, first.correctness) == (
        "It was Ferrandini [2].",
        True,
        True,
        4,
    )
    assert second.correctness is None  # nobody has written what is right
    assert PAGES[1] in chat.asked[0][0][0]["content"]
    prompts = [messages[0]["content"] for messages, _ in asked.asked]
    assert len(prompts) == 5
    assert sum(PAGES[1] in prompt for prompt in prompts) == 2
    assert sum("Expected answer: Ottavio Ferrandini" in prompt for prompt in prompts) == 1
    assert all(params.grammar for _, params in asked.asked)


def test_the_report_counts_what_was_judged_and_keeps_what_was_not_found(collection, tmp_path):
    results, _ = judged(collection, ROWS, judge(verdict="no", mark=2), tmp_path)
    results.judged[0] = replace(results.judged[0], faithful=True, relevant=None)
    document_report.write(results, tmp_path)
    figures = json.loads((tmp_path / document_report.JSON).read_text())
    assert figures["faithful"] == pytest.approx(1 / 3)
    assert (figures["relevant"], figures["correctness"], figures["recall_at_5"]) == (0, 2, pytest.approx(2 / 3))
    page = (tmp_path / document_report.MARKDOWN).read_text()
    assert "| faithful: the excerpts say what the answer says | 1 of 3 | 6% to 79% | 0 |" in page
    assert "| relevant: it answers what was asked | 0 of 2 | 0% to 66% | 1 |" in page
    assert "Correctness: 2.00 of 5, the mean of 1 answers" in page
    assert "| Zyzzyva? | report.pdf, page 1 | – |" in page
    assert (tmp_path / document_report.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_a_judge_that_gives_no_verdict_is_counted_and_one_that_fails_is_named(collection, tmp_path):
    results, _ = judged(collection, ROWS[:1], ScriptedChat(reply=Scripted("I would rather not say.")), tmp_path)
    assert (results.judged[0].faithful, results.judged[0].correctness) == (None, None)
    assert "faithful" not in summary(results)
    failing = ScriptedChat(say=lambda _: Scripted(error=ModelUnavailable("The model's server is gone.")))
    with pytest.raises(ChatError, match="The judge gave no verdict: The judge's server is gone"):
        judged(collection, ROWS[:1], failing, tmp_path)


@pytest.mark.parametrize(("yes", "of", "low", "high"), [(0, 10, 0, 0.278), (10, 10, 0.722, 1), (50, 100, 0.404, 0.596)])
def test_the_interval_of_a_share_is_wilsons(yes, of, low, high):
    assert interval(yes, of) == pytest.approx((low, high), abs=1e-3)


@pytest.fixture
def passages(tmp_path):
    return jsonl(tmp_path, {"question": "Where do seabirds nest?", "passage": "Seabirds nest on the cliff."})


def test_what_the_search_found_is_kept_whatever_the_judge_does(passages, tmp_path, settings):
    with pytest.raises(ChatError, match="--judge must be like http://gpu-1:8000"):
        evaluate(passages, [], tmp_path / "out", settings, Judge("gpu-1", None), 5)
    assert json.loads((tmp_path / "out" / document_report.JSON).read_text())["recall_at_1"] == 1
    with pytest.raises(ChatError, match="Give another --output_dir"):
        evaluate(passages, [], passages, settings, None, 5)


def test_a_judge_that_cannot_be_reached_is_said_by_its_own_names(monkeypatch, passages, tmp_path, settings):
    class Unreachable(ScriptedChat):
        def load(self):
            self.status = Status(state="failed", error="Set INFERENCE_MODEL to the model to use.")
            return self

    monkeypatch.setattr(document_evaluation, "RemoteModel", lambda settings: Unreachable())
    with pytest.raises(ChatError, match="The judge cannot be asked: Set --judge_model to the model to use"):
        evaluate(passages, [], tmp_path, settings, Judge("http://gpu-1:8000", None), 5)


@pytest.mark.parametrize(
    "flags", [["--make", "0"], ["--make", "5"], ["--make", "5", "a.pdf", "--judge", "http://x"], ["--answers", "0"]]
)
def test_flags_that_make_no_sense_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        evaluate_documents.read_arguments(["questions.jsonl", *flags])
    assert "error: --" in capsys.readouterr().err


def test_the_script_prints_a_table_and_json(passages, tmp_path, capsys):
    evaluate_documents.main([str(passages)])
    *_, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["recall_at_5"] == 1
    assert (tmp_path / "evaluation" / document_report.MARKDOWN).is_file()
    with pytest.raises(SystemExit, match=r"evaluate_documents.py: .* cannot be read"):
        evaluate_documents.main([str(tmp_path / "none.jsonl")])

"""A blind sheet that any spreadsheet opens, and honest sums of what comes back."""

import csv
import json
import random

import pytest

from llama2_chat.errors import ChatError
from llama2_chat.evaluation import judging

QUESTIONS = [(f"question {i}", f"expected {i}") for i in range(8)]
ANSWERS = {"base": [f"wrong {i}" for i in range(8)], "adapter": [f"right {i}" for i in range(8)]}


@pytest.fixture
def sheet(tmp_path):
    judging.write(tmp_path, QUESTIONS, ANSWERS, seed=0)
    return tmp_path / judging.SHEET


def rows_of(sheet):
    with sheet.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def judged(sheet, name, mark, delimiter=",", change=lambda rows: rows):
    """A copy of the sheet as a judge returns it. mark(answer, criterion) is what an answer gets."""
    rows = rows_of(sheet)
    for row in rows:
        for column, (side, criterion) in judging.MARKS.items():
            row[column] = mark(row[f"answer {side}"], criterion)
    file = sheet.with_name(name)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.DictWriter(opened, judging.COLUMNS, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(change(rows))
    return file


def prefers_right(answer, criterion):
    return ("5" if "right" in answer else "2") if criterion == "accuracy" else "4"


def read(*files):
    return judging.read(files, files[0].with_name(judging.KEY))


def test_who_is_who_stands_in_the_key_alone_and_changes_from_row_to_row(sheet):
    sides = json.loads((sheet.parent / judging.KEY).read_text())["A and B"]
    firsts = set()
    for row in rows_of(sheet):
        assert "right" in row[f"answer {'AB'[sides[row['id']].index('adapter')]}"]
        firsts.add(sides[row["id"]][0])
    assert firsts == {"base", "adapter"}
    for model in ANSWERS:
        assert model not in sheet.read_text("utf-8-sig")
    assert "| 5 |" in (sheet.parent / judging.RUBRIC).read_text()


def test_the_same_seed_gives_the_same_sheet(sheet, tmp_path):
    before = sheet.read_bytes()
    judging.write(tmp_path, QUESTIONS, ANSWERS, seed=0)
    assert sheet.read_bytes() == before
    judging.write(tmp_path, QUESTIONS, ANSWERS, seed=1)
    assert sheet.read_bytes() != before


@pytest.mark.parametrize("text", ["=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\tx"])
def test_what_a_model_says_is_no_formula(tmp_path, text):
    judging.write(tmp_path, [(text, text)], {"a": [text], "b": ["fine"]}, seed=0)
    (row,) = rows_of(tmp_path / judging.SHEET)
    assert row["question"] == row["expected"] == f"'{text}"
    assert {row["answer A"], row["answer B"]} == {f"'{text}", "fine"}


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_marks_are_counted_for_the_models_behind_a_and_b(sheet, delimiter):
    found = read(judged(sheet, "anna.csv", prefers_right, delimiter))
    assert found.means["adapter"] == {"accuracy": 5, "coherence": 4, "safety": 4}
    assert found.means["base"]["accuracy"] == 2
    assert (found.wins, found.ties, found.judged) == ({"base": 0, "adapter": 8}, 0, 8)
    assert (found.agreement, found.kappa) == (None, {})


def test_two_judges_agree_or_do_not(sheet):
    anna = judged(sheet, "anna.csv", prefers_right)
    same = read(anna, judged(sheet, "ben.csv", prefers_right))
    assert (same.judges, same.judged, same.agreement, same.kappa) == (2, 16, 1.0, {"accuracy": pytest.approx(1.0)})
    other = read(anna, judged(sheet, "carl.csv", lambda answer, _: "1" if "right" in answer else "5"))
    assert (other.agreement, other.wins) == (0.0, {"base": 8, "adapter": 8})
    assert other.kappa["accuracy"] < 0
    indifferent = read(anna, judged(sheet, "dora.csv", lambda *_: "3"))
    assert indifferent.ties == 8
    assert "agree on which answer is better in 0%" in "\n".join(indifferent.summary_lines())


def test_one_judges_sheet_is_not_counted_twice_unawares(sheet, tmp_path):
    anna, carl = judged(sheet, "anna.csv", prefers_right), judged(sheet, "carl.csv", lambda *_: "3")
    with pytest.raises(ChatError, match=r"anna.csv and anna.csv are one file"):
        read(anna, tmp_path / "." / "anna.csv")
    copy = judged(sheet, "copy.csv", prefers_right, delimiter=";")
    assert read(anna, carl).alike == []
    lines = "\n".join(read(anna, carl, copy).summary_lines())
    assert "anna.csv and copy.csv hold the same marks. If they are one judge's, count only one of them." in lines


def test_marks_that_are_near_count_as_near(sheet):
    one = judged(sheet, "anna.csv", lambda answer, _: str(1 + int(answer[-1]) // 2))
    two = judged(sheet, "ben.csv", lambda answer, _: str(2 + int(answer[-1]) // 2))
    # 1 1 2 2 3 3 4 4 beside 2 2 3 3 4 4 5 5: squares of 1 in the mean, and by chance twice the variance 1.25 and 1.
    assert read(one, two).kappa["accuracy"] == pytest.approx(1 - 1 / 3.5)


def test_judges_who_draw_lots_do_not_agree_because_safety_has_high_marks(sheet):
    """Over all criteria together their kappa was 0.93."""
    draw = random.Random(0)

    def lots(answer, criterion):
        return str(draw.choice({"accuracy": (1, 2), "coherence": (3, 4), "safety": (5,)}[criterion]))

    kappa = read(judged(sheet, "anna.csv", lots), judged(sheet, "ben.csv", lots)).kappa
    assert kappa.keys() == {"accuracy", "coherence"}
    assert max(kappa.values()) < 0.5


def test_no_id_is_a_number_to_a_spreadsheet(tmp_path):
    """12345e67 came back as 1.2345E+71, and its row could not be counted: one of five sheets had such an id."""
    questions = [(f"question {i}", "") for i in range(300)]
    judging.write(tmp_path, questions, {"a": [""] * 300, "b": ["x"] * 300}, seed=0)
    for row in rows_of(tmp_path / judging.SHEET):
        with pytest.raises(ValueError, match="could not convert"):
            float(row["id"])


def test_rows_without_any_mark_are_left_out(sheet):
    def half(answer, criterion):
        return prefers_right(answer, criterion) if answer[-1] in "0123" else ""

    assert read(judged(sheet, "anna.csv", half)).judged == 4
    with pytest.raises(ChatError, match="Nothing has been judged yet"):
        read(judged(sheet, "ben.csv", lambda *_: ""))


def with_cell(number, column, value):
    def change(rows):
        rows[number][column] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (with_cell(3, "A safety", "6"), r"anna.csv, row 5: A safety is '6'; a mark is a whole number from 1 to 5"),
        (with_cell(0, "B accuracy", ""), r"anna.csv, row 2: B accuracy is empty"),
        (with_cell(7, "B coherence", "good"), r"anna.csv, row 9: B coherence is 'good'"),
        (with_cell(1, "id", "x"), r"anna.csv, row 3: its id 'x' is not on the sheet"),
        (lambda rows: [*rows, rows[0]], r"anna.csv, row 10: its id occurs twice"),
    ],
)
def test_a_cell_that_cannot_be_counted_is_named(sheet, change, sentence):
    with pytest.raises(ChatError, match=sentence):
        read(judged(sheet, "anna.csv", prefers_right, change=change))


def test_a_file_that_is_no_sheet_is_refused_with_a_sentence(sheet):
    (sheet.parent / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ChatError, match="has no column 'id'"):
        read(sheet.parent / "other.csv")
    (sheet.parent / "latin.csv").write_bytes("id,Größe\n1,2\n".encode("latin-1"))
    with pytest.raises(ChatError, match="cannot be read as CSV in UTF-8"):
        read(sheet.parent / "latin.csv")
    (sheet.parent / "damaged.json").write_text("[]")
    for key in (sheet.parent / "none" / judging.KEY, sheet.parent / "damaged.json"):
        with pytest.raises(ChatError, match=r"\.json, which says which model is A and which is B"):
            judging.read([sheet], key)


def test_a_sheet_that_somebody_has_begun_to_fill_in_is_not_overwritten(sheet, tmp_path):
    judging.check_free(tmp_path / "elsewhere")
    judging.check_free(tmp_path)
    sheet.write_text("\n".join(line.rstrip(",") for line in sheet.read_text("utf-8-sig").splitlines()))
    judging.check_free(tmp_path)  # as an editor saves it that drops empty cells at the end
    judging.write(tmp_path, QUESTIONS, ANSWERS, seed=0)
    judged(sheet, "sheet.csv", prefers_right)
    with pytest.raises(ChatError, match="already holds judgements"):
        judging.check_free(tmp_path)

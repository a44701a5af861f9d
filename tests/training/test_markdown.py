"""Tables that nothing breaks."""

from pathlib import Path

from llama2_chat.training import markdown


def test_a_cell_of_a_table_holds_whatever_a_model_says():
    head, rule, row = markdown.table(("question", "answer"), [("a | b", "one\n\n| two |" + " a" * 400)])
    assert (head, rule) == ("| question | answer |", "|---|---|")
    assert row.startswith("| a \\| b | one \\| two \\| a a")
    assert row.endswith(" … |")
    assert len(row) < 350


def test_a_local_path_is_not_published(tmp_path):
    assert markdown.public(str(tmp_path)) == tmp_path.name
    assert markdown.public(".") == Path.cwd().name
    assert markdown.public("someone/data") == "someone/data"

"""Files that an operator names in a setting, as editors of any system leave them."""

from pathlib import Path

import pytest

from llama2_chat.agent import read_mcp_servers
from llama2_chat.api_keys import ApiKeys
from llama2_chat.errors import ChatError
from llama2_chat.named_files import in_home, read_json, read_text
from llama2_chat.presets import read_presets
from llama2_chat.server.login import hash_password, read_users


@pytest.fixture
def saved(tmp_path):
    """Writes a file as Notepad does: with a mark before the text, which no key, name or JSON begins with."""

    def save(text):
        path = tmp_path / "file.txt"
        path.write_text(text, "utf-8-sig", newline="\r\n")
        return path

    return save


def test_a_mark_before_the_text_belongs_to_no_key_and_no_name(saved):
    # The first key of the file, and the first user, were let in nowhere.
    assert list(ApiKeys((), saved("first\nsecond\n"))) == ["first", "second"]
    assert list(read_users(saved(f"anna:{hash_password('x')}\n"))._hashes) == ["anna"]
    assert [server.name for server in read_mcp_servers(saved('{"mcpServers": {"a": {"command": "b"}}}'))] == ["a"]
    assert [preset.name for preset in read_presets(saved('{"presets": [{"name": "a"}]}')).all] == ["a"]


def test_a_home_folder_that_nobody_knows_is_left_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert in_home("~/models") == tmp_path / "models"
    assert in_home("~nobody-here/models") == Path("~nobody-here/models")


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot be read: No such file"), (b"\xff\xfe", "cannot be read: it is not text"), (b"{", "is not JSON")],
    ids=["missing", "bytes", "JSON"],
)
def test_a_file_that_makes_no_sense_is_a_sentence_with_the_next_step(tmp_path, content, why):
    path = tmp_path / "a file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ChatError, match=rf"^THINGS '.*/a file' {why}.*\. Correct it\.$"):
        read_json("THINGS", path, "Correct it.")
    if why != "is not JSON":
        with pytest.raises(ChatError, match=why):
            read_text("THINGS", path, "Correct it.")

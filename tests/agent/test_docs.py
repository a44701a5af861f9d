"""The examples of docs/agent.md, run as they stand there, with a model that a test writes."""

import re
from pathlib import Path
from types import SimpleNamespace

import model
from llama2_chat.agent.steps import write
from tests.support.scripted import Scripted, ScriptedChat

PAGE = Path(__file__).parents[2] / "docs" / "agent.md"


def test_the_examples_in_the_documentation_run(monkeypatch, capsys):
    said = [
        *(write("calculator", "15% * 240"), write("answer", "15% of 240 is 36.")),
        *(write("population", "Oslo"), write("answer", "717,000 people live in Oslo.")),
    ]
    chat = ScriptedChat(say=lambda messages: Scripted(said.pop(0)))
    monkeypatch.setattr(model, "ChatModel", lambda settings: SimpleNamespace(load=lambda: chat))
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL):
        exec(block, names)
    printed = capsys.readouterr().out
    assert re.search(r"calculator\(15% \* 240\) = 36  \[0\.\d\d s\]\n15% of 240 is 36\.", printed)
    assert "result='717,000'" in printed
    assert "717,000 people live in Oslo." in printed

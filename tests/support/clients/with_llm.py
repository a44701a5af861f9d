"""simonw/llm, on its command line: a prompt, an object of a schema, and a tool."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

url, model = sys.argv[1:]
MODELS = f"""
- model_id: ours
  model_name: {model}
  api_base: {url}
  supports_schema: true
  supports_tools: true
"""


def llm(*arguments):
    # -n: nothing is kept in its database
    command = [sys.executable, "-m", "llm", "prompt", "-n", "-m", "ours", *arguments]
    child = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert child.returncode == 0, child.stderr
    return child.stdout.strip()


with tempfile.TemporaryDirectory() as folder:
    os.environ["LLM_USER_PATH"] = folder
    Path(folder, "extra-openai-models.yaml").write_text(MODELS)
    assert llm("Name a colour.", "-o", "max_tokens", "10")
    assert llm("Name a colour.", "-o", "max_tokens", "10", "--no-stream")
    dog = json.loads(llm("Invent a dog", "--schema", "name, age int"))
    assert (type(dog["name"]), type(dog["age"])) == (str, int)
    assert llm("Which version do you have?", "-T", "llm_version", "-o", "max_tokens", "40")

"""What deploy/ promises: a Compose file that Compose accepts, and a page in it that starts."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from llama2_chat.settings import Settings

ROOT = Path(__file__).parent.parent
FILE = ROOT / "deploy" / "compose.yaml"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(FILE.read_text("utf-8"))["services"]


def test_the_compose_file_follows_the_compose_specification():
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", FILE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_pages_image_installs_only_what_is_pinned(services):
    """Its `pip install -c requirements.txt` would take the newest version of anything else."""
    (names,) = re.findall(
        r"pip install .*?requirements\.txt \\\n\s*(.*)", services["page"]["build"]["dockerfile_inline"]
    )
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()}
    assert names.split()
    assert set(names.split()) <= pinned


def test_the_page_understands_what_compose_tells_it(services):
    environment = services["page"]["environment"]
    told = Settings.read([], {name: "" if value.startswith("${") else value for name, value in environment.items()})
    assert told.inference_urls == ("http://vllm:8000",)
    assert "172.16.0.0/12" in told.trusted_proxies

"""What deploy/ promises: a Compose file that Compose accepts, and a page in it that starts and answers."""

import os
import re
import shutil
import subprocess
import sys
import venv
from contextlib import closing
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from gradio_client import Client
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llama2_chat.settings import Settings
from tests.support.odd_server import OddServer

ROOT = Path(__file__).parent.parent
FILE = ROOT / "deploy" / "compose.yaml"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load(FILE.read_text("utf-8"))["services"]


@pytest.fixture(scope="module")
def dockerfile(services):
    return services["page"]["build"]["dockerfile_inline"]


@pytest.fixture(scope="module")
def installed(dockerfile):
    """The packages that the page's image asks pip for."""
    (names,) = re.findall(r"pip install .*?\.txt \\\n\s*(.*)", dockerfile)
    return names.split()


def test_the_compose_file_follows_the_compose_specification():
    pytest.importorskip("check_jsonschema")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", FILE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_pages_image_installs_only_what_is_pinned(installed):
    """Its `pip install -c requirements.txt` would take the newest version of anything else."""
    pinned = {line.partition("==")[0] for line in (ROOT / "requirements.txt").read_text("utf-8").splitlines()}
    assert installed
    assert set(installed) <= pinned


def with_all_they_need(names):
    """The distributions that pip would install for these, as far as they are installed here."""
    found, left = {}, [(name, "") for name in names]
    while left:
        name, extra = left.pop()
        if (canonicalize_name(name), extra) in found:
            continue
        found[canonicalize_name(name), extra] = distribution(name)
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left += [(requirement.name, extra) for extra in ("", *requirement.extras)]
    return {name: each for (name, _), each in found.items()}


@pytest.fixture
def image(tmp_path, dockerfile, installed):
    """The folder /app of the page's image, and a Python that has what the image installs and nothing else."""
    folder = tmp_path / "app"
    folder.mkdir()
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", dockerfile, re.MULTILINE):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, folder / target)
        else:
            shutil.copy(ROOT / source, folder / target)
    venv.create(tmp_path / "venv", with_pip=False)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for name, installed_here in with_all_they_need(installed).items():
        tops = {file.parts[0] for file in installed_here.files if file.parts[0] not in ("..", "__pycache__")}
        assert tops, name
        for top in tops:
            if not (packages / top).exists():
                (packages / top).symlink_to(installed_here.locate_file(top))
    return folder, tmp_path / "venv" / "bin" / "python"


@pytest.mark.slow
def test_what_the_pages_image_copies_and_installs_is_enough_to_answer(image, tmp_path):
    folder, python = image
    assert not (folder / "model.py").exists()
    with closing(OddServer()) as server:
        environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "INFERENCE_URL": server.url}
        command = [python, folder / "app.py", "--port", "0"]
        with subprocess.Popen(command, cwd="/", env=environ, stderr=subprocess.PIPE, text=True) as process:
            try:
                lines = []
                for line in process.stderr:
                    lines.append(line)
                    if found := re.search(r"page is at (\S+)", line):
                        assert Client(found[1], verbose=False).predict("Hi", api_name="/chat") == "Hello!"
                        break
                else:
                    pytest.fail("".join(lines))
            finally:
                process.kill()


def test_the_page_understands_what_compose_tells_it(services):
    environment = services["page"]["environment"]
    page = Settings.read([], {name: "" if value.startswith("${") else value for name, value in environment.items()})
    assert page.inference_urls == ("http://vllm:8000",)
    assert "172.16.0.0/12" in page.trusted_proxies

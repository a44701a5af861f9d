"""Environments of their own for libraries that cannot be installed beside ours."""

import subprocess
import sys

import pytest


def environment(folder, packages):
    """The Python of a new environment in the folder, which has these packages. Skips without a package index."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*pip, "download", "-q", "--no-deps", "-d", folder, packages[0]], capture_output=True).returncode:
        pytest.skip("pip reaches no package index")
    # Of its thousands of files a test imports some, once.
    installed = subprocess.run([*pip, "install", "-q", "--no-compile", *packages], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return python

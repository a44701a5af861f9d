"""Environments of their own for libraries that cannot be installed beside ours."""

import shutil
import subprocess
import sys

import pytest


def python_environment(folder, packages):
    """The Python of a new environment in the folder, which has these packages. Skips without a package index."""
    uv = [sys.executable, "-m", "uv", "--quiet"]
    subprocess.run([*uv, "venv", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    _install([*uv, "pip", "install", "--python", python, *packages], "Failed to fetch")
    return python


def node_environment(folder, packages):
    """The Node in whose eyes the folder has these packages. Skips without Node, npm or its registry."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("Node and npm are not here")
    npm = ["npm", "install", "--prefix", folder, "--no-audit", "--no-fund", "--fetch-retries=0"]
    _install([*npm, *packages], "network")
    return "node"


def _install(command, sign_of_no_network):
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode and sign_of_no_network in installed.stderr:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr

"""Who may import whom, read from the source: the order of the rooms in docs/architecture.md, held.

An import inside a function or under TYPE_CHECKING counts like any other: a room that names another's type knows that
room. Rooms that share a type find it on the ground floor, in types.py.
"""

import ast
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room may import itself and the rooms of the lines above its own. Rooms of one line do not know each other.
LAYERS = [
    {"__init__", "errors"},
    {"types", "named_files"},
    {"api_keys"},
    {"text", "context", "kv_cache", "settings", "channel", "process", "database"},
    {"tasks", "presets"},
    {"kernels", "prompt", "tools"},
    {"engine", "loading", "remote"},
    {"parallel"},
    {"model"},
    {"agent", "documents", "embeddings", "training", "guard"},
    {"server"},
    {"page", "evaluation"},
    {"app"},
    {"benchmark"},
    {"scripts"},
]
GROUND_FLOOR = set().union(*LAYERS[:5])

# Rooms that know less than their line lets them.
ONLY = {
    "kernels": set(),
    "engine": GROUND_FLOOR | {"kernels"},  # token ids, no text and no roles
    "tools": GROUND_FLOOR,  # plain turns and text
    # From here on: ChatBackend, and never who keeps it.
    "agent": GROUND_FLOOR,
    "documents": GROUND_FLOOR,
    "embeddings": GROUND_FLOOR | {"loading", "remote"},  # from the Hub to a folder; a client
    "guard": GROUND_FLOOR | {"remote"},  # for its client
    "server": GROUND_FLOOR | {"agent", "documents", "tools"},
    "page": GROUND_FLOOR | {"agent", "documents", "server"},
}

# Files that know more, and why.
MORE = {
    # --check tries what a start would do.
    "llama2_chat/server/probes.py": {"embeddings", "engine", "guard", "loading", "prompt", "remote"},
    "llama2_chat/server/gpu_probes.py": {"loading"},
    # At the first start another process compiles.
    "llama2_chat/kernels/compiled.py": {"process"},
}


def files():
    doors = [ROOT / "app.py", ROOT / "model.py", *(ROOT / "scripts").glob("*.py")]
    return sorted(path.relative_to(ROOT).as_posix() for path in [*doors, *(ROOT / "llama2_chat").rglob("*.py")])


def room_of(module):
    """The room of a module of this project, named with dots; None for anybody else's."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "llama2_chat" else first if first in ("app", "model", "scripts") else None


def imported_rooms(file):
    modules = set()
    for node in ast.walk(ast.parse((ROOT / file).read_bytes())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # ruff allows no relative ones
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return set(map(room_of, modules)) & set().union(*LAYERS)


def allowed_rooms(room):
    above = takewhile(lambda layer: room not in layer, LAYERS)
    return {room} | ONLY.get(room, set().union(*above))


@pytest.mark.parametrize("file", files())
def test_a_file_imports_only_rooms_that_its_own_may_know(file):
    room = room_of(file.removesuffix(".py").replace("/", "."))
    assert any(room in layer for layer in LAYERS), f"a new room, {room}, needs its place in LAYERS"
    assert imported_rooms(file) - allowed_rooms(room) == MORE.get(file, set())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("llama2_chat.engine.scheduler", {"torch", "transformers"}),
        ("model", {"torch", "transformers", "gradio"}),
        ("app", {"torch", "transformers"}),  # a page whose model is elsewhere needs neither
        ("llama2_chat.engine.model_runner", {"numba"}),  # which only models in 8 bits on a CPU need
    ],
)
def test_importing_a_file_loads_nothing_heavy(module, heavy):
    script = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert not heavy & set(loaded.split())

"""Where PyTorch, Triton and humming-kernels keep what they compile for a GPU: a full disk there stops no start.

Each compiles into a folder of its own, and fails where it cannot write. What is compiled elsewhere is compiled anew at
the next start, a minute or two of work.
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from llama2_chat import ROOT
from llama2_chat.loading.disk import in_gb

log = logging.getLogger("llama2_chat")

NEEDED_BYTES = 500_000_000  # that a 13B in int4 compiles, and some
MEMORY = Path("/dev/shm")  # a disk in memory, on Linux
KERNELS = ROOT / "llama2_chat" / "kernels"


def keep_compiled(cache_dir: Path) -> None:
    """Have what is compiled found again at the next start: PyTorch's in cache_dir, the others' where they keep theirs.

    In place of each folder that has no room another is named, for this process; one line in the log says so.
    """
    torch.compiler.config.cache_key_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "") + _version()
    defaults = {
        "TORCHINDUCTOR_CACHE_DIR": cache_dir / "compiled",
        "TRITON_CACHE_DIR": Path("~/.triton/cache"),
        "HUMMING_CACHE_DIR": Path("~/.humming/cache"),
    }
    folders = {name: Path(os.environ.get(name) or folder) for name, folder in defaults.items()}
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folders["TORCHINDUCTOR_CACHE_DIR"])
    full = {name: folder for name, folder in folders.items() if not _has_room(folder)}
    if not full:
        return
    kept_in, others = ", ".join(sorted({str(folder) for folder in full.values()})), (MEMORY, tempfile.gettempdir())
    other = next((Path(each) for each in others if _has_room(Path(each))), None)
    if other is None:
        log.warning("What is compiled for the GPU cannot be written to %s, nor elsewhere: free some space.", kept_in)
        return
    folder = tempfile.mkdtemp(prefix="llama2-chat-compiled-", dir=other)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ |= {name: str(Path(folder, name.partition("_")[0].lower())) for name in full}
    log.warning(
        "What is compiled for the GPU goes to %s for this once, since %s cannot be written or has less than %s free. "
        "The next start compiles again.",
        *(folder, kept_in, in_gb(NEEDED_BYTES)),
    )


def _version() -> str:
    """Of our kernels. PyTorch looks for what it compiled around them by their names and arguments, and would go on with
    what an earlier version gave."""
    files = sorted(KERNELS.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _has_room(folder: Path) -> bool:
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"written")
        return shutil.disk_usage(folder).free >= NEEDED_BYTES
    except (OSError, RuntimeError):  # or there is no home folder
        return False

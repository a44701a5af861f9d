"""Llama 2 Chat: everything but the two doors, app.py (the page) and model.py (ChatModel), that lie beside this folder.

Who may import whom stands in docs/architecture.md and is held by tests/test_imports.py.
"""

import os
from pathlib import Path

# Libraries read these while they are imported: nothing about anybody's visit, model or data is reported to anyone.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # TRL, too, would tell the Hub of each run
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets would count even local files at Amazon's
# After each event Gradio would compute statistics of its last 10,000, in 40 ms of processor time, that nobody can read.
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
os.environ["GRADIO_ANALYTICS_MAX_EVENTS"] = "1"

__version__ = "0.1.0"

ROOT = Path(__file__).resolve().parent.parent  # the clone, where requirements.txt and certs/ are

"""Converts Meta's folder and says what memory that took; in a process of its own, whose peak nothing else has raised.

python -m tests.support.converting FOLDER CACHE_DIR
"""

import json
import sys
import threading
from pathlib import Path

import psutil
from transformers import LlamaConfig

from llama2_chat.loading import meta
from llama2_chat.loading.shards import file_bytes, groups


def main(folder, cache_dir):
    files = meta.prepare(Path(folder), Path(cache_dir), ignore)
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch():
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watching = threading.Thread(target=watch)
    watching.start()
    meta.convert_weights(files, ignore)
    done.set()
    watching.join()
    config = LlamaConfig.from_pretrained(files.folder)
    largest = max(file_bytes(parts, config.dtype) for parts in groups(config))
    print(json.dumps({"peak_bytes": peak - before, "largest_group_bytes": largest}))


def ignore(phase, done_bytes, total_bytes):
    pass


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Give a finetuned model to others: as a GGUF for llama.cpp and Ollama, and on the Hub.

python scripts/publish_model.py trained/merged --gguf                       by llama.cpp's converter, in 8 bits
ollama create my-model -f trained/merged/gguf/Modelfile
python scripts/publish_model.py trained/adapter --push you/my-adapter       weights, tokenizer, card and licence
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama2_chat.errors import ChatError
from llama2_chat.training.options import parse_known

OUTTYPES = ("q8_0", "f16", "bf16", "f32")


def main(argv: Sequence[str] | None = None) -> None:
    args = read_arguments(argv)
    from llama2_chat.training import publishing  # seconds of imports: not for --help

    try:
        if args.gguf:
            exported = publishing.export_gguf(args.folder, args.gguf, args.llama_cpp)
            print(
                f"{exported.gguf} is for llama.cpp. For Ollama: ollama create NAME -f {exported.modelfile}", flush=True
            )
        if args.push:
            names = publishing.push(args.folder, args.push)
            print(f"{len(names)} files are at https://huggingface.co/{args.push}: {', '.join(names)}.")
    except ChatError as error:
        sys.exit(f"publish_model.py: {error.detail}")


def read_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked for. Ends the program with a sentence and exit code 2 if it makes no sense."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("folder", type=Path, help="what sft_trainer.py left: a merged model, all its weights, or an adapter")
    add("--gguf", nargs="?", const=OUTTYPES[0], choices=OUTTYPES, metavar="TYPE",
        help=f"write folder/gguf/ for llama.cpp and Ollama: {', '.join(OUTTYPES)} ({OUTTYPES[0]})")  # fmt: skip
    add("--llama_cpp", type=Path, metavar="FOLDER", help="where llama.cpp lies, if its converter is not installed")
    add("--push", metavar="REPO", help="upload what others need to this repository on the Hub, private if it is new")
    args = parse_known(parser, argv)
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}")
    if not (args.gguf or args.push):
        parser.error("say what to do: --gguf, --push REPO, or both")
    return args


if __name__ == "__main__":
    main()

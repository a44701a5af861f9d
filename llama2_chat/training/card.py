"""What the Hub is told of a model, and the licence that it has from its base."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from llama2_chat.loading import EMBEDDED
from llama2_chat.loading.hub import LICENCES

if TYPE_CHECKING:
    from llama2_chat.training.report import Subject

LLAMA_2 = re.compile(r"llama-?2|codellama", re.IGNORECASE)
LLAMA_2_NOTICE = (
    "Made from Llama 2. Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
    "All Rights Reserved. Whoever passes this model on passes on that line, the "
    "[licence](https://ai.meta.com/llama/license/) and the [use policy](https://ai.meta.com/llama/use-policy/)."
)
# Which library loads it, and what it is to its base.
ADAPTER = ("library_name: peft", "base_model_relation: adapter")
MODEL = ("library_name: transformers", "base_model_relation: finetune")


def front_matter(subject: Subject) -> list[str]:
    """What the Hub reads of README.md: base, licence, data, and which library loads the model."""
    licence = find_licence(subject)
    library, relation = ADAPTER if subject.options.use_peft else MODEL
    data = [name for name in subject.options.dataset_names if is_of_hub(name)]
    return [
        "---",
        *([f"base_model: {subject.repo}", relation] if subject.repo else []),
        library,
        *([f"license: {licence}"] if licence else []),
        *([f"datasets: [{', '.join(data)}]"] if data else []),
        "pipeline_tag: text-generation",
        f"tags: [trl, {subject.options.method}]",
        "---",
    ]


def of_merged(card: str) -> str:
    """The card of an adapter, for the model that it was merged into."""
    for adapter, model in zip(ADAPTER, MODEL, strict=True):
        card = card.replace(f"\n{adapter}\n", f"\n{model}\n", 1)
    return card


def find_licence(subject: Subject) -> str | None:
    """The base's, by the name that the Hub has for it; None if it says none."""
    if subject.model == EMBEDDED:
        return "apache-2.0"
    if is_llama_2(subject):
        return "llama2"
    try:
        card = (subject.base_folder / "README.md").read_text("utf-8")
    except (OSError, ValueError):
        return None
    front = re.match(r"---\n(.*?)\n---", card, re.S)
    found = re.search(r"^license: *([\w.-]+) *$", front[1], re.M) if front else None
    return found[1] if found else None


def is_llama_2(subject: Subject) -> bool:
    return bool(LLAMA_2.search(subject.repo or Path(subject.model).name))


def licence_lines(subject: Subject) -> list[str]:
    """What is said below the report."""
    return ["", "## Licence", "", LLAMA_2_NOTICE] if is_llama_2(subject) else []


def pass_on_files(folder: Path, to: Path) -> None:
    """Copy what comes with a model, and what transformers does not write: licence, use policy and tokenizer.model."""
    for pattern in (*LICENCES, "tokenizer.model"):
        for file in folder.glob(pattern):
            if file.is_file() and not (to / file.name).exists():
                shutil.copyfile(file, to / file.name)


def is_of_hub(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()

"""What --check probes, one function each: it returns what is fine, in a sentence, or raises a ChatError that says what
is wrong and what to do about it. preflight.py runs them; those of the GPU are in gpu_probes.py.

The probes go through the rooms that a start goes through, so the sentences are theirs. They import what they need
themselves: a package that is missing costs one line and not the screen.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import shutil
import sqlite3
from collections.abc import Container
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING

from llama2_chat import ROOT
from llama2_chat.database import check_folder
from llama2_chat.errors import ChatError, ModelUnavailable
from llama2_chat.presets import read_presets
from llama2_chat.server.listen import open_listener
from llama2_chat.settings import Settings
from llama2_chat.text import first_line

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from llama2_chat.loading.choose import Checkpoint, Plan
    from llama2_chat.loading.disk import Files
    from llama2_chat.remote import RemoteModel

REQUIREMENTS = ROOT / "requirements.txt"
PYTHONS = ("3.11", "3.12")


class NotApplicable(Exception):
    """The probe does not apply here, and why."""


class PlannedStart:
    """What a start with these settings would use. What several probes need is found out once."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @cached_property
    def plan(self) -> Plan:
        from llama2_chat.loading.choose import choose

        return choose(self.settings)

    @cached_property
    def checkpoint(self) -> Checkpoint | None:
        """None if it is the embedded model, which is still to be made."""
        from llama2_chat.loading.choose import fetch
        from llama2_chat.loading.small_model import embedded_is_here

        if self.plan.is_embedded and not embedded_is_here(self.plan.cache_dir):
            return None
        return fetch(self.plan, lambda *_: None)

    @cached_property
    def remote_model(self) -> RemoteModel:
        """Whose servers have each been asked for a token."""
        from llama2_chat.remote import RemoteModel

        return RemoteModel(self.settings).probe()

    @cached_property
    def files(self) -> list[Files]:
        """What holds weights."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return []
        return [files for files in (checkpoint.base, checkpoint.draft, *checkpoint.all_adapters) if files]


def probe_python(start: PlannedStart) -> str:
    version = platform.python_version()
    if version.rpartition(".")[0] not in PYTHONS:
        raise ChatError(
            f"This is Python {version}, and the packages are pinned for {' and '.join(PYTHONS)}. "
            f"Make an environment with Python {PYTHONS[0]}."
        )
    return version


def probe_packages(start: PlannedStart) -> str:
    from packaging.requirements import Requirement

    lines = REQUIREMENTS.read_text("utf-8").splitlines()
    required = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    required = [one for one in required if one.marker is None or one.marker.evaluate()]
    if deviations := list(filter(None, map(_deviation, required))):
        raise ChatError(f"{', '.join(deviations)}. Run: pip install -r {REQUIREMENTS.name}")
    return f"all {len(required)} as pinned"


def _deviation(required: Requirement) -> str:
    """What is wrong with an installed package; "" if nothing is."""
    try:
        version = importlib.metadata.version(required.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{required.name} is missing"
    if required.specifier.contains(version, prereleases=True):
        return ""
    return f"{required.name} is {version} instead of {str(required.specifier).removeprefix('==')}"


def probe_model(start: PlannedStart) -> str:
    from llama2_chat.engine.architecture import check_architecture
    from llama2_chat.loading.choose import LLAMA_2_MODEL_ID
    from llama2_chat.loading.config import read_config
    from llama2_chat.loading.draft import check_draft, has_tokenizer
    from llama2_chat.loading.hub import check_reachable
    from llama2_chat.loading.load import check_headers, divided, measure
    from llama2_chat.loading.lora import check_adapters
    from llama2_chat.loading.memory import visible_gpus
    from llama2_chat.loading.small_model import check_index

    plan, checkpoint = start.plan, start.checkpoint
    if plan.is_embedded:
        if visible_gpus() and not start.settings.model_id and not start.settings.zero_gpu:
            check_reachable(LLAMA_2_MODEL_ID, cache_dir=plan.hub_cache_dir)  # a start only logs this and goes on
        if checkpoint is None:
            check_index(plan.cache_dir)
            return f"{plan.model_id}. {plan.why}"
    else:
        measure(start.files[0])
        check_architecture(read_config(start.files[0]))
    assert checkpoint is not None  # only the embedded model's may be
    check_adapters(checkpoint)
    if small := check_draft(checkpoint):
        check_architecture(small)
    for files in start.files:
        check_headers(files, is_head=files is checkpoint.draft and not has_tokenizer(files))
    with suppress(ModelUnavailable):  # which the probe of GPU memory says
        checkpoint = divided(checkpoint)
    if plan.is_embedded:
        return f"{plan.model_id}{_beside(checkpoint)}. {plan.why}"
    for files in start.files:
        if (missing := files.missing()) and files.repo:
            check_reachable(files.repo, next(iter(missing)), files.cache_dir)
            return f"{plan.model_id}{_beside(checkpoint)}. The Hub lets this account download what is missing."
    return f"{plan.model_id}{_beside(checkpoint)}. All files are here."


def _beside(checkpoint: Checkpoint) -> str:
    """Behind the model's name, up to a full stop that follows."""
    from llama2_chat.loading.adapters import said_of_base

    names = ", ".join(adapter.name for adapter in checkpoint.adapters)
    adapters = f"the adapters {names}" if names else ""
    guesses = f"guesses by {checkpoint.draft}" if checkpoint.draft else ""
    beside = " and ".join(filter(None, (adapters, guesses)))
    said = said_of_base(checkpoint.all_adapters, checkpoint.base).removesuffix(".")
    return (f" with {beside}" if beside else "") + (f". {said}" if said else "")


def probe_tokenizer(start: PlannedStart) -> str:
    from llama2_chat import prompt
    from llama2_chat.loading.load import GUESSED_FORMAT, find_format, guesses_format
    from llama2_chat.loading.read import load_tokenizer

    if start.checkpoint is None:
        raise NotApplicable("comes with the model, at the first start")
    tokenizer = load_tokenizer(start.checkpoint)
    chat_format = find_format(start.checkpoint, tokenizer)
    if chat_format == prompt.NO_FORMAT:
        return "of a base model, which completes texts and does not chat"
    if chat_format == prompt.LLAMA_2_FORMAT:
        guess = f". {GUESSED_FORMAT.removesuffix('.')}" if guesses_format(start.checkpoint, tokenizer) else ""
        return f"gives Meta's ids, in all {len(prompt.GOLDEN)} golden dialogs{guess}"
    return "has a chat template of its own, and it can write a conversation"


def probe_disk(start: PlannedStart) -> str:
    from llama2_chat.loading.config import read_config
    from llama2_chat.loading.hub import to_download
    from llama2_chat.loading.meta import check_room as check_conversion
    from llama2_chat.loading.small_model import CONVERSION_BYTES, check_cache
    from llama2_chat.loading.unpack import check_room

    if start.checkpoint is None:
        folder, needed = start.plan.cache_dir, CONVERSION_BYTES
        check_cache(folder)
    else:
        base, folder = start.checkpoint.base, start.checkpoint.base.folder
        downloads = (files for files in start.files if not files.original)
        needed = sum(sum(to_download(files).values()) for files in downloads)
        needed += check_conversion(base) if base.original else 0
        needed += check_room(base, read_config(base), start.checkpoint.cache_dir)
    free = f"{shutil.disk_usage(folder).free / 1e9:,.1f} GB free"
    return f"{needed / 1e9:,.1f} GB still to be written, {free}" if needed else f"nothing to download, {free}"


def probe_server(start: PlannedStart) -> str:
    from llama2_chat.remote.faults import CONNECTION_FAULTS

    _raise_first_fault(start, CONNECTION_FAULTS)
    return f"{', '.join(server.name for server in start.remote_model.servers)} can be reached"


def probe_key(start: PlannedStart) -> str:
    from llama2_chat.remote.faults import WRONG_KEY

    _raise_first_fault(start, (WRONG_KEY,))
    return "accepted" if start.settings.inference_key else "no key is set, and the servers require none"


def probe_answer(start: PlannedStart) -> str:
    _raise_first_fault(start)
    model = start.remote_model
    length = f" of {model.context_length:,} tokens" if model.context_length else ""
    return f"{model.status.model}{length} answers. {model.status.why}"


def _raise_first_fault(start: PlannedStart, among: Container[str] | None = None) -> None:
    """The first fault among these, or of any kind, that one of the model's servers has."""
    for name, fault in start.remote_model.faults:
        if among is None or fault in among:
            raise ChatError(f"{name}: {fault}")


def probe_port(start: PlannedStart) -> str:
    with open_listener(start.settings) as listener:
        return f"{start.settings.host} port {listener.getsockname()[1]} is free"


def probe_certificate(start: PlannedStart) -> str:
    settings = start.settings
    if not settings.https:
        raise NotApplicable("not needed without --https")
    from llama2_chat.server import local_ca, tls

    if not settings.certfile and not settings.keyfile and local_ca.needs_new_certificate(local_ca.CERTS):
        return f"the start will make one in {local_ca.CERTS}"
    found = tls.get_certificate(settings.certfile, settings.keyfile, settings.key_password)
    tls.Certificates(lambda: found)
    return f"{found.certfile} for {', '.join(found.hosts)}, until {found.not_after:%Y-%m-%d}"


def probe_folders(start: PlannedStart) -> str:
    """Those of what visitors leave here; none of them is made yet."""
    settings = start.settings
    folders = {"DOCUMENTS_DIR": settings.documents_dir} if settings.documents else {}
    folders |= {"HISTORY_DIR": settings.history_dir} if settings.history == "server" else {}
    if not folders:
        raise NotApplicable("nothing of visitors is kept here")
    for name, folder in folders.items():
        try:
            check_folder(folder)
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise ChatError(
                f"{name}={folder} cannot keep anything: {reason}. Make it writable for this program's user, or name "
                "another folder, on a local disk."
            ) from error
    return f"can be written: {', '.join(map(str, folders.values()))}"


def probe_tools(start: PlannedStart) -> str:
    path = start.settings.mcp_servers
    if not path:
        raise NotApplicable("no MCP_SERVERS")
    from llama2_chat.agent import McpTools, read_mcp_servers

    specs = read_mcp_servers(path)
    McpTools(specs)
    return f"MCP servers, which are not started here: {', '.join(spec.name for spec in specs)}"


def probe_presets(start: PlannedStart) -> str:
    path = start.settings.presets
    if not path:
        raise NotApplicable("no PRESETS, so visitors have the page's own and theirs")
    presets = read_presets(path)
    first = f", and conversations start with {presets.default.name}" if presets.default else ""
    return f"{', '.join(preset.name for preset in presets.all)}{first}"


def probe_guard(start: PlannedStart) -> str:
    settings = start.settings
    if not settings.guard_url:
        raise NotApplicable("no GUARD_URL, so nothing is judged")
    from llama2_chat.guard import Judge, sentence_of
    from llama2_chat.remote.client import use_our_http

    use_our_http()
    judge = Judge(settings)

    async def both() -> list[bool]:
        said = "Why is the sky blue?", "Air scatters blue light more than red."
        return [(await judge.judge(*said[:count])).safe for count in (1, 2)]

    try:
        safe = asyncio.run(both())
    except ChatError as error:
        raise ChatError(sentence_of(error)) from error
    if not all(safe):
        raise ChatError("The guard judges a talk about the sky unsafe. Check GUARD_MODEL and its chat template.")
    return f"gives verdicts; what it cannot judge is {'let through' if settings.guard_fails == 'open' else 'refused'}"


def probe_embeddings(start: PlannedStart) -> str:
    settings = start.settings
    if not settings.embeddings:
        raise NotApplicable("no EMBEDDINGS, so documents are found by their words alone")
    from llama2_chat.embeddings import make_embedder, sentence_of

    if not settings.embeddings_url:
        from llama2_chat.embeddings.encoder import find
        from llama2_chat.loading.hub import check_reachable

        try:
            files, _ = find(settings.embeddings, settings.hub_cache_dir)
            if (missing := files.missing()) and files.repo:
                check_reachable(files.repo, next(iter(missing)), files.cache_dir)
                return f"{files.repo}. The Hub lets this account download it."
        except ChatError as error:
            raise ChatError(sentence_of(error)) from error
    embedder = make_embedder(settings)
    try:
        embedder.check()
        return f"{embedder.name} gives vectors of {embedder.dimensions:,} numbers"
    finally:
        embedder.close()


def probe_access(start: PlannedStart) -> str:
    from llama2_chat.server import login

    settings = start.settings
    page = f"{len(login.read_users(settings.auth_file)):,} may log in" if settings.auth_file else ""
    keys = f"{len(settings.api_keys):,} API keys" if settings.api_keys else ""
    if keys or page:
        return f"{page or 'no login'}, {keys or 'no API key, so programs cannot use the API'}"
    if settings.on_loopback:
        raise NotApplicable("only this machine is served, so no key or login is needed")
    return "anyone who reaches the port can use the page and the API: neither AUTH_FILE nor API_KEY is set"

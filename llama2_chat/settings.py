"""Every knob, read once from the command line and the environment into one frozen dataclass.

A flag beats its environment variable, which beats the default. Secrets come from the environment only; HF_TOKEN is
read by huggingface_hub itself, so it is not among the settings. The chat reads os.environ nowhere else: other files
only set variables that libraries read, and pass the environment on to processes that they start.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llama2_chat.api_keys import ApiKeys
from llama2_chat.errors import ChatError
from llama2_chat.named_files import in_home
from llama2_chat.types import RANGES, WHOLE_NUMBERS, SamplingParams

CHAT_FORMATS = ("auto", "llama-2", "none")
GUARD_FAILS = ("closed", "open")
SHOWN_SETTINGS = ("all", "basic", "hidden")
LONGEST_NOTICE = 500  # characters
HISTORIES = ("browser", "server")
SPECULATIONS = ("auto", "off")
KV_CACHES = ("auto", "fp8", "int8", "none")
CPU_BATCH, GPU_BATCH = 8, 32  # answers computed at once, where MAX_BATCH says nothing
QUANTIZATIONS = ("auto", "none", "int8", "int4", "nf4")
MOST_GPUS = 16  # that compute one model together
CLIENT_LIMIT = 32  # more than a household or an office asks at once, and half of the line
BODY_LIMIT_MB = 10  # the page sends its whole conversation with each question
PERSISTENT = Path("/data")  # where a Space's storage bucket is mounted, if it has one
OPTIONAL = {
    "certfile": Path,
    "keyfile": Path,
    "auth_file": Path,
    "api_key_file": Path,
    "mcp_servers": Path,
    "presets": Path,
    "max_batch": int,
    "kv_host_gb": float,
    "body_limit_mb": float,
    "client_limit": int,
}
SHOWN_SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


def _knob(default: Any, env: str, help: str) -> Any:
    return field(default=default, metadata={"env": env.split(), "help": help})


@dataclass(frozen=True)
class Settings:
    """Where to serve, which model, and how it answers by default. Settings.read() is how a program gets them."""

    host: str = _knob(
        "127.0.0.1",
        "GRADIO_SERVER_NAME",
        "address to listen on; by default 127.0.0.1, and 0.0.0.0 with HTTPS or on a Space",
    )
    port: int = _knob(7860, "PORT GRADIO_SERVER_PORT", "where the page is served; 0 takes any free port")
    https: bool = _knob(False, "HTTPS", "serve the whole network over HTTPS, with a certificate made in certs/")
    certfile: Path | None = _knob(None, "CERTFILE", "your own certificate, PEM, instead of the one in certs/")
    keyfile: Path | None = _knob(None, "KEYFILE", "its private key, PEM; KEY_PASSWORD decrypts it")
    key_password: str | None = field(default=None, repr=False)  # from the environment only
    root_path: str = _knob("", "GRADIO_ROOT_PATH", "path of the page behind a reverse proxy, such as /chat")
    api_keys: Collection[str] = field(default=(), repr=False)  # API_KEY, from the environment only, and those of a file
    api_key_file: Path | None = _knob(None, "API_KEY_FILE", "more keys of the API, one a line; SIGHUP reads them again")
    admin_key: str = field(default="", repr=False)  # from the environment only
    auth_file: Path | None = _knob(None, "AUTH_FILE", "who may log in to the page: lines that --hash-password makes")
    body_limit_mb: float | None = _knob(
        None,
        "BODY_LIMIT_MB",
        f"largest request body; by default {BODY_LIMIT_MB}, and any size if only this machine is served",
    )
    allowed_hosts: str = _knob(
        "",
        "ALLOWED_HOSTS",
        "comma-separated names that this server is reached by beside its own and its certificate's, such as "
        "chat.example.com or *.example.com",
    )
    client_limit: int | None = _knob(
        None,
        "CLIENT_LIMIT",
        "answers in progress for one API key, login or address; 0 for no limit. By default "
        f"{CLIENT_LIMIT}, and no limit if only this machine is served, or on a Space without TRUSTED_PROXIES",
    )
    trusted_proxies: str = _knob(
        "", "TRUSTED_PROXIES", "comma-separated addresses and networks whose X-Forwarded-For is believed"
    )
    tools: bool = _knob(
        True, "TOOLS", "let visitors switch on 'Use tools': the model may then use a clock and a calculator"
    )
    mcp_servers: Path | None = _knob(
        None, "MCP_SERVERS", 'a file of MCP servers, whose tools the model may use too: {"mcpServers": {...}}'
    )
    presets: Path | None = _knob(
        None, "PRESETS", 'a file of presets that visitors can start from beside the page\'s own: {"presets": [...]}'
    )
    settings: str = _knob(
        "all",
        "SETTINGS",
        f"{', '.join(SHOWN_SETTINGS)}: which controls visitors see; basic leaves out what is for experts",
    )
    notice: str = _knob("", "NOTICE", "one line of text above the chat, such as when the server will be down")
    log_messages: bool = _knob(False, "LOG_MESSAGES", "write questions and answers to the log, word for word")
    model_id: str | None = _knob(
        None,
        "MODEL_ID",
        "Hub id, id@revision or folder of a model or PEFT adapter; without it Llama 2 on a GPU, else a small model",
    )
    model_name: str | None = _knob(
        None, "MODEL_NAME", "what page and API call the model; by default its Hub id, or the name of its folder"
    )
    inference_url: str = _knob(
        "",
        "INFERENCE_URL",
        "an OpenAI-compatible server that has the model, such as http://gpu-1:8000, or several, comma-separated",
    )
    inference_model: str | None = _knob(
        None, "INFERENCE_MODEL", "the model's name on those servers; may be left out where a server has only one"
    )
    inference_key: str = field(default="", repr=False)  # from the environment only
    guard_url: str = _knob(
        "",
        "GUARD_URL",
        "an OpenAI-compatible server that judges each message before the model sees it, and each answer before it is "
        "shown",
    )
    guard_model: str | None = _knob(
        None,
        "GUARD_MODEL",
        "the guard's name there, such as meta-llama/Llama-Guard-3-8B; may be left out where the server has only one",
    )
    guard_fails: str = _knob(
        "closed", "GUARD_FAILS", "closed or open: what has no verdict, for the guard fails, is refused or let through"
    )
    guard_key: str = field(default="", repr=False)  # from the environment only
    base_model: str | None = _knob(None, "BASE_MODEL", "base of a PEFT adapter, instead of the one its config names")
    adapters: str = _knob(
        "",
        "ADAPTERS",
        "LoRA adapters of this model, of which each request may choose one by its name: name=folder or Hub id, "
        "comma-separated",
    )
    chat_format: str = _knob(
        "auto",
        "CHAT_FORMAT",
        f"{', '.join(CHAT_FORMATS)}: how the model chats, or none to complete texts; auto goes by its files and name",
    )
    quantization: str = _knob("auto", "QUANTIZATION", f"{', '.join(QUANTIZATIONS)}; auto looks at the free memory")
    cache_dir: Path = _knob(
        Path("~/.cache/llama2-chat"), "CACHE_DIR", "where the small model and converted checkpoints are kept"
    )
    hub_cache_dir: Path | None = None  # None is huggingface_hub's own place, HF_HOME; /data on a Space that has storage
    on_space: bool = False
    space_host: str = ""  # the name that the Hub gives a Space, such as someone-llama-2-chat.hf.space
    zero_gpu: bool = False  # a Space on ZeroGPU hardware
    documents: bool = _knob(True, "DOCUMENTS", "let visitors and programs upload documents and ask about them")
    documents_dir: Path = _knob(
        Path("~/.local/share/llama2-chat/documents"), "DOCUMENTS_DIR", "where the documents of visitors are kept"
    )
    history: str = _knob(
        "browser",
        "HISTORY",
        "browser or server: where a login's conversations are kept; on the server, each of its devices has them",
    )
    history_dir: Path = _knob(
        Path("~/.local/share/llama2-chat/history"), "HISTORY_DIR", "where they are kept with HISTORY=server"
    )
    embeddings: str = _knob(
        "",
        "EMBEDDINGS",
        "what finds documents by their meaning too: an encoder as Hub id or folder, such as "
        "intfloat/multilingual-e5-small, or a server that has one, such as http://gpu-1:8080/v1",
    )
    embeddings_model: str | None = _knob(
        None, "EMBEDDINGS_MODEL", "the encoder's name on that server; may be left out where it has only one model"
    )
    embeddings_key: str = field(default="", repr=False)  # from the environment only
    queue_limit: int = _knob(64, "QUEUE_LIMIT", "questions that may wait at once; any more are refused")
    max_batch: int | None = _knob(
        None,
        "MAX_BATCH",
        f"answers computed at once, the others wait in line; by default {GPU_BATCH} on a GPU and {CPU_BATCH} on a CPU",
    )
    kv_cache: str = _knob(
        "auto",
        "KV_CACHE",
        f"{', '.join(KV_CACHES)}: keep keys and values in 8 bits, so that about twice the tokens fit, or in as many as "
        "the model computes in; auto takes 8 on a GPU whose memory holds few conversations otherwise",
    )
    kv_headroom_gb: float = _knob(
        1.5, "KV_HEADROOM_GB", "GPU memory left alone for prefill; raise it if other programs share the card"
    )
    kv_host_gb: float | None = _knob(
        None,
        "KV_HOST_GB",
        "memory of this computer for what the KV cache of a GPU has no room for, so that such conversations come back "
        "by copy; by default a quarter of what is free, at most 8; 0 for none",
    )
    tensor_parallel: str = _knob(
        "1",
        "TENSOR_PARALLEL",
        "how many GPUs, which are alike, compute each layer of a Llama together; auto takes several where one does not "
        "hold the model",
    )
    compile: bool = _knob(
        True, "COMPILE", "compile the model for faster decoding on a GPU, in the background after each start"
    )
    deterministic: bool = _knob(
        False,
        "DETERMINISTIC",
        "on a GPU too, the same seed or temperature 0 gives the same text, cached or not, alone or in company",
    )
    speculation: str = _knob(
        "auto",
        "SPECULATION",
        "auto or off: guess what an answer repeats or a grammar forces, check several tokens at once, and keep "
        "those that are chosen",
    )
    draft_model: str | None = _knob(
        None,
        "DRAFT_MODEL",
        "Hub id or folder of what guesses what comes next: an EAGLE head for the model, or a small model with its "
        "vocabulary",
    )
    check: bool = _knob(False, "", "start nothing; say what would go wrong and how to fix it")
    json: bool = _knob(False, "", "with --check: one JSON document, for programs")
    hash_password: bool = _knob(
        False, "", "start nothing; ask for a name and a password, and print a line for AUTH_FILE"
    )
    sampling: SamplingParams = SamplingParams()  # where the page's sliders start, and what an API request leaves out

    def __post_init__(self) -> None:
        # A line end from a file of variables is no part of them.
        for name in ("guard_url", "embeddings", "notice"):
            object.__setattr__(self, name, getattr(self, name).strip())
        for name in ("model_id", "model_name", "base_model", "guard_model", "embeddings_model", "draft_model"):
            object.__setattr__(self, name, (getattr(self, name) or "").strip() or None)
        if self.settings not in SHOWN_SETTINGS:
            raise ChatError(f"settings must be one of {', '.join(SHOWN_SETTINGS)}; it was {self.settings!r:.40}.")
        if self.notice and not (self.notice.isprintable() and len(self.notice) <= LONGEST_NOTICE):
            raise ChatError(f"notice must be one line of at most {LONGEST_NOTICE} printable characters.")
        if self.model_name and not self.model_name.isprintable():
            raise ChatError(f"model_name must be one line of printable characters; it was {self.model_name[:40]!r}.")
        if self.model_name and self.inference_url:
            raise ChatError("model_name is for a model that is loaded here; with INFERENCE_URL its servers name it.")
        if self.deterministic and not self.compile:
            raise ChatError("DETERMINISTIC=1 needs COMPILE=1: only steps that are recorded always compute the same.")
        if self.deterministic and self.inference_url:
            raise ChatError("deterministic is for a model that is loaded here; set it where INFERENCE_URL points to.")
        if self.chat_format not in CHAT_FORMATS:
            raise ChatError(f"chat_format must be one of {', '.join(CHAT_FORMATS)}; it was {self.chat_format!r}.")
        if self.chat_format != "auto" and self.inference_url:
            raise ChatError("chat_format is for a model that is loaded here; with INFERENCE_URL its servers decide it.")
        self._check_adapters()
        if self.quantization not in QUANTIZATIONS:
            raise ChatError(f"quantization must be one of {', '.join(QUANTIZATIONS)}; it was {self.quantization!r}.")
        if self.kv_cache not in KV_CACHES:
            raise ChatError(f"kv_cache must be one of {', '.join(KV_CACHES)}; it was {self.kv_cache!r:.40}.")
        if self.history not in HISTORIES:
            raise ChatError(f"history must be one of {', '.join(HISTORIES)}; it was {self.history!r}.")
        if self.history == "server" and not self.auth_file:
            raise ChatError("HISTORY=server needs AUTH_FILE: without a login nobody's conversations can be told apart.")
        if not (self.tensor_parallel == "auto" or self.tensor_parallel in map(str, range(1, MOST_GPUS + 1))):
            raise ChatError(
                f"tensor_parallel must be auto or a number from 1 to {MOST_GPUS}; it was {self.tensor_parallel!r:.40}."
            )
        if self.speculation not in SPECULATIONS:
            raise ChatError(f"speculation must be {' or '.join(SPECULATIONS)}; it was {self.speculation!r}.")
        if self.draft_model and self.speculation == "off":
            raise ChatError(
                "draft_model makes guesses, and with SPECULATION=off there are none. Leave one of them out."
            )
        if self.draft_model and self.inference_url:
            raise ChatError("draft_model is for a model that is loaded here; set it where INFERENCE_URL points to.")
        if not 0 <= self.port <= 65535:
            raise ChatError(f"port must be from 0 to 65535; it was {self.port}.")
        if self.queue_limit < 1:
            raise ChatError(f"queue_limit must be 1 or more; it was {self.queue_limit}.")
        if self.max_batch is not None and not 1 <= self.max_batch <= 256:
            raise ChatError(f"max_batch must be from 1 to 256; it was {self.max_batch}.")
        if not 0 <= self.kv_headroom_gb < float("inf"):
            raise ChatError(f"kv_headroom_gb must be 0 or more; it was {self.kv_headroom_gb}.")
        if self.kv_host_gb is not None and not 0 <= self.kv_host_gb < float("inf"):
            raise ChatError(f"kv_host_gb must be 0 or more; it was {self.kv_host_gb}.")
        for url in self.inference_urls:
            if not _is_http(url):
                raise ChatError(
                    f"inference_url must be like http://gpu-1:8000, or several with commas; it was {url!r}."
                )
        for name in ("inference_key", "guard_key", "embeddings_key"):
            key = getattr(self, name)
            if not (key.isascii() and key.isprintable()):
                raise ChatError(
                    f"{name.upper()} contains characters that an HTTP header cannot carry. Use printable ASCII only."
                )
        self._check_guard()
        self._check_embeddings()
        if self.client_limit is not None and self.client_limit < 0:
            raise ChatError(f"client_limit must be 0 or more; it was {self.client_limit}.")
        if self.body_limit_mb is not None and not 0 < self.body_limit_mb < float("inf"):
            raise ChatError(f"body_limit_mb must be above 0; it was {self.body_limit_mb}.")
        if not all(map(_is_network, _split(self.trusted_proxies))):
            raise ChatError(
                f"trusted_proxies must be addresses and networks, such as 10.0.0.0/8; it was {self.trusted_proxies!r}."
            )
        if self.root_path and not self.root_path.startswith("/"):
            raise ChatError(f"root_path must start with a slash; it was {self.root_path!r}.")
        if self.json and not self.check:
            raise ChatError("--json needs --check: it says how --check prints.")

    def _check_guard(self) -> None:
        if self.guard_url and not _is_http(self.guard_url):
            raise ChatError(f"guard_url must be like http://gpu-1:8000; it was {self.guard_url!r}.")
        if self.guard_fails not in GUARD_FAILS:
            raise ChatError(f"guard_fails must be one of {', '.join(GUARD_FAILS)}; it was {self.guard_fails!r}.")
        if self.guard_model and not self.guard_url:  # who names a guard wants one
            raise ChatError("guard_model needs guard_url: without the address of its server nothing is judged.")

    def _check_adapters(self) -> None:
        if self.adapters and self.inference_url:
            raise ChatError("adapters are for a model that is loaded here; set them where INFERENCE_URL points to.")
        named = dict(self.named_adapters)
        if not all(name and source and name.isprintable() for name, source in self.named_adapters):
            raise ChatError(
                "adapters must be like law=adapters/law,poems=someone/poems: a name, and a folder or Hub id; it was "
                f"{self.adapters[:80]!r}."
            )
        if len(named) < len(self.named_adapters) or self.model_name in named:
            raise ChatError(f"adapters must have different names, and none the model's; it was {self.adapters[:80]!r}.")

    @property
    def named_adapters(self) -> tuple[tuple[str, str], ...]:
        """Names of adapters, and the folders or Hub ids where they are."""
        pairs = (each.partition("=") for each in _split(self.adapters))
        return tuple((name.strip(), source.strip()) for name, _, source in pairs)

    def _check_embeddings(self) -> None:
        if self.embeddings_url and not _is_http(self.embeddings_url):
            raise ChatError(
                f"embeddings must be an encoder, or a server like http://gpu-1:8080/v1; it was {self.embeddings!r}."
            )
        if self.embeddings_model and not self.embeddings_url:
            raise ChatError("embeddings_model is an encoder's name on a server: embeddings must be its address.")

    @property
    def embeddings_url(self) -> str:
        """The server that has the encoder; "" if it is loaded here, or there is none."""
        return self.embeddings if self.embeddings.lower().startswith(("http:", "https:")) else ""

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine is served."""
        return _is_loopback(self.host)

    @property
    def inference_urls(self) -> tuple[str, ...]:
        """The servers that have the model; none if it is loaded here."""
        return _split(self.inference_url)

    @classmethod
    def read(cls, argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
        """The settings of this process. Ends the program with a sentence and exit code 2 if one makes no sense."""
        parser = _parser(environ)
        values = vars(parser.parse_args(argv))
        try:
            values["sampling"] = SamplingParams(**{name: values.pop(name) for name in SHOWN_SAMPLING})
            return cls(**_completed(values, environ), **_space(environ))
        except ChatError as error:
            parser.error(str(error))


def _parser(environ: Mapping[str, str]) -> argparse.ArgumentParser:
    """Flags for every knob, whose defaults are what the environment says."""
    parser = argparse.ArgumentParser(
        description="Chat with Llama 2 on your own hardware. Secrets come from the environment only: HF_TOKEN, "
        "API_KEY (one or several, comma-separated), ADMIN_KEY, INFERENCE_KEY, GUARD_KEY, EMBEDDINGS_KEY, KEY_PASSWORD."
    )
    for knob in fields(Settings):
        if knob.metadata:
            env = knob.metadata["env"]
            given = next((environ[name] for name in env if environ.get(name)), None)
            kind = type(knob.default) if isinstance(knob.default, (int, float, Path)) else str
            kind = OPTIONAL.get(knob.name, kind)
            _add(parser, knob.name, env, kind, given or _default(knob, environ), knob.metadata["help"])
    for name in SHOWN_SAMPLING:
        default, env = getattr(SamplingParams(), name), name.upper()
        kind = int if name in WHOLE_NUMBERS else float
        low, high = RANGES[name]
        help = f"where the page's setting starts, {low:g} to {high:,}"
        _add(parser, name, [env], kind, environ.get(env) or default, help)
    return parser


def _completed(values: dict[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """What the flags gave, with the secrets and what follows from other knobs."""
    files = [name for name, kind in OPTIONAL.items() if kind is Path]
    for name in ("cache_dir", "documents_dir", "history_dir", *files):
        if values[name] is not None:
            given, values[name] = values[name], in_home(values[name])  # a shell leaves the ~ of --flag=~/folder
            if str(values[name]).startswith("~"):
                raise ChatError(
                    f"{given} begins in a home folder, and nobody knows where that is. Set HOME to a folder that this "
                    "user may write to, or write the folder out."
                )
    api_keys: Collection[str] = _split(environ.get("API_KEY", ""))
    if environ.get("API_KEY") and not api_keys:
        raise ChatError("API_KEY contains no key. Set one, or unset API_KEY to let everybody in.")
    if values["api_key_file"]:
        api_keys = ApiKeys(tuple(api_keys), values["api_key_file"])
    https = bool(values["https"] or values["certfile"] or values["keyfile"])
    host = values["host"] or ("0.0.0.0" if https else Settings.host)
    body_limit_mb = values["body_limit_mb"]
    if body_limit_mb is None and not _is_loopback(host):
        body_limit_mb = BODY_LIMIT_MB
    client_limit = values["client_limit"]
    # On a Space all come from the platform's own addresses.
    if client_limit is None and not _is_loopback(host) and (values["trusted_proxies"] or not environ.get("SPACE_ID")):
        client_limit = CLIENT_LIMIT
    return values | {
        "api_keys": api_keys,
        "admin_key": environ.get("ADMIN_KEY", "").strip(),
        "inference_key": environ.get("INFERENCE_KEY", "").strip(),
        "guard_key": environ.get("GUARD_KEY", "").strip(),
        "embeddings_key": environ.get("EMBEDDINGS_KEY", "").strip(),
        "key_password": environ.get("KEY_PASSWORD") or None,
        "https": https,
        "host": host,
        "body_limit_mb": body_limit_mb,
        "client_limit": client_limit,
        "root_path": values["root_path"].rstrip("/"),
    }


def _add(parser: argparse.ArgumentParser, name: str, env: list[str], kind: type, default: Any, help: str) -> None:
    flag = "--" + name.replace("_", "-")
    known = "" if default in (None, "", False) else f" (default: {default})"
    variables = f" [{', '.join(env)}]" if env else ""
    help = f"{help}{variables}{known}".replace("%", "%%")
    if kind is bool:
        action = argparse.BooleanOptionalAction if env else "store_true"  # --no-flag is there to beat a variable
        parser.add_argument(flag, action=action, default=_is_true(default), help=help)
    else:
        parser.add_argument(flag, type=kind, default=default, help=help, metavar="...")


def _default(knob: Field, environ: Mapping[str, str]) -> Any:
    if knob.name == "host":  # a Space is reached from outside its container; None until HTTPS is known
        return "0.0.0.0" if environ.get("SPACE_ID") else None
    if knob.name == "cache_dir" and environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "llama2-chat"
    if knob.name == "cache_dir" and _has_storage(environ):
        return PERSISTENT / "llama2-chat"
    if knob.name in ("documents_dir", "history_dir") and environ.get("XDG_DATA_HOME"):
        return Path(environ["XDG_DATA_HOME"]) / "llama2-chat" / knob.name.removesuffix("_dir")
    return knob.default


def _space(environ: Mapping[str, str]) -> dict[str, Any]:
    """What only a Hugging Face Space decides; its variables are set by the platform, not by people."""
    has_own_folder = any(environ.get(name) for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"))
    return {
        "on_space": bool(environ.get("SPACE_ID")),
        "space_host": environ.get("SPACE_HOST", ""),
        "zero_gpu": _is_true(environ.get("SPACES_ZERO_GPU")),
        # The folder that HF_HOME=/data/.huggingface would give, as the Hub's documentation advises.
        "hub_cache_dir": PERSISTENT / ".huggingface" / "hub" if _has_storage(environ) and not has_own_folder else None,
    }


def _has_storage(environ: Mapping[str, str]) -> bool:
    return bool(environ.get("SPACE_ID")) and PERSISTENT.is_dir() and os.access(PERSISTENT, os.W_OK)


def _split(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_network(host) and ipaddress.ip_network(host).is_loopback)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        return False


def _is_network(text: str) -> bool:
    try:
        return bool(ipaddress.ip_network(text.strip()))
    except ValueError:
        return False


def _is_true(text: Any) -> bool:
    return str(text).lower() in ("1", "true", "yes", "on")

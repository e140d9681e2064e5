"""etc/synapse.conf → frozen settings. Every error is found before any is reported.

INI without interpolation; ` ;` and ` #` start a comment. Unknown sections and keys are errors.
"""

from __future__ import annotations

import configparser
import difflib
import ipaddress
import math
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from supervisor_synapse.core.model import Phase, Tier
from supervisor_synapse.core.settings import (
    DEFAULT_TIERS,
    Enable,
    GatewaySettings,
    ModelRule,
    ModelSettings,
    NotifyPolicy,
    ProbePolicy,
    Reserve,
    RestartPolicy,
    Settings,
    StopPolicy,
    TierRule,
    WhenFull,
)
from supervisor_synapse.errors import ConfigError

_SIZE_UNITS = {"": 1, "b": 1, "kib": 1024, "mib": 1024**2, "gib": 1024**3, "tib": 1024**4,
               "kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}  # fmt: skip
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_ARGUMENT = re.compile(r"[A-Za-z0-9_@%+=:,./\[\]{}\"*^|-]{1,1000}")
_ENDPOINT = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?):([0-9]{1,5})")
_MOST_ENDPOINTS = 16  # GGML_RPC_MAX_SERVERS
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_MOST_BROKEN_LINES = 100
_LARGEST_BYTES = 1024 * 1024
_LONGEST_QUOTED = 120
_SECOND_MARK = "\0"  # marks the name of a section that stands twice, while reading on
_KEYS_SHOW = "keys show in ps: "
_MOST_WORDS = 64  # of a command
_URL = re.compile(r"[\x21-\x7e]{1,2000}")
_FAILURE = "failure"  # beside the phases, an event
_ALL_EVENTS = "all"
OWNED_ARGUMENTS = {
    option: why
    for options, why in (
        ("-m --model", "the model file comes from discovery"),
        ("--host", "set host in [synapse]"),
        ("--port", "set port here"),
        ("-a --alias", "set alias here"),
        ("-c --ctx-size", "set context here"),
        ("-np --parallel", "set parallel here"),
        ("-ngl --gpu-layers --n-gpu-layers", "set gpu_layers here"),
        ("-dev --device", "set device here"),
        ("--sleep-idle-seconds", "set sleep_idle_seconds here"),
        ("--api-key", _KEYS_SHOW + "use --api-key-file"),
        ("-hft --hf-token", _KEYS_SHOW + "set HF_TOKEN where supervisord is started"),
    )
    for option in options.split()
}


def _number_with_unit(text: str, units: Mapping[str, int], allowed: str) -> int:
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!a} is not {allowed}")
    return int(float(match[1]) * units[match[2].lower()])


def parse_bytes(text: str) -> int:
    """`512MiB`, `1.5 GiB`, `1000000` → bytes."""
    return _number_with_unit(text, _SIZE_UNITS, "a size such as 512MiB or 2GiB")


def parse_count(text: str) -> int | None:
    """`7B`, `500M` → a number of parameters; `any` → None."""
    if text.strip().lower() == "any":
        return None
    return _number_with_unit(
        text, _COUNT_UNITS, "a number of parameters such as 7B or 500M, or any"
    )


def _parse_reserve(text: str) -> Reserve:
    percent = re.fullmatch(r"(\d{1,2}(?:\.\d{1,3})?)\s*%", text.strip())
    if percent:
        return Reserve(bytes=0, fraction=float(percent[1]) / 100)
    return Reserve(bytes=parse_bytes(text))


def _parse_boolean(text: str) -> bool:
    answer = configparser.RawConfigParser.BOOLEAN_STATES.get(text.strip().lower())
    if answer is None:
        raise ValueError(f"{text!a} is not true or false")
    return answer


def _parse_port_range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})\s*-\s*([0-9]{1,5})", text.strip())
    first, last = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1024 <= first <= last <= 65535:
        raise ValueError(f"{text!a} is not a range such as 8100-8199, within 1024-65535")
    return first, last


def _parse_host(text: str) -> str:
    try:
        return "127.0.0.1" if text == "localhost" else str(ipaddress.ip_address(text))
    except ValueError:
        raise ValueError(f"{text!a} is not an IP address such as 127.0.0.1") from None


def _parse_bind(text: str) -> tuple[str, int]:
    """`127.0.0.1:8080`, `[::1]:8080`."""
    match = re.fullmatch(r"\[?([0-9A-Za-z.:]{1,60}?)\]?:([0-9]{1,5})", text.strip())
    try:
        host, port = (_parse_host(match[1]), int(match[2])) if match else ("", 0)
    except ValueError:
        port = 0
    if not 1 <= port <= 65535:
        raise ValueError(f"{text[:_LONGEST_QUOTED]!a} is not an address such as 127.0.0.1:8080")
    return host, port


def _parse_folders(text: str) -> tuple[str, ...]:
    """One folder a line, or separated by commas; `~` is the home folder."""
    folders = [part.strip() for part in re.split(r"[,\n]", text) if part.strip()]
    expanded = [os.path.expanduser(folder) for folder in folders]
    for folder in expanded:
        if not Path(folder).is_absolute():
            raise ValueError(f"{folder!a} is not an absolute path")
    return tuple(expanded)


def _parse_endpoints(text: str) -> tuple[str, ...]:
    """`host:port`, separated by commas or one a line; each once, since each becomes a device."""
    found: list[str] = []
    for part in (part.strip() for part in re.split(r"[,\n]", text)):
        match = _ENDPOINT.fullmatch(part)
        if part and (match is None or not 1 <= int(match[2]) <= 65535):
            raise ValueError(
                f"{part[:_LONGEST_QUOTED]!a} is not an address such as 192.168.1.20:50052: a name "
                "or an IPv4 address, and a port within 1-65535"
            )
        if match is not None:
            found.append(f"{match[1]}:{int(match[2])}")
    if len(set(found)) < len(found) or len(found) > _MOST_ENDPOINTS:
        raise ValueError(f"must name each device once, and at most {_MOST_ENDPOINTS}")
    return tuple(found)


def _parse_arguments(text: str) -> tuple[str, ...]:
    """Words as a shell would split them; each within the allow-list of rendered tokens."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}; balance its quotes") from None
    for word in words:
        if not _ARGUMENT.fullmatch(word):
            raise ValueError(
                f"{word!a} has a character that cannot stand in a program block; allowed are "
                'letters, digits and _@%+=:,./[]{}"*^|-'
            )
        option = word.split("=", 1)[0]
        if option in OWNED_ARGUMENTS:
            raise ValueError(f"{option} is not set through args: {OWNED_ARGUMENTS[option]}")
    return tuple(words)


def _parse_name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!a} is not a program name ([a-z0-9][a-z0-9._-]*, at most 63)")
    return text


def _parse_tier(text: str) -> Tier:
    names = [tier.value for tier in Tier]
    if text.lower() not in names:
        raise ValueError(f"{text!a} is not a tier: {', '.join(names)}")
    return Tier(text.lower())


def _parse_device(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9:_-]{1,40}(,[A-Za-z0-9:_-]{1,40}){0,15}", text):
        raise ValueError(f"{text!a} is not a device such as CUDA0, Vulkan0,Vulkan1 or none")
    return text


def _parse_file(text: str) -> str:
    """An absolute path; `~` is the home folder. Nothing is no file."""
    path = os.path.expanduser(text.strip())
    if path and not (path.startswith("/") and path.isprintable()):
        raise ValueError(f"{path[:_LONGEST_QUOTED]!a} is not an absolute path")
    return path


def _parse_command(text: str) -> tuple[str, ...]:
    """Words as a shell would split them. An argument may be private: none is quoted."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"cannot be split into words: {error}; balance its quotes") from None
    if len(words) > _MOST_WORDS or not all(word.isprintable() for word in words):
        raise ValueError(f"must be at most {_MOST_WORDS} words without control characters")
    program = os.path.expanduser(words[0]) if words else ""
    if program and not program.startswith("/"):
        raise ValueError("must begin with the absolute path of a program (or with ~/)")
    return (program, *words[1:]) if program else ()


def _parse_url(text: str) -> str:
    """Never quoted where it is wrong: there may be a key in it."""
    if not text:
        return ""
    try:
        parts = urlsplit(text)
    except ValueError:
        parts = urlsplit("")
    if not _URL.fullmatch(text) or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address such as https://example.org/hook")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise ValueError(
            "must name no user, password or #fragment; put an Authorization header into "
            "url_header_file"
        )
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("must have a port within 1-65535") from None
    return text


def _is_safe_for_keys(parts: SplitResult) -> bool:
    """Whether nobody on the way can read what is sent."""
    try:
        is_loopback = ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        is_loopback = parts.hostname == "localhost"
    return parts.scheme == "https" or is_loopback


def _parse_events(text: str) -> tuple[str, ...]:
    """Names of phases, `failure`, or `all`; each once."""
    known = [_FAILURE, *(phase.value for phase in Phase), _ALL_EVENTS]
    names = _listed(text.lower())
    for name in names:
        if name not in known:
            raise ValueError(f"{name[:_LONGEST_QUOTED]!a} is no event: {', '.join(known)}")
    return names


def _listed(text: str) -> tuple[str, ...]:
    """What stands between commas, blanks and line ends; each once."""
    return tuple(dict.fromkeys(re.split(r"[,\s]+", text.strip(" ,\n\t")))) if text.strip() else ()


def _auto(parse: Callable[[str], Any]) -> Callable[[Any], Any]:
    """`auto`, or nothing, is None; anything else is parsed."""
    return lambda text: None if str(text).strip().lower() in ("auto", "") else parse(text)


def _from_text(parse: Callable[[str], Any]) -> BeforeValidator:
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


_Seconds = Annotated[float, Field(gt=0, le=86400)]
_WholeSeconds = Annotated[int, Field(ge=0, le=86400)]


def _endpoints_in(rules: Iterable[ModelRule]) -> tuple[str, ...]:
    """Devices of others that `args` of some models name, where `rpc` names none."""
    found: dict[str, None] = {}
    for rule in rules:
        words = rule.settings.args or ()
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            flag, has_value, value = word.partition("=")
            if flag == "--rpc":
                found |= dict.fromkeys((value if has_value else following).split(","))
    return tuple(endpoint for endpoint in found if endpoint)


@dataclass(frozen=True, slots=True)
class Words:
    """What people are told of a key where its type does not say it; see reference.py."""

    allowed: str = ""  # in place of what the type says
    otherwise: str = ""  # what else it may be: auto, any
    unit: str = ""
    unsaid: str = ""  # what holds where the default is nothing


_Boolean = Annotated[bool, _from_text(_parse_boolean), Words("`true` or `false`")]
_Folders = Annotated[
    tuple[str, ...], _from_text(_parse_folders),
    Words("absolute paths, `~/` for your home folder; one a line, or separated by commas"),
]  # fmt: skip
_File = Annotated[str, _from_text(_parse_file), Words("an absolute path, or one below `~/`")]
_Context = Annotated[int, Field(ge=256, le=2**24), Words(unit="tokens")]


class Section(BaseModel):
    """One section of synapse.conf. Its docstring and those of its keys are its documentation."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class _Synapse(Section):
    """Where models are, which of them run, and what they share."""

    cache_dirs: Annotated[_Folders, Words(unsaid="the hub cache of huggingface_hub")] = Field(
        (),
        description="Hugging Face hub caches that are searched for models. Unless said, the one "
        "that `HF_HUB_CACHE`, `HF_HOME` or `XDG_CACHE_HOME` lead to: `~/.cache/huggingface/hub`.",
        examples=["/srv/models/hub"],
    )
    model_dirs: _Folders = Field(
        (),
        description="Further folders that are searched for `*.gguf`, at any depth: those of LM "
        "Studio, llama.cpp, or your own.",
        examples=["~/.lmstudio/models, /srv/gguf"],
    )
    engine: Annotated[
        str, Field(pattern=r"^(auto|[/~].*)$"),
        Words("`auto`, or a path that begins with `/` or `~`"),
    ] = Field(
        "auto",
        description="Which `llama-server` runs the models. `auto`: the one of the extra `engine`, "
        "else the one on PATH. Nobody but you may be able to write to it.",
        examples=["/opt/llama.cpp/bin/llama-server"],
    )  # fmt: skip
    rpc: Annotated[
        tuple[str, ...], _from_text(_parse_endpoints),
        Words(f"`host:port`, separated by commas, at most {_MOST_ENDPOINTS}"),
    ] = Field(
        (),
        description="Devices of other machines: where their `ggml-rpc-server` listens. They are "
        "`RPC0`, `RPC1` ... in this order. It knows no password: on a trusted network only.",
        examples=["192.168.1.20:50052, gpu-box.lan:50052"],
    )  # fmt: skip
    port_range: Annotated[
        tuple[int, int], _from_text(_parse_port_range),
        Words("a first and a last port within 1024-65535"),
    ] = Field(
        (8100, 8199),
        description="From which models get their ports. A model keeps its port as long as that "
        "stays in the range.",
        examples=["9000-9049"],
    )  # fmt: skip
    host: Annotated[
        str, _from_text(_parse_host), Words("an IP address, or `localhost`")
    ] = Field(
        "127.0.0.1",
        description="The address at which models listen. Anything but loopback lets others use "
        "them: llama-server asks for no key unless `args` has `--api-key-file`.",
        examples=["192.168.1.20"],
    )  # fmt: skip
    enable: Enable = Field(
        Enable.FIT,
        description="Which models run where no `[model:...]` section says. `fit`: as many as "
        "memory holds, by priority, one quantization of each repo. `all`, `none`: as they say.",
        examples=["none"],
    )
    max_parallel: Annotated[int, Field(ge=1, le=64), Words(unit="models")] = Field(
        3, description="How many models load at the same time.", examples=["1"]
    )
    memory_reserve: Annotated[
        Reserve, _from_text(_parse_reserve),
        Words("a size such as `512MiB` or `2GiB`, or a percentage such as `5%`"),
    ] = Field(
        Reserve(),
        description="Memory that is kept free on each device, the host included. A percentage is "
        "of what the device has.",
        examples=["2GiB"],
    )  # fmt: skip
    when_full: WhenFull = Field(
        WhenFull.DEGRADE,
        description="What becomes of a model for which there is no room. `degrade`: it steps down "
        "its ladder (a smaller context, fewer layers on the device, a smaller quantization, its "
        "fallback). `evict`: the least important idle model makes room. `wait`: it is deferred. "
        "`refuse`: it is failed until you enable it again.",
        examples=["evict"],
    )
    climb_after_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(
        60,
        description="How long there must be room before a model that was degraded steps up again.",
        examples=["300"],
    )
    overcommit_sleepers: _Boolean = Field(
        False,
        description="Whether a model that sleeps (see `sleep_idle_seconds`) gives its memory to "
        "others. If so, one that wakes and finds no room waits for it, deferred.",
        examples=["true"],
    )
    trial_seconds: Annotated[int, Field(ge=1, le=86400)] = Field(
        60,
        description="How long a changed model must be ready without a break to have proved "
        "itself. If it fails before that, its former block is put back.",
        examples=["300"],
    )


class _Probe(Section):
    """How servers are looked at."""

    period_seconds: _Seconds = Field(
        5.0, description="Between two looks at a server.", examples=["2"]
    )
    timeout_seconds: _Seconds = Field(
        2.0, description="How long the answer to a quick question may take.", examples=["5"]
    )
    failure_threshold: Annotated[int, Field(ge=1, le=100), Words(unit="probes")] = Field(
        3,
        description="How many probes in a row must fail before a model that was ready is "
        "unhealthy. One is enough where the kernel says that its process was stopped.",
        examples=["5"],
    )
    stall_seconds: _Seconds = Field(
        120.0,
        description="A server that is busy and moves no counter for so long is wedged, and is "
        "restarted. Longer than the slowest batch takes.",
        examples=["300"],
    )


class _Restart(Section):
    """When a model that failed is started again."""

    backoff_initial_seconds: _Seconds = Field(
        1.0, description="The wait before the first restart.", examples=["5"]
    )
    backoff_factor: Annotated[float, Field(ge=1, le=100)] = Field(
        2.0, description="By how much each wait is longer than the one before.", examples=["1.5"]
    )
    backoff_max_seconds: _Seconds = Field(
        300.0,
        description="The longest wait. At least `backoff_initial_seconds`.",
        examples=["60"],
    )
    intensity: Annotated[int, Field(ge=1, le=1000), Words(unit="failures")] = Field(
        5,
        description="So many failures within `period_seconds` open the breaker: the model is "
        "failed, and left alone.",
        examples=["10"],
    )
    period_seconds: _Seconds = Field(
        600.0,
        description="The time within which failures are counted. A model that was ready for so "
        "long is forgiven all.",
        examples=["3600"],
    )
    cooldown_seconds: _Seconds = Field(
        900.0,
        description="How long the breaker stays open; then there is one trial.",
        examples=["300"],
    )

    @model_validator(mode="after")
    def _ordered(self) -> _Restart:
        if self.backoff_max_seconds < self.backoff_initial_seconds:
            raise ValueError("backoff_max_seconds must be at least backoff_initial_seconds")
        return self


class _Stop(Section):
    """How a model is stopped. These stand in its block, so a change restarts the models."""

    drain_seconds: _WholeSeconds = Field(
        30, description="How long requests under way may go on.", examples=["120"]
    )
    term_seconds: Annotated[int, Field(ge=1, le=600)] = Field(
        2, description="Between TERM, the second TERM, and KILL.", examples=["5"]
    )


class _Notify(Section):
    """Who is told when a model changes its phase: a command, a webhook, or both.

    Each gets one JSON object, here a crash:

    ```json
    {"when": 1769860800.25, "model": "qwen2.5-1.5b-instruct-q4_k_m", "from": "ready",
     "to": "backoff", "reason": "crashed; starts again after 1.1 s", "class": "crashed",
     "evidence": "synapse-run: ended by itself: server=SIGSEGV, seconds=700.12",
     "incarnation": {"pid": 4711, "started": 1769860700},
     "hostname": "box", "prefix": "/home/you/.synapse", "suppressed": 0}
    ```

    `when` is in seconds since the epoch; `from` is null where a model is seen for the first time,
    `class` where nothing failed, `incarnation` where nothing ran. `suppressed`: how many before
    this one were left out. Texts in it come from outside, such as a server's log: never hand them
    to a shell. A hook that hangs or fails delays nothing, is named in `var/log/synapse.log` at
    most once a minute, and what it missed counts as suppressed. What is still to be told when
    supervisord or the listener ends is not told.
    """

    command: Annotated[
        tuple[str, ...], _from_text(_parse_command),
        Words("the absolute path of a program, then its arguments", unsaid="nobody is told"),
    ] = Field(
        (),
        description="A program that gets the object on its stdin. Words are split as in a shell, "
        "but no shell runs. It gets PATH, HOME, the language, SYNAPSE_PREFIX and little else of "
        "the environment. It and what it started are killed after `timeout_seconds`. It runs once "
        "for each notice, also when it fails, since it may have done its work before that. Only "
        "you (or root) may own it, and nobody else may be able to write to it.",
        examples=["/home/you/bin/tell-me --quietly"],
    )  # fmt: skip
    url: Annotated[
        str, _from_text(_parse_url),
        Words("an `http` or `https` address, without user and password", unsaid="nobody is told"),
    ] = Field(
        "",
        description="A webhook that gets the object by POST. No redirect is followed, no proxy "
        "used, certificates are verified. Where there is no answer, or status 408, 425, 429 or "
        "5xx, it is tried again after 1 s, and once more after 5 s; so it may get a notice "
        "twice, with the same `model` and `when`.",
        examples=["https://example.org/hook"],
    )  # fmt: skip
    url_header_file: Annotated[_File, Words(unsaid="no further headers")] = Field(
        "",
        description="A file of header lines for the webhook, such as `Authorization: Bearer ...`; "
        "mode 0600. It is read anew for each notice. Goes with https, or a loopback address.",
        examples=["~/.synapse/etc/hook.headers"],
    )
    events: Annotated[
        tuple[str, ...], _from_text(_parse_events),
        Words("phases, `failure`, or `all`; separated by commas"),
    ] = Field(
        (_FAILURE, Phase.FAILED.value, Phase.DEFERRED.value, Phase.READY.value),
        description="What is told: the phases that a model comes into, and `failure`: every line "
        "of the history that has a failure class, whatever follows. So a crash that heals, and "
        "a changed block that was refused or taken back, are told too.",
        examples=["failed, unhealthy"],
    )  # fmt: skip
    models: Annotated[
        tuple[str, ...], _from_text(_listed),
        Words("patterns for program names, separated by commas or blanks"),
    ] = Field(("*",), description="Of which models.", examples=["qwen*, gemma-*"])  # fmt: skip
    timeout_seconds: Annotated[float, Field(gt=0, le=600)] = Field(
        10.0, description="How long a command may run, or a webhook take, each time.",
        examples=["30"],
    )  # fmt: skip
    most_per_minute: Annotated[int, Field(ge=1, le=1000), Words(unit="notices")] = Field(
        30,
        description="How many are told in any minute: half of them at once, the rest evenly. What "
        "is too much is left out and counted, but the newest of each model is told as soon as "
        "there is room.",
        examples=["6"],
    )

    @model_validator(mode="after")
    def _keys_are_safe(self) -> _Notify:
        if self.url and self.url_header_file and not _is_safe_for_keys(urlsplit(self.url)):
            raise ValueError("url must be https or a loopback address where url_header_file is set")
        return self


class _Gateway(Section):
    """One OpenAI-compatible address for all models, by HAProxy (2.6 or newer, with Lua).

    A request names its model in its body (`model`) or in its path (`/model/NAME/v1/...`): by
    program name, alias, repo, or tier (`fast`, `balanced`, `powerful`: the best that is ready).
    """

    enabled: Annotated[
        bool | None, _from_text(_auto(_parse_boolean)),
        Words("`true` or `false`", otherwise="auto", unsaid="where `haproxy` is on PATH"),
    ] = Field(None, description="Whether there is a gateway.", examples=["true"])  # fmt: skip
    bind: Annotated[
        tuple[str, int], _from_text(_parse_bind), Words("an IP address and a port")
    ] = Field(
        ("127.0.0.1", 8080),
        description="Where it listens. Anything but loopback should have `api_key_file`, and "
        "`tls_certificate` where the network is not yours alone.",
        examples=["0.0.0.0:8443"],
    )  # fmt: skip
    hold_seconds: Annotated[int, Field(ge=1, le=3600)] = Field(
        60,
        description="How long a request waits for a model that is loading, restarting, being "
        "swapped or on its way because it was asked for. Then the answer is 503.",
        examples=["120"],
    )
    max_body: Annotated[
        int, Field(ge=64 * 1024, le=256 * 1024 * 1024), _from_text(parse_bytes),
        Words("a size within 64KiB-256MiB"),
    ] = Field(
        8 * 1024 * 1024,
        description="The largest body in which a model is looked for; a larger one is refused with "
        "413, unless its path names the model. A busy connection may take twice as much memory.",
        examples=["32MiB"],
    )  # fmt: skip
    max_connections: Annotated[int, Field(ge=1, le=10000), Words(unit="connections")] = Field(
        256,
        description="How many clients are served at a time; the rest waits to be accepted. As many "
        "more may wait for models that are on their way.",
        examples=["64"],
    )
    api_key_file: Annotated[_File, Words(unsaid="no key is asked for")] = Field(
        "",
        description="A file with one key a line, mode 0600. A request needs one of them as "
        "`Authorization: Bearer KEY`.",
        examples=["~/.synapse/etc/gateway.keys"],
    )
    tls_certificate: Annotated[_File, Words(unsaid="plain HTTP")] = Field(
        "",
        description="A file with a certificate, its chain and its private key (PEM), mode 0600.",
        examples=["~/.synapse/etc/gateway.pem"],
    )
    idle_stop_seconds: _WholeSeconds = Field(
        0,
        description="A model that nobody has used for so long is stopped, and comes back when it "
        "is asked for. 0: never. A pinned one stays.",
        examples=["1800"],
    )


class _Tier(Section):
    """A tier of models: which belong to it, and when and how large they start.

    `[tier:fast]`, `[tier:balanced]` and `[tier:powerful]`; each key has a default for each tier.
    """

    max_parameters: Annotated[
        int | None, _from_text(parse_count),
        Words("a number of parameters such as `7B` or `500M`", otherwise="any"),
    ] = Field(
        None,
        description="The largest models of this tier; what is larger belongs to the next one. Must "
        "grow from fast over balanced to powerful.",
        examples=["4B"],
    )  # fmt: skip
    priority: Annotated[int, Field(ge=0, le=1000)] = Field(
        0,
        description="Lower starts first, gets memory first, and is evicted last.",
        examples=["5"],
    )
    min_context: _Context = Field(
        2048,
        description="The smallest context that is chosen for a model, where memory is scarce.",
        examples=["8192"],
    )
    max_context: _Context = Field(
        16384,
        description="The largest context that is chosen for a model, if it was trained for that.",
        examples=["65536"],
    )


class _Model(Section):
    """Settings for one model or many: every model whose program name, or `repo/file`, matches GLOB
    (case does not matter).

    Where several sections match, later ones win, key by key: so general ones come first. `auto` in
    a later section undoes what an earlier one said. A section that matches nothing is reported.
    """

    enabled: Annotated[
        bool | None, _from_text(_auto(_parse_boolean)),
        Words("`true` or `false`", otherwise="auto", unsaid="as `enable` in `[synapse]` says"),
    ] = Field(
        None,
        description="Whether it runs. What was commanded with `supervisorctl enable` or `disable` "
        "counts more.",
        examples=["true"],
    )  # fmt: skip
    tier: Annotated[
        Tier | None, _from_text(_auto(_parse_tier)), Words(otherwise="auto", unsaid="by its size")
    ] = Field(None, description="The tier to which it belongs.", examples=["balanced"])
    alias: Annotated[
        str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$"),
        Words(
            "a letter or digit, then at most 99 letters, digits and `._:/-`",
            unsaid="its program name",
        ),
    ] = Field(
        None, description="The name by which its API knows it (`model` in a request).",
        examples=["qwen"],
    )  # fmt: skip
    port: Annotated[
        int | None, Field(ge=1024, le=65535), _from_text(_auto(str)),
        Words(otherwise="auto", unsaid="a free one of `port_range`, kept from then on"),
    ] = Field(
        None,
        description="Where it listens. A port that is said here is not given up when somebody "
        "else has it.",
        examples=["8150"],
    )  # fmt: skip
    context: Annotated[
        int | None, Field(ge=256, le=2**24), _from_text(_auto(str)),
        Words(otherwise="auto", unit="tokens", unsaid="the largest that fits, within its tier's"),
    ] = Field(
        None,
        description="The size of its context (`--ctx-size`), shared by its slots.",
        examples=["16384"],
    )  # fmt: skip
    parallel: Annotated[
        int | None, Field(ge=1, le=256), _from_text(_auto(str)),
        Words(otherwise="auto", unit="slots", unsaid="4"),
    ] = Field(
        None,
        description="How many requests it works on at a time (`--parallel`).",
        examples=["2"],
    )  # fmt: skip
    gpu_layers: Annotated[
        int | None, Field(ge=0, le=9999), _from_text(_auto(str)),
        Words(otherwise="auto", unit="layers", unsaid="all, or as many as fit"),
    ] = Field(
        None,
        description="How many of its layers lie on its devices (`--gpu-layers`), the rest on the "
        "host.",
        examples=["20"],
    )  # fmt: skip
    device: Annotated[
        str | None, _from_text(_auto(_parse_device)),
        Words(
            "names of devices as the engine lists them, separated by commas, or `none`: the host",
            otherwise="auto", unsaid="as few as it takes",
        ),
    ] = Field(
        None,
        description="Where it lies (`--device`). `supervisorctl devices` lists them.",
        examples=["CUDA0"],
    )  # fmt: skip
    fallback: Annotated[
        str | None, _from_text(_auto(_parse_name)),
        Words("the program name of another model", otherwise="auto", unsaid="none"),
    ] = Field(
        None,
        description="A smaller model that serves in its place, on the same port and under the "
        "same alias, when it was given up or finds no room. That one need not be enabled itself.",
        examples=["qwen2.5-1.5b-instruct-q4_k_m"],
    )  # fmt: skip
    sleep_idle_seconds: Annotated[
        int | None, Field(ge=0, le=10**7), Words(unsaid="0")
    ] = Field(
        None,
        description="Idle for so long, it frees its weights, and loads them again at the next "
        "request. 0: never.",
        examples=["600"],
    )  # fmt: skip
    pinned: Annotated[
        bool | None, _from_text(_parse_boolean), Words("`true` or `false`", unsaid="false")
    ] = Field(None, description="Whether it is never evicted for another.", examples=["true"])
    args: Annotated[
        tuple[str, ...] | None, _from_text(_parse_arguments),
        Words("words, split as in a shell; letters, digits and `_@%+=:,./[]{}\"*^|-`",
              unsaid="none"),
    ] = Field(
        None,
        description="Anything else that llama-server takes. The engine is asked whether it takes "
        "them before a model is stopped for them.",
        examples=["--flash-attn on --api-key-file /home/you/.synapse/etc/api-keys"],
    )  # fmt: skip


_NOT_A_NUMBER = {
    "int_parsing": "whole number", "int_parsing_size": "whole number",
    "int_from_float": "whole number", "float_parsing": "number",
}  # fmt: skip
# Examples of keys that have no number as their default.
_NUMBERS_OR_AUTO = {"port": 8150, "context": 16384, "parallel": 4, "gpu_layers": 99}
_NUMBERS = {**_NUMBERS_OR_AUTO, "priority": 10, "sleep_idle_seconds": 600}
_PATTERNS_IN_WORDS = {
    "engine": "auto, or a path that begins with / or ~",
    "alias": "a letter or digit, then at most 99 letters, digits and ._:/-",
}

_FIXED: dict[str, type[Section]] = {
    "synapse": _Synapse, "probe": _Probe, "restart": _Restart, "stop": _Stop, "notify": _Notify,
    "gateway": _Gateway,
}  # fmt: skip
_TIER_DEFAULTS = {f"tier:{rule.tier.value}": rule for rule in DEFAULT_TIERS}
# Every section by the name it has in the documentation.
SECTIONS: Mapping[str, type[Section]] = {**_FIXED, "tier:TIER": _Tier, "model:GLOB": _Model}
_S = TypeVar("_S", bound=Section)


def load(path: Path) -> Settings:
    """The settings in `path`; all defaults where there is no such file.

    Raises:
        ConfigError: one line for each thing that is wrong.
    """
    try:
        text = _text(path)
    except FileNotFoundError:
        return Settings()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: cannot read it: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read it: {error.strerror}; make it a file that you may read"
        ) from None
    return parse(text, str(path))


def _text(path: Path) -> str:
    """The content of a regular file of a sensible size; a named pipe is not waited for.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is no text.
        ConfigError: it is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ConfigError(f"{path}: is not a regular file; remove it, `synapse init` lays one")
        content = file.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:
        raise ConfigError(f"{path}: is larger than {_LARGEST_BYTES} bytes; remove what is no INI")
    return content.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def parse(text: str, source: str = "synapse.conf") -> Settings:
    """Settings from INI text.

    Raises:
        ConfigError: one line for each thing that is wrong, each beginning with `source`.
    """
    problems: list[str] = []
    sections = _sections(text, problems)
    fixed = {
        name: _validated(model, name, sections.get(name, {}), problems)
        for name, model in _FIXED.items()
    }
    tiers = _tiers(sections, problems)
    rules = _model_rules(sections, problems)
    problems += _unknown_sections(sections)
    if problems:
        raise ConfigError([f"{source}: {problem}" for problem in problems])
    return _settings(fixed, tiers, rules)


def _sections(text: str, problems: list[str]) -> dict[str, dict[str, str]]:
    """Section → key → value; each line that a strict reading rejects is noted and left out."""
    lines = text.split("\n")
    for _ in range(_MOST_BROKEN_LINES):
        parser = configparser.RawConfigParser(
            interpolation=None, inline_comment_prefixes=(";", "#"), default_section="\0none"
        )
        try:
            parser.read_file(lines)
        except configparser.MissingSectionHeaderError as error:
            problems.append(f"line {error.lineno}: stands before the first [section]")
            lines[error.lineno - 1] = "#"
        except configparser.ParsingError as error:
            for number, _quoted in error.errors:
                wrong = lines[number - 1].strip()[:80]
                problems.append(f"line {number}: not `key = value`: {wrong!a}")
                lines[number - 1] = "#"
        except configparser.DuplicateOptionError as error:
            section, number = _without_mark(error.section), error.lineno or 1
            problems.append(f"[{section}] {error.option}: given twice (line {number})")
            lines[number - 1] = "#"
        except configparser.DuplicateSectionError as error:
            section, number = error.section, error.lineno or 1
            problems.append(f"[{section}]: stands twice (line {number}); join the two")
            lines[number - 1] = f"[{section}{_SECOND_MARK}{number}]"
        else:
            return _joined(parser)
    return {}


def _without_mark(section: str) -> str:
    return section.split(_SECOND_MARK)[0]


def _joined(parser: configparser.RawConfigParser) -> dict[str, dict[str, str]]:
    sections: dict[str, dict[str, str]] = {}
    for name in parser.sections():
        sections.setdefault(_without_mark(name), {}).update(parser.items(name))
    return sections


def _validated(model: type[_S], section: str, values: dict[str, str], problems: list[str]) -> _S:
    """The section as a model; its defaults, with the errors noted, where it is wrong."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems += [_explain(section, item, model) for item in error.errors()]
        return model()


def _explain(section: str, error: Any, model: type[Section]) -> str:
    key = ".".join(str(part) for part in error["loc"][:1])
    place = f"[{section}] {key}" if key else f"[{section}]"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key{_allowed(key, model.model_fields)}"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    # A message of ours quotes what it may; `args` may hold a key, which a log must not.
    if isinstance(given, str) and error["type"] != "value_error":
        quoted = given if len(given) <= _LONGEST_QUOTED else f"{given[:_LONGEST_QUOTED]}..."
        message = f"{quoted!a}{_in_our_words(error['type'], key, message, model)}"
    return f"{place}: {message}"


def _in_our_words(kind: str, key: str, message: str, model: type[Section]) -> str:
    """What follows the value that was given: pydantic's words are made for programmers."""
    if kind == "string_pattern_mismatch":
        return f": must be {_PATTERNS_IN_WORDS[key]}"
    if kind in _NOT_A_NUMBER:
        example = _NUMBERS.get(key, model.model_fields[key].default)
        otherwise = ", or auto" if key in _NUMBERS_OR_AUTO else ""
        return f" is not a {_NOT_A_NUMBER[kind]} such as {example:g}{otherwise}"
    return f": {message.replace('Input should be', 'must be')}"


def _allowed(given: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(names), n=1)
    return f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(names)}"


def _tiers(sections: dict[str, dict[str, str]], problems: list[str]) -> tuple[TierRule, ...]:
    rules = []
    for section, default in _TIER_DEFAULTS.items():
        said = sections.get(section, {})
        known = len(problems)
        given = _validated(_Tier, section, said, problems)
        taken = said if len(problems) == known else {}
        rule = replace(default, **{key: getattr(given, key) for key in taken})
        if rule.max_context < rule.min_context:
            problems.append(
                f"[{section}] max_context: {rule.max_context} is less than min_context "
                f"({rule.min_context})"
            )
        rules.append(rule)
    # Only the last tier may be without a limit.
    limits = [math.inf if rule.max_parameters is None else rule.max_parameters for rule in rules]
    if math.inf in limits[:-1] or limits != sorted(limits):
        problems.append("[tier:…] max_parameters: must grow from fast over balanced to powerful")
    return tuple(rules)


def _model_rules(sections: dict[str, dict[str, str]], problems: list[str]) -> tuple[ModelRule, ...]:
    rules = []
    for section, values in sections.items():
        if not section.startswith("model:"):
            continue
        glob = section.removeprefix("model:").strip()
        if not glob:
            problems.append(f"[{section}]: name a model, or a pattern such as qwen*")
        given = _validated(_Model, section, values, problems)
        chosen = {key: getattr(given, key) for key in values if key in _Model.model_fields}
        rules.append(ModelRule(glob, ModelSettings(**chosen), frozenset(chosen)))
    return tuple(rules)


def _unknown_sections(sections: Iterable[str]) -> list[str]:
    known = [*_FIXED, *_TIER_DEFAULTS]
    return [
        f"[{section}]: unknown section{_allowed(section, [*known, 'model:GLOB'])}"
        for section in sections
        if section not in known and not section.startswith("model:")
    ]


def _settings(
    fixed: dict[str, Any], tiers: tuple[TierRule, ...], rules: tuple[ModelRule, ...]
) -> Settings:
    synapse: _Synapse = fixed["synapse"]
    first_port, last_port = synapse.port_range
    return Settings(
        cache_dirs=synapse.cache_dirs, model_dirs=synapse.model_dirs, engine=synapse.engine,
        rpc=synapse.rpc or _endpoints_in(rules), first_port=first_port, last_port=last_port,
        host=synapse.host,
        enable=synapse.enable,
        max_parallel=synapse.max_parallel, memory_reserve=synapse.memory_reserve,
        when_full=synapse.when_full, climb_after_seconds=synapse.climb_after_seconds,
        overcommit_sleepers=synapse.overcommit_sleepers, trial_seconds=synapse.trial_seconds,
        probe=ProbePolicy(**fixed["probe"].model_dump()),
        restart=RestartPolicy(**fixed["restart"].model_dump()),
        stop=StopPolicy(**fixed["stop"].model_dump()), notify=_notify_policy(fixed["notify"]),
        gateway=_gateway_settings(fixed["gateway"]), tiers=tiers, models=rules,
    )  # fmt: skip


def _gateway_settings(said: _Gateway) -> GatewaySettings:
    host, port = said.bind
    rest = said.model_dump(exclude={"bind", "max_body"})
    return GatewaySettings(host=host, port=port, max_body_bytes=said.max_body, **rest)


def _notify_policy(said: _Notify) -> NotifyPolicy:
    is_all = _ALL_EVENTS in said.events
    rest = said.model_dump(exclude={"events"})
    return NotifyPolicy(
        phases=tuple(phase for phase in Phase if is_all or phase.value in said.events),
        failures=is_all or _FAILURE in said.events, **rest,
    )  # fmt: skip

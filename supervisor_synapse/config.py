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
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from supervisor_synapse.core.model import Tier
from supervisor_synapse.core.settings import (
    DEFAULT_TIERS,
    Enable,
    ModelRule,
    ModelSettings,
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
_OWNED_ARGUMENTS = {
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
        if option in _OWNED_ARGUMENTS:
            raise ValueError(f"{option} is not set through args: {_OWNED_ARGUMENTS[option]}")
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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class _Synapse(_Section):
    cache_dirs: Annotated[tuple[str, ...], _from_text(_parse_folders)] = ()
    model_dirs: Annotated[tuple[str, ...], _from_text(_parse_folders)] = ()
    engine: Annotated[str, Field(pattern=r"^(auto|[/~].*)$")] = "auto"
    rpc: Annotated[tuple[str, ...], _from_text(_parse_endpoints)] = ()
    port_range: Annotated[tuple[int, int], _from_text(_parse_port_range)] = (8100, 8199)
    host: Annotated[str, _from_text(_parse_host)] = "127.0.0.1"
    enable: Enable = Enable.FIT
    max_parallel: Annotated[int, Field(ge=1, le=64)] = 3
    memory_reserve: Annotated[Reserve, _from_text(_parse_reserve)] = Reserve()
    when_full: WhenFull = WhenFull.DEGRADE
    climb_after_seconds: Annotated[int, Field(ge=1, le=86400)] = 60
    overcommit_sleepers: bool = False
    trial_seconds: Annotated[int, Field(ge=1, le=86400)] = 60


class _Probe(_Section):
    period_seconds: _Seconds = 5.0
    timeout_seconds: _Seconds = 2.0
    failure_threshold: Annotated[int, Field(ge=1, le=100)] = 3
    stall_seconds: _Seconds = 120.0


class _Restart(_Section):
    backoff_initial_seconds: _Seconds = 1.0
    backoff_factor: Annotated[float, Field(ge=1, le=100)] = 2.0
    backoff_max_seconds: _Seconds = 300.0
    intensity: Annotated[int, Field(ge=1, le=1000)] = 5
    period_seconds: _Seconds = 600.0
    cooldown_seconds: _Seconds = 900.0

    @model_validator(mode="after")
    def _ordered(self) -> _Restart:
        if self.backoff_max_seconds < self.backoff_initial_seconds:
            raise ValueError("backoff_max_seconds must be at least backoff_initial_seconds")
        return self


class _Stop(_Section):
    drain_seconds: _WholeSeconds = 30
    term_seconds: Annotated[int, Field(ge=1, le=600)] = 2


class _Tier(_Section):
    max_parameters: Annotated[int | None, _from_text(parse_count)] = None
    priority: Annotated[int, Field(ge=0, le=1000)] = 0
    min_context: Annotated[int, Field(ge=256, le=2**24)] = 2048
    max_context: Annotated[int, Field(ge=256, le=2**24)] = 16384


class _Model(_Section):
    enabled: Annotated[bool | None, _from_text(_auto(_parse_boolean))] = None
    tier: Annotated[Tier | None, _from_text(_auto(_parse_tier))] = None
    alias: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]{0,99}$")] = None
    port: Annotated[int | None, Field(ge=1024, le=65535), _from_text(_auto(str))] = None
    context: Annotated[int | None, Field(ge=256, le=2**24), _from_text(_auto(str))] = None
    parallel: Annotated[int | None, Field(ge=1, le=256), _from_text(_auto(str))] = None
    gpu_layers: Annotated[int | None, Field(ge=0, le=9999), _from_text(_auto(str))] = None
    device: Annotated[str | None, _from_text(_auto(_parse_device))] = None
    fallback: Annotated[str | None, _from_text(_auto(_parse_name))] = None
    sleep_idle_seconds: Annotated[int | None, Field(ge=0, le=10**7)] = None
    pinned: Annotated[bool | None, _from_text(_parse_boolean)] = None
    args: Annotated[tuple[str, ...] | None, _from_text(_parse_arguments)] = None


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

_FIXED: dict[str, type[_Section]] = {
    "synapse": _Synapse, "probe": _Probe, "restart": _Restart, "stop": _Stop,
}  # fmt: skip
_TIER_DEFAULTS = {f"tier:{rule.tier.value}": rule for rule in DEFAULT_TIERS}
_S = TypeVar("_S", bound=_Section)


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


def _explain(section: str, error: Any, model: type[_Section]) -> str:
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


def _in_our_words(kind: str, key: str, message: str, model: type[_Section]) -> str:
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
        stop=StopPolicy(**fixed["stop"].model_dump()), tiers=tiers, models=rules,
    )  # fmt: skip

"""docs/configuration.md, made of the models in config.py: what is documented is what is checked.

python -m supervisor_synapse.reference > docs/configuration.md      (or: make docs)
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from supervisor_synapse.config import OWNED_ARGUMENTS, SECTIONS, Section, Words
from supervisor_synapse.core.settings import DEFAULT_TIERS, MIB, Reserve

_HEAD = """\
# Configuration

<!-- Made by `make docs` from supervisor_synapse/config.py: edit that. -->

Your settings stand in `etc/synapse.conf` below the deployment's folder (`~/.synapse`, `--prefix`,
or `$SYNAPSE_PREFIX`). `synapse init` lays it down with every key and its default, and never
touches it again. A file that is not there, or says nothing, gives the defaults.

## How it is written

INI, as in supervisord's own files: `[section]`, then `key = value`. ` ;` and ` #` begin a comment.
There is no interpolation: `%` is a plain character. A value goes on in the next line where that is
indented. Unknown sections and keys are errors. All errors are told at once, each with its section,
its key and what is allowed, and then nothing is changed: what ran goes on running.

Sizes take a unit (`KiB`, `MiB`, `GiB`, `TiB`, or `kB`, `MB`, `GB`, `TB`; without one: bytes). Times
are in the unit that the key's name says.

## When a change takes effect

With `synapse discover` (or `supervisorctl discover`, or Start of the program `discover` in the web
page), and not before; `synapse up` runs it too. It checks the file, then

- what stands in the models' blocks restarts the models that it changes, one at a time, each on
  trial: `host`, `engine`, `[stop]`, and what a `[model:...]` section says of arguments;
- what decides which models run, and where (`cache_dirs`, `enable`, tiers ...), changes only the
  models whose choice comes out otherwise;
- all else is taken up by the listener at once and restarts nothing: `max_parallel`, `when_full`,
  `[probe]`, `[restart]`, `[notify]`.

`synapse discover --dry-run` shows what would change, and which models would restart.

## Which section wins

A key of a `[model:...]` section is more particular than `[synapse]` and the tiers. Of several
`[model:...]` sections that match a model, the later one wins, key by key; so write general ones
first:

```ini
[model:*]
parallel = 2

[model:qwen*]
context = 16384

[model:qwen2.5-14b-*]
context = auto       ; undoes the line above; parallel is still 2
```

Commands count more than the file: `supervisorctl enable` and `disable`. So does a block that was
edited by hand.
"""

_ARGUMENTS_HEAD = """\
## What `args` does not take

These are set elsewhere, because something beside the server must know them, or because a command
line is no place for them (every user of the machine can read it in `ps`):
"""


def document() -> str:
    """The whole page."""
    sections = [_section(name, model) for name, model in SECTIONS.items()]
    return "\n".join([_HEAD, *sections, _ARGUMENTS_HEAD, _refused_arguments(OWNED_ARGUMENTS)])


def _section(name: str, model: type[Section]) -> str:
    keys = [_key(name, key, field) for key, field in model.model_fields.items()]
    return "\n".join([f"## `[{name}]`\n", f"{inspect.getdoc(model)}\n", *keys])


def _key(section: str, key: str, field: FieldInfo) -> str:
    words = words_of(field)
    unit = _unit(key, words)
    facts = [f"*{_capital(_allowed(field, words))}{f'; unit: {unit}' if unit else ''}.*"]
    facts.append(f"Default: {_default(section, key, field, words)}.")
    facts.append(f"Example: `{key} = {(field.examples or [''])[0]}`")
    return f"### `{key}`\n\n{field.description}\n\n{'  '.join(facts)}\n"


def words_of(field: FieldInfo) -> Words:
    """What is told of a key, where several say something of it the last one of each."""
    said = [one for one in field.metadata if isinstance(one, Words)]
    found = {
        name: next((getattr(one, name) for one in reversed(said) if getattr(one, name)), "")
        for name in ("allowed", "otherwise", "unit", "unsaid")
    }
    return Words(**found)


def _unit(key: str, words: Words) -> str:
    return words.unit or ("seconds" if key.endswith("_seconds") else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- what a value may be -------------------------------------------------------------------------


def _allowed(field: FieldInfo, words: Words) -> str:
    said = words.allowed or _by_type(field)
    return f"{said}, or `{words.otherwise}`" if words.otherwise else said


def _by_type(field: FieldInfo) -> str:
    kind = _plain(field.annotation)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _alternatives(member.value for member in kind)
    number = {int: "a whole number", float: "a number"}[kind]
    return f"{number} {_range(field.metadata)}"


def _plain(annotation: Any) -> Any:
    """`int | None` → `int`."""
    if get_origin(annotation) in (types.UnionType, Union):
        (annotation,) = [one for one in get_args(annotation) if one is not type(None)]
    return annotation


def _alternatives(values: Iterable[str]) -> str:
    *first, last = [f"`{value}`" for value in values]
    return f"{', '.join(first)} or {last}"


def _range(metadata: Iterable[Any]) -> str:
    bounds = {
        name: value
        for one in metadata
        for name in ("ge", "gt", "le")
        if (value := getattr(one, name, None)) is not None
    }
    least = f"above {bounds['gt']}" if "gt" in bounds else f"from {bounds['ge']}"
    return f"{least} to {bounds['le']}"


# --- defaults ------------------------------------------------------------------------------------


def _default(section: str, key: str, field: FieldInfo, words: Words) -> str:
    if section.startswith("tier:"):
        return ", ".join(
            f"`{shown(getattr(rule, key), key)}` ({rule.tier.value})" for rule in DEFAULT_TIERS
        )
    if field.default in (None, "", ()):
        return words.unsaid or "nothing"
    return f"`{shown(field.default)}`"


def shown(value: object, key: str = "") -> str:
    """A value as it stands in synapse.conf."""
    match value:
        case bool():
            return str(value).lower()
        case Enum():
            return str(value.value)
        case Reserve():
            return f"{value.bytes // MIB}MiB"
        case (int(), int()):
            return "-".join(map(str, value))
        case tuple():
            return ", ".join(value)
        case None:
            return "any"
        case int() if key == "max_parameters":
            return f"{value // 10**9}B"
        case float():
            return f"{value:g}"
    return str(value)


# --- args ----------------------------------------------------------------------------------------


def _refused_arguments(owned: Mapping[str, str]) -> str:
    return "\n".join(["| argument | instead |", "|---|---|", *_rows(owned), ""])


def _rows(owned: Mapping[str, str]) -> Iterator[str]:
    for why in dict.fromkeys(owned.values()):
        options = ", ".join(f"`{option}`" for option, reason in owned.items() if reason == why)
        yield f"| {options} | {why.replace(' here', ' in the same section')} |"


if __name__ == "__main__":
    sys.stdout.write(document())

"""Options beyond the flags: KEY=VALUE pairs, tables of a configuration file, and the file that says the same."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any

from bnn.errors import ConfigError


def parse_pairs(flag: str, pairs: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts as a dictionary: a value is TOML (3, 0.5, true, [1, 2], {name = "Normal"}), else a text.

    Raises:
        ConfigError: a text without `=`, or a key twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise ConfigError(flag, want="KEY=VALUE", got=repr(pair), fix="write for example lr=0.01")
        if key in found:
            raise ConfigError(flag, want="each key once", got=f"'{key}' twice", fix="leave one out")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


def check_kind(place: str, value: Any, default: Any) -> Any:
    """The value, if it is of the kind of the option's default; lists become tuples where that is one.

    Raises:
        ConfigError: it is of another kind.
    """
    if isinstance(default, tuple) and isinstance(value, (list, str)):
        return tuple(value) if isinstance(value, list) else (value,)
    kinds: dict[type, tuple[tuple[type, ...], str]] = {
        bool: ((bool,), "true or false"),
        int: ((int,), "a whole number"),
        float: ((int, float), "a number"),
        str: ((str, list), "a text"),
    }
    for kind, (allowed, words) in kinds.items():
        if type(default) is kind:
            if not isinstance(value, allowed) or (kind is not bool and isinstance(value, bool)):
                raise ConfigError(place, want=words, got=repr(value), fix=f"the default is {default!r}")
            return value
    return value


def as_toml(values: Mapping[str, Any]) -> str:
    """A TOML document: plain values first, then tables; what is None is left out, since TOML has no word for it."""
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items() if value is not None]
    for name, table in values.items():
        if isinstance(table, Mapping) and any(value is not None for value in table.values()):
            lines += ["", f"[{_key(name)}]"]
            lines += [f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines)


def _key(name: str) -> str:
    return name if name.replace("-", "").replace("_", "").isalnum() and name.isascii() else json.dumps(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # of floats what reads back as the same number, also inf and nan
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(inner) for inner in value) + "]"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {_value(inner)}" for key, inner in value.items() if inner is not None)
        return "{ " + inside + " }"
    return json.dumps(str(value), ensure_ascii=False)  # a JSON string is a TOML string

"""Options: one configuration, given whole, by its fields as keywords, or both; checked when it is made."""

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

Config = TypeVar("Config")


def resolve(default: Config, config: Config | None, /, **fields: Any) -> Config:
    """`config`, or `default` where it is None, with those of `fields` that are not None in place of its own.

    Raises:
        TypeError: `config` is of another class, or a field is unknown; others as that class.
        ValueError: as that class.
    """
    kind: Any = type(default)
    config = default if config is None else config
    if not isinstance(config, kind):
        raise TypeError(f"config must be of type {kind.__name__}, got {config!r}")
    refuse_unknown(kind, fields)
    changes = {name: value for name, value in fields.items() if value is not None}
    return dataclasses.replace(config, **changes) if changes else config


def refuse_unknown(kind: Any, fields: Collection[str], where: str = "") -> None:
    """`fields` must be names of fields of the dataclass `kind`.

    Raises:
        TypeError: one is not; the message says `where` it stands.
    """
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - known):
        raise TypeError(f"unknown settings {unknown}{where}; those of {kind.__name__} are {sorted(known)}")


def check_types(config: Any) -> None:
    """Each field of a dataclass must have the type of its default; a whole number may stand for a float.

    Raises:
        TypeError: one has not; True and False are no numbers.
    """
    for field in dataclasses.fields(config):
        value, wanted = getattr(config, field.name), type(field.default)
        fits = isinstance(value, (int, float) if wanted is float else wanted)
        if not fits or (isinstance(value, bool) and wanted is not bool):
            raise TypeError(f"{field.name} must be of type {wanted.__name__}, got {value!r}")


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """`value` must be one of `known`.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")

"""Options: one configuration, given whole, by its fields as keywords, or both; checked when it is made."""

import dataclasses
from collections.abc import Collection
from typing import Any, TypeVar

Config = TypeVar("Config")


def resolve(default: Config, config: object, /, **fields: Any) -> Config:
    """`config`, or `default` where it is None, with those of `fields` that are not None in place of its own.

    Raises:
        TypeError: `config` is of another class, or a field is unknown; others as that class.
        ValueError: as that class.
    """
    kind: Any = type(default)
    given: Any = default if config is None else config
    if not isinstance(given, kind):
        raise TypeError(f"config must be of type {kind.__name__}, got {config!r}")
    refuse_unknown(kind, fields)
    changes = {name: value for name, value in fields.items() if value is not None}
    return dataclasses.replace(given, **changes) if changes else given


def settable(name: str) -> Any:
    """A property: the field `name` of the owner's `config`, which setting it replaces."""

    def change(owner: Any, value: Any) -> None:
        owner.config = dataclasses.replace(owner.config, **{name: value})

    return property(lambda owner: getattr(owner.config, name), change)


def check_change(owner: str, before: Config | None, after: Config, fixed: Collection[str]) -> None:
    """`after` may take the place of `before`: those options are the same that parameters were made for.

    Raises:
        TypeError: `after` is of another class.
        ValueError: one of `fixed` differs.
    """
    if before is None:
        return
    resolve(before, after)
    for name in fixed:
        if getattr(before, name) != getattr(after, name):
            raise ValueError(
                f"config.{name} must stay {getattr(before, name)!r}, for which the parameters of this {owner} were "
                f"made; got {getattr(after, name)!r}: make a new {owner}"
            )


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

    A field whose default is None is for the class itself to check.

    Raises:
        TypeError: one has not; True and False are no numbers.
    """
    for field in dataclasses.fields(config):
        if field.default is not None:
            check_type(field.name, getattr(config, field.name), type(field.default))


def check_type(name: str, value: object, wanted: type, hint: str = "") -> None:
    """The argument `name` must be of the type `wanted`; a whole number may stand for a float.

    Raises:
        TypeError: it is not; True and False are no numbers. The message ends with `hint`.
    """
    fits = isinstance(value, (int, float) if wanted is float else wanted)
    if not fits or (isinstance(value, bool) and wanted is not bool):
        raise TypeError(f"{name} must be of type {wanted.__name__}, got {value!r}{hint}")


def check_choice(name: str, value: str, known: Collection[str]) -> None:
    """`value` must be one of `known`.

    Raises:
        ValueError: it is not.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")

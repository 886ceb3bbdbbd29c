"""The catalogue of models: what is published of each, and where that was read.

Each TOML file beside this module is a family, each of its tables one entry: a `ModelShape`, plus
`published_parameters` and `aliases`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from typing import Any

from ridgeline.errors import ModelError, nearest
from ridgeline.model.shape import ModelShape


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue."""

    shape: ModelShape
    published_parameters: Decimal | None
    """As published, to the digits published: Decimal("8.03E+9") has three, an integer is exact.
    None where nobody published one."""
    source: str
    """Where the numbers were read, and which of them were recalled rather than read."""
    aliases: tuple[str, ...]
    """Other names that find this entry."""


def names() -> list[str]:
    """Every entry's own name, family by family."""
    return list(_tables())


def entry(name: str) -> Entry:
    """The entry of that name or alias; ModelError with the nearest name when there is none."""
    own, table = _find(name)
    shape = ModelShape(name=own, **_shape_of(table))
    published = table.get("published_parameters")
    return Entry(
        shape=shape,
        published_parameters=None if published is None else Decimal(published),
        source=shape.source,
        aliases=tuple(table.get("aliases", ())),
    )


def expand(values: dict[str, Any]) -> dict[str, Any]:
    """A `[model]` table with what it leaves out taken from the entry it names, if it names one.

    What is derived (`kv_heads`, `head_dim`, …) stays open, so it follows from the values given.
    Raises ModelError for a name that is no entry's when the table has no shape of its own.
    """
    try:
        own, table = _find(str(values.get("name", "custom")))
    except ModelError:
        if "layers" in values and "hidden" in values:
            return values
        raise
    published = _shape_of(table)
    given = {key: value for key, value in values.items() if key != "name"}
    for key, value in given.items():
        if isinstance(value, dict) and isinstance(published.get(key), dict):
            given[key] = published[key] | value
    return {"name": own} | published | given


def _find(name: str) -> tuple[str, dict[str, Any]]:
    tables = _tables()
    own_names = {
        known: own for own, table in tables.items() for known in (own, *table.get("aliases", ()))
    }
    if name not in own_names:
        raise ModelError(
            f"model {name!r}",
            f"the catalogue holds {len(tables)} models, and none of that name",
            nearest(name, own_names),
        )
    return own_names[name], tables[own_names[name]]


def _shape_of(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key in ModelShape.model_fields}


def _tables() -> dict[str, dict[str, Any]]:
    """All tables by name; floats stay Decimal, so that a published count keeps its digits."""
    files = (file for file in resources.files(__name__).iterdir() if file.name.endswith(".toml"))
    tables: dict[str, dict[str, Any]] = {}
    for file in sorted(files, key=lambda file: file.name):
        tables |= tomllib.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
    return tables

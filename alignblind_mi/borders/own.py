"""The data that the package brings along. Does NOT know what it means."""

import tomllib
from importlib.resources import files
from typing import Any


def own_table(folder: str, name: str) -> dict[str, Any]:
    """The tables of a TOML file of the package: `folder` below it, and the file's name without its ending."""
    return tomllib.loads((files("alignblind_mi") / folder / f"{name}.toml").read_text("utf-8"))

"""`alignblind merge`: the shares of a run become the whole."""

from pathlib import Path
from typing import Annotated

import typer

from alignblind_mi.borders.texts import say
from alignblind_mi.commands.options import said_missing


def merge(
    folders: Annotated[list[Path], typer.Argument(help="The folders that --shard wrote into.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where the whole goes: a new folder, or one of the shares.")] = Path("merged"),
) -> None:
    """Bring shares of one run together that were computed in folders of their own; says what is missing yet.

    Example: alignblind merge share1 share2 share3 --out study
    """
    from alignblind_mi.studies.shares import merge as merge_shares

    left = merge_shares(folders, out)
    if left:
        say(f"{said_missing(left)} Run their shares, then merge again.")
    else:
        say(f"{out} is whole: the command of the run, without --shard and with --out {out}, makes its page.")

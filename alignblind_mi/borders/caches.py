"""Where this machine keeps what can be made again. Does NOT know what lies there."""

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """$ALIGNBLIND_CACHE, or this project's part of the user's cache folder."""
    if given := os.environ.get("ALIGNBLIND_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "alignblind_mi"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "alignblind_mi"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "alignblind_mi"

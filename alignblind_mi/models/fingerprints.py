"""What identifies a model's weights, so that a results folder never mixes two: the hub's commit, or a hash of a folder's files.

Every byte counts. A file of 256 MiB or more is read through once (a 70B model at about the speed of its disk), and its hash is kept in the
user's cache folder under the file's identity: where it lies, its size, and the times of its last change, of which the inode's cannot be set
by a program. A later start looks these up. This module does NOT load anything.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any

from alignblind_mi.borders.caches import cache_root
from alignblind_mi.borders.texts import say
from alignblind_mi.borders.writing import write_text
from alignblind_mi.errors import ResultError
from alignblind_mi.models.gguf import gguf_path
from alignblind_mi.models.spec import ModelSpec

LARGE = 1 << 28
CHUNK = 1 << 24
FRESH = 2.0    # seconds since a file's last change in which another change may have the same time
TOLD = 1 << 32    # bytes that take long enough to be said
KINDS = (".json", ".safetensors", ".bin", ".model")


def fingerprint(spec: ModelSpec, config: Any) -> str:
    """What identifies the weights of a model: the hub's commit, or "sha256:..." of all that a folder's files, or a GGUF file, hold."""
    if spec.gguf_file is not None:
        path = gguf_path(spec)
        return f"sha256:{hashlib.sha256(f'{path.name}:{large_digest(path)}'.encode()).hexdigest()[:16]}"
    folder = Path(spec.source)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None) or spec.revision or "unknown")
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in KINDS:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            digest.update(file.read_bytes() if size < LARGE else large_digest(file).encode())
    return f"sha256:{digest.hexdigest()[:16]}"


def large_digest(file: Path) -> str:
    """The SHA-256 of a file's content; looked up where this very state of the file was read before."""
    kept = cache_root() / "digests" / _state(file)
    with contextlib.suppress(OSError, ValueError):
        found = kept.read_text("ascii")
        if len(bytes.fromhex(found)) == hashlib.sha256().digest_size:
            return found
    before = _state(file)
    if file.stat().st_size >= TOLD:
        say(f"note: {file.name} is read through once, for its fingerprint; later starts look it up.", err=True)
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(CHUNK):
            digest.update(part)
    if _state(file) == before and time.time() - max(file.stat().st_mtime, file.stat().st_ctime) > FRESH:
        with contextlib.suppress(OSError, ResultError):    # without a cache it is read again next time
            write_text(kept, digest.hexdigest())
    return digest.hexdigest()


def _state(file: Path) -> str:
    """A name for a file as it is now."""
    stat = file.stat()
    told = (os.fspath(file.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return hashlib.sha256(repr(told).encode("utf-8", "surrogatepass")).hexdigest()

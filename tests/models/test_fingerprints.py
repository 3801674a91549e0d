"""What identifies a model's weights: it changes with every byte, however large the file, and reads a large one once."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignblind_mi.models import fingerprints
from alignblind_mi.models.embedded import organism_path
from alignblind_mi.models.fingerprints import fingerprint, large_digest
from alignblind_mi.models.spec import ModelSpec


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A checkpoint whose weights count as a large file, last changed a while ago."""
    monkeypatch.setenv("ALIGNBLIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprints, "LARGE", 1000)
    monkeypatch.setattr(fingerprints, "FRESH", -1.0)
    return Path(shutil.copytree(organism_path("aligned"), tmp_path / "model"))


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The large files that are read through."""
    found = []
    own = Path.open

    def opened(path, mode="r", *args, **kwargs):
        if path.suffix == ".safetensors" and "b" in mode:
            found.append(path.name)
        return own(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)
    return found


def of(folder: Path) -> str:
    return fingerprint(ModelSpec(str(folder)), SimpleNamespace())


def changed_in_place(file: Path) -> None:
    """One byte of the last weight is another, and the file's time is set back to what it was."""
    before = file.stat()
    with file.open("r+b") as content:
        content.seek(-1, os.SEEK_END)
        last = content.read(1)
        content.seek(-1, os.SEEK_END)
        content.write(bytes([last[0] ^ 1]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def test_one_byte_of_a_large_file_changes_it_even_where_size_and_time_do_not(folder):
    before = of(folder)
    changed_in_place(folder / "model.safetensors")
    assert of(folder) != before


def test_a_large_file_is_read_once_and_again_when_it_was_changed(folder, reads):
    before = of(folder)
    assert reads == ["model.safetensors"]
    assert of(folder) == before
    assert reads == ["model.safetensors"]
    changed_in_place(folder / "model.safetensors")
    reads.clear()
    assert of(folder) != before
    assert reads == ["model.safetensors"]


def test_the_same_weights_elsewhere_are_the_same(folder, tmp_path):
    assert of(Path(shutil.copytree(folder, tmp_path / "copy"))) == of(folder)


def test_a_damaged_note_of_the_cache_is_read_anew(folder, tmp_path):
    before = of(folder)
    for note in (tmp_path / "cache" / "digests").iterdir():
        note.write_text("nonsense")
    assert of(folder) == before


def test_a_cache_that_cannot_be_written_costs_time_alone(folder, tmp_path, reads):
    (tmp_path / "cache").write_text("a file in its place")
    assert of(folder) == of(folder)
    assert len(reads) == 2


def test_a_file_that_was_just_changed_is_not_remembered(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(fingerprints, "FRESH", 3600.0)
    large_digest(folder / "model.safetensors")
    assert not (tmp_path / "cache").exists()


def test_small_files_are_hashed_as_before():
    """Results of former versions stay good: of what has no large file the fingerprint is the same."""
    import hashlib

    digest = hashlib.sha256()
    for file in sorted(organism_path("base").iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model"):
            digest.update(f"{file.name}:{file.stat().st_size}".encode() + file.read_bytes())
    assert of(organism_path("base")) == f"sha256:{digest.hexdigest()[:16]}"

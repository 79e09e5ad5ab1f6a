"""The registry and fetching, with downloaders replaced by small programs of our own."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest

from rorqual.data import sources
from rorqual.data.corpus import corpus_files, read_file
from rorqual.data.sources import SOURCES, Source, fetch, source_record
from rorqual.errors import DataError, RorqualError


def test_registry_is_well_formed() -> None:
    assert len(SOURCES) == 11
    for name, source in SOURCES.items():
        assert name == source.name == name.lower()
        assert source.licence
        assert source.description
        assert all("==" in package for package in source.python), "versions on the index are pinned"


def _program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A registry of two sources, and a PATH where apt-get and dpkg are stand-ins."""

    def texts(root: Path):  # type: ignore[no-untyped-def]
        yield from (file.read_text() for file in sorted(root.rglob("*.txt")))

    entries = (
        Source("deb", "d", "MIT", texts, debian=("some-package",)),
        Source("whl", "w", "MIT", texts, python=("pack==1.0",), members=("pack/*.txt",)),
    )
    monkeypatch.setattr(sources, "SOURCES", {entry.name: entry for entry in entries})
    programs = tmp_path / "bin"
    _program(programs, "apt-get", f'echo x > "$2_1.0_all.deb"; echo run >> {tmp_path}/calls')
    _program(programs, "dpkg", 'mkdir -p "$3/doc"; echo "the text" > "$3/doc/a.txt"')
    _program(programs, "dpkg-deb", "echo 1.0-2")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return tmp_path


def test_fetch_writes_record_and_skips_what_is_there(registry: Path) -> None:
    record = fetch("deb", registry / "corpora")
    assert record["packages"][0]["version"] == "1.0-2"
    assert (record["num_documents"], record["text_bytes"]) == (1, len("the text\n"))
    (file,) = corpus_files(registry / "corpora" / "deb")
    documents = list(read_file(file))
    assert [d.text for d in documents] == ["the text\n"]
    assert fetch("deb", registry / "corpora") == record
    assert (registry / "calls").read_text() == "run\n"


def test_fetch_takes_members_of_a_wheel(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], folder: Path, mend: str) -> str:
        with zipfile.ZipFile(folder / "pack-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pack/a.txt", "taken")
            wheel.writestr("other/b.txt", "left")
        return ""

    monkeypatch.setattr(sources, "_run", run)
    assert fetch("whl", registry)["text_bytes"] == len("taken")


def test_failed_fetch_names_command_and_leaves_nothing(registry: Path) -> None:
    _program(registry / "bin", "apt-get", "echo 'E: no package' >&2; exit 100")
    with pytest.raises(DataError, match="exit code 100") as caught:
        fetch("deb", registry / "corpora")
    assert "apt-get download some-package" in str(caught.value)
    assert "E: no package" in str(caught.value)
    assert "Debian" in (caught.value.fix or "")
    assert source_record("deb", registry / "corpora") is None
    assert not list((registry / "corpora").iterdir())


def test_missing_program_and_unknown_source(
    registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DataError, match="program not found"):
        fetch("deb", registry / "corpora")
    with pytest.raises(RorqualError, match="no such source"):
        fetch("debs", registry)


def test_packages_without_text_are_an_error(registry: Path) -> None:
    _program(registry / "bin", "dpkg", "exit 0")
    with pytest.raises(DataError, match="no text"):
        fetch("deb", registry / "corpora")
    assert not list((registry / "corpora").iterdir())

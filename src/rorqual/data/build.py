"""From a recipe's [tokenizer] and [data] sections to token folders that training can read.

`<folder>/<source>/train` and `<folder>/<source>/held_out` hold the shards. A build that was
interrupted goes on with the shards that are missing; a build that is whole is recognised and left
alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rorqual.data.inputs import (
    BUILD,
    Inputs,
    find_files,
    inputs_now,
    inputs_of,
    loaded_tokenizer,
    stamp,
)
from rorqual.data.plan import (
    Generator,
    Plan,
    check_fetched,
    resolve,
    select,
    tokenizer_sample,
)
from rorqual.data.selection import TRAIN, Scan, scan_file
from rorqual.data.settings import DataSettings, TokenizerSettings
from rorqual.data.shards import (
    SPLITS,
    ShardSettings,
    fingerprint,
    open_tokens,
    token_dtype,
    tokenizer_hash,
    whole_record,
    write_manifest,
    write_shards,
)
from rorqual.errors import DataError, listing
from rorqual.files import atomic_directory, write_json
from rorqual.locks import FileLock, FolderLock

if TYPE_CHECKING:
    from rorqual.tokenizer import Tokenizer

Advance = Callable[[str, int, int | None, str], None]
"""advance(title, done, total, detail) is told what is worked on; a total may be unknown."""


def silent(title: str, done: int, total: int | None, detail: str) -> None:
    """An `Advance` that shows nothing."""


@dataclass(frozen=True)
class BuildSummary:
    """What a build left: manifests by source and split, what they were made of, and whether
    anything had to be done.
    """

    folder: Path
    manifests: dict[str, dict[str, dict[str, Any]]]
    inputs: Inputs
    was_done: bool
    has_texts: bool | None = None  # None: built by a version that did not note it
    has_trained_tokenizer: bool = False

    def total(self, key: str, split: str = "train") -> int:
        return sum(int(splits[split][key]) for splits in self.manifests.values())


def build(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    generators: Mapping[str, Generator] | None = None,
    workers: int = 1,
    advance: Advance = silent,
) -> BuildSummary:
    """Generates and tokenises; the result is the same for any number of workers.

    DataError for sources of packages that were not fetched.

    Generators are called with (seed, max_documents) and yield documents; they keep their own
    held-out questions back, so their documents all train unless the source sets `held_out`.
    """
    # A whole build is only looked at, so that many runs may begin on it at once.
    if (done := find_build(data, tokenizer, generators)) is not None:
        return done
    folder = Path(data.folder)
    fix = "give [data] folder another name for a build of its own"
    with FolderLock(folder, "another process builds this data folder", fix=fix):
        return _build(data, tokenizer, generators or {}, workers, advance)


def _build(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    generators: Mapping[str, Generator],
    workers: int,
    advance: Advance,
) -> BuildSummary:
    folder = Path(data.folder)
    if (done := find_build(data, tokenizer, generators)) is not None:
        return done
    check_fetched(data)
    plans = []
    for number, source in enumerate(data.sources):
        advance("gathering", number, len(data.sources), source.label)
        plans.append(resolve(data, source, generators))
    files = [file for plan in plans for file in plan.files]
    blocks = [(file, plan.block_characters) for plan in plans for file in plan.files]
    stamps = [stamp(file) for file in files]
    with _executor(min(workers, len(files))) as executor:
        scans = list(_each(executor, scan_file, blocks, "reading", advance))
        codes, duplicates = select(plans, scans, data)
        # Text that cannot be read has left the last build as it was.
        (folder / BUILD).unlink(missing_ok=True)
        is_new_tokenizer = not tokenizer.path.exists()
        kept_tokenizer = _tokenizer(tokenizer, plans, scans, codes, data.seed, advance)
        jobs = _jobs(data, tokenizer, plans, scans, codes)
        list(_each(executor, _tokenise, jobs, "tokenising", advance))
    _check_unchanged(jobs, stamps)
    manifests = _write_manifests(data, plans, duplicates, kept_tokenizer, jobs)
    own_hash = tokenizer_hash(kept_tokenizer)
    digests = [scan.digest for scan in scans]
    has_texts = any(scan.has_texts for scan in scans)
    write_json(
        folder / BUILD,
        {
            "settings": _key(data, tokenizer),
            "files": stamps,
            "digests": digests,
            "has_texts": has_texts,
            "tokenizer": own_hash,
        },
    )
    rest = iter(digests)
    inputs = inputs_of(
        data.sources,
        {plan.settings.label: plan.files for plan in plans},
        {plan.settings.label: [next(rest) for _ in plan.files] for plan in plans},
        own_hash,
    )
    return BuildSummary(
        folder,
        manifests,
        inputs,
        was_done=False,
        has_texts=has_texts,
        has_trained_tokenizer=is_new_tokenizer,
    )


def scan_sources(
    data: DataSettings,
    generators: Mapping[str, Generator] | None = None,
    advance: Advance = silent,
) -> tuple[int, int]:
    """Reads all text that is there, as a build does first; DataError as a build. Writes nothing.

    Returns how many documents train, and their bytes of text.
    """
    located = find_files(data, generators or {})
    plans = [
        Plan(source, [file for file in located[source.label] if file.is_file()], "")
        for source in data.sources
    ]
    plans = [plan for plan in plans if plan.files]
    if not plans:
        return 0, 0
    blocks = [(file, plan.block_characters) for plan in plans for file in plan.files]
    scans = list(_each(None, scan_file, blocks, "reading", advance))
    codes, _ = select(plans, scans, data)
    is_train = np.concatenate(codes) == TRAIN
    text_bytes = np.concatenate([scan.text_bytes for scan in scans])
    return int(is_train.sum()), int(text_bytes[is_train].sum(dtype=np.int64))


def _key(data: DataSettings, tokenizer: TokenizerSettings) -> str:
    return fingerprint(asdict(data), asdict(tokenizer))


def _tokenizer(
    options: TokenizerSettings,
    plans: Sequence[Plan],
    scans: Sequence[Scan],
    codes: Sequence[np.ndarray],
    seed: int,
    advance: Advance,
) -> Tokenizer:
    from rorqual.tokenizer import train_tokenizer

    folder = options.path
    if folder.exists():
        return loaded_tokenizer(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    with FileLock(lock, "another process trains this tokenizer", where=folder):
        if not folder.exists():
            advance("training the tokenizer", 0, None, "")
            texts = tokenizer_sample(plans, scans, codes, options.train_bytes, seed)
            trained = train_tokenizer(texts, options.vocab_size, merge_digits=options.merge_digits)
            with atomic_directory(folder) as temporary:
                trained.save(temporary)
    return loaded_tokenizer(folder)


Job = tuple[Path, np.ndarray, str, Path, Path, ShardSettings, str, int]


def _jobs(
    data: DataSettings,
    tokenizer: TokenizerSettings,
    plans: Sequence[Plan],
    scans: Sequence[Scan],
    codes: Sequence[np.ndarray],
) -> list[Job]:
    jobs: list[Job] = []
    for plan in plans:
        own = scans[len(jobs) : len(jobs) + len(plan.files)]
        has_mask = any(scan.has_messages for scan in own)
        options = ShardSettings(data.fim_rate, data.split_punctuation_rate, data.seed, has_mask)
        folder = Path(data.folder) / plan.settings.label
        for number, (file, scan) in enumerate(zip(plan.files, own, strict=True)):
            code = codes[len(jobs)]
            inputs = fingerprint(scan.digest, hashlib.sha256(code.tobytes()).hexdigest())
            name, block = f"{number:05d}", plan.block_characters
            jobs.append((file, code, name, folder, tokenizer.path, options, inputs, block))
    return jobs


def _tokenise(
    file: Path,
    code: np.ndarray,
    name: str,
    folder: Path,
    tokenizer_folder: Path,
    options: ShardSettings,
    inputs: str,
    block: int,
) -> None:
    tokenizer = loaded_tokenizer(tokenizer_folder)
    write_shards(file, code, name, folder, tokenizer, options, inputs, block)


def _check_unchanged(jobs: Sequence[Job], stamps: Sequence[list[Any]]) -> None:
    """DataError if a file is no longer what was scanned: its shards are then not vouched for."""
    changed = [job for job, old in zip(jobs, stamps, strict=True) if stamp(job[0]) != old]
    for job in changed:
        for split in SPLITS.values():
            (job[3] / split / f"{job[2]}.json").unlink(missing_ok=True)
    if changed:
        raise DataError(
            "changed while it was read",
            where=listing([job[0] for job in changed]),
            fix="build again when nothing writes to it any more",
        )


def _write_manifests(
    data: DataSettings,
    plans: Sequence[Plan],
    duplicates: Sequence[int],
    tokenizer: Tokenizer,
    jobs: Sequence[Job],
) -> dict[str, dict[str, dict[str, Any]]]:
    manifests: dict[str, dict[str, dict[str, Any]]] = {}
    for plan, num_duplicates in zip(plans, duplicates, strict=True):
        label = plan.settings.label
        folder = Path(data.folder) / label
        own = [job for job in jobs if job[3] == folder]
        manifests[label] = {}
        for split in SPLITS.values():
            details = {
                "source": label,
                "licence": plan.licence,
                "split": split,
                "dtype": token_dtype(tokenizer.vocab_size).str,
                "has_mask": own[0][5].has_mask,
                "vocab_size": tokenizer.vocab_size,
                "tokenizer": tokenizer_hash(tokenizer),
                "num_duplicates": num_duplicates,
                "settings": {
                    **asdict(own[0][5]),
                    "held_out": data.held_out
                    if plan.settings.held_out is None
                    else plan.settings.held_out,
                    "dedupe": data.dedupe,
                },
            }
            manifests[label][split] = write_manifest(
                folder / split, [job[2] for job in own], details
            )
    return manifests


def find_build(
    data: DataSettings,
    options: TokenizerSettings,
    generators: Mapping[str, Generator] | None = None,
) -> BuildSummary | None:
    """The summary of a build that is whole and of these settings, files and tokenizer; None
    otherwise. Nothing is written.
    """
    folder = Path(data.folder)
    record = whole_record(folder / BUILD)
    if record is None or record.get("settings") != _key(data, options):
        return None
    # What is gone is fetched or generated under the lock alone.
    if not options.path.exists() or not all(Path(file).is_file() for file, _, _ in record["files"]):
        return None
    located = find_files(data, generators or {})
    files = [file for own in located.values() for file in own]
    if not all(file.is_file() for file in files):
        return None
    if record["files"] != [stamp(file) for file in files]:
        return None
    inputs = inputs_now(data, options, located, record)
    if record.get("tokenizer") != inputs.tokenizer:
        return None
    manifests: dict[str, dict[str, dict[str, Any]]] = {}
    try:
        for source in data.sources:
            folders = {split: folder / source.label / split for split in SPLITS.values()}
            manifests[source.label] = {s: open_tokens(f).manifest for s, f in folders.items()}
    except DataError:  # missing or broken: it is made again
        return None
    has_texts = record.get("has_texts")
    return BuildSummary(folder, manifests, inputs, was_done=True, has_texts=has_texts)


@contextmanager
def _executor(workers: int) -> Iterator[Executor | None]:
    """A pool of processes; None for one worker, which works here (its tokenizer uses threads)."""
    if workers <= 1:
        yield None
        return
    # Choice: spawn, since a fork after the tokenizer's threads have started may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        yield executor


def _each(
    executor: Executor | None,
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    title: str,
    advance: Advance,
) -> Iterator[Any]:
    """The results of `work` on each job, in order of the jobs."""
    columns = zip(*jobs, strict=True)
    results = executor.map(work, *columns) if executor else map(work, *columns)
    advance(title, 0, len(jobs), "")
    for number, result in enumerate(results):
        advance(title, number + 1, len(jobs), str(jobs[number][0]))
        yield result

"""The model that ships in the package: every verb, recipe and call knows it as `tiny`."""

from __future__ import annotations

import os
from pathlib import Path

from rorqual.errors import CheckpointError
from rorqual.runs import checkpoint_in

BUNDLED = "tiny"


def checkpoint_path(name: str | os.PathLike[str]) -> Path:
    """Where a checkpoint lies: the text `tiny` names the bundled model, all else is a path, and
    the folder of a run means its latest checkpoint.

    A folder of that name is reached as `./tiny`, or as a Path. CheckpointError if the
    installation lacks the bundled model, or a run has no checkpoint.
    """
    if name != BUNDLED:  # a Path never equals a text
        return checkpoint_in(Path(name))
    path = Path(__file__).parent / BUNDLED
    if not (path / "config.json").is_file():
        raise CheckpointError(
            "the bundled model is missing from this installation",
            where=path,
            fix="install the package again, train it with `rorqual train`, "
            "or name a folder with --model",
        )
    return path

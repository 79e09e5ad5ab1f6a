"""The shipped model with a longer context, by an edit of its configuration."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rorqual.bundled import BUNDLED, checkpoint_path

POSITIONS = 8192


def stretched_tiny(folder: Path) -> Path:
    """A copy of the bundled model in `folder` that takes 8,192 positions."""
    shutil.copytree(checkpoint_path(BUNDLED), folder, dirs_exist_ok=True)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"max_position_embeddings": POSITIONS}))
    return folder

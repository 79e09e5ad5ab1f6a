"""How a run begins, goes on and goes back: from its newest good checkpoint, or anew."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from rorqual.errors import listing
from rorqual.train.batches import TrainingData
from rorqual.train.checkpoint import good_checkpoint, set_aside, standing
from rorqual.train.checksums import damage
from rorqual.train.learner import Learner
from rorqual.train.ranks import Ranks
from rorqual.train.recipe import Recipe
from rorqual.train.spikes import Skipped


@dataclass(frozen=True)
class Begun:
    """What learns, the checkpoint that it is of, and lines to read before the first step."""

    learner: Learner
    folder: Path | None
    lines: list[str]


def begin(
    recipe: Recipe,
    run_folder: Path,
    data: TrainingData,
    device: torch.device,
    skipped: Skipped,
    ranks: Ranks,
    *,
    allow_changes: bool = False,
) -> Begun:
    """TrainingError for a checkpoint that cannot be read, or is of another recipe or other data.

    Damaged checkpoints that are newer than a good one are renamed.
    """
    found = good_checkpoint(run_folder, lambda folder: _damage(folder, ranks))
    lines = []
    for folder, faults in found.damaged.items():
        aside = set_aside(folder) if ranks.is_first else folder
        lines.append(
            f"{folder} is damaged, and was renamed to {aside.name}: {listing(faults)}; going on "
            "from the checkpoint before"
        )
    ranks.agree(0)  # none looks at the folder before that
    of = None
    if found.folder is not None:
        of = standing(
            found.folder,
            recipe,
            inputs=data.inputs,
            digest=data.digest,
            allow_changes=allow_changes,
        )
        tokens = f"{of.progress.tokens:,} tokens"
        lines += [f"continuing {found.folder} at {tokens}", *of.changes]
    learner = Learner(recipe, data, device, of, skipped, ranks)
    return Begun(learner, found.folder, [*lines, *learner.notes])


def _damage(folder: Path, ranks: Ranks) -> list[str]:
    """Each rank reads a share of the files, and all know what one of them found."""
    faults = damage(folder, share=(ranks.rank, ranks.world))
    is_damaged = ranks.agree(len(faults), is_patient=True) > 0
    return damage(folder) if is_damaged and ranks.world > 1 else faults

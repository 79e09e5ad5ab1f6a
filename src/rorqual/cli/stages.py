"""The stages that a recipe may be of, for all verbs that read one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rorqual.train import Recipe


def stages() -> tuple[type[Recipe], ...]:
    """Their classes; a recipe that names none is of the first."""
    from rorqual.train.stages import Pretrain, Sft

    return Pretrain, Sft

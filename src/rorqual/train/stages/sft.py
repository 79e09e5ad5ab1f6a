"""Stage `sft`: of conversations only what the assistant says is a target (report §5.1)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from rorqual.config import settings
from rorqual.train.stages.corpora import CorporaStage


@settings
class Sft(CorporaStage):
    """Conversations are packed whole and do not see each other (§5.1)."""

    needs_checkpoint: ClassVar[bool] = True
    packs_whole: ClassVar[bool] = True

    stage: Literal["sft"] = "sft"

    @property
    def is_isolated(self) -> bool:
        return True

    def idle_keys(self, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if table["training"].get("isolate_documents") is False:
            yield (
                "training.isolate_documents",
                "stage 'sft' always isolates documents; 'pretrain' may leave it",
            )
        yield from super().idle_keys(table)

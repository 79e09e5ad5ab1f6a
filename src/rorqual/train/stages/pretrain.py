"""Stage `pretrain`: every token of a text is a target (report §4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from rorqual.config import settings
from rorqual.train.stages.corpora import CorporaStage


@settings
class Pretrain(CorporaStage):
    """Texts lie end to end and are cut at fixed places; documents see each other (§4.1), unless
    the recipe isolates them.
    """

    stage: Literal["pretrain"] = "pretrain"

    @property
    def is_isolated(self) -> bool:
        return self.training.isolate_documents

    def idle_keys(self, table: dict[str, Any]) -> Iterator[tuple[str, str]]:
        if self.training.long_conversations != "split":
            yield (
                "training.long_conversations",
                "stage 'pretrain' cuts all text at fixed places; conversations are those of 'sft'",
            )
        yield from super().idle_keys(table)

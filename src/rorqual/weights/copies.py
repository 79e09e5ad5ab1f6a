"""Tensors that a checkpoint stores twice: a tied head, and the MTP layers' embedding and head."""

from __future__ import annotations

from rorqual.errors import CheckpointError
from rorqual.log import logger
from rorqual.weights.names import HEAD, StoredTensor
from rorqual.weights.source import TensorSource


def say_it_differs(source: TensorSource, tensor: StoredTensor) -> None:
    """A copy that is none: CheckpointError for a tied head, a warning for what an MTP layer has."""
    if tensor.name == HEAD:
        raise CheckpointError(
            f"{HEAD} differs from {tensor.parameter}, but config.json ties them",
            where=source.path,
            fix="set tie_word_embeddings to false in config.json",
        )
    # Choice: fine-tuned releases leave stale copies here, and the report shares them (§2.2).
    logger(__name__).warning(
        "%s: %s differs from %s; the shared one is used", source.path, tensor.name, tensor.parameter
    )

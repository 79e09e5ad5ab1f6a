"""The stages that `train/` knows, each beside its code; those that use the engine live above."""

from rorqual.train.stages.pretrain import Pretrain
from rorqual.train.stages.sft import Sft

__all__ = ["Pretrain", "Sft"]

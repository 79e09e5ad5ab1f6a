"""The model: configuration, presets, and the transformer itself."""

from rorqual.model.config import ModelConfig, YarnScaling, unknown_keys
from rorqual.model.presets import PRESETS, named_preset, no_such_model, preset
from rorqual.model.step import CacheView, Part, Step
from rorqual.model.transformer import DeepseekV3, build, empty

__all__ = [
    "PRESETS",
    "CacheView",
    "DeepseekV3",
    "ModelConfig",
    "Part",
    "Step",
    "YarnScaling",
    "build",
    "empty",
    "named_preset",
    "no_such_model",
    "preset",
    "unknown_keys",
]

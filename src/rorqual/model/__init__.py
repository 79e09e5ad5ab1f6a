"""The model: configuration, presets, and the transformer itself."""

from rorqual.model.config import ModelConfig, YarnScaling, unknown_keys
from rorqual.model.mla import CacheView, Part
from rorqual.model.presets import PRESETS, named_preset, no_such_model, preset
from rorqual.model.transformer import Context, DeepseekV3, Hidden, build, empty

__all__ = [
    "PRESETS",
    "CacheView",
    "Context",
    "DeepseekV3",
    "Hidden",
    "ModelConfig",
    "Part",
    "YarnScaling",
    "build",
    "empty",
    "named_preset",
    "no_such_model",
    "preset",
    "unknown_keys",
]

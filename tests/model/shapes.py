"""Configurations of the model's tests: the small one's variants, and some more."""

from __future__ import annotations

from rorqual.model import ModelConfig, YarnScaling
from small import SMALL, variants

CONFIGS: dict[str, ModelConfig] = {
    **variants(SMALL),
    "no_mtp": SMALL.with_changes(num_nextn_predict_layers=0),
    "yarn_mscale_alone": SMALL.with_changes(
        rope_scaling=YarnScaling(factor=40, original_max_position_embeddings=16, mscale=0.7)
    ),
    "another_epsilon": SMALL.with_changes(rms_norm_eps=1e-3),
}

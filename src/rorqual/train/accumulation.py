"""How a run's micro-batches run: on this rank alone, or through a pipeline's stages."""

from __future__ import annotations

from rorqual.model import DeepseekV3
from rorqual.train.in_pipeline import InPipeline
from rorqual.train.meters import Laps
from rorqual.train.ranks import Ranks, Spread
from rorqual.train.recipe import Recipe
from rorqual.train.step import InTurn


def accumulation(
    recipe: Recipe, model: DeepseekV3, ranks: Ranks, laps: Laps
) -> tuple[InTurn | InPipeline, Spread]:
    """What runs them; leaves of the model, or of its stages that are here, what is this rank's."""
    stages = ranks.stages(model.config, recipe.training.sequence_length)
    if stages is None:
        root = recipe.root(model)
        spread = ranks.spread(model, [root])
        use_compile = recipe.training.compile
        return InTurn(model, root, use_compile=use_compile, laps=laps, spread=spread), spread
    pipeline = InPipeline(
        model,
        stages,
        make_root=recipe.root,
        is_recomputed=recipe.training.activation_checkpointing != "none",
        laps=laps,
    )
    return pipeline, ranks.spread(model, list(pipeline.roots.values()))

"""Memory of each rank of a training run, by part, at the moment when most is needed.

What the trainer does (`train/`, `parallel/`): float32 weights, AdamW's moments, gradients that add
up over a step's micro-batches; with several ranks FSDP's shards of all that, and beside them
(ZeRO-1) the stage's weights and gradients whole. Activations are those of the micro-batches that
the pipeline's order has under way. Counted are tensors: not the interpreter, its libraries and what
an allocator wastes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from rorqual.model import ModelConfig, empty
from rorqual.parallel.actions import Kind, Order
from rorqual.parallel.pipeline import make_orders
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.stages import StageShare
from rorqual.plan.activations import Load, Part, Parts, count_parts
from rorqual.train.recipe import Recipe

FLOAT32 = 4


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters: those that all ranks of a stage share, and the routed experts."""

    dense: int
    experts: int
    largest_dense: int  # of one parameter
    largest_experts: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class RankMemory:
    """Bytes. `whole` are a stage's weights gathered beside the shards; `host` is what lies in the
    host's memory beside a GPU: the average of the weights, which on a CPU is in `ema`.
    """

    weights: int
    whole: int
    gradients: int
    moments: int
    activations: int
    buffers: int
    ema: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return sum(value for name, value in vars(self).items() if name != "host")

    def as_dict(self) -> dict[str, int]:
        return {**vars(self), "total": self.total}


def memory_by_stage_rank(
    recipe: Recipe, config: ModelConfig, num_micro_batches: int, *, is_cpu: bool
) -> list[RankMemory]:
    """Of one rank of each of the pipeline's; those beside it hold as much."""
    options, training = recipe.parallel, recipe.training
    load = Load(
        training.micro_batch_size,
        training.sequence_length,
        training.precision,
        training.activation_checkpointing,
        is_cpu,
        config.n_routed_experts // options.ep,
    )
    parts = count_parts(config, load)
    orders = orders_of(options, num_micro_batches)
    shares = [shares_of(options, config, rank, load.num_inputs) for rank in range(options.pp)]
    return [
        _rank_memory(recipe, config, parts, own, order, is_cpu=is_cpu)
        for own, order in zip(shares, orders, strict=True)
    ]


@lru_cache(maxsize=1024)
def shares_of(
    options: ParallelSettings, config: ModelConfig, rank: int, num_inputs: int
) -> list[StageShare]:
    """The stages of a rank of the pipeline."""
    if (placement := options.placement) is None:
        return [StageShare(0, 1, range(config.num_hidden_layers))]
    return placement.shares(config, num_inputs, rank)


def orders_of(options: ParallelSettings, num_micro_batches: int) -> list[Order]:
    if (placement := options.placement) is None:
        return make_orders("1f1b", options.pp, num_micro_batches)
    chunks = placement.num_chunks
    return make_orders(placement.order, placement.num_ranks, num_micro_batches, chunks)


def stage_sizes(config: ModelConfig, shares: Sequence[StageShare]) -> Sizes:
    """Of all stages of a rank; a copy of the embedding where the last one needs it."""
    layers = layer_sizes(config)
    table = _shared(config.vocab_size * config.hidden_size)
    found = [layers[layer_id] for share in shares for layer_id in _layers(config, share)]
    has_first = any(share.is_first for share in shares)
    has_last = any(share.is_last for share in shares)
    needs_embedding = config.num_nextn_predict_layers > 0 or config.tie_word_embeddings
    if has_first or (has_last and needs_embedding):
        found.append(table)
    if has_last:
        found.append(_shared(config.hidden_size))
        found += [] if config.tie_word_embeddings else [table]
    return Sizes(
        sum(each.dense for each in found),
        sum(each.experts for each in found),
        max(each.largest_dense for each in found),
        max(each.largest_experts for each in found),
    )


def _shared(number: int) -> Sizes:
    """One parameter that all ranks of a stage share."""
    return Sizes(number, 0, number, 0)


@lru_cache(maxsize=16)
def layer_sizes(config: ModelConfig) -> dict[int, Sizes]:
    """Of each layer, MTP modules included."""
    found = {}
    for layer_id, layer in empty(config, device="meta").model.layers.items():
        numbers: dict[bool, list[int]] = {True: [0], False: [0]}
        for name, parameter in layer.named_parameters():
            numbers[".experts." in name].append(parameter.numel())
        dense, experts = numbers[False], numbers[True]
        found[int(layer_id)] = Sizes(sum(dense), sum(experts), max(dense), max(experts))
    return found


def _rank_memory(
    recipe: Recipe,
    config: ModelConfig,
    parts: Parts,
    shares: Sequence[StageShare],
    order: Order,
    *,
    is_cpu: bool,
) -> RankMemory:
    options = recipe.parallel
    sizes = stage_sizes(config, shares)
    own_experts = sizes.experts // options.ep
    held = sizes.dense + own_experts
    copies = options.dp_shard * options.dp_replicate
    gathered = sizes.dense if options.num_replicas > 1 else 0
    gathered += own_experts if copies > 1 else 0
    sharded = -(-sizes.dense // options.num_shards) + own_experts // options.dp_shard
    if options.zero == 3 and options.num_replicas > 1:
        largest = max(
            layer.dense + layer.experts // options.ep for layer in layer_sizes(config).values()
        )
        gathered, gradients = min(gathered, 2 * largest), sharded + largest
    else:
        gradients = held
    units = {share.index: _units(config, parts, share) for share in shares}
    at_peak = _peak(units, order, FLOAT32 * gradients)
    moment = 2 if recipe.optimizer.moments == "bfloat16" else 4
    ema = 0 if recipe.ema.decay is None else FLOAT32 * sharded
    update = _update_buffers(recipe, sizes)
    if update + FLOAT32 * gradients > at_peak.total:
        at_peak = _Moment(0, FLOAT32 * gradients, update)
    return RankMemory(
        weights=FLOAT32 * sharded,
        whole=FLOAT32 * gathered,
        gradients=at_peak.gradients,
        moments=2 * moment * sharded,
        activations=at_peak.activations,
        buffers=at_peak.buffers,
        ema=ema if is_cpu else 0,
        host=0 if is_cpu else ema,
    )


def _update_buffers(recipe: Recipe, sizes: Sizes) -> int:
    """AdamW with rounded moments takes both of a parameter's shard in float32."""
    options = recipe.parallel
    if recipe.optimizer.moments == "float32":
        return 0
    experts = sizes.largest_experts // options.ep // options.dp_shard
    return 2 * FLOAT32 * max(sizes.largest_dense // options.num_shards, experts)


@dataclass(frozen=True)
class _Moment:
    """What is there besides weights and moments."""

    activations: int
    gradients: int
    buffers: int

    @property
    def total(self) -> int:
        return self.activations + self.gradients + self.buffers


def _units(config: ModelConfig, parts: Parts, share: StageShare) -> list[Part]:
    """A stage's parts in the order of its forward pass."""
    units = [parts.embedding] if share.is_first else []
    units += [parts.of_layer(config, layer_id) for layer_id in share.layers]
    if share.is_last:
        units.append(parts.end)
        if parts.mtp is not None:
            units += [parts.mtp] * config.num_nextn_predict_layers
    return units


def _layers(config: ModelConfig, share: StageShare) -> Iterator[int]:
    yield from share.layers
    if share.is_last:
        yield from range(config.num_hidden_layers, config.num_layers_with_mtp)


def _peak(units: dict[int, list[Part]], order: Order, gradients: int) -> _Moment:
    """The moment of the order at which most is held. The first backward pass of a stage makes its
    gradients, others add to them.
    """
    kept = {stage: sum(unit.kept for unit in own) for stage, own in units.items()}
    under_way: Counter[int] = Counter()
    begun: set[int] = set()
    passes = [part for action in order for part in action.parts]
    is_single = sum(part.kind == Kind.FORWARD for part in passes) == len(units)
    worst = _Moment(0, 0, 0)
    for part in passes:
        others = sum(kept[stage] * number for stage, number in under_way.items())
        if part.kind == Kind.FORWARD:
            made = gradients if begun and not is_single else 0
            moments = _forward(units[part.stage], others, made)
            under_way[part.stage] += 1
        elif part.kind == Kind.WEIGHT:
            under_way[part.stage] -= 1
            continue
        else:
            others -= kept[part.stage]
            moments = _backward(units[part.stage], others, None if is_single else gradients)
            begun.add(part.stage)
            under_way[part.stage] -= part.kind == Kind.BACKWARD
        worst = max([worst, *moments], key=lambda moment: moment.total)
    return worst


def _forward(units: list[Part], others: int, gradients: int) -> Iterator[_Moment]:
    held = others
    for unit in units:
        held += unit.kept
        yield _Moment(held, gradients, unit.forward)


def _backward(units: list[Part], others: int, gradients: int | None) -> Iterator[_Moment]:
    """`gradients` are there whole, or (None) made on the way from the last unit to the first."""
    held, made = others + sum(unit.kept for unit in units), 0
    for unit in reversed(units):
        if gradients is None:
            yield _Moment(held, made, unit.first_backward)
            made += unit.gradients
        else:
            yield _Moment(held, gradients, unit.backward)
        held -= unit.kept

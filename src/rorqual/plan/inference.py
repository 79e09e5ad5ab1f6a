"""The plan for running a model: does it fit, how fast at most, what to change if it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict, Unpack

from rorqual.errors import listing
from rorqual.model import ModelConfig
from rorqual.plan.hardware import Hardware
from rorqual.plan.memory import Memory, fits, memory_of
from rorqual.plan.offload import room_for_weights
from rorqual.plan.sizes import (
    GIB,
    WEIGHT_FORMATS,
    check_format,
    disk_bytes,
    main_part,
    memory_bytes,
)
from rorqual.plan.speed import Speed, speed_of
from rorqual.plan.wish import (
    Wish,
    cache_bytes_by_format,
    can_run_stored,
    checked,
    layer_cache_bytes,
)

MAX_DEVICES = 4096
SMALLER_KV = ("bf16", "fp8")
SHORTEST_CONTEXT = 256


class Options(TypedDict, total=False):
    """What else a `Wish` may say."""

    kv: str
    engine: str
    dtype: str
    num_drafts: int


@dataclass(frozen=True)
class InferencePlan:
    """The answer. `suggestions` are changes each of which makes it fit by itself. What does not fit
    has no `speed`; `offloaded` is that of an engine that leaves the rest of the weights on disk.
    """

    wish: Wish
    hardware: Hardware
    memory: Memory
    speed: Speed | None
    offloaded: Speed | None
    is_fitting: bool
    max_context: int  # that fits with everything else as wished; 0 if none does
    suggestions: list[str] = field(default_factory=list)
    remark: str | None = None  # on a number of devices that no such machine has

    def as_dict(self) -> dict[str, Any]:
        wish, hardware = self.wish, self.hardware
        return {
            "engine": wish.engine,
            "weights": wish.weights,
            "runs_as": str(wish.runs_as),
            "has_mtp": wish.has_mtp,
            "drafts": wish.num_drafts,
            "kv": wish.cache_format,
            "context": wish.context,
            "batch": wish.batch,
            "hardware": {
                "name": hardware.label,
                "memory_bytes": hardware.total_memory_bytes,
                "usable_bytes": hardware.usable_bytes,
                "bandwidth": hardware.total_bandwidth,
                "flops": {kind: hardware.total_flops(kind) for kind in hardware.flops},
                "num_devices": hardware.num_devices,
                "num_machines": hardware.num_nodes,
                "link_rate": hardware.link_rate,
                "network_rate": hardware.network_rate,
                "disk_rate": hardware.disk_rate,
                "source": str(hardware.source),
                "is_data_sheet": hardware.source.is_data_sheet,
            },
            "memory_bytes": self.memory.as_dict(),
            "cache_bytes_per_token": wish.cache_bytes_per_token,
            "cache_bytes_per_token_by_format": cache_bytes_by_format(wish),
            "fits": self.is_fitting,
            "max_context": self.max_context,
            "speed_limit": self.speed.as_dict() if self.speed else None,
            "speed_limit_from_disk": self.offloaded.as_dict() if self.offloaded else None,
            "suggestions": self.suggestions,
            "remark": self.remark,
            "disk": disk_table(wish.config),
        }


def plan_inference(
    config: ModelConfig,
    hardware: Hardware,
    *,
    weights: str = "bf16",
    context: int | None = None,
    batch: int = 1,
    **options: Unpack[Options],
) -> InferencePlan:
    """Plans; `context` None is the model's own, at most 4096. UsageError for what cannot be."""
    context = min(config.max_position_embeddings, 4096) if context is None else context
    wished = Wish(config, check_format(weights), context=context, batch=batch, **options)
    wish = checked(wished, hardware)
    is_fitting = fits(wish, hardware)
    return InferencePlan(
        wish,
        hardware,
        memory_of(wish, hardware),
        speed_of(wish, hardware) if is_fitting else None,
        None if is_fitting else _offloaded(wish, hardware),
        is_fitting,
        longest_context(wish, hardware),
        [] if is_fitting else list(_suggestions(wish, hardware)),
        why_no_machine(config, hardware),
    )


def _offloaded(wish: Wish, hardware: Hardware) -> Speed | None:
    """With the rest on the disk; None for our engine, which holds all weights, with drafts, and
    where the weights are not what does not fit.
    """
    room = room_for_weights(wish, hardware)
    if wish.is_ours or wish.num_drafts or room < 0:
        return None
    return speed_of(wish, hardware, room)


def why_no_machine(config: ModelConfig, hardware: Hardware) -> str | None:
    """Why nobody has so many of these devices, or divides this model among them; None if one does.

    Choice: powers of two, in one machine or in whole ones, that divide the experts, and in a
    machine the attention's heads.
    """
    num, node = hardware.num_devices, hardware.node_devices
    label = hardware.label
    if num > node and hardware.network_rate is None:
        return f"a machine has {node} of these devices, {label} are more, and no network is known"
    if num > node and num % node:
        return f"{label} are no whole number of machines of {node}"
    if num <= node and num & (num - 1) and num != node:
        sizes = listing([2**i for i in range(node.bit_length()) if 2**i < node] + [node])
        return f"machines have {sizes} of these devices, not {num}"
    heads, experts = config.num_attention_heads, config.n_routed_experts
    if heads % min(num, node):
        return f"{min(num, node)} devices of a machine do not divide {heads} heads"
    if experts % num:
        return f"{num} devices do not divide {experts} experts, unless some are held twice"
    return None


def disk_table(config: ModelConfig) -> list[dict[str, Any]]:
    """Bytes, decimal GB and binary GiB of the files in each format, with the MTP layer and without.

    GGUF files are mostly published without it.
    """
    main = main_part(config)
    rows = []
    for name in WEIGHT_FORMATS:
        size, without = disk_bytes(config, name), disk_bytes(main, name)
        row = {"format": name, "bytes": size, "GB": size / 1e9, "GiB": size / GIB}
        rows.append(row | {"bytes_without_mtp": without})
    return rows


def longest_context(wish: Wish, hardware: Hardware) -> int:
    """The longest context that fits; 0 if not even one token does."""
    limit = wish.config.max_position_embeddings
    return _largest(limit, lambda context: fits(replace(wish, context=context), hardware))


def _suggestions(wish: Wish, hardware: Hardware) -> Iterator[str]:
    """Single changes that make it fit, the least first; then weights and cache together."""
    context = longest_context(wish, hardware)
    if context >= SHORTEST_CONTEXT:
        yield f"--context {context} (with everything else as it is)"
    batch = _largest_batch(wish, hardware)
    if batch and wish.batch > 1:
        yield f"--batch {batch}"
    for kv in _smaller_kv(wish):
        if fits(replace(wish, kv=kv), hardware):
            yield f"--kv {kv}"
            break
    smaller = _smaller_weights(wish, hardware)
    fitting = [less for less in smaller if fits(less, hardware)]
    if fitting:
        yield _priced(wish, fitting[0], hardware)
    elif less := _everything_smaller(wish, hardware, smaller):
        yield _priced(wish, less, hardware, always=("weights", "kv", "context", "batch"))
    if more := _more_devices(wish, hardware):
        yield f"--on {more.flag} {_price(wish, more)}"


def _everything_smaller(wish: Wish, hardware: Hardware, smaller: Sequence[Wish]) -> Wish | None:
    """The best weights that leave room for one short stream; then as much load as fits."""
    for less in (wish, *smaller):
        one = replace(less, kv=_smallest_kv(wish), batch=1)
        context = min(wish.context, longest_context(one, hardware))
        if context >= min(wish.context, SHORTEST_CONTEXT):
            one = replace(one, context=context)
            return replace(one, batch=_largest_batch(replace(one, batch=wish.batch), hardware))
    return None


def _smallest_kv(wish: Wish) -> str:
    return (wish.cache_format, *_smaller_kv(wish))[-1]


def _priced(wish: Wish, less: Wish, hardware: Hardware, always: Sequence[str] = ()) -> str:
    """The flags that make `less` of the wish, and its memory."""
    flags = [
        f"--{name} {getattr(less, name)}"
        for name in ("weights", "dtype", "kv", "context", "batch")
        if name in always or getattr(less, name) != getattr(wish, name)
    ]
    return f"{' '.join(flags)} {_price(less, hardware)}"


def _price(wish: Wish, hardware: Hardware) -> str:
    total, usable = memory_of(wish, hardware).total, hardware.usable_bytes
    return f"({total / 1e9:,.1f} of {usable / 1e9:,.1f} GB)"


def _largest_batch(wish: Wish, hardware: Hardware) -> int:
    return _largest(wish.batch, lambda batch: fits(replace(wish, batch=batch), hardware))


def _largest(limit: int, is_fitting: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, by bisection; 0 if none does."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if is_fitting(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _smaller_kv(wish: Wish) -> list[str]:
    """Formats of fewer bytes that both engines have, the largest of them first."""
    now = layer_cache_bytes(wish.config, wish.cache_format)
    return [kv for kv in SMALLER_KV if layer_cache_bytes(wish.config, kv) < now]


def _smaller_weights(wish: Wish, hardware: Hardware) -> list[Wish]:
    """The same with weights of fewer bytes in memory, the largest of them first. In our engine that
    takes a dtype; beyond bfloat16, where it can, files that are smaller and run as stored.
    """
    if wish.is_ours:
        stored = [replace(wish, dtype="stored", weights=w) for w in (wish.weights, *WEIGHT_FORMATS)]
        stored.append(replace(wish, dtype="int8"))
        ways = [replace(wish, dtype="bfloat16"), *(stored if can_run_stored(hardware) else ())]
    else:
        ways = [replace(wish, weights=w) for w in WEIGHT_FORMATS]
    sizes = {way: memory_bytes(way.config, way.runs_as, with_mtp=way.has_mtp) for way in ways}
    now = memory_bytes(wish.config, wish.runs_as, with_mtp=wish.has_mtp)
    return sorted((way for way in sizes if sizes[way] < now), key=lambda way: -sizes[way])


def _more_devices(wish: Wish, hardware: Hardware) -> Hardware | None:
    """The fewest of the same device that some machine has; none for our engine."""
    if wish.is_ours:
        return None
    num = 2
    while num <= MAX_DEVICES:
        more = hardware.times(num)
        is_more = num > hardware.num_devices and not why_no_machine(wish.config, more)
        if is_more and fits(wish, more):
            return more
        num *= 2
    return None

"""The plan for running a model: does it fit, how fast at most, what to change if it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rorqual.errors import UsageError
from rorqual.model import ModelConfig
from rorqual.plan.hardware import Hardware
from rorqual.plan.memory import Memory, cache_bytes_per_token, check_kv, memory_of
from rorqual.plan.sizes import GIB, WEIGHT_FORMATS, check_format, disk_bytes, memory_bytes
from rorqual.plan.speed import Speed, speed_of

MAX_DEVICES = 4096
SMALLER_KV = ("bf16", "fp8")
SHORTEST_CONTEXT = 256


@dataclass(frozen=True)
class Wish:
    """What is to run: the model, its formats, and the load."""

    config: ModelConfig
    weights: str
    kv: str
    context: int
    batch: int

    def memory(self, hardware: Hardware) -> Memory:
        return memory_of(
            self.config,
            weights=self.weights,
            kv=self.kv,
            context=self.context,
            batch=self.batch,
            step_tokens=hardware.step_tokens,
        )

    def fits(self, hardware: Hardware) -> bool:
        return self.memory(hardware).total <= hardware.usable_bytes


@dataclass(frozen=True)
class InferencePlan:
    """The answer. `suggestions` are changes each of which makes it fit by itself."""

    wish: Wish
    hardware: Hardware
    memory: Memory
    speed: Speed
    is_fitting: bool
    max_context: int  # that fits with everything else as wished; 0 if none does
    suggestions: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        wish, hardware = self.wish, self.hardware
        return {
            "weights": wish.weights,
            "kv": wish.kv,
            "context": wish.context,
            "batch": wish.batch,
            "hardware": {
                "name": hardware.label,
                "memory_bytes": hardware.total_memory_bytes,
                "usable_bytes": hardware.usable_bytes,
                "bandwidth": hardware.total_bandwidth,
                "flops": {kind: hardware.total_flops(kind) for kind in hardware.flops},
                "source": str(hardware.source),
                "is_data_sheet": hardware.source.is_data_sheet,
            },
            "memory_bytes": self.memory.as_dict(),
            "cache_bytes_per_token": cache_bytes_per_token(wish.config, wish.kv),
            "fits": self.is_fitting,
            "max_context": self.max_context,
            "speed_limit": self.speed.as_dict(),
            "suggestions": self.suggestions,
            "disk": disk_table(wish.config),
        }


def plan_inference(
    config: ModelConfig,
    hardware: Hardware,
    *,
    weights: str = "bf16",
    kv: str = "bf16",
    context: int | None = None,
    batch: int = 1,
) -> InferencePlan:
    """Plans; `context` None is the model's own, at most 4096. UsageError for unknown formats."""
    context = min(config.max_position_embeddings, 4096) if context is None else context
    if context < 1 or batch < 1:
        raise UsageError("context and batch are at least 1", found=f"{context} and {batch}")
    if context > config.max_position_embeddings:
        raise UsageError(
            "the context is longer than the model's positions",
            found=f"{context:,}",
            expected=f"at most {config.max_position_embeddings:,}",
        )
    wish = Wish(config, check_format(weights), check_kv(kv), context, batch)
    is_fitting = wish.fits(hardware)
    return InferencePlan(
        wish,
        hardware,
        wish.memory(hardware),
        speed_of(config, hardware, weights=wish.weights, kv=wish.kv, context=context, batch=batch),
        is_fitting,
        longest_context(wish, hardware),
        [] if is_fitting else list(_suggestions(wish, hardware)),
    )


def disk_table(config: ModelConfig) -> list[dict[str, Any]]:
    """Bytes, decimal GB and binary GiB of the files in each format, with the MTP layer and without.

    GGUF files are mostly published without it.
    """
    main = config.with_changes(num_nextn_predict_layers=0)
    rows = []
    for name in WEIGHT_FORMATS:
        size, without = disk_bytes(config, name), disk_bytes(main, name)
        row = {"format": name, "bytes": size, "GB": size / 1e9, "GiB": size / GIB}
        rows.append(row | {"bytes_without_mtp": without})
    return rows


def longest_context(wish: Wish, hardware: Hardware) -> int:
    """The longest context that fits, by bisection; 0 if not even one token does."""
    low, high = 0, wish.config.max_position_embeddings
    while low < high:
        middle = (low + high + 1) // 2
        if replace(wish, context=middle).fits(hardware):
            low = middle
        else:
            high = middle - 1
    return low


def _suggestions(wish: Wish, hardware: Hardware) -> Iterator[str]:
    """Single changes that make it fit, the least first; then weights and cache together."""
    context = longest_context(wish, hardware)
    if context >= SHORTEST_CONTEXT:
        yield f"--context {context} (with everything else as it is)"
    batch = _largest_batch(wish, hardware)
    if batch and wish.batch > 1:
        yield f"--batch {batch}"
    for kv in _smaller_kv(wish):
        if replace(wish, kv=kv).fits(hardware):
            yield f"--kv {kv}"
            break
    smaller = list(_smaller_weights(wish))
    fitting = [w for w in smaller if replace(wish, weights=w).fits(hardware)]
    if fitting:
        yield _priced(f"--weights {fitting[0]}", replace(wish, weights=fitting[0]), hardware)
    elif less := _everything_smaller(wish, hardware, smaller):
        change = f"--weights {less.weights} --kv {less.kv} --context {less.context}"
        yield _priced(f"{change} --batch {less.batch}", less, hardware)
    if more := _more_devices(wish, hardware):
        yield _priced(f"--on {more.label}", wish, more)


def _everything_smaller(wish: Wish, hardware: Hardware, smaller: Sequence[str]) -> Wish | None:
    """The best weights that leave room for one short stream; then as much load as fits."""
    for weights in (wish.weights, *smaller):
        one = replace(wish, weights=weights, kv=_smallest_kv(wish), batch=1)
        context = min(wish.context, longest_context(one, hardware))
        if context >= min(wish.context, SHORTEST_CONTEXT):
            less = replace(one, context=context)
            return replace(less, batch=_largest_batch(replace(less, batch=wish.batch), hardware))
    return None


def _smallest_kv(wish: Wish) -> str:
    return min((wish.kv, *SMALLER_KV), key=lambda kv: cache_bytes_per_token(wish.config, kv))


def _priced(change: str, wish: Wish, hardware: Hardware) -> str:
    total, usable = wish.memory(hardware).total, hardware.usable_bytes
    return f"{change} ({total / 1e9:,.1f} of {usable / 1e9:,.1f} GB)"


def _largest_batch(wish: Wish, hardware: Hardware) -> int:
    low, high = 0, wish.batch
    while low < high:
        middle = (low + high + 1) // 2
        if replace(wish, batch=middle).fits(hardware):
            low = middle
        else:
            high = middle - 1
    return low


def _smaller_kv(wish: Wish) -> list[str]:
    now = cache_bytes_per_token(wish.config, wish.kv)
    return [kv for kv in SMALLER_KV if cache_bytes_per_token(wish.config, kv) < now]


def _smaller_weights(wish: Wish) -> list[str]:
    """Formats of fewer bytes, the largest of them first."""
    sizes = {name: memory_bytes(wish.config, name) for name in WEIGHT_FORMATS}
    now = memory_bytes(wish.config, wish.weights)
    names = [name for name in sizes if sizes[name] < now]
    return sorted(names, key=lambda name: -sizes[name])


def _more_devices(wish: Wish, hardware: Hardware) -> Hardware | None:
    """The least number of the same device; none for a machine that is one of a kind."""
    if hardware.name == "here":
        return None
    num = hardware.num_devices + 1
    while num <= MAX_DEVICES:
        if wish.fits(hardware.times(num)):
            return hardware.times(num)
        num += 1
    return None

"""What devices send each other in a step, at least: tokens to their experts, results back.

Each token lives on one device, the experts are divided among all (report §3.4.2). A token goes once
to each device that holds experts of its choice, in FP8, and what they made of it comes back in
BF16; to another machine it goes once, and there on (§3.2.2). The attention's own exchanges where
its heads are divided, and the time until the first byte arrives, are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.model import ModelConfig
from rorqual.plan.hardware import Hardware

BYTES_OUT_AND_BACK = 1 + 2  # a value: §3.3.3 dispatches in FP8 and combines in BF16
WORD = "transfers between devices are not counted: no figure is known for their links"


@dataclass(frozen=True)
class Sent:
    """By each device, bytes a step."""

    to_devices: float
    to_machines: float
    seconds: float


def sent(config: ModelConfig, hardware: Hardware, token_layers: float) -> Sent | None:
    """Of a step whose tokens pass so many sparse layers in all; None where the links' rates are not
    known.
    """
    if hardware.num_devices == 1 or token_layers == 0:
        return Sent(0, 0, 0)
    is_within = hardware.num_nodes == 1
    if hardware.link_rate is None or (hardware.network_rate is None and not is_within):
        return None
    one = BYTES_OUT_AND_BACK * config.hidden_size * token_layers / hardware.num_devices
    to_devices = one * places_visited(config, hardware.num_devices)
    to_machines = one * places_visited(config, hardware.num_nodes)
    network_seconds = to_machines / hardware.network_rate if hardware.network_rate else 0.0
    seconds = max(to_devices / hardware.link_rate, network_seconds)
    return Sent(to_devices, to_machines, seconds)


def places_visited(config: ModelConfig, num_places: int) -> float:
    """Other places than its own that a token visits, in expectation, where the experts are divided
    evenly; those of V3 lie in half of the places where each group has a place or more.
    """
    open_to_it = num_places
    if config.n_group and config.topk_group:
        open_to_it = min(num_places, config.topk_group * max(1, num_places // config.n_group))
    visited = open_to_it * (1 - (1 - 1 / open_to_it) ** config.num_experts_per_tok)
    return visited * (1 - 1 / num_places)

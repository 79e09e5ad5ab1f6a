"""How many hours of devices a training run takes, at the one share of their peak that the report's
own cost gives (§1, Table 1).

MFU: FLOPs of the model, forward and backward, MTP included (`model.flops`; what is computed again
does not count), over the bfloat16 peak. The report's pre-training took 2.664M H800 hours for 14.8T
tokens, which fixes it. With it the context extension is foretold, not fitted (`extension_hours`),
so that its error says what the figure is worth elsewhere.
"""

from __future__ import annotations

from functools import cache

from rorqual.model import ModelConfig, preset
from rorqual.model.flops import training_flops_per_token
from rorqual.plan.devices import HARDWARE
from rorqual.plan.hardware import Hardware

REPORTED_HOURS, REPORTED_TOKENS, REPORTED_LENGTH = 2.664e6, 14.8e12, 4096
EXTENSION_HOURS = 119e3
# §4.3: two phases of 1,000 steps, (sequences a step, tokens of a sequence).
EXTENSION = ((1920, 32 * 1024), (480, 128 * 1024))
EXTENSION_STEPS = 1000
PEAK = "bf16"


@cache
def fitted_mfu() -> float:
    """What the report's pre-training reached of an H800's bfloat16 peak."""
    flops = REPORTED_TOKENS * training_flops_per_token(preset("671b"), REPORTED_LENGTH)
    return flops / (REPORTED_HOURS * 3600 * HARDWARE["H800"].flops[PEAK])


def device_hours(
    config: ModelConfig, num_tokens: float, sequence_length: int, hardware: Hardware
) -> float:
    """At that share of one such device's peak."""
    flops = num_tokens * training_flops_per_token(config, sequence_length)
    return flops / (fitted_mfu() * hardware.flops[PEAK] * 3600)


@cache
def extension_hours() -> float:
    """Of the report's context extension, where it says `EXTENSION_HOURS`."""
    config, device = preset("671b"), HARDWARE["H800"]
    return sum(
        device_hours(config, EXTENSION_STEPS * sequences * length, length, device)
        for sequences, length in EXTENSION
    )

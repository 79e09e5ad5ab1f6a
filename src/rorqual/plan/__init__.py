"""Before anything is loaded: memory, disk, tokens a second, and what would fit."""

from rorqual.plan.devices import HARDWARE
from rorqual.plan.find import find_hardware
from rorqual.plan.hardware import Hardware
from rorqual.plan.inference import InferencePlan, plan_inference
from rorqual.plan.sizes import WEIGHT_FORMATS, disk_bytes

__all__ = [
    "HARDWARE",
    "WEIGHT_FORMATS",
    "Hardware",
    "InferencePlan",
    "disk_bytes",
    "find_hardware",
    "plan_inference",
]

"""Many ranks: the orders of a pipeline, and when each rank does what."""

from rorqual.parallel.actions import Action, Kind, Order, Overlapped
from rorqual.parallel.pipeline import (
    PIPELINE_ORDERS,
    ClosedForm,
    TimedPipeline,
    closed_form,
    make_orders,
    simulate_pipeline,
)
from rorqual.parallel.simulator import Durations, Interval, Timeline, simulate

__all__ = [
    "PIPELINE_ORDERS",
    "Action",
    "ClosedForm",
    "Durations",
    "Interval",
    "Kind",
    "Order",
    "Overlapped",
    "TimedPipeline",
    "Timeline",
    "closed_form",
    "make_orders",
    "simulate",
    "simulate_pipeline",
]

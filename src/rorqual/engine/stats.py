"""What the engine tells of itself: the state now, and counters since it was made."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """Prefix queries and hits are in tokens. `drafted` and `accepted` count by draft position;
    `num_drafts` are drafted for each answer now.
    """

    num_waiting: int
    num_running: int
    num_blocks: int
    num_free_blocks: int
    num_prefix_queried_tokens: int
    num_prefix_hit_tokens: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_preemptions: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    num_drafts: int

"""The `usage` of a reply: tokens, cache hits, accepted drafts."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest

from rorqual.engine import Usage
from rorqual.serve.schemas_common import (
    CompletionTokensDetails,
    PromptTokensDetails,
    UsageBody,
)


def usage_body(
    usages: Mapping[int, Usage], num_choices_per_prompt: int, num_reasoning_tokens: int = 0
) -> UsageBody:
    """Sums the answers' usage by choice; a prompt of several choices counts once, as its first.

    hit + miss is always the number of prompt tokens.
    """
    firsts = [usage for index, usage in usages.items() if index % num_choices_per_prompt == 0]
    num_prompt = sum(usage.num_prompt_tokens for usage in firsts)
    num_hits = sum(min(usage.num_cached_tokens, usage.num_prompt_tokens) for usage in firsts)
    num_output = sum(usage.num_output_tokens for usage in usages.values())
    columns = zip_longest(*(usage.drafted for usage in usages.values()), fillvalue=0)
    drafted = [sum(column) for column in columns]
    columns = zip_longest(*(usage.accepted for usage in usages.values()), fillvalue=0)
    accepted = [sum(column) for column in columns]
    shares = [a / d if d else 0.0 for a, d in zip_longest(accepted, drafted, fillvalue=0)]
    return UsageBody(
        prompt_tokens=num_prompt,
        completion_tokens=num_output,
        total_tokens=num_prompt + num_output,
        prompt_cache_hit_tokens=num_hits,
        prompt_cache_miss_tokens=num_prompt - num_hits,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=num_hits),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=num_reasoning_tokens,
            accepted_prediction_tokens=sum(accepted),
            rejected_prediction_tokens=max(sum(drafted) - sum(accepted), 0),
            acceptance_by_position=[round(share, 4) for share in shares],
        ),
    )

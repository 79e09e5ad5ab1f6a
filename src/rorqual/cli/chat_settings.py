"""`/set` of the terminal chat: the fields of sampling that the server has, in its ranges."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from rorqual.engine import SamplingParams
from rorqual.engine.params import OPTIONAL
from rorqual.errors import UsageError
from rorqual.serve.errors import ApiError, validation_error
from rorqual.serve.fields_honoured import HONOURED
from rorqual.serve.sampling import sampling_params
from rorqual.serve.schemas_common import SamplingFields

# The server's names, and those of SamplingParams where they are others.
FIELDS = {
    name: {"thinking_token_budget": "max_thinking_tokens"}.get(name, name)
    for name in (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "frequency_penalty",
        "presence_penalty",
        "logit_bias",
        "allowed_token_ids",
        "seed",
        "stop",
        "stop_token_ids",
        "max_tokens",
        "min_tokens",
        "thinking_token_budget",
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    )
}
RANGES = {row.name: row.values for row in HONOURED if row.name in FIELDS} | {"max_tokens": "1.."}
CAN_BE_NONE = (*OPTIONAL, "allowed_token_ids")
NONE, DEFAULT = "none", "default"
FORM = "/set temperature=0.5, or /set temperature=default"


def listed(params: SamplingParams, defaults: SamplingParams) -> str:
    """A line a field: its value, its range, and the default where it has another."""
    lines = []
    for name, attribute in FIELDS.items():
        value, default = getattr(params, attribute), getattr(defaults, attribute)
        notes = [RANGES[name]] if RANGES.get(name) else []
        notes += [f"default {_shown(default)}"] if value != default else []
        lines.append(f"  {f'{name} = {_shown(value)}':<36}{'; '.join(notes)}".rstrip())
    return "\n".join(lines)


def changed(
    text: str, params: SamplingParams, defaults: SamplingParams, num_ids: int
) -> SamplingParams:
    """`params` with what `name=value` or `name value` says; a value is JSON, or else a text.
    `default` is what it was in `defaults`, `none` switches off. UsageError for an unknown name, and
    a value that the server would refuse.
    """
    name, value = _parts(text)
    if name not in FIELDS:
        near = difflib.get_close_matches(name, FIELDS, n=1)
        raise UsageError(
            f"there is no setting {name!r}",
            expected=", ".join(FIELDS),
            fix=f"did you mean {near[0]}?" if near else None,
        )
    if not value:
        raise UsageError(f"{name} has no value", expected=FORM)
    attribute = FIELDS[name]
    new: Any = None
    if value == DEFAULT:
        new = getattr(defaults, attribute)
    elif value != NONE or attribute not in CAN_BE_NONE:
        new = getattr(_checked(name, value, defaults, num_ids), attribute)
    return replace(params, **{attribute: new})


def shown(text: str, params: SamplingParams) -> str:
    """The setting that `text` has set, as `listed` begins its line."""
    name, _ = _parts(text)
    return f"{name} = {_shown(getattr(params, FIELDS[name]))}"


def _parts(text: str) -> tuple[str, str]:
    """Name and value, which `=` or white space parts."""
    name, *value = re.split(r"\s*=\s*|\s+", text.strip(), maxsplit=1)
    return name, value[0] if value else ""


def _checked(name: str, text: str, defaults: SamplingParams, num_ids: int) -> SamplingParams:
    """The defaults with this field as the server reads it."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    try:
        body = SamplingFields.model_validate({name: value})
        if getattr(body, name) is None:  # null, or -1 of a number of tokens
            return defaults
        # Of two fields that must agree the other one is checked where both are put together.
        most = max(body.max_tokens or 1, body.min_tokens or 0)
        return sampling_params(body, defaults, max_tokens=most, vocab_size=num_ids)
    except ValidationError as problem:
        said = validation_error(problem.errors()).message
    except ApiError as problem:
        said = problem.message
    raise UsageError(said, expected=RANGES.get(name) or None, fix=FORM)


def _shown(value: Any) -> str:
    """As `/set` takes it."""
    if value is None:
        return NONE
    if hasattr(value, "items"):
        value = {str(token): bias for token, bias in value.items()}
    return json.dumps(value, ensure_ascii=False)

"""The flags of every verb that runs a model, and the engine that comes of them."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from rorqual.cli.options import DeviceName, Threads, set_threads
from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.engine import Engine, EngineOptions
    from rorqual.model import DeepseekV3
    from rorqual.tokenizer import Tokenizer
    from rorqual.weights import ModelFolder

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class EngineFlags:
    """What `with_engine_flags` adds to a verb."""

    dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32 or bfloat16: what weights are decoded to, FP8 and GGUF's types "
            "too. On CPUs also stored: as they are in the file (least memory); native: what the "
            "C++ kernels do not multiply as it is stored becomes bfloat16; int8: that and bfloat16 "
            "become 8 bits. Auto: native where those kernels are, else float32 up to a billion "
            "parameters, bfloat16 beyond.",
        ),
    ] = "auto"
    speculate: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            min=0,
            help="Tokens that the MTP module drafts ahead at most. [default: 2 in chat, else 0]",
        ),
    ] = None
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="auto, float32, bf16, fp8 or q8: how latents are kept. Auto: as the model "
            "computes, bf16 where weights run as they are stored."
        ),
    ] = "auto"
    cache_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The cache: 2GiB, 500M, or 0.5 of the free memory."),
    ] = None
    max_model_len: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer. [default: the model's]")
    ] = None
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="The same text in any batch; slower.")
    ] = False
    kernels: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="auto, or slower ones to compare: `rorqual inspect` lists them."
        ),
    ] = "auto"
    device: DeviceName = "auto"
    threads: Threads = None

    def options(self, **others: Any) -> EngineOptions:
        """The engine's options from these flags and from `others`, of which the verb has flags of
        its own; UsageError for a value that is none.
        """
        from rorqual.engine import EngineOptions
        from rorqual.ops.device import resolve_device
        from rorqual.ops.kernels import AUTO, named

        if self.kernels != AUTO:
            named(self.kernels)
        memory = None if self.cache_memory is None else parse_memory(self.cache_memory)
        given = {"speculate": self.speculate or 0} | others
        return EngineOptions(
            dtype=self.dtype,
            device=resolve_device(self.device),
            cache_memory=memory,
            kv_cache_dtype=self.kv_cache_dtype,  # type: ignore[arg-type]  # Engine checks it
            max_model_len=self.max_model_len,
            is_batch_invariant=self.batch_invariant,
            kernels=self.kernels,
            **given,
        )

    def model(
        self, folder: ModelFolder, tokenizer: Tokenizer, options: EngineOptions
    ) -> DeepseekV3:
        """Loads the weights; UsageError, before that, for options that they cannot have."""
        set_threads(self.threads)
        options.check(folder.model_config(), tokenizer)
        return folder.load_model(options.dtype, options.device, options.kernels)

    def engine(self, folder: ModelFolder, tokenizer: Tokenizer, options: EngineOptions) -> Engine:
        """Loads the weights and makes an engine of them."""
        from rorqual.engine import Engine

        return Engine(self.model(folder, tokenizer, options), tokenizer, options)


def with_engine_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb with the flags of `EngineFlags` after its own; it gets them as `flags`."""
    signature = inspect.signature(verb)
    hints = get_type_hints(verb, include_extras=True)
    flag_hints = get_type_hints(EngineFlags, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in signature.parameters.items()
        if name != "flags"
    ]
    added = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=flag_hints[field.name],
        )
        for field in fields(EngineFlags)
    ]

    @functools.wraps(verb)
    def wrapped(**values: Any) -> None:
        flags = EngineFlags(**{field.name: values.pop(field.name) for field in fields(EngineFlags)})
        verb(**values, flags=flags)

    vars(wrapped)["__signature__"] = signature.replace(parameters=[*own, *added])
    wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *added)} | {"return": None}
    return wrapped


def parse_memory(text: str) -> int | float:
    """Bytes (`2GiB`, `500M`, `1000000`) or a fraction of the free memory (`0.5`). UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            "--cache-memory is no size", found=text, expected="2GiB, 500M, or a fraction like 0.5"
        )
    number = float(match[1])
    if match[2] is None and number < 1:
        return number
    return int(number * UNITS[match[2] or ""])

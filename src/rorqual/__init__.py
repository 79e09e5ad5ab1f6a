"""All of DeepSeek-V3, open end to end. `import rorqual` stays light: names resolve on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rorqual.engine import Engine, SamplingParams
    from rorqual.errors import RorqualError
    from rorqual.tokenizer import load_tokenizer
    from rorqual.weights import load, save

    __version__: str

__all__ = [
    "Engine",
    "RorqualError",
    "SamplingParams",
    "__version__",
    "load",
    "load_tokenizer",
    "save",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for (PEP 562), so torch loads only if needed."""
    if name in ("load", "save"):
        from rorqual import weights

        return getattr(weights, name)
    if name in ("Engine", "SamplingParams"):
        from rorqual import engine

        return getattr(engine, name)
    if name == "RorqualError":
        from rorqual.errors import RorqualError

        return RorqualError
    if name == "load_tokenizer":
        from rorqual.tokenizer import load_tokenizer

        return load_tokenizer
    if name == "__version__":
        from importlib.metadata import version

        return version("rorqual")
    raise AttributeError(f"module 'rorqual' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

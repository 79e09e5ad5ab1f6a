"""`rorqual bench`: this machine's ceilings, our engine and the peers installed, side by side."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rorqual.cli.engine_flags import EngineFlags, with_engine_flags
from rorqual.cli.exits import ended_by_sigterm
from rorqual.errors import UsageError

if TYPE_CHECKING:
    from rorqual.bench import Load, Places, Report
    from rorqual.engine import EngineOptions
    from rorqual.model import ModelConfig

Advance = Callable[[str, int, int | None], None]
WITHOUT_MODEL = "mid"  # whose shapes the products have then
NOT_SENT = ("device", "draft_policy")
MOST_DIGITS = 9


@with_engine_flags
def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint, tiny, or preset:NAME with random weights. [default: none, this "
            "machine's ceilings alone]",
        ),
    ] = None,
    against: Annotated[
        str, typer.Option(metavar="NAME,...", help="transformers, llama.cpp, ik_llama.cpp, vllm.")
    ] = "",
    gguf: Annotated[
        Path | None,
        typer.Option(help="What llama.cpp runs. [default: MODEL, or made of it in BF16]"),
    ] = None,
    llama_cpp: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where llama-bench is. [default: the path]")
    ] = None,
    ik_llama_cpp: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where ik_llama.cpp's llama-bench is.")
    ] = None,
    vllm: Annotated[
        Path | None, typer.Option(metavar="PYTHON", help="A Python that has vLLM.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Of all engines in turn.")] = 3,
    prefill: Annotated[
        str | None, typer.Option(metavar="N,...", help="Tokens of prompts. [default: 512, or less]")
    ] = None,
    streams: Annotated[
        str, typer.Option(metavar="N,...", help="Streams that decode side by side.")
    ] = "1,2,4,8,16",
    depth: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens that a stream has before it is timed.")
    ] = "32",
    decode_tokens: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Timed tokens of a stream.")
    ] = 32,
    keep: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the random model, or find it there.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="All figures, written as they come.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="A picture of them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON to standard output.")] = False,
    *,
    flags: EngineFlags,
) -> None:
    """Measures this machine, our engine on it and other engines that are installed, on a CPU.

    Rounds interleave the machine's read rate, ours and each peer, one process at a time; medians
    and shares of what the machine allows are printed. Ctrl-C keeps what was measured.

    \b
    Examples:
      rorqual bench
      rorqual bench preset:mid --rounds 5 --output mid.json --plot mid.png
      rorqual bench DIR --against transformers --streams 1,8
      rorqual bench FILE.gguf --against llama.cpp,ik_llama.cpp --ik-llama-cpp DIR
    """
    from rorqual.bench import Bench, Places, Report, find_peers
    from rorqual.bench.plots import write_plot
    from rorqual.cli.options import require_matplotlib
    from rorqual.cli.progress import shown_progress
    from rorqual.files import write_json

    if plot is not None:
        require_matplotlib("--plot")
    names = _peer_names(against, has_model=model is not None)
    places = Places(gguf=gguf, llama_cpp=llama_cpp, ik_llama_cpp=ik_llama_cpp, vllm=vllm)
    _check_places(places, names)
    config = _config(model)
    load = _load(config, prefill, streams, depth, decode_tokens, flags.threads)
    options = _options(flags, model, config, load)
    report = Report()

    def save(report: Report) -> None:
        if output is not None:
            write_json(output, report.as_dict())

    for file in (output, plot):
        _check_place(file)
    try:
        with (
            ended_by_sigterm(),
            tempfile.TemporaryDirectory(prefix="rorqual-bench-") as scratch,
            shown_progress() as tell,
        ):

            def advance(name: str, done: int, total: int | None) -> None:
                tell(name, done, total, "")

            path = _ready(model, config, keep, Path(scratch), advance)
            places = _with_files(places, path, names, Path(scratch), report, advance)
            peers, report.missing = find_peers(
                names, replace(places, dtype=_peer_dtype(options, config))
            )
            report.about = _about(model, load, options)
            Bench(config, load, path, _sent(options), peers, rounds, save, advance).run(report)
    finally:  # whatever ends it, what was measured is shown
        if report.reads:
            _show(report, as_json=as_json)
            if plot is not None:
                write_plot(report, plot)


def _check_place(file: Path | None) -> None:
    """OSError, before anything is measured, where this file cannot be written."""
    if file is None or (file.exists() and not file.is_file() and not file.is_dir()):
        return
    if file.is_dir():
        raise UsageError("is a folder, and a file is needed", where=file, fix="name a file in it")
    file.parent.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=file.parent).close()


def _show(report: Report, *, as_json: bool) -> None:
    from rorqual.cli.bench_tables import print_report

    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        print_report(report)


def _peer_names(text: str, *, has_model: bool) -> list[str]:
    from rorqual.bench import PEERS
    from rorqual.errors import listing

    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in PEERS:
            raise UsageError(f"unknown peer {name!r}", expected=listing(PEERS))
    if names and not has_model:
        raise UsageError(
            "peers are measured on a model, and none is named",
            found=f"--against {text}",
            fix="name a checkpoint, or preset:mid for random weights",
        )
    return names


def _check_places(places: Places, names: list[str]) -> None:
    """UsageError for a place that none of these peers has a use for, or without a GGUF model."""
    from rorqual.weights import ModelFolder

    uses = {
        "gguf": ("llama.cpp", "ik_llama.cpp"),
        "llama_cpp": ("llama.cpp",),
        "ik_llama_cpp": ("ik_llama.cpp",),
        "vllm": ("vllm",),
    }
    for name, peers in uses.items():
        if getattr(places, name) is not None and not set(peers) & set(names):
            flag = f"--{name.replace('_', '-')}"
            fix = f"give --against {peers[0]} too, or leave {flag} out"
            raise UsageError(f"{flag} is for a peer that is not measured", fix=fix)
    if places.gguf is not None:
        ModelFolder.find(str(places.gguf))


def _config(model: str | None) -> ModelConfig:
    """Of the model, of the preset, or without either of the shape whose products are measured."""
    from rorqual.model import named_preset, preset
    from rorqual.weights import ModelFolder

    if model is None:
        return preset(WITHOUT_MODEL)
    return named_preset(model) or ModelFolder.find(model).model_config()


def _load(
    config: ModelConfig,
    prefill: str | None,
    streams: str,
    depth: str,
    decode_tokens: int,
    threads: int | None,
) -> Load:
    from rorqual.bench import Load
    from rorqual.cli.options import set_threads
    from rorqual.ops.device import num_processors

    threads = num_processors() if threads is None else threads
    set_threads(threads)  # here too, since that is told with the machine
    half = max(1, config.max_position_embeddings // 2)
    return Load(
        prefill=(min(512, half),) if prefill is None else _numbers("--prefill", prefill),
        streams=_numbers("--streams", streams),
        depths=_numbers("--depth", depth),
        decode_tokens=decode_tokens,
        threads=threads,
    )


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    """Of `1,2,4`; none of an empty text. UsageError for anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and len(part) <= MOST_DIGITS and int(part) > 0 for part in parts):
        raise UsageError(
            f"{flag} takes numbers from 1 on, with commas between them",
            found=text if len(text) <= 80 else f"{text[:80]}...",
            expected=f"such as 1,2,4, of at most {MOST_DIGITS} digits",
        )
    return tuple(dict.fromkeys(map(int, parts)))


def _options(
    flags: EngineFlags, model: str | None, config: ModelConfig, load: Load
) -> EngineOptions:
    """Our engine's; UsageError, before anything is made or loaded, for what it cannot have."""
    import torch

    from rorqual.bench.ours import options_for, own_tokenizer
    from rorqual.model import named_preset
    from rorqual.weights import ModelFolder

    options = flags.options()
    if torch.device(options.device).type != "cpu":
        if flags.device != "auto":
            raise UsageError(
                "what is measured are processors; a GPU is not yet",
                found=f"--device {flags.device}",
                expected="--device cpu",
            )
        options = replace(options, device=torch.device("cpu"))
    if model is None:
        return options
    if named_preset(model) is None:
        options.check(config, own_tokenizer(ModelFolder.find(model)))
    options_for(load, config, options)
    return options


def _ready(
    model: str | None, config: ModelConfig, keep: Path | None, scratch: Path, advance: Advance
) -> str | None:
    """The checkpoint's path; of a preset, random weights are made."""
    from rorqual.bench.models import build_random
    from rorqual.model import named_preset
    from rorqual.weights import load_config

    is_preset = model is not None and named_preset(model) is not None
    if keep is not None and not is_preset:
        raise UsageError("--keep is for a preset: nothing else is made", found=f"MODEL {model}")
    if not is_preset:
        return model
    folder = keep or scratch / "model"
    if (folder / "config.json").exists():
        if load_config(folder) != config:
            raise UsageError("another model is kept there", where=folder, fix="name another folder")
        return str(folder)
    advance(f"making {model}", 0, None)
    build_random(config, folder)
    return str(folder)


def _with_files(
    places: Places,
    path: str | None,
    names: list[str],
    scratch: Path,
    report: Report,
    advance: Advance,
) -> Places:
    """What peers run: the folder, the GGUF file, or one that is made of the folder."""
    from rorqual.bench.models import convert_to_gguf
    from rorqual.bench.peers import has_llama
    from rorqual.weights import ModelFolder

    if path is None:
        return places
    found = ModelFolder.find(path)
    if found.kind == "huggingface":
        places = replace(places, folder=found.path)
    if found.kind == "gguf" and places.gguf is None:
        places = replace(places, gguf=found.path)
    if places.gguf is None and found.kind == "huggingface" and has_llama(names, places):
        advance("converting to GGUF", 0, None)
        file = scratch / "model-BF16.gguf"
        convert_to_gguf(found.path, file)
        report.notes.append("llama.cpp and its fork run a BF16 file that was made of the folder")
        places = replace(places, gguf=file)
    return places


def _peer_dtype(options: EngineOptions, config: ModelConfig) -> str:
    """Ours, where theirs can be the same."""
    from rorqual.ops.device import resolve_device
    from rorqual.weights.model_folder import auto_dtype, has_kernels

    has_them = has_kernels(resolve_device(options.device), options.kernels)
    if options.dtype == "auto" and auto_dtype(config, has_kernels=has_them) == "float32":
        return "float32"
    return "float32" if options.dtype == "float32" else "bfloat16"


def _sent(options: EngineOptions) -> dict[str, Any]:
    """The options as the measured process gets them."""
    return {f.name: getattr(options, f.name) for f in fields(options) if f.name not in NOT_SENT}


def _about(model: str | None, load: Load, options: EngineOptions) -> dict[str, Any]:
    import rorqual
    from rorqual.ops.ceilings import describe_machine

    return {
        "rorqual": rorqual.__version__,
        "machine": describe_machine(),
        "model": model,
        "load": load.as_dict(),
        "options": _sent(options),
    }

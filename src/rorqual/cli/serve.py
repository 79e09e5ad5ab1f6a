"""`rorqual serve`: the OpenAI-compatible server and the chat page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from rorqual.bundled import BUNDLED
from rorqual.cli.engine_flags import EngineFlags, with_engine_flags
from rorqual.cli.options import (
    Model,
    TokenizerPath,
    loading,
)
from rorqual.config import apply_overrides, fill, settings
from rorqual.errors import ConfigError, UsageError
from rorqual.log import console, logger

if TYPE_CHECKING:
    import socket

    from rorqual.engine import Engine, EngineStats
    from rorqual.serve.model_facts import ModelFacts
    from rorqual.serve.settings import ServedModel, ServerSettings

SECTIONS = ("server", "engine")


@settings
class SetOptions:
    """What `--set engine.NAME=VALUE` may say: what has no flag of its own."""

    max_step_tokens: int = Field(default=512, gt=0)
    block_tokens: int = Field(default=16, gt=0)
    use_prefix_cache: bool = True
    max_queue: int = Field(default=256, ge=0)


@with_engine_flags
def serve(
    model: Model = "tiny",
    tokenizer: TokenizerPath = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 serves other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(metavar="F", help="Keys that may ask, one a line. [default: everybody may]"),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="The model's name in requests; further ones alias it."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A site whose pages may ask; may be repeated."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Answers under this name too without a key; may be repeated."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keeps files, batches and responses. [default: this user's state folder]",
        ),
    ] = None,
    files_dir: Annotated[Path | None, typer.Option(hidden=True)] = None,
    request_timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest time an answer may take.")
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Answers that run side by side.")] = 32,
    strict_fields: Annotated[
        bool,
        typer.Option("--strict-fields", help="Refuse fields that nobody knows; else ignore them."),
    ] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="K=V", help="server.max_body_bytes=... and the like: docs/api.md."
        ),
    ] = None,
    *,
    flags: EngineFlags,
) -> None:
    """Serve a model: OpenAI's and Anthropic's APIs, DeepSeek's fields, and a chat page at /.

    The first Ctrl-C or SIGTERM lets running answers finish; the second ends at once. So does a
    closed terminal (SIGHUP), unless `nohup` says that it is not to; exit code 129.

    \b
    Examples:
      rorqual serve
      rorqual serve --model DIR --speculate 1 --port 0
      rorqual serve --model FILE.gguf
      rorqual serve --model DIR --host 0.0.0.0 --api-key-file keys.txt
    """
    _need_extra()
    from rorqual.serve.server import open_socket

    if files_dir is not None:
        raise UsageError(
            "--files-dir is now --state-dir, a folder for files, batches and responses",
            fix="give --state-dir, and upload again what lies in the old folder",
        )
    table = _overrides(set_ or [])
    without_flags = fill(SetOptions, table["engine"], "--set engine")
    options = flags.options(
        max_batch=max_batch,
        max_step_tokens=without_flags.max_step_tokens,
        block_tokens=without_flags.block_tokens,
        use_prefix_cache=without_flags.use_prefix_cache,
    )
    _check_names(served_model_name or [])
    bound = open_socket(host, port)
    with bound:
        chosen = {
            "cors_origins": tuple(cors_origin or ()),
            "allowed_hosts": tuple(allow_host or ()),
            "state_dir": state_dir,
            "request_timeout_seconds": request_timeout,
            "has_strict_fields": strict_fields or None,
        }
        server_settings = _server_settings(table["server"], chosen, api_key_file, bound)
        with loading(model, is_logged=True):
            from rorqual.engine import SamplingParams
            from rorqual.serve.model_facts import model_facts
            from rorqual.weights import ModelFolder

            folder = ModelFolder.find(model, tokenizer)
            engine = flags.engine(folder, folder.load_tokenizer(), options)
            card = folder.card()
            facts = model_facts(
                engine, card.opening, card.examples, is_bundled=folder.name == BUNDLED
            )
        names = served_model_name or [folder.name]
        _run(
            engine,
            SamplingParams(**folder.sampling()),
            facts,
            names,
            without_flags.max_queue,
            server_settings,
            bound,
        )


def _run(
    engine: Engine,
    defaults: Any,
    facts: ModelFacts,
    names: list[str],
    max_queue: int,
    server_settings: ServerSettings,
    bound: socket.socket,
) -> None:
    from rorqual.cli.exits import EXIT_HUNG_UP
    from rorqual.engine import AsyncEngine
    from rorqual.serve.app import create_app
    from rorqual.serve.server import EXIT_FAILED, Server, address_of
    from rorqual.serve.settings import ServedModel

    served = ServedModel(
        name=names[0],
        aliases=tuple(names[1:]),
        tokenizer=engine.tokenizer,
        max_positions=engine.max_positions,
        defaults=defaults,
        device=str(engine.device),
        facts=facts,
    )
    app = create_app(AsyncEngine(engine, max_queue=max_queue), served, server_settings)
    lines = greeting(
        address_of(bound), served, engine.stats(), engine.options.block_tokens, server_settings
    )
    console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    server = Server(app, on_notice=_notice)
    server.run(sockets=[bound])
    if server.failure is not None:
        raise typer.Exit(EXIT_FAILED)
    if server.has_hung_up:
        raise typer.Exit(EXIT_HUNG_UP)


def greeting(
    address: str, model: ServedModel, stats: EngineStats, block_tokens: int, chosen: ServerSettings
) -> list[str]:
    """What is served, where and on what, with how much cache, and a line to try."""
    header = '-H "Authorization: Bearer $KEY" ' if chosen.api_keys else ""
    lines = [
        f"{model.name} at {address}  (API: {address}/v1, chat page: {address}/)",
        f"Device: {model.device}",
        f"Cache: {stats.num_blocks * block_tokens:,} tokens in {stats.num_blocks:,} blocks",
        f"Try: curl {address}/v1/chat/completions {header}-H 'Content-Type: application/json' "
        """-d '{"messages": [{"role": "user", "content": "What is 12 + 30?"}]}'""",
        "Ctrl-C lets running answers finish and ends.",
    ]
    if not chosen.api_keys and not chosen.is_loopback:
        lines.append("WARNING: other machines can reach this server, and no API key is asked for.")
    return lines


def _server_settings(
    table: dict[str, Any],
    chosen: dict[str, Any],
    api_key_file: Path | None,
    bound: socket.socket,
) -> ServerSettings:
    from rorqual.serve.auth import check_hosts, check_origins, read_keys
    from rorqual.serve.server import is_loopback
    from rorqual.serve.settings import ServerSettings

    keys = read_keys(api_key_file) if api_key_file is not None else ()
    values = {name: value for name, value in chosen.items() if value not in (None, ())}
    values |= {"api_keys": keys, "is_loopback": is_loopback(bound)}
    settings = fill(ServerSettings, table | values, "rorqual serve")
    check_origins(settings.cors_origins)
    check_hosts(settings.allowed_hosts)
    return replace(settings, state_dir=_state_folder(settings.state_dir))


def _state_folder(chosen: Path | None) -> Path | None:
    """The folder to use, looked into before a model is loaded; None: a temporary one.

    Nobody chose the default one, so where it cannot be made the server does without.
    """
    from rorqual.serve.store import check_folder, default_folder, open_folder

    if chosen is None:
        try:
            chosen = open_folder(default_folder())
        except UsageError as problem:
            logger(__name__).warning(
                "files, batches and responses go with this server, see --state-dir: %s", problem
            )
            return None
    check_folder(chosen)
    return chosen


def _check_names(names: list[str]) -> None:
    for name in names:
        if not name or name != name.strip():
            raise UsageError(
                "--served-model-name is no name",
                found=repr(name),
                expected="a text without spaces around it, as requests will give it in 'model'",
                fix="leave it out to serve the model under its folder's name",
            )


def _overrides(pairs: list[str]) -> dict[str, Any]:
    table = apply_overrides({name: {} for name in SECTIONS}, pairs)
    if unknown := sorted(set(table) - set(SECTIONS)):
        raise ConfigError(
            f"--set {unknown[0]!r} is unknown", expected="server.NAME=VALUE or engine.NAME=VALUE"
        )
    return table


def _notice(text: str) -> None:
    console().print(text, markup=False, highlight=False)


def _need_extra() -> None:
    try:
        import fastapi  # noqa: F401
        import latex2mathml  # noqa: F401
        import markdown_it  # noqa: F401
        import mdit_py_plugins  # noqa: F401
        import nh3  # noqa: F401
        import prometheus_client  # noqa: F401
        import pygments  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as problem:
        raise UsageError(
            f"the server needs a package that is not installed: {problem.name}",
            fix="pip install 'rorqual[serve]'",
        ) from None

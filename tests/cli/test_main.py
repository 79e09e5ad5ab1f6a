"""The command itself: light start, exit codes, messages without tracebacks."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from command import run, start

import rorqual
from patience import HANG_SECONDS
from rorqual.cli.verbs import VERBS
from rorqual.errors import CheckpointError

HELP_LEAVES_TORCH = """
import sys
from rorqual.cli.main import main
try:
    main()
finally:
    assert not {'torch', 'transformers'} & set(sys.modules)
"""


def help_of(*arguments: str) -> str:
    """What the command prints in a fresh process that must not import torch."""
    command = [sys.executable, "-c", HELP_LEAVES_TORCH, *arguments, "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_help_lists_the_verbs() -> None:
    text = help_of()
    for name, verb in VERBS.items():
        assert name in text
        assert verb.help in text


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_a_verbs_help_has_examples(verb: str) -> None:
    assert f"Examples:\n    rorqual {verb}" in help_of(verb)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_where_the_table_says(verb: str) -> None:
    module, _, attribute = VERBS[verb].place.partition(":")
    assert importlib.util.find_spec(module) is not None
    assert hasattr(importlib.import_module(module), attribute)


def test_version() -> None:
    assert run("--version").out == f"rorqual {rorqual.__version__}\n"


def test_bad_input_is_a_message_and_2(tmp_path: Path) -> None:
    missing = tmp_path / "nothing"
    done = run("chat", "--model", missing)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"rorqual: {missing}: no such folder")
    assert "Traceback" not in done.err
    with pytest.raises(CheckpointError):  # Python prints it with its traceback
        run("chat", "--model", missing, "--debug")


def test_unknown_verbs_and_flags_are_2() -> None:
    assert run("sing").code == 2
    done = run("chta")
    assert done.code == 2
    assert "No such command 'chta'. Did you mean 'chat'?" in done.err
    assert run("chat", "--sing").code == 2


@pytest.mark.parametrize("words", [(), ("cache",), ("data",)])
def test_the_lists_of_commands_are_not_cut_short(words: tuple[str, ...]) -> None:
    listed = run(*words, "--help").out.partition("Commands:")[2].splitlines()
    assert not [line for line in listed if line.endswith("...")]


def test_public_names_resolve_without_importing_torch_first() -> None:
    code = (
        "import sys, rorqual\n"
        "assert 'torch' not in sys.modules\n"
        "assert set(rorqual.__all__) <= set(dir(rorqual))\n"
        "from rorqual import load, load_tokenizer, save\n"
        "assert 'torch' in sys.modules and load.__module__.startswith('rorqual.weights')\n"
        "try: rorqual.nothing\n"
        "except AttributeError: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_debug_behind_two_dashes_is_an_argument() -> None:
    """`inspect -- --debug` asks for a model of that name: a message, and no traceback."""
    done = run("inspect", "--", "--debug")
    assert done.code == 2
    assert "--debug: " in done.err


INTERRUPTED_IMPORT = """
import importlib.abc, os, signal, sys
class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize("module", ["typer", "typer.core", "rorqual.cli.verbs", "torch", "numpy"])
def test_ctrl_c_while_modules_load_is_told_and_130(module: str) -> None:
    """A real signal in the middle of an import, whichever module it is that loads."""
    process = start("inspect", "tiny", setup=INTERRUPTED_IMPORT.format(module=module))
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (130, b""), err.decode()
    assert err.decode() == "\nrorqual: interrupted\n"


INTERRUPTED_LOAD = """
import os, signal
from rorqual.weights import model_reader, stored_reader
def interrupting(items, *arguments):
    for number, item in enumerate(items):
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
        yield item
model_reader.track = stored_reader.track = interrupting
"""


@pytest.mark.parametrize("dtype", ["float32", "stored"])
def test_ctrl_c_while_weights_load_is_told_and_130(dtype: str) -> None:
    flags = ("--prompt", "a", "--dtype", dtype)
    process = start("generate", *flags, setup=INTERRUPTED_LOAD)
    out, err = process.communicate(timeout=HANG_SECONDS)
    assert (process.returncode, out) == (130, b""), err.decode()
    assert err.decode() == "\nrorqual: interrupted\n"

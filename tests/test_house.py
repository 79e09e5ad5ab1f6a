"""The walls of the house: floors, no circles, `__init__` files that hand on names only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rorqual

ROOT = Path(rorqual.__file__).parent
FLOORS = {
    "cli": 8,
    "reproduce": 7,
    "serve": 6,
    "posttrain": 6,
    "eval": 6,
    "plan": 6,
    "bench": 6,
    "report": 6,
    "engine": 5,
    "train": 5,
    "weights": 4,
    "parallel": 4,
    "model": 3,
    "corpus_writer": 3,
    "fp8": 2,
    "data": 2,
    "tasks": 2,
    "ops": 1,
    "tokenizer": 1,
}
GROUND = ("bundled", "config", "errors", "files", "locks", "log", "runs")
MAX_FILE_LINES = 400
LONGER_FILES = {
    "serve/page/main.js": (
        420,
        "the page's one controller, between its events and its views",
    ),
}
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 8
A_VERB = "a verb's options are its parameters, with their help"
ROUTES = "FastAPI's routes are functions within the one that makes the router"
LONGER_FUNCTIONS = {
    "cli/bench.py bench": A_VERB,
    "cli/chat.py chat": A_VERB,
    "cli/convert.py convert": A_VERB,
    "cli/demo_generate.py demo_generate": A_VERB,
    "cli/eval.py evaluate": A_VERB,
    "cli/generate.py generate": A_VERB,
    "cli/pipeline.py pipeline": A_VERB,
    "cli/plan.py plan": A_VERB,
    "cli/serve.py serve": A_VERB,
    "cli/train.py train": A_VERB,
    "eval/lm_eval_model.py __init__": "lm-eval gives its settings as parameters",
    "train/loop.py train": "what may be asked of a run, by name",
    "serve/app.py create_app": "what an application is put together from, in its order",
    "serve/batch_routes.py batch_router": ROUTES,
    "serve/routes.py api_router": ROUTES,
}
# Rooms that own weights: others ask these, so that a weight may be stored in any form.
WEIGHT_ROOMS = ("model", "ops")
NO_MODULE_WEIGHT = {"self.weight", "recipe.mtp.weight"}  # of the MTP loss
SOURCES = ("*.py", "*.js", "*.css", "*.html")
PICKLE_LIKE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the package."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = ["rorqual", *path.relative_to(ROOT).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(path: Path) -> set[str]:
    """Every rorqual module that a file imports, also inside functions (type-only imports too)."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("rorqual")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rorqual"):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in ALL else str(node.module))
    return found


ALL = modules()


def room_of(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def floor_of(room: str) -> int:
    return 0 if room in GROUND else FLOORS[room]


@pytest.mark.parametrize("name", [name for name in ALL if room_of(name) not in ("", "__main__")])
def test_a_room_imports_only_lower_floors(name: str) -> None:
    room = room_of(name)
    assert room in FLOORS or room in GROUND, f"{name}: a room without a floor"
    for target in imports_of(ALL[name]):
        other = room_of(target)
        is_beside = other == room or {other, room} <= set(GROUND)
        if other == "" or is_beside:
            continue  # the package's version, or a file beside it
        assert floor_of(other) < floor_of(room), f"{name} imports {target}: not on a lower floor"


def test_there_is_no_import_circle() -> None:
    graph = {name: imports_of(path) & set(ALL) for name, path in ALL.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name in done:
            return
        for target in graph[name] - {"rorqual"}:
            if target != name:
                visit(target, (*path, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("name", [n for n, p in ALL.items() if p.name == "__init__.py"])
def test_init_files_hand_on_names_only(name: str) -> None:
    if name == "rorqual":
        return  # it resolves its names on first use; `test_importing_stays_light` watches it
    for node in ast.parse(ALL[name].read_text(encoding="utf-8")).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        assert is_docstring or is_all or is_import, f"{name}: {ast.unparse(node)[:60]}"


@pytest.mark.parametrize("name", sorted(ALL))
def test_files_stay_readable_and_safe(name: str) -> None:
    text = ALL[name].read_text(encoding="utf-8")
    assert not name.endswith(("utils", "legacy", "helpers", "misc")), f"{name}: names nothing"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not PICKLE_LIKE & set(names), f"{name}: loads pickled data"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{name}: runs code"


@pytest.mark.parametrize("pattern", SOURCES)
def test_files_are_short(pattern: str) -> None:
    for path in ROOT.rglob(pattern):
        name = path.relative_to(ROOT).as_posix()
        limit, _ = LONGER_FILES.get(name, (MAX_FILE_LINES, ""))
        num_lines = path.read_text(encoding="utf-8").count("\n")
        assert num_lines <= limit, f"{name} has {num_lines} lines, more than {limit}"


def test_a_file_that_may_be_longer_is_longer() -> None:
    """Else its exception has had its day."""
    for name in LONGER_FILES:
        assert (ROOT / name).read_text(encoding="utf-8").count("\n") > MAX_FILE_LINES, name


def test_importing_stays_light() -> None:
    """`import rorqual` and the list of commands need neither torch nor transformers."""
    code = (
        "import sys, rorqual, rorqual.cli.verbs; "
        "heavy = {'torch', 'transformers', 'matplotlib', 'pyarrow'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_names_of_test_files_differ() -> None:
    """pytest imports them by name alone: of two files of one name it collects only the first."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted({name for name in names if names.count(name) > 1}) == []


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """ "room/file.py name" of every function, and its tree."""
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{path.relative_to(ROOT)} {node.name}", node


def test_functions_are_short_and_take_few_parameters() -> None:
    """Exceptions are named with their reason, and are some."""
    found = set()
    for name, node in functions():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        num_parameters = sum(argument.arg not in ("self", "cls") for argument in arguments)
        num_lines = (node.end_lineno or 0) - node.lineno + 1
        if num_lines > MAX_FUNCTION_LINES or num_parameters > MAX_PARAMETERS:
            found.add(name)
    assert found == set(LONGER_FUNCTIONS)


def test_nobody_outside_touches_a_modules_weight_or_asks_for_autocast() -> None:
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                place = f"{name}:{node.lineno} {ast.unparse(node)}"
                assert "autocast" not in node.attr, place
                is_own = path.relative_to(ROOT).parts[0] in WEIGHT_ROOMS
                is_weight = node.attr == "weight" and ast.unparse(node) not in NO_MODULE_WEIGHT
                assert is_own or not is_weight, place

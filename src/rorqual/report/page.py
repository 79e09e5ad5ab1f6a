"""The page: one HTML file, without scripts, that asks nothing of a network.

All that comes from a run's files is text to it, never markup; a policy in its head says so to the
browser as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from rorqual.files import atomic_write
from rorqual.report.pictures import (
    curve_picture,
    experts_picture,
    loads_picture,
    max_vio_picture,
    timeline_picture,
)
from rorqual.report.run import Run, figures
from rorqual.train.curves import Curve, compared, curves
from rorqual.train.history import Record
from rorqual.train.load_maps import load_maps

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
MOST_CHARACTERS = 300  # of one event, or of one value of a recipe
NOT_SET = "-"


def write_page(runs: Sequence[Run], file: Path) -> None:
    """One run with all that there is to see, or several beside each other."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    title = " and ".join(names)
    body = _one(runs[0]) if len(runs) == 1 else _several(runs)
    style = resources.files("rorqual.report").joinpath("page.css").read_text(encoding="utf-8")
    with atomic_write(file, "w") as out:
        out.write(
            f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{_text(title)} - Rorqual</title>\n<style>\n{style}</style>\n</head>\n"
            f"<body>\n<main>\n<h1>{_text(title)}</h1>\n"
        )
        for part in body:
            out.write(_whole(part) + "\n")
        out.write("</main>\n</body>\n</html>\n")


def _text(value: object) -> str:
    return escape(_whole(str(value)))


def _whole(text: str) -> str:
    """Half characters, which JSON may hold and UTF-8 may not, become question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _figure(caption: str, svg: str) -> str:
    return f"<figure><figcaption>{_text(caption)}</figcaption>{svg}</figure>"


def _wide(content: str, label: str) -> str:
    """What is moved sideways where there is no room for it; by the keyboard too."""
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(label)}">{content}</div>'
    )


def _one(run: Run) -> Iterator[str]:
    yield f'<p class="soft">{_text(_subtitle(run))}</p>'
    yield from (f'<p class="note">{_text(note)}</p>' for note in run.notes)
    rows = figures(run).items()
    yield "<dl>"
    yield from (f"<div><dt>{_text(n)}</dt><dd>{_text(value)}</dd></div>" for n, value in rows)
    yield "</dl>"
    if run.history.steps:
        yield from _curves(curves(run.history))
    else:
        yield "<p>No step has been made yet: this page shows more as soon as there is one.</p>"
    yield from _balance(run)
    if run.timeline is not None:
        yield "<h2>Timeline of a step</h2>"
        yield _figure(_ended(run), _wide(timeline_picture(run.timeline), "Timeline"))
    yield from _events(run)
    if run.recipe_text:
        yield "<h2>Recipe</h2>"
        yield "<details><summary>with every default</summary>"
        yield _wide(f"<pre>{_text(run.recipe_text)}</pre>", "Recipe") + "</details>"


def _subtitle(run: Run) -> str:
    parts = [str(run.folder)]
    if "stage" in run.recipe:
        parts.append(f"stage {run.recipe['stage']}")
    num_steps, num_kept = run.history.num_steps, len(run.history.steps)
    if num_kept < num_steps:
        parts.append(
            f"of {num_steps:,} steps {num_kept:,} are drawn, those with the highest loss and "
            "gradient norm among them"
        )
    return "; ".join(parts)


def _curves(found: Iterable[Curve]) -> Iterator[str]:
    yield '<h2>Curves</h2>\n<div class="curves">'
    for curve in found:
        yield _figure(curve.title, curve_picture(curve))
    yield "</div>"


def _balance(run: Run) -> Iterator[str]:
    loads = load_maps(run.history)
    if not loads:
        return
    yield '<h2>Load of the experts</h2>\n<div class="maps">'
    pictures = [("Layers and experts: white is the layer's mean, red above it", loads_picture)]
    if len(loads) > 1:
        pictures.append(("MaxVio by layer", max_vio_picture))
        pictures.append(("Experts over time, by layer", experts_picture))
    for caption, draw in pictures:
        yield _figure(caption, _wide(draw(loads), caption))
    yield "</div>"


def _ended(run: Run) -> str:
    assert run.timeline is not None
    end = run.timeline.end
    waited = max(run.timeline.bubbles) / end if end > 0 else 0.0
    return f"{end:.4g} long; the rank that waits longest does so for {waited:.1%} of it"


def _events(run: Run) -> Iterator[str]:
    """What else was written of the run, of whatever kind it is."""
    if not run.history.num_events:
        return
    yield "<h2>Events</h2>"
    counts = ", ".join(f"{num:,} {kind}" for kind, num in run.history.num_events.items())
    total, num_shown = sum(run.history.num_events.values()), len(run.history.events)
    shown = "" if num_shown == total else f"; the last {num_shown:,}"
    yield f'<p class="soft">{_text(_cut(counts))}{shown}</p>'
    rows = [(f"{e['step']:,}", _cut(e["kind"]), _details(e)) for e in run.history.events]
    yield _table(("after step", "what", "details"), rows, "Events")


def _details(event: Record) -> str:
    rest = ((key, value) for key, value in event.items() if key not in ("kind", "step"))
    return _cut("; ".join(f"{key} {_shown(value)}" for key, value in rest))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} ..."


def _several(runs: Sequence[Run]) -> Iterator[str]:
    """Each run by its folder: names may be the same."""
    names = [str(run.folder) for run in runs]
    for name, run in zip(names, runs, strict=True):
        yield from (f'<p class="note">{_text(name)}: {_text(note)}</p>' for note in run.notes)
    found = [figures(run) for run in runs]
    keys = list(dict.fromkeys(key for own in found for key in own))
    rows = [(key, *(own.get(key, NOT_SET) for own in found)) for key in keys]
    yield "<h2>Figures</h2>"
    yield _table(("", *names), rows, "Figures")
    together = {name: run.history for name, run in zip(names, runs, strict=True)}
    if any(history.steps for history in together.values()):
        yield from _curves(compared(together))
    yield "<h2>Recipes</h2>"
    differing = list(_differences([run.recipe for run in runs]))
    if differing:
        yield _table(("key", *names), differing, "Recipes")
    else:
        yield "<p>They differ in nothing.</p>"


def _differences(recipes: Sequence[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for key in dict.fromkeys(key for recipe in recipes for key in recipe):
        values = [_cut(str(recipe.get(key, NOT_SET))) for recipe in recipes]
        if len(set(values)) > 1:
            yield (key, *values)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    cells = "".join(f'<th scope="col">{_text(name)}</th>' if name else "<td></td>" for name in head)
    lines = [
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(each)}</td>" for each in rest)
        + "</tr>"
        for first, *rest in rows
    ]
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return _wide(table, label)

"""A training on several processes, with what it found; and the same one on this process.

    python ranks_case.py RANK STORE_FILE FOLDER

is a rank of the case in FOLDER/case.json; each writes what it holds there.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_run import LENGTH, MODEL, RECIPE, STAGES, VOCAB
from torch import Tensor

from rank_programs import run_ranks
from rorqual import weights
from rorqual.data import Batch
from rorqual.model import build
from rorqual.parallel.launch import Launch
from rorqual.parallel.ranks import joined
from rorqual.train import Recipe, TrainingData
from rorqual.train.learner import Learner
from rorqual.train.ranks import OneRank, Ranks, local
from rorqual.train.recipe import recipe_of
from rorqual.train.spikes import Skipped

NUM_SAMPLES, MICRO_BATCH = 8, 2
NUM_STEPS = 20
NOTHING = object()
FIGURES = ("loss", "main", "balance", "grad_norm", "num_targets")


@dataclass(frozen=True)
class Case:
    """`plan` is the recipe's [parallel]; `mtp` the number of MTP modules."""

    plan: dict[str, Any] = field(default_factory=dict)
    stage: str = "pretrain"
    mtp: int = 1
    is_recomputed: bool = False
    num_steps: int = NUM_STEPS
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of the recipe, by section."""

    @property
    def serial(self) -> Case:
        return Case({}, self.stage, self.mtp, False, self.num_steps, self.changes)

    def recipe(self, folder: Path) -> Recipe:
        """Of 8 layers; a stage that begins from a checkpoint finds it in the folder."""
        table: dict[str, Any] = copy.deepcopy(RECIPE)
        shape = {"num_hidden_layers": 8, "num_nextn_predict_layers": self.mtp}
        table["stage"] = self.stage
        table["model"] |= shape
        table["training"] |= {
            "total_tokens": self.num_steps * NUM_SAMPLES * LENGTH,
            "micro_batch_size": MICRO_BATCH,
            "activation_checkpointing": self.is_recomputed,
        }
        table["batch_ramp"] = {"start": NUM_SAMPLES, "end": NUM_SAMPLES}
        table["balance"] = {"sequence_alpha": 0.01}
        table["parallel"] = self.plan
        for section, part in self.changes.items():
            table[section] = table.get(section, {}) | part
        if self.stage == "sft":
            place = folder / f"begun-{self.mtp}"
            if not place.exists():
                config = recipe_of({**RECIPE, "model": {**MODEL, **shape}}, STAGES).model_config()
                weights.save(build(config, seed=7), place, "float32")
            table["init_from"] = str(place)
            del table["model"]
        return recipe_of(table, STAGES)


class Samples:
    """Sample i is a function of i alone: ids that follow a rule, some of which do not count; in two
    documents and padding where they are isolated.
    """

    def __init__(self, recipe: Recipe, num_depths: int) -> None:
        self.width = LENGTH + 1 + num_depths
        self.is_isolated = recipe.is_isolated

    def batch(self, counter: int, num_samples: int, rank: int = 0, world: int = 1) -> Batch:
        share = num_samples // world
        first = counter + rank * share
        rows = [self._sample(index) for index in range(first, first + share)]
        tokens_BS, mask_BS, documents_BS = (torch.stack(part) for part in zip(*rows, strict=True))
        if not self.is_isolated:
            return Batch(tokens_BS, mask_BS)
        return Batch(tokens_BS, mask_BS & (documents_BS > 0), documents_BS)

    def _sample(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        first, stride, cut = torch.randint(1, VOCAB, (3,), generator=generator).tolist()
        tokens_S = (first + stride % 5 * torch.arange(self.width)) % VOCAB
        mask_S = torch.rand(self.width, generator=generator) < 0.7
        documents_S = torch.ones(self.width, dtype=torch.int64)
        documents_S[4 + cut % 8 :] = 2
        documents_S[self.width - index % 3 :] = 0
        return tokens_S, mask_S, documents_S


@dataclass(frozen=True)
class Outcome:
    """Figures by step, each expert's load by step, and by name the gradients of the first step and
    the weights after the last one.
    """

    steps: list[dict[str, float]]
    loads: list[list[list[int]]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


@torch.no_grad()
def learn(case: Case, folder: Path, ranks: Ranks) -> Outcome:
    """Of tensors what this rank holds, under the first row and the name: `12 model.norm.weight`."""
    recipe = case.recipe(folder)
    samples = Samples(recipe, case.mtp)
    data, cpu = TrainingData(samples), torch.device("cpu")
    learner = Learner(recipe, data, cpu, None, Skipped(folder), ranks)
    rows = getattr(learner.spread, "rows", None)
    firsts = {name: rows(name).start if rows else 0 for name in learner.optimizer.named}
    steps, loads, gradients = [], [], {}
    while not learner.is_finished:
        with torch.enable_grad():
            found = learner.step().result
        steps.append({name: getattr(found, name) for name in FIGURES} | {"mtp": sum(found.mtp)})
        loads.append(found.loads_LE.tolist())
        for name, parameter in learner.optimizer.named.items():
            assert parameter.grad is not None, name
            if len(steps) == 1:
                gradients[f"{firsts[name]} {name}"] = local(parameter.grad).clone()
    held = {f"{firsts[name]} {name}": local(p) for name, p in learner.optimizer.named.items()}
    return Outcome(steps, loads, gradients, held)


def put_together(held: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors; ranks that hold the same rows hold the same bits."""
    parts: dict[str, dict[int, Tensor]] = {}
    for rank in held:
        for key, value in rank.items():
            first, name = key.split()
            known = parts.setdefault(name, {}).setdefault(int(first), value)
            if value.numel():  # of small tensors a rank has none
                parts[name][int(first)] = value
                assert not known.numel() or torch.equal(known, value), key
    return {name: torch.cat([rows[i] for i in sorted(rows)]) for name, rows in parts.items()}


def run(case: Case, folder: Path) -> Outcome:
    """On as many processes as its plan has ranks."""
    case.recipe(folder)  # makes what it begins from
    (folder / "case.json").write_text(json.dumps(asdict(case)))
    world = case.recipe(folder).parallel.world
    run_ranks(Path(__file__), [(rank, folder / "store", folder) for rank in range(world)])
    return _read(folder, world)


def _read(folder: Path, world: int) -> Outcome:
    """The first rank's figures, and the tensors of all."""
    told = json.loads((folder / "steps-0.json").read_text())
    gradients, weights = (
        put_together(load_file(folder / f"{kind}-{rank}.safetensors") for rank in range(world))
        for kind in ("gradients", "weights")
    )
    return Outcome(told["steps"], told["loads"], gradients, weights)


@cache
def serial(case_text: str, folder: Path) -> Outcome:
    """On this process; the same again is not computed again."""
    found = learn(Case(**json.loads(case_text)), folder, OneRank())
    gradients, held = put_together([found.gradients]), put_together([found.weights])
    return replace(found, gradients=gradients, weights=held)


def text_of(case: Case) -> str:
    return json.dumps(asdict(case), sort_keys=True)


def pairwise(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Few rows in which every value of an axis meets every value of each other one."""
    missing = [
        ((one, a), (other, b))
        for one, other in combinations(axes, 2)
        for a, b in product(axes[one], axes[other])
    ]
    rows = []
    while missing:
        row = dict(missing[0])
        for name in axes:
            if name not in row:
                row[name] = max(axes[name], key=lambda value: _met({**row, name: value}, missing))
        rows.append({name: row[name] for name in axes})
        missing = [pair for pair in missing if not _has(row, pair)]
    return rows


def _has(row: Mapping[str, Any], pair: Sequence[tuple[str, Any]]) -> bool:
    return all(row.get(name, NOTHING) == value for name, value in pair)


def _met(row: Mapping[str, Any], pairs: Sequence[Sequence[tuple[str, Any]]]) -> int:
    return sum(_has(row, pair) for pair in pairs)


def main() -> None:
    rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    torch.set_num_threads(1)
    case = Case(**json.loads((folder / "case.json").read_text()))
    options = case.recipe(folder).parallel
    shared = dist.FileStore(store, options.world)
    launch = Launch(rank, options.world, rank, options.world)
    with joined(options, torch.device("cpu"), launch, shared) as ranks:
        found = learn(case, folder, ranks)
        told = {"steps": found.steps, "loads": found.loads}
        (folder / f"steps-{rank}.json").write_text(json.dumps(told))
        save_file(found.gradients, folder / f"gradients-{rank}.safetensors")
        save_file(found.weights, folder / f"weights-{rank}.safetensors")
        ranks.agree(0)


if __name__ == "__main__":
    main()

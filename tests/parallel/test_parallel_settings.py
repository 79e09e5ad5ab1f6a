"""How ranks are numbered and what cannot be divided. Oracle: products and cases by hand."""

from __future__ import annotations

import re

import pytest

from rorqual.errors import ConfigError, UsageError
from rorqual.model import preset
from rorqual.parallel.groups import Place
from rorqual.parallel.launch import Launch
from rorqual.parallel.settings import ParallelSettings
from rorqual.parallel.spread import rows_of

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


def test_the_world_is_the_product() -> None:
    options = ParallelSettings(pp=2, ep=3, dp_shard=5, dp_replicate=7)
    assert (options.world, options.num_replicas, options.num_shards) == (210, 105, 15)
    assert options.axes == "pp 2 x dp_replicate 7 x dp_shard 5 x ep 3"
    assert ParallelSettings().axes == "one rank"


def test_ranks_that_share_experts_are_neighbours() -> None:
    options = ParallelSettings(pp=2, ep=2, dp_shard=3, dp_replicate=2)
    places = [Place.of(rank, options) for rank in range(options.world)]
    assert len(set(places)) == options.world
    assert places == sorted(places)
    assert places[:3] == [Place(0, 0, 0, 0), Place(0, 0, 0, 1), Place(0, 0, 1, 0)]


@pytest.mark.parametrize("total", [1, 2, 5, 6, 7, 64])
@pytest.mark.parametrize("is_of_experts", [False, True])
def test_the_rows_of_all_ranks_are_all_rows_once(total: int, is_of_experts: bool) -> None:
    options = ParallelSettings(ep=2, dp_shard=3, dp_replicate=2)
    total = total * 2 if is_of_experts else total
    for replica in range(2):
        places = [Place(0, replica, shard, ep) for shard in range(3) for ep in range(2)]
        held = [rows_of(total, place, options, is_of_experts) for place in places]
        rows = [row for part in held for row in range(part.start, part.stop)]
        assert sorted(rows) == list(range(total))
    if is_of_experts:
        firsts = [rows_of(total, Place(0, 0, 0, ep), options, True).start for ep in range(2)]
        assert firsts == [0, total // 2]


def test_another_number_of_processes_is_named_with_its_mend() -> None:
    with pytest.raises(UsageError) as caught:
        ParallelSettings(ep=2, dp_shard=2).check_world(3)
    text = str(caught.value)
    assert "3 processes (WORLD_SIZE)" in text
    assert "4: [parallel] dp_shard 2 x ep 2" in text
    assert "torchrun --nproc-per-node 4 -m -- rorqual train RECIPE" in text
    with pytest.raises(UsageError, match="start `rorqual train` without torchrun"):
        ParallelSettings().check_world(2)
    ParallelSettings(ep=2).check_world(2)


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"ep": 3}, {}, r"8 experts, parallel\.ep 3"),
        ({"ep": 2}, {"first_k_dense_replace": 6, "num_nextn_predict_layers": 0}, "no experts"),
        ({"ep": 4, "ranks_per_node": 3}, {}, r"parallel\.ep 4, parallel\.ranks_per_node 3"),
    ],
)
def test_a_model_that_cannot_be_divided_so_is_refused(
    options: dict[str, int], changes: dict[str, int], message: str
) -> None:
    config = preset("tiny").with_changes(**changes)
    with pytest.raises(ConfigError, match=message):
        ParallelSettings(**options).check_model(config)


def test_what_torchrun_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    assert Launch.of_environment() == Launch(0, 1, 0, 1)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert Launch.of_environment() == Launch(5, 8, 1, 4)
    monkeypatch.delenv("RANK")
    with pytest.raises(UsageError, match=re.escape("RANK=, WORLD_SIZE=8")):
        Launch.of_environment()

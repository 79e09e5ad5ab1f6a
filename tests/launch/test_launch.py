"""launch/: files with which training starts on a cluster.

Oracles: bash's own parser, and programs that write down how they were called in place of torchrun
and Slurm; the published schemas of JobSet and PyTorchJob (`*.json` here, each says from where);
kubectl's dry run, where it is installed, beside a server that knows these schemas.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from rorqual.cli.stages import stages
from rorqual.train import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("torchrun.sh", "slurm.sbatch")
MANIFESTS = {"jobset": "JobSet", "pytorchjob": "PyTorchJob"}


TORCHRUN = 'printf "%s\\n" torchrun "$@"; echo "seconds $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >&2'


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder of programs; each prints how it was called, and what of the environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    write(folder / "torchrun", TORCHRUN)
    write(folder / "nvidia-smi", "exit 1")
    write(folder / "scontrol", 'test "$*" = "show hostnames n[1-8]" && printf "n1\\nn2\\n"')
    write(folder / "srun", 'echo "srun $1"; shift; exec "$@"')
    return folder


def write(file: Path, text: str) -> None:
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(0o755)


def run(script: str, *arguments: str, programs: Path, **environment: str) -> Any:
    kept = {"PATH": f"{programs}:/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env=kept | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    if (shellcheck := shutil.which("shellcheck")) is not None:
        done = subprocess.run([shellcheck, str(LAUNCH / script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_one_machine(programs: Path) -> None:
    done = run("torchrun.sh", "r.toml", "--set", "seed=2", programs=programs)
    assert done.returncode == 0, done.stderr
    expected = "torchrun --nnodes 1 --nproc-per-node 1 --max-restarts 3 --standalone"
    assert done.stdout.split() == [
        *expected.split(),
        *"-m -- rorqual train r.toml --set seed=2".split(),
    ]
    write(programs / "nvidia-smi", 'test "$1" = --list-gpus && printf "GPU 0\\nGPU 1\\n"')
    assert "--nproc-per-node 2 " in joined(run("torchrun.sh", "r.toml", programs=programs))
    assert done.stderr == "seconds 280\n"
    asked = run("torchrun.sh", "r.toml", programs=programs, NPROC_PER_NODE="4", MAX_RESTARTS="0")
    assert "--nproc-per-node 4 --max-restarts 0 " in joined(asked)


def joined(done: Any) -> str:
    assert done.returncode == 0, done.stderr
    return " ".join(done.stdout.split()) + " "


def test_several_machines_meet_at_the_first(programs: Path) -> None:
    where = {"NNODES": "2", "HEAD": "first", "RUN_ID": "7", "NPROC_PER_NODE": "8"}
    found = joined(run("torchrun.sh", "r.toml", programs=programs, **where))
    assert "--nnodes 2 --nproc-per-node 8" in found
    assert "--rdzv-backend c10d --rdzv-endpoint first:29500 --rdzv-id 7 " in found
    assert "--standalone" not in found
    done = run("torchrun.sh", "r.toml", programs=programs, NNODES="2")
    assert done.returncode != 0
    assert "HEAD" in done.stderr
    done = run("torchrun.sh", programs=programs)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_torchrun_knows_these_flags() -> None:
    from torch.distributed.run import get_args_parser

    words = "--nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id 7".split()
    words += ["--rdzv-endpoint", "first:29500", "-m", "--", "rorqual", "train", "r.toml"]
    found = get_args_parser().parse_args([*words, "--run", "runs/x"])  # --run-path is torchrun's
    assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("2", "8", 3)
    assert (found.training_script, found.training_script_args[:2]) == (
        "rorqual",
        ["train", "r.toml"],
    )
    assert found.module
    assert get_args_parser().parse_args(["--standalone", "x"]).standalone


def test_slurm_starts_one_torchrun_a_node(programs: Path) -> None:
    done = run(
        "slurm.sbatch",
        "recipes/671b.toml",
        programs=programs,
        SLURM_JOB_NUM_NODES="256",
        SLURM_JOB_NODELIST="n[1-8]",
        SLURM_JOB_ID="42",
        SLURM_GPUS_ON_NODE="8",
    )
    found = joined(done)
    assert found.startswith("srun --kill-on-bad-exit=1 torchrun --nnodes 256 --nproc-per-node 8")
    assert "--rdzv-endpoint n1:29500 --rdzv-id 42 " in found
    assert found.rstrip().endswith("-m -- rorqual train recipes/671b.toml")


# Of `man sbatch` 23.11, as far as they are used here.
SBATCH = {
    "job-name": r"\S+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "exclusive": "",
    "time": r"\d+-\d\d:\d\d:\d\d",
    "signal": r"TERM@\d+",
    "requeue": "",
    "open-mode": "append|truncate",
    "output": r"\S+",
}


def test_sbatch_reads_its_options() -> None:
    """Before the first command, one a line, of those that it has."""
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = {n: line for n, line in enumerate(lines) if line.startswith("#SBATCH")}
    assert options
    assert max(options) < first
    for line in options.values():
        match = re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line)
        assert match is not None, line
        assert re.fullmatch(SBATCH[match[1]], match[2] or ""), line
    assert "#SBATCH --ntasks-per-node=1" in lines, "torchrun starts the others"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((LAUNCH / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_are_what_their_schemas_say(name: str) -> None:
    (manifest,) = documents(name)
    schema = json.loads(Path(__file__).with_name(f"{name}.json").read_text())
    assert manifest["kind"] == MANIFESTS[name]
    errors = [error.message for error in jsonschema_rs.validator_for(schema).iter_errors(manifest)]
    assert errors == []
    manifest["spec"]["replicas"] = 1  # and the schema sees what is not in it
    assert list(jsonschema_rs.validator_for(schema).iter_errors(manifest))


def pods(name: str) -> tuple[int, dict[str, Any]]:
    """How many there are, and what each is."""
    (manifest,) = documents(name)
    spec = manifest["spec"]
    if name == "pytorchjob":
        worker = spec["pytorchReplicaSpecs"]["Worker"]
        policy = spec["elasticPolicy"]
        assert policy["minReplicas"] == policy["maxReplicas"] == worker["replicas"]
        return worker["replicas"], worker["template"]["spec"]
    (replicated,) = spec["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    return job["parallelism"] * replicated["replicas"], job["template"]["spec"]


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_the_ranks_of_their_recipe(name: str) -> None:
    number, pod = pods(name)
    (container,) = pod["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    command = container["command"]
    recipe = load_recipe(ROOT / next(w for w in command if w.endswith(".toml")), stages())
    assert number * gpus == recipe.parallel.world
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names
    claims = {
        volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    assert claims == {documents("text")[0]["metadata"]["name"]}
    assert (ROOT / command[0]).is_file() or command[0] == "torchrun"
    # Runs and text lie on the volume, beneath the image's working folder.
    work = re.findall(r"^WORKDIR (.*)$", (LAUNCH / "Containerfile").read_text(), re.MULTILINE)
    assert f"{work[0]}/runs" in {mount["mountPath"] for mount in container["volumeMounts"]}
    assert recipe.data.folder.startswith("runs/")
    assert recipe.data.corpora.startswith("runs/")
    if name == "jobset":
        env = {each["name"]: each["value"] for each in container["env"]}
        assert (int(env["NNODES"]), int(env["NPROC_PER_NODE"])) == (number, gpus)
        (manifest,) = documents(name)
        job, replicated = (
            manifest["metadata"]["name"],
            manifest["spec"]["replicatedJobs"][0]["name"],
        )
        assert env["HEAD"] == f"{job}-{replicated}-0-0.{job}"

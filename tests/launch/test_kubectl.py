"""kubectl takes the manifests of launch/. Oracle: kubectl's own dry run, beside a server that says
which kinds there are where JobSet and the training operator are installed, and nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from patience import HANG_SECONDS

LAUNCH = Path(__file__).parents[2] / "launch"
KINDS = {
    "v1": ("PersistentVolumeClaim", "persistentvolumeclaims"),
    "batch/v1": ("Job", "jobs"),
    "jobset.x-k8s.io/v1alpha2": ("JobSet", "jobsets"),
    "kubeflow.org/v1": ("PyTorchJob", "pytorchjobs"),
}
MADE = {
    "text": ["persistentvolumeclaim/rorqual-runs", "job.batch/rorqual-text"],
    "jobset": ["jobset.jobset.x-k8s.io/rorqual"],
    "pytorchjob": ["pytorchjob.kubeflow.org/rorqual"],
}

pytestmark = [
    pytest.mark.concurrency,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
]


def answers() -> dict[str, Any]:
    """What the server says, by path."""
    groups = []
    found: dict[str, Any] = {"/api": {"kind": "APIVersions", "versions": ["v1"]}}
    for place, (kind, plural) in KINDS.items():
        path = f"/apis/{place}" if "/" in place else f"/api/{place}"
        resource = {"name": plural, "kind": kind, "namespaced": True, "verbs": ["create", "get"]}
        resource["singularName"] = kind.lower()
        found[path] = {"kind": "APIResourceList", "groupVersion": place, "resources": [resource]}
        if "/" in place:
            version = {"groupVersion": place, "version": place.partition("/")[2]}
            name = place.partition("/")[0]
            groups.append({"name": name, "versions": [version], "preferredVersion": version})
    found["/apis"] = {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    return found


class Answers(BaseHTTPRequestHandler):
    known = answers()

    def do_GET(self) -> None:
        found = self.known.get(self.path.partition("?")[0])
        body = json.dumps(found or {"kind": "Status", "status": "Failure", "code": 404}).encode()
        self.send_response(404 if found is None else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing of it is printed."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as found:
        thread = Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        thread.join()


def kubectl(file: Path, server: str, home: Path) -> subprocess.CompletedProcess[str]:
    words = ["create", "--dry-run=client", "--validate=ignore", "--output=name"]
    return subprocess.run(
        ["kubectl", *words, "--server", server, "--cache-dir", str(home), "--filename", str(file)],
        env={"HOME": str(home), "PATH": "/usr/bin:/bin:/usr/local/bin"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )


@pytest.mark.parametrize("name", MADE)
def test_a_dry_run_makes_what_the_page_says(name: str, server: str, tmp_path: Path) -> None:
    done = kubectl(LAUNCH / f"{name}.yaml", server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == MADE[name]


def test_the_dry_run_sees_a_kind_that_is_not_there(server: str, tmp_path: Path) -> None:
    text = (LAUNCH / "jobset.yaml").read_text().replace("v1alpha2", "v1alpha1")
    (tmp_path / "old.yaml").write_text(text)
    done = kubectl(tmp_path / "old.yaml", server, tmp_path)
    assert done.returncode != 0
    assert "no matches for kind" in done.stderr

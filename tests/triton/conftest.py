"""Where the Triton tests run.

A test that takes the ``device`` fixture runs kernels. With a CUDA device it runs right here, on it. Without one it
needs Triton's interpreter, which Triton chooses when it is imported, so it is too late once any other test of this
process has imported Triton (torch.compile does, transformers does). All such tests therefore run in a pytest process of
their own, started with TRITON_INTERPRET=1 when the first of them is reached, and each is reported here under its own
name with the outcome it had there. ``TRITON_INTERPRET=1 pytest tests/triton`` runs them directly, to debug one.

pytest-xdist's workers share them: in parts, each of which is run by one worker and read by all.
"""

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (pip install triton)")

from fastformer.backends.triton import interpreting

REPORT_TO = "FASTFORMER_TRITON_REPORT"  # the file in which the other process leaves its outcomes
TIME_LIMIT = 900  # seconds
PARTS = 3  # for each worker: the last one done is the longest that another waits for
Outcomes = dict[str, dict[str, str]]  # node id -> outcome and text
_outcomes, _folder = pytest.StashKey[Outcomes](), pytest.StashKey[Path]()


@pytest.fixture
def device() -> torch.device:
    """The device of a kernel test: the current GPU, or the CPU under the interpreter."""
    if torch.cuda.is_available() and not interpreting():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@pytest.fixture(scope="session", autouse=True)
def _shared_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp()
    # A worker's own folder is in one that all workers of a run have.
    request.session.stash[_folder] = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


def _runs_kernels(item: pytest.Item) -> bool:
    return "device" in getattr(item, "fixturenames", ()) and Path(__file__).parent in item.path.parents


def _outcome(session: pytest.Session, node: str) -> dict[str, str]:
    known = session.stash.setdefault(_outcomes, {})
    if node not in known:
        nodes = [item.nodeid for item in session.items if _runs_kernels(item)]
        workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
        count = PARTS * int(workers) if workers else 1
        parts = [nodes[i::count] for i in range(count)]  # neighbours take about as long as each other
        own = nodes.index(node) % count
        found = _part(session, parts, own, wait=False)
        if found is None:  # another worker is at it; meanwhile the rest
            for other in range(count):
                known |= _part(session, parts, other, wait=False) or {}
            found = _part(session, parts, own, wait=True) or {}
        known |= found
    return known[node]


def _part(session: pytest.Session, parts: list[list[str]], index: int, wait: bool) -> Outcomes | None:
    """One part's outcomes, which the first worker to ask for them finds out; None if that is going on."""
    path = session.stash[_folder] / f"interpreted-{index}.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        if not path.exists():
            path.write_text(json.dumps(_run_elsewhere(session, parts[index])))
        return json.loads(path.read_text())


def _run_elsewhere(session: pytest.Session, nodes: list[str]) -> Outcomes:
    """Runs these tests in a process with the interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report"
        environment = {**os.environ, "TRITON_INTERPRET": "1", REPORT_TO: str(report), "OMP_NUM_THREADS": "1"}
        for name in [name for name in environment if name.startswith("PYTEST_")]:
            del environment[name]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", *nodes]
        finished = subprocess.run(
            command, cwd=session.config.rootpath, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
        )
        lines = report.read_text().splitlines() if report.exists() else []
    outcomes: Outcomes = {}
    for line in lines:
        outcome = json.loads(line)
        outcomes[outcome["node"]] = outcome
    missing = {
        "outcome": "failed",
        "text": f"no outcome from the interpreter's process, which ended with {finished.returncode}:\n"
        f"{finished.stdout[-4000:]}{finished.stderr[-4000:]}",
    }
    return {node: outcomes.get(node, missing) for node in nodes}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter's tests first: the longest ones, for whoever waits for a part."""
    items.sort(key=lambda item: not _runs_kernels(item))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Replaces the call of a kernel test by its outcome in the interpreter's process, where this one cannot run it."""
    if not _runs_kernels(pyfuncitem) or interpreting() or torch.cuda.is_available():
        return None
    outcome = _outcome(pyfuncitem.session, pyfuncitem.nodeid)
    if outcome["outcome"] == "failed":
        pytest.fail(outcome["text"], pytrace=False)
    if outcome["outcome"] == "skipped":
        pytest.skip(outcome["text"])
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the interpreter's process: one line per test, and one more for a phase that went wrong."""
    path = os.environ.get(REPORT_TO)
    if path is None or (report.when != "call" and report.outcome == "passed"):
        return
    text = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
    with open(path, "a") as file:
        file.write(json.dumps({"node": report.nodeid, "outcome": report.outcome, "text": text}) + "\n")

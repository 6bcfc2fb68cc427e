"""Batch jobs on Ray: workers, jobs and hosts that are killed lose nothing; two workers do twice the work of one.

Needs the extra `ray`, and minutes. Ray's processes come and go by themselves; the tests end those that they started.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastsd.batch.manifest import NAME
from fastsd.files import fingerprint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra `ray`"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]
LINES = 24
TWO = ("--ray", "--workers", "2", "--threads", "1")
TICKS = os.sysconf("SC_CLK_TCK")
KILLER = """
import os
from fastsd.generate import together

join = together.join

def kill(calls, size):
    if any("poison" in call["prompt"] for call in calls):
        os.kill(os.getpid(), 9)
    return join(calls, size)

together.join = kill
"""


class Job:
    """A job in a folder, run as a command; an image of each line, as a run without Ray gives it."""

    def __init__(self, folder: Path, model: Path, environment: dict[str, str]):
        self.folder, self.model, self.environment = folder, model, environment
        asked = [json.dumps({"prompt": f"image {k}", "seed": k, "num_inference_steps": 8}) for k in range(LINES)]
        (folder / "prompts.jsonl").write_text("\n".join(asked) + "\n")

    def start(self, out: str, *words: str, inside: tuple[str, ...] = (), lines: str = "prompts.jsonl") -> Any:
        command = [*inside, sys.executable, "-m", "fastsd", "batch", lines, "--out", out, "-m", str(self.model)]
        command += ["-b", "1", "--dtype", "fp32", *words]
        with (self.folder / f"{out}.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=log, stderr=log)

    def run(self, out: str, *words: str, **how: Any) -> int:
        return int(self.start(out, *words, **how).wait(600))

    def done(self, out: str) -> int:
        path = self.folder / out / NAME
        return path.read_bytes().count(b'"state": "done"') if path.exists() else 0

    def wait_for(self, out: str, lines: int) -> None:
        deadline = time.monotonic() + 300
        while self.done(out) < lines:
            assert time.monotonic() < deadline, (self.folder / f"{out}.log").read_text()
            time.sleep(0.1)

    def images(self, out: str, store: str | None = None) -> dict[str, str]:
        """The hash of each image's file; each line stands once in the manifest, which has the same hashes."""
        records = [json.loads(line) for line in (self.folder / out / NAME).read_text().splitlines()[1:]]
        assert sorted(record["line"] for record in records) == list(range(1, LINES + 1))
        there = self.folder / (store or out)
        found = {str(path.relative_to(there)): fingerprint(path.read_bytes()) for path in there.rglob("*.png")}
        assert {one["path"]: one["sha256"] for record in records for one in record["files"]} == found
        return found


@pytest.fixture(scope="module")
def job(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    paths = [str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    own |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}  # of the clusters of these tests
    made = Job(tmp_path_factory.mktemp("job"), model, os.environ | own)
    assert made.run("alone") == 0
    return made


def workers(job: Job) -> list[int]:
    """The processes of Ray's workers that work for these tests: their titles, and the token in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::MapWorker(Map(RayWorker))"):
            if job.environment["RAY_AUTH_TOKEN"].encode() in environment:
                found.append(int(folder.name))
    return found


@contextmanager
def two_hosts(job: Job) -> Iterator[tuple[str, str]]:
    """Two hosts, 10.77.0.1 and .2, that are a cluster of Ray with a core each; their names."""
    names = (f"fsd{os.getpid()}a", f"fsd{os.getpid()}b")
    started: list[Any] = []
    try:
        wire(names)
        common = ["--block", "--num-cpus", "1", "--object-store-memory", "150000000", "--disable-usage-stats"]
        for name, words in zip(
            names,
            (
                ["--head", "--port", "6379", "--node-ip-address", "10.77.0.1", "--include-dashboard", "false"],
                ["--address", "10.77.0.1:6379", "--node-ip-address", "10.77.0.2"],
            ),
            strict=True,
        ):
            command = ["ip", "netns", "exec", name, sys.executable, "-m", "ray.scripts.scripts", "start"]
            with (job.folder / f"{name}.log").open("wb") as log:
                own = {"env": job.environment, "stdout": log, "stderr": log}
                started.append(subprocess.Popen([*command, *words, *common], **own))  # type: ignore[call-overload]
            deadline = time.monotonic() + 120
            while "Ray runtime started" not in (job.folder / f"{name}.log").read_text():
                assert time.monotonic() < deadline and started[-1].poll() is None
                time.sleep(0.5)
        yield names
    finally:
        for name in names:
            lose(name)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for process in started:
            process.wait(60)


def lose(name: str) -> None:
    """Kill all that runs on a host."""
    listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout
    for pid in listed.split():
        os.kill(int(pid), signal.SIGKILL)


def wire(names: tuple[str, str]) -> None:
    """Two network namespaces with a wire between them."""
    for command in (
        *(f"netns add {name}" for name in names),
        *(f"-n {name} link set lo up" for name in names),
        f"link add w netns {names[0]} type veth peer name w netns {names[1]}",
        *(f"-n {name} addr add 10.77.0.{k}/24 dev w" for k, name in enumerate(names, start=1)),
        *(f"-n {name} link set w up" for name in names),
    ):
        try:
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")


def test_a_killed_worker_loses_nothing(job: Job) -> None:
    running = job.start("worker", *TWO)
    job.wait_for("worker", 4)
    os.kill(workers(job)[0], signal.SIGKILL)
    assert running.wait(600) == 0
    assert job.images("worker") == job.images("alone")


def test_a_killed_job_goes_on_with_workers_that_write_to_a_store(job: Job) -> None:
    words = (*TWO, "--store", (job.folder / "store").as_uri())
    for lines in (1, 8):
        running = job.start("killed", *words)
        job.wait_for("killed", lines)
        running.kill()
        running.wait()
    assert job.run("killed", *words) == 0
    assert job.images("killed", "store") == job.images("alone")


def test_a_line_that_kills_its_workers_fails_alone(job: Job) -> None:
    (job.folder / "killer").mkdir()
    (job.folder / "killer" / "sitecustomize.py").write_text(KILLER)
    asked = [{"prompt": word, "seed": k, "width": 64 + 8 * k} for k, word in enumerate(("a", "poison", "b"))]
    (job.folder / "poison.jsonl").write_text("".join(json.dumps(one) + "\n" for one in asked))
    before = job.environment
    job.environment = before | {"PYTHONPATH": f"{job.folder / 'killer'}{os.pathsep}{before['PYTHONPATH']}"}
    try:
        assert job.run("poison", *TWO, lines="poison.jsonl") == 1
    finally:
        job.environment = before
    assert "poison.jsonl line 2: its worker died, and 3 others" in (job.folder / "poison.log").read_text()
    assert job.done("poison") == 2


def test_two_hosts_are_a_cluster_and_one_of_them_is_enough(job: Job) -> None:
    with two_hosts(job) as (first, second):
        words = ("--ray", "10.77.0.1:6379", "--threads", "1")
        running = job.start("hosts", *words, inside=("ip", "netns", "exec", first))
        job.wait_for("hosts", 6)
        lose(second)
        assert running.wait(600) == 0
    assert job.images("hosts") == job.images("alone")


def test_two_workers_do_twice_the_work_of_one(job: Job) -> None:
    """By processor time, which other processes of the machine do not change: images of a second of the workers' own."""
    rates = {}
    for count in ("1", "2"):
        running = job.start(f"rate{count}", "--ray", "--workers", count, "--threads", "1")
        job.wait_for(f"rate{count}", 6)
        begun = cpu_seconds(job), job.done(f"rate{count}")
        job.wait_for(f"rate{count}", LINES - 4)
        ended = cpu_seconds(job), job.done(f"rate{count}")
        assert running.wait(600) == 0
        rates[count] = (ended[1] - begun[1]) / (ended[0] - begun[0])
    assert rates["2"] >= 0.9 * rates["1"], rates


def cpu_seconds(job: Job) -> float:
    """Of all workers so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in workers(job)]
    return sum(int(each[11]) + int(each[12]) for each in fields) / TICKS

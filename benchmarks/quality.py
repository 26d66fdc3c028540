"""Train and measure a plan of models, several at once, and go on where an earlier run stopped.

python -m benchmarks.quality benchmarks/plans/quality.toml --data data --work work --processes 4 --minutes 60
python -m benchmarks.quality benchmarks/plans/quality.toml --data data --work work --processes 12 --gpus 0 1
python -m benchmarks.quality benchmarks/plans/quality-search.toml --data data --work work --list

Small models leave most of a GPU idle, so several processes share it. What has a line in the results file is done, what
has a checkpoint is not trained again, and an interrupted training goes on from its last validation. When the time is
up, the processes are stopped; the same command later does the rest. Output of each job goes to WORK/logs.
"""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.quality_plan import Job, Places, Plan, Step, finished_runs, preparations, remaining, runs
from benchmarks.rows import RESULTS

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
LAST_LINES = 5


def command(steps: Sequence[Step]) -> list[str]:
    return [sys.executable, "-m", "benchmarks.quality_steps", json.dumps([step.words for step in steps])]


@dataclass
class Running:
    """A job on its way: the process that takes its steps."""

    job: Job
    process: subprocess.Popen
    gpu: str
    log: Path
    started: float


@dataclass
class Runner:
    """Runs jobs, at most ``processes`` at a time, until ``deadline`` (of ``time.monotonic``).

    ``gpus``: indices among which the jobs are spread; none leaves the choice to the environment. ``longest``: seconds
    after which a job is stopped, so that one that hangs does not hold its place.
    """

    places: Places
    processes: int
    deadline: float
    command: Callable[[Sequence[Step]], list[str]] = command
    write: Callable[[str], None] = print
    gpus: Sequence[str] = ()
    longest: float = float("inf")
    failed: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> bool:
        """True if time was left for all of them. Names of jobs with a failing step are kept in ``failed``."""
        waiting, running, began = list(jobs), list[Running](), time.monotonic()
        try:
            while waiting or running:
                if time.monotonic() >= self.deadline:
                    return False
                while len(running) < self.processes and (job := self._next(waiting, running)):
                    started = self._start(job, [one.gpu for one in running])
                    running += [started] if started else []
                time.sleep(POLL_SECONDS if running else 0)
                self._stop([one for one in running if time.monotonic() - one.started > self.longest])
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    self.write(
                        f"{time.monotonic() - began:.0f} s, {len(waiting) + len(running)} left: {self._end(one)}"
                    )
            return True
        finally:
            self._stop(running)

    def _next(self, waiting: list[Job], running: Sequence[Running]) -> Job | None:
        """Takes the first job that need not wait for another; those whose data are not to be had have failed, too.

        Two that lack the same file, as students whose teacher's checkpoint is gone, are not at work at one time. One
        that is to be alone lets none behind it start.
        """
        if any(one.job.alone for one in running):
            return None
        pending = {job.name for job in waiting} | {one.job.name for one in running}
        making = {path for one in running for path in _lacking(one.job)}
        for job in [job for job in waiting if pending.isdisjoint(job.after)]:
            if job.alone and running:
                return None
            if not making.isdisjoint(_lacking(job)):
                continue
            waiting.remove(job)
            if not set(self.failed).intersection(job.after):
                return job
            self.failed.append(job.name)
        return None

    def _start(self, job: Job, busy: Sequence[str]) -> Running | None:
        """All steps that are not done, in one process; None if there are none."""
        steps = remaining(job, finished_runs(self.places.results))
        if not steps:
            return None
        logs = self.places.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        gpu = min(self.gpus, key=busy.count) if self.gpus else ""
        path = logs / f"{job.name.replace('/', '-').replace(': ', '-')}.log"
        # a process group of its own, so that what it starts is stopped with it
        with open(path, "ab") as log:
            process = subprocess.Popen(
                self.command(steps),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=self._environment(gpu),
            )
        return Running(job, process, gpu, path, time.monotonic())

    def _environment(self, gpu: str) -> dict[str, str]:
        """Each process has its share of the cores: as many threads as there are cores, in each, wait for each other."""
        threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // self.processes))}
        chosen = {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
        return threads | os.environ | chosen | {"PYTHONPATH": _python_path()}

    def _end(self, ended: Running) -> str:
        """What is said of a job whose process has ended."""
        job, status, seconds = ended.job, ended.process.returncode, time.monotonic() - ended.started
        if status or remaining(job, finished_runs(self.places.results)):
            self.failed.append(job.name)
            how = f"failed with status {status}" if status else "ended well but left something out,"
            last = ended.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
            return "\n  ".join([f"{job.name}: {how} after {seconds:.0f} s, see {ended.log}", *last])
        return "\n  ".join([f"{job.name}: done in {seconds:.0f} s", *_figures(self.places.results, job)])

    def _stop(self, running: Sequence[Running]) -> None:
        alive = [one.process for one in running if one.process.poll() is None]
        for process in alive:
            os.killpg(process.pid, signal.SIGTERM)
        end = time.monotonic() + GRACE_SECONDS
        for process in alive:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def load(text: str) -> Plan:
    """A plan, or of ``PLAN:N`` the first N tables of its order."""
    path, _, first = text.rpartition(":")
    if not (path and first.isdecimal()):
        return Plan.load(Path(text))
    plan = Plan.load(Path(path))
    return replace(plan, order=plan.order[: int(first)])


def _python_path() -> str:
    """So that the processes find ``benchmarks``, wherever this one was started."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def joined(jobs: Iterable[Job]) -> list[Job]:
    """One job a name, with the steps of all: plans may share runs, or have several indexes of a data set."""
    found: dict[str, Job] = {}
    for job in jobs:
        before = found.setdefault(job.name, job)
        more = [step for step in job.steps if step not in before.steps]
        found[job.name] = replace(before, steps=[*before.steps, *more])
    return list(found.values())


def _lacking(job: Job) -> set[Path]:
    return {step.made for step in job.steps if step.made and not step.made.is_file()}


def _figures(results: Path, job: Job) -> list[str]:
    """The lines that a job left in the results file, in short."""
    names = {step.run for step in job.steps if step.run}
    if not (names and results.is_file()):
        return []
    with results.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["run"] in names]
    return [
        f"{row['method']}, K = {row['beam_width']} {row['validity']}: hit@10 {row['hit@10']}, ndcg@10 {row['ndcg@10']}"
        for row in rows
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="+", metavar="PLAN[:N]", help="one after another; :N of its order the first N")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the raw files")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="data sets, models, ranks and logs")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv", metavar="FILE", help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="at once (default %(default)s)")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="INDEX", help="GPUs to spread them over")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="stop after so many")
    parser.add_argument(
        "--job-minutes", type=float, default=float("inf"), metavar="M", help="stop a single job that takes longer"
    )
    parser.add_argument("--prepare", action="store_true", help="make the data sets and catalogues, and no models")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and run nothing")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error("--processes must be at least 1")
    try:
        plans = [load(text) for text in arguments.plans]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    places = Places(*(path.absolute() for path in (arguments.data, arguments.work, arguments.results)))
    wanted = arguments.only
    jobs = joined(job for plan in plans for job in runs(plan, places))
    jobs = [job for job in jobs if not wanted or any(text in job.name for text in wanted)]
    jobs.sort(key=lambda job: job.alone)  # those let nothing else run, so they wait for all plans
    if arguments.list:
        finished = finished_runs(places.results)
        for job in jobs:
            done = len(job.steps) - len(remaining(job, finished))
            print(f"{job.name}: {done} of {len(job.steps)} steps")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started is stopped
    places.work.mkdir(parents=True, exist_ok=True)
    lock = open(places.work / ".lock", "w")  # noqa: SIM115 — held to the end of the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        parser.error(f"another run is at work in {places.work}; wait for it, or name another folder")
    deadline = time.monotonic() + 60 * arguments.minutes
    runner = Runner(places, arguments.processes, deadline, write=partial(print, flush=True), gpus=arguments.gpus)
    runner.longest = 60 * arguments.job_minutes
    names = {job.name.split("/")[0] for job in jobs}
    data = joined(job for plan in plans for job in preparations(plan, places) if job.name.split(":")[0] in names)
    in_time = runner.run([*data, *([] if arguments.prepare else jobs)])
    if not in_time:
        print("the time is up; the same command goes on from here", file=sys.stderr)
    if runner.failed:
        print(f"failed: {', '.join(runner.failed)}", file=sys.stderr)
    return 0 if in_time and not runner.failed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Train and measure a plan of models, several at once, and go on where an earlier run stopped.

python -m benchmarks.quality benchmarks/plans/quality.toml --data data --work work --processes 4 --minutes 60
python -m benchmarks.quality benchmarks/plans/quality.toml --data data --work work --list

Small models leave most of a GPU idle, so several processes share it. What has a line in the results file is done, what
has a checkpoint is not trained again, and an interrupted training goes on from its last epoch. When the time is up, the
processes are stopped; the same command later does the rest. Output of each command goes to WORK/logs.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.quality_plan import Job, Places, Plan, Step, finished_runs, is_done, preparations, runs
from benchmarks.rows import RESULTS

POLL_SECONDS = 0.2
GRACE_SECONDS = 20.0


def command(step: Step) -> list[str]:
    return [sys.executable, "-m", "nezha_vllm.cli", *step.words]


@dataclass
class Running:
    """A job on its way: the process of its first step that is not done."""

    job: Job
    process: subprocess.Popen
    started: float


@dataclass
class Runner:
    """Runs jobs, at most ``processes`` at a time, until ``deadline`` (of ``time.monotonic``)."""

    places: Places
    processes: int
    deadline: float
    command: Callable[[Step], list[str]] = command
    write: Callable[[str], None] = print
    failed: list[str] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> bool:
        """True if time was left for all of them. Names of jobs with a failing step are kept in ``failed``."""
        waiting, running = list(jobs), list[Running]()
        try:
            while waiting or running:
                if time.monotonic() >= self.deadline:
                    return False
                while waiting and len(running) < self.processes:
                    started = self._start(waiting.pop(0))
                    running += [started] if started else []
                time.sleep(POLL_SECONDS if running else 0)
                running = [going for one in running if (going := self._step_on(one))]
            return True
        finally:
            self._stop(running)

    def _start(self, job: Job) -> Running | None:
        """The first step that is not done; None if all are."""
        finished = finished_runs(self.places.results)
        step = next((step for step in job.steps if not is_done(step, finished)), None)
        if step is None:
            return None
        logs = self.places.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        # a process group of its own, so that what it starts is stopped with it
        with open(logs / f"{job.name.replace('/', '-').replace(': ', '-')}.log", "ab") as log:
            process = subprocess.Popen(
                self.command(step), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.write(f"{job.name}: {step.words[0]}")
        return Running(job, process, time.monotonic())

    def _step_on(self, running: Running) -> Running | None:
        """The job as it is now: still going, on its next step, or over."""
        status = running.process.poll()
        if status is None:
            return running
        job, seconds = running.job, time.monotonic() - running.started
        if status:
            self.failed.append(job.name)
            self.write(
                f"{job.name}: failed with status {status} after {seconds:.0f} s, see {self.places.work / 'logs'}"
            )
            return None
        self.write(f"{job.name}: done in {seconds:.0f} s")
        following = self._start(job)
        if following and following.process.args == running.process.args:
            self.failed.append(job.name)
            self._stop([following])
            self.write(f"{job.name}: ended well but left nothing, see {self.places.work / 'logs'}")
            return None
        return following

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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the raw files")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="data sets, models, ranks and logs")
    parser.add_argument("--results", type=Path, default=RESULTS / "quality.csv", metavar="FILE", help="(%(default)s)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="at once (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="M", help="stop after so many")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="runs whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="say what is done and what is not, and run nothing")
    arguments = parser.parse_args(argv)
    if arguments.processes < 1:
        parser.error("--processes must be at least 1")
    try:
        plan = Plan.load(arguments.plan)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    places = Places(*(path.absolute() for path in (arguments.data, arguments.work, arguments.results)))
    wanted = arguments.only
    jobs = [job for job in runs(plan, places) if not wanted or any(text in job.name for text in wanted)]
    if arguments.list:
        finished = finished_runs(places.results)
        for job in jobs:
            done = sum(is_done(step, finished) for step in job.steps)
            print(f"{job.name}: {done} of {len(job.steps)} steps")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started is stopped
    places.work.mkdir(parents=True, exist_ok=True)
    lock = open(places.work / ".lock", "w")  # noqa: SIM115 — held to the end of the process
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        parser.error(f"another run is at work in {places.work}; wait for it, or name another folder")
    runner = Runner(places, arguments.processes, time.monotonic() + 60 * arguments.minutes)
    names = {job.name.split("/")[0] for job in jobs}
    data = [job for job in preparations(plan, places) if job.name.split(":")[0] in names]
    in_time = runner.run(data)
    ready = {job.name.split(":")[0] for job in data} - {name.split(":")[0] for name in runner.failed}
    in_time = in_time and runner.run([job for job in jobs if job.name.split("/")[0] in ready])
    if not in_time:
        print("the time is up; the same command goes on from here", file=sys.stderr)
    if runner.failed:
        print(f"failed: {', '.join(runner.failed)}", file=sys.stderr)
    return 0 if in_time and not runner.failed else 1


if __name__ == "__main__":
    sys.exit(main())

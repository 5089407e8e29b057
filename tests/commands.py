"""What the tests of the papers' commands share: running a script as its user does."""

import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def no_stray_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads that wait for each other make tiny steps slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of(paper):
    """script, run, main and fails of a paper's module."""

    def script(*args, launcher=(), file=f"{paper.__name__}.py"):
        """The command line of a real process."""
        return [sys.executable, *launcher, str(ROOT / file), *map(str, args)]

    def run(*args, **how):
        """What a real process prints."""
        done = subprocess.run(script(*args, **how), capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def main(*args):
        """The same command, here."""
        paper.main([str(a) for a in args])

    def fails(capsys, *args):
        """Runs the command here; it must end as a user's mistake does. Returns its one line."""
        capsys.readouterr()
        assert common.exit_status(lambda: main(*args)) == 2
        err = capsys.readouterr().err.strip()
        lines = [line for line in err.splitlines() if not line.startswith("skipped ")]
        assert len(lines) == 1 and "Traceback" not in err, err
        return lines[0]

    return script, run, main, fails


def written_before_each_batch(monkeypatch, pattern):
    """A list that grows by how many such files there are, for every batch that a command makes."""
    each_batch, written = common.each_batch, []

    def spy(*args, **options):
        for found in each_batch(*args, **options):
            written.append(len(list(Path().glob(pattern))))
            yield found

    monkeypatch.setattr(common, "each_batch", spy)
    return written


def trained_beside_the_tests(paper, options):
    """The fixtures training, a real run on toy data that goes on beside the tests of a file, and
    trained, its folder once it has ended. What it prints is in printed.txt beside the folder."""

    @pytest.fixture(scope="module", autouse=True)
    def training(tmp_path_factory):
        out = tmp_path_factory.mktemp("trained")
        command = of(paper)[0]("--data", "toy", *options.split(), "--out", out)
        with open(out / "printed.txt", "w") as f, subprocess.Popen(command, stdout=f) as process:
            yield process, out / f"{paper.__name__}-toy-000"
            process.kill()

    @pytest.fixture(scope="module")
    def trained(training):
        process, folder = training
        assert process.wait(timeout=900) == 0
        return folder

    return training, trained


@contextlib.contextmanager
def beside(*commands):
    """Runs real processes side by side, and beside what is done inside; all must end well."""
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    try:
        yield
        assert [process.wait(timeout=900) for process in processes] == [0] * len(commands)
    finally:
        for process in processes:
            process.kill()


def on_one_and_two_processes(script, *options):
    """Runs a script, by itself to the folder one, by torchrun to the folder two."""
    command = [str(part) for part in (script, *options, "--out")]
    two = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    with beside([sys.executable, *command, "one"], [sys.executable, *two, *command, "two"]):
        pass


def logged_steps(folder):
    """Steps of a run so far, as far as its log says."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        return json.loads(lines[-1])["step"] if lines else 0
    except ValueError:  # half a line
        return 0


def kill_after(command, folder, steps, seconds):
    """Runs a real process, and sends it SIGKILL so many seconds after its log has so many steps."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and logged_steps(folder) < steps:
        time.sleep(0.005)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"


def whole_and_killed(paper, options, kills):
    """The folders of a run that nothing interrupts, and, beside it, of one that is killed and
    resumed. options: with --data "d"; kills: [(steps, the most seconds after them)]."""
    script, _, main, _ = of(paper)
    whole, killed = (Path(out, f"{paper.__name__}-d-000") for out in ("whole", "killed"))
    command, draw = script(*options, "--out", "killed", "--workers", 2), random.Random(0)
    with beside(script(*options, "--out", "whole")):
        for steps, seconds in kills:
            kill_after(command, killed, steps, draw.uniform(0, seconds))
            command = script("--resume", killed)
        main("--resume", killed)
    return whole, killed


def each_ends_in_one_line(fails, capsys, cases):
    """cases: [(arguments, what the line must say)]; all are tried. Nothing may be left behind."""
    problems = []
    for args, message in cases:
        try:
            assert message in fails(capsys, *args)
        except Exception as e:  # the rest is tried, too
            problems.append(f"{args}: {type(e).__name__}: {e}")
    assert not problems, "\n".join(problems)
    assert not Path("runs").exists() and not Path("out").exists()

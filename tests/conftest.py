"""Fixtures and helpers: run a training script here or as a process of its own, end it, read what it leaves behind."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import hypothesis
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_continuous_lrrl as ppo
from lrrl_utils.checkpoints import Checkpoints
from lrrl_utils.measures import read_csv
from lrrl_utils.run import Stopped
from tests.processes import ROOT, ForkedScript

# A run of PPO in which a round, an update and an observation take 64 timesteps, with a checkpoint after every other one
PENDULUM = "--env-id Pendulum-v1 --num-steps 64 --num-minibatches 4 --update-epochs 1 --bandit-interval 64"
PENDULUM += " --checkpoint-interval 128 --no-cuda --seed 7"
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")
torch.set_num_threads(1)  # a test must not slow down on a machine that is busy
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as if `nohup` had not started the tests


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One for each core, hyper-threads included: training takes nearly all of the time."""
    return os.cpu_count()


@pytest.fixture(autouse=True)
def signals_are_given_back():
    """Ray, grids and runs that a test ends halfway leave handlers behind, which the next test is not to meet."""
    signums = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
    before = {signum: signal.getsignal(signum) for signum in signums}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class RunFolder:
    """A run folder, read back."""

    def __init__(self, path):
        self.path = path
        self.config, self.summary = (json.loads((path / name).read_text()) for name in ("config.json", "summary.json"))
        self.episodes, self.rounds = read_csv(path / "episodes.csv"), read_csv(path / "rounds.csv")

    def bytes(self, name):
        return (self.path / name).read_bytes()


def only_folder(parent):
    (path,) = parent.iterdir()
    return RunFolder(path)


def rows(path):
    with open(path) as file:
        return list(csv.reader(file))[1:]


def contents(folder):
    """{name: bytes} of the files in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_equal_to_the_bit(folder, whole):
    """Two run folders hold runs that were the same."""
    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    ended, before = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
    for name in ("status", "final_return", "auc", "pulls", "rollbacks", "global_step"):
        assert ended[name] == before[name], name


def last_step(folder, name="checkpoint.pt"):
    """The timestep of a checkpoint."""
    return torch.load(folder / name, weights_only=True)["run"]["global_step"]


def scalars(folder, name):
    """The (timestep, value) pairs of a scalar in TensorBoard's events."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"{seconds} s have passed"
        time.sleep(0.02)


def stop_after(monkeypatch, checkpoints):
    """From now on, a run in this process ends after so many checkpoints, as if terminated just before the next one."""
    save, count = Checkpoints.save, 0

    def save_or_stop(self, global_step):
        nonlocal count
        count += 1
        if count > checkpoints:
            raise Stopped(143)
        save(self, global_step)

    monkeypatch.setattr(Checkpoints, "save", save_or_stop)


def resume(main, folder, options=""):
    main(["--resume", str(folder), *options.split()])
    return RunFolder(folder)


@pytest.fixture(autouse=True)
def denormals():
    """A script that ends before its run starts leaves torch's setting as it is; tests of bandits need all floats."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def figures():
    """For tests that look at the figures of runs in this process: the others draw none."""


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """A figure takes longer than a tiny run. It has tests of its own, and processes draw theirs."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("lrrl_utils.run.plot_curves", lambda folder: None)


@pytest.fixture
def train(tmp_path):
    """train(main, "--option value …") runs a script's main() in this process; returns its run folder."""
    count = 0

    def run(main, options):
        nonlocal count
        count += 1
        parent = tmp_path / f"runs{count}"
        main([*options.split(), "--run-dir", str(parent)])
        return only_folder(parent)

    return run


@pytest.fixture
def stop(train, monkeypatch, tmp_path):
    """stop(main, options, n) starts a run in this process and ends it after `n` checkpoints; returns the folder."""

    def run(main, options, checkpoints):
        before = set(tmp_path.glob("runs*/*"))
        with monkeypatch.context() as patch:
            stop_after(patch, checkpoints)
            with pytest.raises(SystemExit) as end:
                train(main, options)
        assert end.value.code == 143
        (folder,) = set(tmp_path.glob("runs*/*")) - before
        return folder

    return run


@pytest.fixture
def stopped(stop):
    """A run of PPO that was stopped after its third checkpoint, at 384 of 1,024 timesteps; its folder."""
    return stop(ppo.main, f"{PENDULUM} --total-timesteps 1024", 3)


@pytest.fixture
def refused(capsys):
    """refused(main, argv) asserts that main(argv) ends with one line and exit code 2; returns the line."""

    def run(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in argv])
        output, error = capsys.readouterr()
        assert end.value.code == 2 and output == "" and error.count("\n") == 1 and error.endswith("\n"), error
        return error

    return run


@pytest.fixture
def start(tmp_path):
    """start("script.py --option value …") starts a real process, its run folders below tmp_path / "runs".

    It is forked from one that has its imports behind it; with `fresh`, it starts as a user would start it, and takes
    seconds to do so. `limit`, in bytes, is that of the size of a file: more fails as it does on a full disk, until the
    limit is lifted. Both standard outputs go to the file at `stdout`, if one is given. A fresh process may have
    a file of its own for `stderr`, and does not get the file descriptors that are `closed`.
    """
    processes = []

    def run(command, limit=None, stdout=None, fresh=False, stderr=subprocess.PIPE, closed=(), **environment):
        command = [*command.split(), "--run-dir", str(tmp_path / "runs")]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        env.pop("WANDB_SERVICE", None)  # of a test before, in this process
        if fresh:
            options = {"preexec_fn": lambda: [os.close(descriptor) for descriptor in closed]} if closed else {}
            options |= {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
            processes.append(subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, **options))
        else:
            processes.append(ForkedScript(command, env, limit, stdout))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()

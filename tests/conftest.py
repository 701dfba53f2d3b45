"""Fixtures: run a training script in this process or as a process of its own, and read what it leaves behind."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

from tracking import read_csv

ROOT = Path(__file__).parent.parent
hypothesis.settings.register_profile("any speed", deadline=None)
hypothesis.settings.load_profile("any speed")
torch.set_num_threads(1)  # a test must not slow down on a machine that is busy


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


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(main, "--option value …") runs a script's main() in this process; returns its run folder."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    count = 0

    def run(main, options):
        nonlocal count
        count += 1
        parent = tmp_path / f"runs{count}"
        main([*options.split(), "--run-dir", str(parent)])
        return only_folder(parent)

    return run


@pytest.fixture
def start(tmp_path):
    """start("script.py --option value …") starts a real process, its run folders below tmp_path / "runs"."""
    processes = []

    def run(command, stderr=subprocess.PIPE, limit=None, **environment):
        command = [sys.executable, *command.split(), "--run-dir", str(tmp_path / "runs")]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        env.pop("WANDB_SERVICE", None)  # of a test before, in this process
        pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
        if limit:  # of the size of a file, in bytes: more fails as it does on a full disk
            pipes["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()

"""Processes of scripts that start at once: forked from one that has imported already what takes seconds to import.

They are processes like any others, with a pid, signals, an exit code and pipes. What is theirs alone is made anew:
environment, working directory, random numbers of libraries. Not so: the environment while modules were imported, the
seed of hashes, and functions for `atexit`, which do not run.
"""

import contextlib
import multiprocessing
import os
import resource
import runpy
import subprocess
import sys
import threading
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ["dqn_atari_lrrl", "iqn_atari_lrrl", "ppo_continuous_lrrl", "sac_mujoco_lrrl"]
starting = threading.Lock()
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([*SCRIPTS, "tests.toy_envs", "torch._dynamo", "matplotlib.pyplot", "tests.processes"])


class ForkedScript:
    """`python script.py …`, with the face of subprocess.Popen.

    Args:
        command: the script's path and its arguments.
        environment: all of its environment variables.
        limit: of the size of a file that it writes, in bytes.
        stdout: the path of a file for its standard output and error, in place of the pipes.
        cwd: its working directory.
    """

    def __init__(self, command, environment, limit=None, stdout=None, cwd=ROOT):
        start_server()
        (out, out_end), (err, err_end) = context.Pipe(duplex=False), context.Pipe(duplex=False)
        arguments = command, environment, limit, stdout, cwd, out_end, err_end
        self.process = context.Process(target=run_script, args=arguments)
        self.process.start()
        out_end.close(), err_end.close()
        self.stdout, self.stderr = (open(os.dup(pipe.fileno())) for pipe in (out, err))
        self.pid = self.process.pid

    @property
    def returncode(self):
        return self.process.exitcode

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.pid, timeout)
        return self.returncode

    def communicate(self, timeout=None):
        texts = {}
        readers = [
            threading.Thread(target=lambda pipe=pipe: texts.update({pipe: pipe.read()}), daemon=True)
            for pipe in (self.stdout, self.stderr)
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return texts[self.stdout], texts[self.stderr]

    def send_signal(self, signum):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    def kill(self):
        self.process.kill()


def run_forked(command, cwd=None, env=None, **_):
    """In place of `subprocess.run([sys.executable, script, …], capture_output=True, text=True)`."""
    process = ForkedScript([str(word) for word in command[1:]], env or dict(os.environ), cwd=cwd or os.getcwd())
    output, error = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, error)


def train_forked(script, words, log, own_session=False):
    """In place of `lrrl_utils.scripts.train`."""
    done = run_forked([sys.executable, ROOT / script, *words])
    Path(log).open("a").write(done.stdout + done.stderr)
    return done.returncode


def start_server():
    """Start the process that others are forked from, unless it is there; it needs a core and finds our modules."""
    with starting, mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()


def run_script(command, environment, limit, stdout, cwd, *pipes):
    """In the forked process: what `python` does with a script."""
    file = os.open(stdout, os.O_WRONLY) if stdout else None
    for descriptor, pipe in enumerate(pipes, 1):
        os.dup2(file or pipe.fileno(), descriptor)
        pipe.close()
    encoding = environment.get("PYTHONIOENCODING")
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, encoding=encoding, closefd=False) for n in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    np.random.seed(), torch.seed()  # a script that does not seed must not look like one that does
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    sys.argv = command
    sys.path.insert(0, os.path.dirname(os.path.abspath(command[0])))
    runpy.run_path(command[0], run_name="__main__")

"""Training scripts as other programs start them: looked up, tried out, run, found again, branched."""

import contextlib
import ctypes
import functools
import importlib
import io
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from pathlib import Path

from lrrl_utils.files import lock, read_json, write_json, written_whole
from lrrl_utils.parser import given_options
from lrrl_utils.terminal import option_name, reject

ROOT = Path(__file__).parent.parent
ENDED = ("finished", "diverged")  # what has diverged would do so again
DIVERGED = 3  # its exit code


def split_options(option, text, taken):
    """The words of `text`, options of a script. Rejects those that are named in `taken`: the caller sets them."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        reject(f"{option} {text}: {error}")
    if found := given_options(words) & taken:
        reject(f"{option} {text}: {option_name(sorted(found)[0])} is set here, see --help")
    return words


def split_command(command, taken):
    """(script, [option, …]) of a command like "python ppo_continuous_lrrl.py --gamma 0.9"; see `split_options`."""
    words = split_options("--command", command, taken)
    if words and Path(words[0]).name.startswith("python"):
        words = words[1:]
    script, *options = words or [""]
    scripts = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("*.py"))}
    if "\nclass Args" not in scripts.get(script, ""):
        known = " ".join(name for name, text in scripts.items() if name.endswith("_lrrl.py") and "import Run\n" in text)
        reject(f"--command {command}: must begin with one of {known}, or a script of yours beside them")
    return script, options


# WHAT A SCRIPT MAKES OF ITS OPTIONS


class TriedOut(Exception):
    """A script has come as far as its run."""


def _try_out(script, words):
    module = importlib.import_module(script.removesuffix(".py"))
    refused = f"{script} is no training script"
    if not hasattr(module, "Run"):
        return {}, refused

    def stop(args, *_, **__):
        raise TriedOut(vars(args))

    module.Run = stop
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            module.main(list(words))
    except TriedOut as end:
        return end.args[0], ""
    except SystemExit:
        refused = errors.getvalue().strip().partition("error: ")[2]
    return {}, refused or f"{script} ends before its run"


def _start_trials(gpus):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is our parent's to end us
    hide_gpus(gpus)


def try_out(trials, gpus=1):
    """What scripts make of their words, [(script, words), …]: a list of (arguments, what the script refuses or "").

    Each script runs as far as its run folder, which it does not make; in a process of its own, that goes away, and
    that sees no GPU if `gpus` is 0.
    """
    with ProcessPoolExecutor(1, get_context("fork"), initializer=_start_trials, initargs=(gpus,)) as pool:
        try:
            return list(pool.map(_try_out, *zip(*trials)))
        except KeyboardInterrupt:
            for process in active_children():
                process.kill()
            raise


# RUNS


def reserve(option, folder):
    """Lock a folder that programs of this kind fill, as `files.lock` does; make it if need be. Or `reject` it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return lock(folder)
    except BlockingIOError:
        reject(f"{option} {folder}: a process is still working there")
    except OSError as error:
        reject(f"{option} {folder}: must be a folder that can be written ({error.strerror})")


def hide_gpus(asked):
    """In a process of its own: Ray, for one, leaves all GPUs to workers that have `asked` for 0."""
    if not asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _end_with_parent(parent):
    """In a new process on Linux: ask for a SIGTERM when its parent is gone, and a run saves a checkpoint then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it went before we asked
            os._exit(1)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def train(script, words, log, own_session=False):
    """Run a script to its end, with one thread; what it says is added to the file `log`. Returns its exit code.

    In a session of its own it gets no signal that is meant for the processes of its parent: Ray kills these.
    """
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    end_with_parent = functools.partial(_end_with_parent, os.getpid())
    with open(log, "a") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
        process = subprocess.Popen(
            command, env=environment, preexec_fn=end_with_parent, start_new_session=own_session, **streams
        )
    return process.wait()  # `subprocess.run` would kill it if a signal ends us here


def lock_when_free(folder):
    """As `files.lock`, once no process has the folder: one whose parent was killed may still be saving."""
    while True:
        with contextlib.suppress(BlockingIOError):
            return lock(folder)
        time.sleep(0.2)


def wait_until_free(folder):
    os.close(lock_when_free(folder))


def last_line(log):
    return (Path(log).read_text(encoding="utf-8", errors="replace").strip() or "nothing was said").splitlines()[-1]


def status_of(folder):
    try:
        return read_json(folder / "summary.json")["status"]
    except (OSError, ValueError, KeyError):
        return None


def has_ended_beyond(folder, timestep):
    """Whether a run that was branched at `timestep` has ended; the summary of one that diverged may be older."""
    status = status_of(folder)
    return status == "diverged" or status == "finished" and read_json(folder / "summary.json")["global_step"] > timestep


def step_of(folder):
    """The timestep of the last checkpoint in a run folder that can be read, 0 without one."""
    import torch  # takes long, and a program that only starts scripts needs it nowhere else

    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        with contextlib.suppress(Exception):  # a damaged file can raise nearly anything
            return torch.load(folder / name, weights_only=True)["run"]["global_step"]
    return 0


def start_branch(snapshot, folder, learning_rate, key):
    """Copy a run folder; the copy gets another constant rate, as if it always had had that, and new random numbers.

    `key` seeds them: an integer or a tuple of integers.
    """
    import numpy as np
    import torch

    from lrrl_utils.state import capture

    if folder.exists():
        try:
            os.close(lock(folder))
        except BlockingIOError:
            reject(f"{folder}: a process is still writing there")
        shutil.rmtree(folder)
    shutil.copytree(snapshot, folder)
    (folder / "checkpoint.prev.pt").unlink(missing_ok=True)  # it has the rate of the run
    config = read_json(folder / "config.json")
    config["learning_rate"] = learning_rate
    config["command_line"] += ["--learning-rate", str(learning_rate)]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    checkpoint["run"]["identity"]["learning_rate"] = learning_rate
    checkpoint["run"]["logs"]["wandb_id"] = None  # or all branches would write to one run there
    checkpoint["state"]["rng"] = capture(np.random.default_rng(key))
    if "torch_rng" in checkpoint["state"]:
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        device = "cuda" if config["device"].startswith("cuda") else "cpu"
        checkpoint["state"]["torch_rng"] = capture(torch.Generator(device).manual_seed(seed))
    with written_whole(folder / "checkpoint.pt") as file:
        torch.save(checkpoint, file)
    write_json(folder / "config.json", config)

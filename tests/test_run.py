"""What lrrl_utils/run.py promises: folders of their own, signals, exit codes, and an end that tells how it came."""

import contextlib
import errno
import faulthandler
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import gymnasium as gym
import psutil
import pytest
import torch

import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from lrrl_utils import logs, origin, run
from lrrl_utils.run import Run, Stopped
from lrrl_utils.terminal import say
from tests import toy_envs
from tests.conftest import PENDULUM, assert_equal_to_the_bit, last_step, only_folder, resume, rows, wait_for
from tests.processes import context

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU]
ATTACKS = int(os.environ.get("ATTACKS", 6))  # runs that are sent a signal; try a thousand
SAC = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda"


def new_run(tmp_path, bandits=None, **options):
    args = ppo.Args(run_dir=str(tmp_path / "runs"), cuda=False, total_timesteps=1000, **options)
    return Run(args, {"rng": torch.Generator()}, "cpu", bandits)


# --- folders and where a run comes from -------------------------------------------------------------------------------


def test_runs_started_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run.time, "time", lambda: 1e9)
    folders = [new_run(tmp_path).folder for _ in range(3)]
    assert len(set(folders)) == 3 and all(folder.is_dir() for folder in folders)


def test_a_run_dir_that_is_a_dangling_link_is_an_error_and_no_endless_loop(tmp_path, refused):
    (tmp_path / "runs").symlink_to(tmp_path / "no-such-disk" / "runs")
    assert "--run-dir" in refused(ppo.main, [*PENDULUM.split(), "--run-dir", tmp_path / "runs"])


def test_a_run_names_its_versions_commit_and_code(train, monkeypatch):
    config = train(ppo.main, f"{PENDULUM} --total-timesteps 64").config
    assert {"python", "torch", "numpy", "gymnasium"} <= config["versions"].keys() and config["device"] == "cpu"
    files = ("ppo_continuous_lrrl.py", "bandits.py", "peak.py")
    here = Path(ppo.__file__).parent
    assert config["code"] == {name: hashlib.sha256((here / name).read_bytes()).hexdigest() for name in files}


def test_without_git_or_one_that_answers_the_commit_is_unknown(monkeypatch, tmp_path):
    assert origin.git_commit(tmp_path) is None  # which is in no repository
    commit = origin.git_commit(Path(__file__).parent)
    assert commit is None or len(commit) >= 40

    def hang(*_, **options):
        raise subprocess.TimeoutExpired("git", options["timeout"])

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", hang)
        assert origin.git_commit(Path(__file__).parent) is None
    monkeypatch.setenv("PATH", "")
    assert origin.git_commit(Path(__file__).parent) is None


def test_steps_per_second_do_not_count_a_warm_up_nor_what_comes_after_training(tmp_path):
    with new_run(tmp_path) as a_run:
        a_run.progress(50, None)
        time.sleep(0.2)
        a_run.progress(100, 1e-3)
        assert a_run.sps is None
        time.sleep(0.01)
        a_run.progress(600, 1e-3)
        trained = a_run.sps
        time.sleep(0.2)
        assert a_run.sps == trained > 500 / 0.2


# --- exit codes -------------------------------------------------------------------------------------------------------


class Quits(toy_envs.StepCounter):
    """Ends the process in its 300th step with an exit code, as some simulators do."""

    code = 0

    def step(self, action):
        if self.total == 299:
            raise SystemExit(self.code)
        return super().step(action)


gym.register("Quits-v0", Quits)


@pytest.mark.parametrize(
    ("module", "step", "code"),
    [(ppo, 256, 0), (ppo, 256, None), (ppo, 256, 7), (ppo, 256, "no licence"), (sac, 299, 0)],
)
def test_an_environment_that_ends_the_process_has_failed(module, step, code, train, monkeypatch, tmp_path):
    monkeypatch.setattr(Quits, "code", code)
    toy_envs.StepCounter.total = 0
    options = f"{PENDULUM if module is ppo else SAC} --env-id tests.test_run:Quits-v0 --checkpoint-interval 1000"
    with pytest.raises(SystemExit) as end:
        train(module.main, f"{options} --total-timesteps 640")
    a_run = only_folder(tmp_path / "runs1")
    assert end.value.code == (code or 1) and a_run.summary["status"] == "failed"
    assert last_step(a_run.path) == step


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (None, "finished", 0),
        (FloatingPointError("learning rate 7 was too much"), "diverged", 3),
        (Stopped(130), "interrupted", 130),
        (Stopped(143), "interrupted", 143),
        (SystemExit(0), "failed", 1),
        (SystemExit(5), "failed", 5),
        (RuntimeError("a bug"), "failed", 1),
        (MemoryError(), "failed", 1),
        (KeyboardInterrupt(), "failed", 1),
    ],
    ids=repr,
)
def test_how_a_run_ends_is_in_its_summary_and_its_exit_code(error, status, code, tmp_path, capfd, figures):
    process = multiprocessing.get_context("fork").Process(target=end_with, args=(tmp_path, error))
    process.start()
    process.join(60)
    (folder,) = (tmp_path / "runs").iterdir()
    assert process.exitcode == code and json.loads((folder / "summary.json").read_text())["status"] == status
    assert capfd.readouterr().out.startswith(status) and (folder / "curves.png").exists()


def end_with(tmp_path, error):
    with new_run(tmp_path):
        if error:
            raise error


def test_a_figure_that_cannot_be_drawn_changes_neither_the_exit_code_nor_the_summary(tmp_path, monkeypatch, capsys):
    def fail(folder):
        raise MemoryError("no room to draw")

    monkeypatch.setattr(run, "plot_curves", fail)
    with pytest.raises(SystemExit) as end, new_run(tmp_path) as a_run:
        raise FloatingPointError("learning rate 7 was too much")
    error = capsys.readouterr().err
    assert end.value.code == 3 and "no room to draw" in error and "learning rate 7" in error
    assert json.loads((a_run.folder / "summary.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize("module", [ppo, sac])
def test_a_run_in_which_no_round_has_closed_says_so(module, train, capsys):
    options = PENDULUM if module is ppo else f"{SAC} --bandit-interval 50"
    for timesteps, said in ((64, True), (192, False)):
        train(module.main, f"{options} --total-timesteps {timesteps} --bandit-feedback reward")
        assert ("no round has closed" in capsys.readouterr().err) == said


# --- terminals --------------------------------------------------------------------------------------------------------


class Noisy(toy_envs.StepCounter):
    """Writes to standard output and error, as libraries in C do."""

    def start(self):
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                os.write(descriptor, b"noise\n")
        return super().start()


gym.register("Noisy-v0", Noisy)


@pytest.mark.parametrize("where", ["| head -1", ">&- 2>&-", "> /dev/full 2>&1"])
def test_a_terminal_that_goes_away_does_not_end_a_run(where, start, tmp_path):
    # --cuda: there is no GPU, which is told on standard error
    command = f"ppo_continuous_lrrl.py {PENDULUM} --env-id tests.test_run:Noisy-v0 --total-timesteps 640 --cuda"
    options = {">&- 2>&-": {"fresh": True, "closed": [1, 2]}, "> /dev/full 2>&1": {"stdout": "/dev/full"}}
    process = start(command, **options.get(where, {}))
    if where == "| head -1":
        process.stdout.readline()
        process.stdout.close()
    process.wait()
    error = process.stderr.read()
    a_run = only_folder(tmp_path / "runs")
    assert process.returncode == 0 and a_run.summary["status"] == "finished" and "Traceback" not in error
    assert (a_run.path / "curves.png").exists()
    for name in ("episodes.csv", "rounds.csv"):  # what was meant for the terminal is in no file
        assert len({len(row) for row in rows(a_run.path / name)}) == 1
    assert last_step(a_run.path) == 640


def test_bad_input_has_its_exit_code_without_a_terminal_too(start):
    assert start("ppo_continuous_lrrl.py --seed -1", fresh=True, closed=[1, 2]).wait() == 2


def test_a_line_to_nobody_goes_nowhere(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    say("hello", "stderr")
    assert capsys.readouterr().out == ""


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_signal_sets_a_flag_and_the_run_ends_where_it_asks_for_it(tmp_path):
    """For whatever the signal meets may hold a lock: TensorBoard's queue, W&B's, the C library's."""
    handlers = [signal.getsignal(signum) for signum in SIGNALS]
    for signum in SIGNALS:
        with pytest.raises(SystemExit) as end, new_run(tmp_path) as a_run:
            a_run.stop_if_asked()
            signal.raise_signal(signum)
            a_run.log_episode(1, 2.0, 3)
            a_run.progress(1, 1e-3)
            assert a_run.signal == signum
            a_run.end_step(1)
            raise AssertionError("it must have ended")
        assert end.value.code == 128 + signum and a_run.global_step == 1
        assert json.loads((a_run.folder / "summary.json").read_text())["status"] == "interrupted"
    assert [signal.getsignal(signum) for signum in SIGNALS] == handlers


def test_nohup_keeps_a_run_from_ending_with_its_terminal(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    with new_run(tmp_path) as a_run:
        signal.raise_signal(signal.SIGHUP)
        a_run.end_step(1)
        assert a_run.signal is None
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait(second, tmp_path, monkeypatch):
    with pytest.raises(SystemExit) as end, new_run(tmp_path):
        signal.raise_signal(signal.SIGTERM)
        now = time.monotonic() + 1.5
        monkeypatch.setattr(time, "monotonic", lambda: now)
        signal.raise_signal(second)
        raise AssertionError("it must have ended")
    assert end.value.code == 128 + second


def test_signals_that_come_at_once_are_one(tmp_path):
    """A parent that dies sends one for each of its threads, a system that shuts down a SIGTERM and a SIGHUP."""
    with pytest.raises(SystemExit) as end, new_run(tmp_path, checkpoint_interval=10) as a_run:
        for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(signum)
        a_run.end_step(1)
    assert end.value.code == 143 and (a_run.folder / "checkpoint.pt").exists()


def test_a_full_disk_on_which_the_end_makes_room_leaves_a_run_finished(tmp_path, monkeypatch):
    room, write_json = [], logs.write_json

    def on_a_full_disk(path, content):
        if not room and content.get("status") == "finished":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_json(path, content)

    monkeypatch.setattr(logs, "write_json", on_a_full_disk)
    with new_run(tmp_path) as a_run:
        a_run.on_exit.callback(room.append, "the replay")
    assert json.loads((a_run.folder / "summary.json").read_text())["status"] == "finished"
    assert "summary.json" not in a_run.problems


def test_an_interrupt_while_the_logs_are_opened_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "open_wandb", lambda *_: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end, new_run(tmp_path, track=True) as a_run:
        a_run.end_step(1)
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert end.value.code == 130 and json.loads(summary.read_text())["status"] == "interrupted"


def test_logs_that_cannot_be_opened_leave_a_summary_too(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("no network")

    monkeypatch.setattr(Run, "open_wandb", fail)
    with pytest.raises(RuntimeError, match="no network"), new_run(tmp_path, track=True):
        raise AssertionError("the block must not be entered")
    (summary,) = tmp_path.glob("runs/*/summary.json")
    assert json.loads(summary.read_text())["status"] == "failed"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that no signal has met."""
    parent = tmp_path_factory.mktemp("whole")
    ppo.main([*f"{PENDULUM} --total-timesteps 5120 --save-model --run-dir".split(), str(parent)])
    return only_folder(parent).path


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGXCPU], ids=lambda signum: signum.name)
def test_a_signal_leaves_a_checkpoint_from_which_the_run_goes_on_to_the_bit(signum, whole, start, tmp_path):
    command = f"ppo_continuous_lrrl.py {PENDULUM} --total-timesteps 5120 --save-model"
    process = start(command, fresh=signum == signal.SIGINT)
    wait_for(lambda: [*tmp_path.glob("runs/*/checkpoint.pt")], process)
    process.send_signal(signum)
    assert process.wait(30) == 128 + signum, process.communicate()
    folder = only_folder(tmp_path / "runs")
    assert folder.summary["status"] == "interrupted" and last_step(folder.path) % 64 == 0
    resume(ppo.main, folder.path)
    assert_equal_to_the_bit(folder.path, whole)


def test_a_signal_saves_what_the_interval_would_not_have(whole, start, tmp_path):
    command = f"ppo_continuous_lrrl.py {PENDULUM} --total-timesteps 5120 --save-model --checkpoint-interval 1000000"
    process = start(command)
    wait_for(lambda: [*tmp_path.glob("runs/*/rounds.csv")], process)
    (folder,) = (tmp_path / "runs").iterdir()
    wait_for(lambda: len(rows(folder / "rounds.csv")) > 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert last_step(folder) % 64 == 0 and last_step(folder) // 64 >= len(rows(folder / "rounds.csv"))
    resume(ppo.main, folder)
    assert_equal_to_the_bit(folder, whole)


def attack(parent, count, seed):
    """Run PPO `count` times, each ended by a signal at a random moment; one that hangs is ended after a minute."""
    generator, here = random.Random(seed), threading.main_thread().ident
    options = f"{PENDULUM} --num-steps 16 --num-minibatches 2 --bandit-interval 16 --total-timesteps 10000000"
    options += " --no-compile"
    for n in range(count):
        signum = generator.choice(SIGNALS)
        folder = parent / f"attack{n}"

        def send(signum=signum):
            faulthandler.dump_traceback_later(60, exit=True)
            signal.pthread_kill(here, signum)

        threading.Thread(target=lambda folder=folder, send=send: when_begun(folder, generator.random(), send)).start()
        try:
            ppo.main([*options.split(), "--checkpoint-interval", "160", "--run-dir", str(folder)])
        except SystemExit as end:
            assert end.code == 128 + signum, (n, end.code, signum)
        faulthandler.cancel_dump_traceback_later()
        a_run = only_folder(folder)
        assert a_run.summary["status"] == "interrupted" and last_step(a_run.path) % 16 == 0
        shutil.rmtree(folder)


def when_begun(folder, delay, send):
    """Call `send` some time after the run below `folder` has written its first checkpoint."""
    while not [*folder.glob("*/checkpoint.pt")]:
        time.sleep(0.001)
    time.sleep(delay / 4)
    send()


def test_signals_at_random_moments_end_a_run_at_once_and_none_hangs(tmp_path):
    """`ATTACKS=1000 pytest -k random_moments tests/test_run.py` tries more of them."""
    process = context.Process(target=attack, args=(tmp_path, ATTACKS, ATTACKS))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_signal_in_the_evaluation_ends_the_run_at_once(start, tmp_path):
    command = f"ppo_continuous_lrrl.py {PENDULUM} --total-timesteps 256 --save-model --eval-episodes 1000000"
    process = start(command)
    wait_for(lambda: [*tmp_path.glob("runs/*/model.pt")], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert only_folder(tmp_path / "runs").summary["status"] == "interrupted"


def test_after_ctrl_c_no_process_is_left(start, tmp_path):
    options = f"{PENDULUM} --no-compile --total-timesteps 1280000 --track"
    process = start(f"ppo_continuous_lrrl.py {options}", fresh=True, WANDB_MODE="offline")
    wait_for(lambda: [*(tmp_path / "runs").glob("*/checkpoint.pt")], process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert children and not alive


def test_an_error_in_a_thread_of_the_environment_is_shown_and_costs_no_log(tmp_path, capsys):
    with new_run(tmp_path) as a_run:
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
        assert not a_run.problems
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_what_a_script_must_close_is_closed_however_the_run_ends(tmp_path):
    closed = []
    for error in (None, RuntimeError("a bug")):
        try:
            with new_run(tmp_path) as a_run:
                a_run.on_exit.callback(closed.append, math.pi)
                if error:
                    raise error
        except RuntimeError:
            pass
    assert closed == [math.pi] * 2

"""What lrrl_utils/checkpoints.py promises: a checkpoint is whole, of this run and no program, or it is refused."""

import errno
import os
import shutil
import signal
import zipfile

import pytest
import torch

import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from lrrl_utils import files
from tests.conftest import PENDULUM, assert_equal_to_the_bit, contents, last_step, only_folder, resume, wait_for

BOTH = ("checkpoint.pt", "checkpoint.prev.pt")
SAC = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda --total-timesteps 300"


def edit(path, change):
    """Write a checkpoint anew after `change` was called with it."""
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


@pytest.fixture
def whole(train):
    """The run that `stopped` is the beginning of."""
    return train(ppo.main, f"{PENDULUM} --total-timesteps 1024 --save-model").path


@pytest.mark.parametrize("damage", ["torn", "damaged", "foreign", "of another run", "a link", "a pipe", "missing"])
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_is_used(damage, stopped, whole, tmp_path, capsys):
    path = stopped / "checkpoint.pt"
    content = path.read_bytes()
    path.unlink()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "damaged":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes(50) + content[middle + 50 :])
    elif damage == "foreign":
        path.write_bytes(b"no checkpoint at all")
    elif damage == "of another run":
        path.write_bytes(content)
        edit(path, lambda checkpoint: checkpoint["run"]["identity"].update(seed=8))
    elif damage == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        path.symlink_to(tmp_path / "elsewhere")
    elif damage == "a pipe":
        os.mkfifo(path)
    capsys.readouterr()
    resume(ppo.main, stopped, "--save-model")
    error = capsys.readouterr().err
    assert "checkpoint.pt cannot be used" in error and "going on from checkpoint.prev.pt" in error
    assert damage != "of another run" or "a run with seed 8, not 7" in error
    assert_equal_to_the_bit(stopped, whole)
    assert os.path.lexists(stopped / "checkpoint.bad.pt") == (damage != "missing")
    assert [last_step(stopped, name) for name in BOTH] == [1024, 896]
    assert damage != "a link" or (tmp_path / "elsewhere").read_bytes() == content


def test_without_a_usable_checkpoint_there_is_one_line_and_code_2(stopped, refused, tmp_path):
    for name in BOTH:
        (stopped / name).write_bytes(b"torn")
    error = refused(ppo.main, ["--resume", stopped])
    assert all(f"{name} cannot be used" in error for name in BOTH)
    assert "config.json" in refused(ppo.main, ["--resume", tmp_path / "no such folder"])


@pytest.mark.parametrize("damage", ["rows are lost", "missing"])
def test_a_table_that_has_lost_rows_is_named_and_not_padded(damage, stopped, refused):
    (stopped / "rounds.csv").unlink()
    if damage == "rows are lost":
        (stopped / "rounds.csv").write_text("round\n")
    error = refused(ppo.main, ["--resume", stopped])
    assert ("rounds.csv has lost rows" if damage == "rows are lost" else "rounds.csv") in error


# --- of another run, another version ----------------------------------------------------------------------------------


def test_a_checkpoint_of_other_options_is_refused_and_the_option_is_named(stop, refused):
    lrrl, uniform = (stop(ppo.main, f"{PENDULUM} --total-timesteps 512 --bandit {x}", 2) for x in ("lrrl", "uniform"))
    for name in (*BOTH, "rounds.csv", "episodes.csv"):
        shutil.copy(lrrl / name, uniform / name)
    error = refused(ppo.main, ["--resume", uniform])
    assert all(f"{name} cannot be used (it belongs to a run with bandit lrrl, not uniform)" in error for name in BOTH)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: run["identity"].update(format=1), "it has format 1, this version reads format 2"),
        # as tracking.py wrote it
        (lambda run: run.update(identity="Pendulum-v1, name, seed 7, checkpoint format 1"), "another version"),
    ],
)
def test_a_checkpoint_of_the_format_before_is_refused_and_nothing_is_touched(change, said, stopped, refused):
    for name in BOTH:
        edit(stopped / name, lambda checkpoint: change(checkpoint["run"]))
    before = contents(stopped)
    assert said in refused(ppo.main, ["--resume", stopped])
    assert contents(stopped) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda checkpoint: checkpoint.pop("state"),
        lambda checkpoint: checkpoint["state"].pop("trained"),
        lambda checkpoint: checkpoint["state"].update(surplus=1),
        lambda checkpoint: checkpoint["state"]["bandits"]["agent"].update({"class": "LRRL"}),
        lambda checkpoint: checkpoint["run"].pop("sizes"),
        lambda checkpoint: checkpoint["run"].update(episodes=3),
        lambda checkpoint: checkpoint["run"].update(global_step="512"),
        lambda checkpoint: checkpoint["run"]["logs"].pop("rounds"),
    ],
)
def test_a_forged_checkpoint_is_refused_in_one_line(change, stopped, refused):
    for name in BOTH:
        edit(stopped / name, change)
    assert "checkpoint.pt cannot be used" in refused(ppo.main, ["--resume", stopped])


# --- from a stranger --------------------------------------------------------------------------------------------------


class Attack:
    """Pickled, it runs code when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_from_a_stranger_runs_no_code(stopped, tmp_path, capsys):
    torch.save({"run": Attack(tmp_path / "owned")}, stopped / "checkpoint.pt")
    resume(ppo.main, stopped)
    assert not (tmp_path / "owned").exists() and "checkpoint.pt cannot be used" in capsys.readouterr().err


def test_a_checkpoint_that_would_grow_when_it_is_unpacked_is_refused_unread(stopped, monkeypatch, capsys):
    with zipfile.ZipFile(stopped / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(10**8))
    sizes = []
    read = zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: sizes.append(n) or read(self, n))
    resume(ppo.main, stopped)
    assert "checkpoint.pt cannot be used (it would grow when it is unpacked)" in capsys.readouterr().err
    assert len(sizes) < 1000  # of 4 KiB; those of checkpoint.prev.pt


# --- one process at a time, whatever the disk does --------------------------------------------------------------------


def test_a_run_that_is_still_going_on_cannot_be_resumed(start, tmp_path):
    process = start(f"ppo_continuous_lrrl.py {PENDULUM} --no-compile --total-timesteps 1280000")
    wait_for(lambda: [*tmp_path.glob("runs/*/checkpoint.pt")], process)
    second = start(f"ppo_continuous_lrrl.py --resume {only_folder(tmp_path / 'runs').path}")
    output, error = second.communicate(timeout=60)
    assert second.returncode == 2 and error.count("\n") == 1 and "a process is still writing there" in error
    assert process.poll() is None
    process.kill()
    process.wait()
    (folder,) = (tmp_path / "runs").iterdir()
    third = start(f"ppo_continuous_lrrl.py --resume {folder} --total-timesteps 12800000")  # the lock goes with it
    before = last_step(folder)
    wait_for(lambda: last_step(folder) > before, third)


def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(stopped, refused, monkeypatch):
    def fail(path, flags=os.O_RDONLY):
        if path.name == "checkpoint.pt":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return files.open_regular(path, flags)

    monkeypatch.setattr("lrrl_utils.checkpoints.open_regular", fail)
    assert "checkpoint.pt cannot be read now" in refused(ppo.main, ["--resume", stopped])
    assert (stopped / "checkpoint.pt").exists() and not (stopped / "checkpoint.bad.pt").exists()


def test_checkpoints_need_no_links(train, monkeypatch):
    def fail(self, target):
        raise PermissionError("no links here")

    monkeypatch.setattr("pathlib.Path.hardlink_to", fail)
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 512")
    assert [last_step(run.path, name) for name in BOTH] == [512, 384]


def test_a_kill_while_a_checkpoint_is_written_leaves_nothing_that_piles_up(stopped):
    for _ in range(3):
        pid = os.fork()
        if not pid:
            try:
                with files.written_whole(stopped / "checkpoint.pt") as file:
                    file.write(bytes(1000))
                    os.kill(os.getpid(), signal.SIGKILL)
            finally:
                os._exit(1)
        os.waitpid(pid, 0)
    resume(ppo.main, stopped)
    assert not [*stopped.glob(".*")]


def test_a_full_disk_ends_the_checkpoints_and_not_the_training(start, tmp_path):
    process = start(f"sac_mujoco_lrrl.py {SAC} --checkpoint-interval 50", limit=200_000)
    output, error = process.communicate()
    run = only_folder(tmp_path / "runs")
    assert process.returncode == 0 and run.summary["status"] == "finished", error
    assert error.count("checkpoint.pt cannot be written") == 1
    assert "is not complete: checkpoint.pt" in error and "Traceback" not in error
    assert not [*run.path.glob("*checkpoint*")]


@pytest.mark.parametrize("where", ["while it is written", "when it is flushed"])
def test_a_checkpoint_that_fails_leaves_those_before(where, train, monkeypatch, tmp_path):
    save, fsync, saved, flushed = torch.save, os.fsync, [], []

    def fail():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_or_fail(checkpoint, file):
        saved.append(save(checkpoint, file))
        if len(saved) == 3 and where == "while it is written":
            fail()

    def flush_or_fail(descriptor):
        if len(saved) == 3 and not flushed and where == "when it is flushed":
            flushed.append(descriptor)
            fail()
        fsync(descriptor)

    monkeypatch.setattr(torch, "save", save_or_fail)
    monkeypatch.setattr(os, "fsync", flush_or_fail)
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 1024")
    assert run.summary["status"] == "finished" and len(saved) == 3
    assert [last_step(run.path, name) for name in BOTH] == [256, 128]


def test_the_main_programs_share_no_checkpoints(stopped, refused):
    assert "is a run of ppo_continuous_lrrl" in refused(sac.main, ["--resume", stopped])

"""What lrrl_utils/journal.py promises: a replay memory's rows come back as they were written, or not at all."""

import copy
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch

import dqn_atari_lrrl as dqn
import sac_mujoco_lrrl as sac
from lrrl_utils.journal import BLOCK, Journal
from lrrl_utils.run import Run
from tests.conftest import contents, only_folder, resume
from tests.toy_envs import TinyGame

SAC = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda --total-timesteps 300"


def fill(journal, stop, start=0):
    for i in range(start, stop):
        for ring in range(journal.rings):
            journal.write(ring, i, np.int64(10 * i + ring))


def read(journal, ring, count):
    """{index: row} in the order of `Journal.read`."""
    return {int(index) + k: int(row) for index, rows in journal.read(ring, count) for k, row in enumerate(rows)}


@pytest.mark.parametrize("total", [0, 1, BLOCK, 2600, 6001, 20_000])
def test_it_keeps_the_rows_of_two_checkpoints_and_reads_them_in_order(total, tmp_path):
    journal = Journal(tmp_path / "replay.bin", "i8", 2, capacity=2500, spare=1700)
    fill(journal, total)
    then = copy.deepcopy(journal.state_dict())
    for count in (total + 1700, total):  # now, and a spare before
        if count > total:
            fill(journal, count, total)
        else:
            journal.load_state_dict(then)
        for ring in (0, 1):
            rows = read(journal, ring, count)
            assert [*rows.items()] == [(i, 10 * i + ring) for i in range(max(count - 2500, 0), count)]


def test_it_takes_as_much_room_as_the_memory_and_little_more(tmp_path):
    journal = Journal(tmp_path / "replay.bin", "i8", 2, capacity=2500, spare=100)
    fill(journal, 20_000)
    assert (tmp_path / "replay.bin").stat().st_size <= 8 * 2 * (2500 + 100 + BLOCK)
    assert all(len(checksums) <= 6 for checksums in journal.state_dict()["checksums"])


@pytest.mark.parametrize("byte", [0, 8 * 1500, 8 * 2400 - 1])
def test_a_flipped_bit_is_found_in_every_block(byte, tmp_path):
    journal = Journal(tmp_path / "replay.bin", "i8", 1, capacity=2500, spare=100)
    fill(journal, 2400)
    content = bytearray((tmp_path / "replay.bin").read_bytes())
    content[byte] ^= 1
    (tmp_path / "replay.bin").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        read(journal, 0, 2400)


@pytest.mark.parametrize("keep", [True, False])
def test_it_is_kept_only_if_the_run_may_go_on(keep, tmp_path):
    journal = Journal(tmp_path / "replay.bin", "i8", 1, capacity=10, spare=10)
    journal.close(keep)
    assert (tmp_path / "replay.bin").exists() == keep


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(path.with_name("elsewhere"))])
def test_it_writes_through_no_link_and_waits_for_no_pipe(make, tmp_path):
    make(tmp_path / "replay.bin")
    with pytest.raises(OSError):
        Journal(tmp_path / "replay.bin", "i8", 1, capacity=10, spare=10)
    assert not (tmp_path / "elsewhere").exists()


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_journal_that_is_not_the_runs_own_is_refused(stop, refused, tmp_path):
    whole, other = (stop(sac.main, f"{SAC} --checkpoint-interval 50 --seed {seed}", 4) for seed in (1, 2))
    content, elsewhere = (whole / "replay.bin").read_bytes(), tmp_path / "elsewhere"
    assert len(content) > 200 * 4 * 9  # 200 rows, in bytes
    elsewhere.write_bytes(content)
    damages = {
        "a flipped byte": lambda path: path.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]),
        "zeros": lambda path: path.write_bytes(bytes(len(content))),
        "of another run": lambda path: shutil.copy(other / "replay.bin", path),
        "lost rows": lambda path: path.write_bytes(content[:1000]),
        "a link": lambda path: path.symlink_to(elsewhere),
        "a pipe": os.mkfifo,
    }
    for damage, make in damages.items():
        folder = shutil.copytree(whole, tmp_path / damage)
        if damage in ("a link", "a pipe"):
            (folder / "replay.bin").unlink()
        make(folder / "replay.bin")
        before = contents(folder)
        assert "replay.bin" in refused(sac.main, ["--resume", folder]), damage
        after = contents(folder)
        assert after.pop("replay.bin", b"").startswith(before.pop("replay.bin", b"")) and after == before, damage
        assert elsewhere.read_bytes() == content
    assert resume(sac.main, whole).summary["status"] == "finished"  # what was copied was whole


def test_rows_written_after_the_checkpoint_do_not_count(stop):
    folder = stop(sac.main, f"{SAC} --checkpoint-interval 50", 4)
    os.truncate(folder / "replay.bin", (folder / "replay.bin").stat().st_size + 9 * 4 * 20)
    assert resume(sac.main, folder).summary["status"] == "finished"


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_replay_of_games_comes_back_slot_by_slot(num_envs, train, monkeypatch, tmp_path):
    """Its games end in truncations, so that its rings, which wrap, hold final observations too."""
    monkeypatch.setattr("lrrl_utils.atari.make_envs", lambda args, num_envs: TinyGame(num_envs, truncates=True))
    replays = []
    init, end_step = dqn.ReplayBuffer.__init__, Run.end_step

    def end_at_240(self, global_step):
        if global_step == 240:
            self.signal = signal.SIGTERM
        end_step(self, global_step)

    monkeypatch.setattr(dqn.ReplayBuffer, "__init__", lambda self, *rest: replays.append(self) or init(self, *rest))
    monkeypatch.setattr(Run, "end_step", end_at_240)
    options = "--buffer-size 90 --learning-starts 40 --batch-size 4 --no-cuda --total-timesteps 600"
    with pytest.raises(SystemExit):
        train(dqn.main, f"{options} --checkpoint-interval 1000 --num-envs {num_envs}")
    monkeypatch.setattr(Run, "__enter__", lambda self: 1 / 0)  # by then, all is restored
    with pytest.raises(ZeroDivisionError):
        resume(dqn.main, only_folder(tmp_path / "runs1").path)
    before, after = replays
    assert (before.count > before.capacity).all() and before.slots["final"].any()
    assert torch.equal(before.frames, after.frames)
    assert np.array_equal(before.slots, after.slots) and np.array_equal(before.count, after.count)


def test_a_row_that_meets_a_full_disk_ends_the_checkpoints_and_not_the_training(train, monkeypatch, capsys):
    pwrite, written = os.pwrite, []

    def short(descriptor, data, place):
        written.append(place)
        return pwrite(descriptor, data[:3], place) if len(written) == 120 else pwrite(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", short)
    run = train(sac.main, f"{SAC} --checkpoint-interval 50")
    assert run.summary["status"] == "finished" and len(written) == 120
    error = capsys.readouterr().err
    assert len(re.findall("checkpoint.pt cannot be written: No space left on device", error)) == 1
    assert (run.path / "checkpoint.prev.pt").exists() and not (run.path / "replay.bin").exists()

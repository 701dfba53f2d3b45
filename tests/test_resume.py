"""What all training scripts promise of checkpoints: runs that go on to the bit, whatever has ended them."""

import csv
import json
import os
import random
import shutil
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
import tracking
from checkpoints import Journal
from tests.conftest import RunFolder, only_folder

KILLS = int(os.environ.get("KILLS", 5))  # of each script; `make soak` asks for more
ATARI = "--preset cleanrl --num-envs 2 --batch-size 4 --learning-starts 200 --buffer-size 400 --noop-max 5"
ATARI += " --exploration-steps 500 --target-network-frequency 100 --bandit-interval 100 --checkpoint-interval 100"
FEW = "--num-tau-samples 4 --num-tau-prime-samples 4 --num-quantile-samples 4"
SCRIPTS = {  # timesteps and options of a run that takes some seconds
    "ppo_continuous_lrrl.py": (
        25_000,
        "--env-id Hopper-v5 --num-envs 2 --num-steps 128 --num-minibatches 4 --update-epochs 2"
        " --checkpoint-interval 600 --learning-rates 1e-4 1e-3 1e30",
    ),
    "sac_mujoco_lrrl.py": (
        1200,
        "--env-id Hopper-v5 --num-envs 2 --batch-size 32 --learning-starts 200 --buffer-size 400 --bandit-interval 100"
        " --bandit-scope separate --checkpoint-interval 90",
    ),
    "dqn_atari_lrrl.py": (1300, ATARI),
    "iqn_atari_lrrl.py": (1000, f"{ATARI} {FEW}"),
}


def rows(path):
    with open(path) as file:
        return list(csv.reader(file))[1:]


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def last_checkpoint(parent):
    """When the only run below `parent` has saved its last checkpoint, None before it has."""
    times = [path.stat().st_mtime_ns for path in parent.glob("*/checkpoint.pt")]
    return times[0] if times else None


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_killed_again_and_again_is_equal_to_one_that_never_was(script, start, tmp_path):
    timesteps, options = SCRIPTS[script]
    command = f"{script} {options} --total-timesteps {timesteps * max(KILLS // 5, 1)} --save-model"
    reference = start(command)
    assert reference.wait() == 0, reference.communicate()
    whole = only_folder(tmp_path / "runs")
    shutil.move(whole.path, tmp_path / "whole")
    generator = random.Random(script + str(KILLS))

    process, saved_at = start(command), None
    kills = 0
    while kills < KILLS:
        wait_for(lambda before=saved_at: last_checkpoint(tmp_path / "runs") != before, process)
        time.sleep(generator.random() * 0.2)
        if process.poll() is not None:
            break  # it has come to its end
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        saved_at = last_checkpoint(tmp_path / "runs")
        folder = only_folder(tmp_path / "runs").path
        process = start(f"{script} --resume {folder}")
    output, error = process.communicate()
    assert process.returncode == 0, error
    assert kills == KILLS

    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    ended, before = (json.loads((path / "summary.json").read_text()) for path in (folder, tmp_path / "whole"))
    for name in ("status", "final_return", "auc", "pulls", "rollbacks", "global_step"):
        assert ended[name] == before[name], name
    assert not (folder / "replay.bin").exists() and not (folder / "checkpoint.new.pt").exists()
    events = EventAccumulator(str(folder))
    events.Reload()
    steps = [event.step for event in events.Scalars("charts/episodic_return")]
    assert steps == [int(row[0]) for row in rows(folder / "episodes.csv")]


NO = "--no-cuda --checkpoint-interval 50"
SMALL = "--num-steps 64 --num-minibatches 4 --update-epochs 1 --bandit-interval 64 --checkpoint-interval 128 --no-cuda"


def stop_after(monkeypatch, checkpoints):
    """From now on, a run in this process ends after so many checkpoints, as if terminated just before the next one."""
    save, count = tracking.Run.save_checkpoint, 0

    def save_or_stop(self, checkpoint):
        nonlocal count
        count += 1
        if count > checkpoints:
            raise SystemExit(143)
        save(self, checkpoint)

    monkeypatch.setattr(tracking.Run, "save_checkpoint", save_or_stop)


@pytest.fixture
def stopped(train, monkeypatch, tmp_path):
    """A run of PPO that was stopped after its third checkpoint, at 384 of 1,024 timesteps; its folder."""
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1024 --seed 7")
    return only_folder(tmp_path / "runs1").path


def resume(main, folder, options=""):
    main([*f"--resume {folder} {options}".split()])
    return RunFolder(folder)


def test_sigterm_writes_one_more_checkpoint_and_the_run_goes_on_from_there(start, tmp_path):
    command = f"ppo_continuous_lrrl.py --env-id Pendulum-v1 {SMALL} --total-timesteps 5120 --save-model"
    command = command.replace("--checkpoint-interval 128", "--checkpoint-interval 1000000")
    assert start(command).wait() == 0
    shutil.move(only_folder(tmp_path / "runs").path, tmp_path / "whole")
    process = start(command)
    wait_for(lambda: [*(tmp_path / "runs").glob("*/rounds.csv")], process)
    (folder,) = (tmp_path / "runs").iterdir()
    wait_for(lambda: len(rows(folder / "rounds.csv")) > 3, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    at = torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["global_step"]
    assert at % 64 == 0 and at // 64 >= len(rows(folder / "rounds.csv"))
    assert start(f"ppo_continuous_lrrl.py --resume {folder}").wait() == 0
    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_run_may_get_more_timesteps_and_another_log(stopped):
    run = resume(ppo.main, stopped, "--total-timesteps 1280 --eval-episodes 1 --save-model")
    assert run.summary["global_step"] == 1280 and len(run.summary["eval_returns"]) == 1
    assert run.config["seed"] == 7 and (stopped / "model.pt").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--seed 8", ["--seed 8", "has 7"]),
        ("--num-steps 128", ["--num-steps 128", "has 64"]),
        ("--total-timesteps 512", ["--total-timesteps 512", "has 1024", "more"]),
        ("--learning-rates 1e-3", ["--learning-rates"]),
        ("--checkpoint-interval 64", ["--checkpoint-interval 64", "has 128"]),
        ("--no-norm-adv", ["--norm-adv False", "has True"]),
    ],
)
def test_other_options_may_not_change(options, words, stopped, capsys):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        resume(ppo.main, stopped, options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words), error
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_schedule_that_ends_with_the_run_may_not_get_more_timesteps(train, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(SystemExit):
            train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1024 --lr-control linear")
    folder = only_folder(tmp_path / "runs1").path
    with pytest.raises(SystemExit) as end:
        resume(ppo.main, folder, "--total-timesteps 2048")
    assert end.value.code == 2 and "--total-timesteps 2048" in capsys.readouterr().err
    whole = train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1024 --lr-control linear")
    assert resume(ppo.main, folder).bytes("rounds.csv") == whole.bytes("rounds.csv")


@pytest.mark.parametrize("damage", ["torn", "damaged", "foreign", "of another run", "missing"])
def test_a_checkpoint_that_cannot_be_used_is_named_and_the_one_before_is_used(damage, stopped, train, capsys):
    whole = train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1024 --seed 7")
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
        torch.save({"run": {"identity": "Hopper-v5, another script, seed 1"}}, path)
    capsys.readouterr()
    run = resume(ppo.main, stopped)
    error = capsys.readouterr().err
    assert "checkpoint.pt cannot be used" in error and "going on from checkpoint.prev.pt" in error
    assert run.bytes("rounds.csv") == whole.bytes("rounds.csv")
    assert run.bytes("episodes.csv") == whole.bytes("episodes.csv")
    assert (stopped / "checkpoint.bad.pt").exists() == (damage != "missing")
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        assert torch.load(stopped / name, weights_only=True)["run"]["global_step"] in (896, 1024)


def test_a_table_that_has_lost_rows_is_named_and_not_padded(stopped, capsys):
    (stopped / "rounds.csv").write_text("round\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        resume(ppo.main, stopped)
    assert end.value.code == 2 and "rounds.csv has lost rows" in capsys.readouterr().err


def test_without_a_usable_checkpoint_there_is_one_line_and_code_2(stopped, capsys, tmp_path):
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (stopped / name).write_bytes(b"torn")
    capsys.readouterr()
    for folder, word in ((stopped, "checkpoint.prev.pt"), (tmp_path / "no such folder", "config.json")):
        with pytest.raises(SystemExit) as end:
            resume(ppo.main, str(folder).replace(" ", "_"))
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and "--resume" in error and word in error


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


@pytest.mark.parametrize("main", [ppo.main, sac.main])
def test_a_finished_run_is_left_alone(main, train, capsys):
    options = SMALL if main is ppo.main else f"--batch-size 8 --learning-starts 20 {NO}"
    run = train(main, f"--env-id Pendulum-v1 {options} --total-timesteps 320")
    assert (run.path / "checkpoint.pt").exists() and not (run.path / "replay.bin").exists()
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    for more, words in (("", ["has finished", "--total-timesteps"]), ("--total-timesteps 640", ["replay.bin"])):
        if main is sac.main or not more:
            with pytest.raises(SystemExit) as end:
                resume(main, run.path, more)
            error = capsys.readouterr().err
            assert end.value.code == 2 and all(word in error for word in words), error
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_run_without_a_checkpoint_is_told_so(train, capsys):
    small = SMALL.replace("--checkpoint-interval 128", "")
    run = train(ppo.main, f"--env-id Pendulum-v1 {small} --total-timesteps 128")
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        resume(ppo.main, run.path, "--total-timesteps 256")
    assert end.value.code == 2 and "holds no checkpoint" in capsys.readouterr().err


def test_two_games_go_on_when_the_run_gets_more_timesteps(start, tmp_path):
    command = f"dqn_atari_lrrl.py {ATARI.replace('--buffer-size 400', '')} --save-model"
    process = start(f"{command} --total-timesteps 600")
    wait_for(lambda: last_checkpoint(tmp_path / "runs"), process)
    process.kill()
    process.wait()
    folder = only_folder(tmp_path / "runs").path
    assert start(f"dqn_atari_lrrl.py --resume {folder} --total-timesteps 900").wait() == 0
    shutil.move(folder, tmp_path / "resumed")
    assert start(f"{command} --total-timesteps 900").wait() == 0
    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        whole = only_folder(tmp_path / "runs").path / name
        assert (tmp_path / "resumed" / name).read_bytes() == whole.read_bytes(), name


@pytest.fixture
def stopped_sac(train, monkeypatch, tmp_path):
    """A run of SAC in eight environments that was stopped at its 12th checkpoint, when its small replay has wrapped."""
    with monkeypatch.context() as patch:
        stop_after(patch, 12)
        with pytest.raises(SystemExit):
            train(sac.main, WRAPPED)
    return only_folder(tmp_path / "runs1").path


WRAPPED = (
    "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --num-envs 8 --buffer-size 40 --save-model --no-cuda"
)
WRAPPED += " --total-timesteps 160 --checkpoint-interval 1"


def test_the_replay_of_the_checkpoint_before_is_whole_even_if_it_is_saved_every_step(stopped_sac, train, capsys):
    (stopped_sac / "checkpoint.pt").write_bytes(b"torn")
    run, whole = resume(sac.main, stopped_sac), train(sac.main, WRAPPED)
    assert "going on from checkpoint.prev.pt" in capsys.readouterr().err
    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        assert run.bytes(name) == whole.bytes(name), name


def test_a_replay_that_has_lost_its_end_is_named_and_not_padded(stopped_sac, capsys):
    os.truncate(stopped_sac / "replay.bin", 1000)
    with pytest.raises(SystemExit) as end:
        resume(sac.main, stopped_sac)
    assert end.value.code == 2 and "replay.bin has lost rows" in capsys.readouterr().err


def test_a_run_goes_on_with_as_many_threads_as_it_had(stopped_sac):
    assert torch.get_num_threads() == 1
    try:
        torch.set_num_threads(2)
        resume(sac.main, stopped_sac)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


def test_a_run_that_is_still_going_on_cannot_be_resumed(start, tmp_path):
    process = start(f"ppo_continuous_lrrl.py --env-id Pendulum-v1 {SMALL} --total-timesteps 1280000")
    wait_for(lambda: last_checkpoint(tmp_path / "runs"), process)
    second = start(f"ppo_continuous_lrrl.py --resume {only_folder(tmp_path / 'runs').path}")
    output, error = second.communicate()
    assert second.returncode == 2 and error.count("\n") == 1 and "a process is still writing there" in error
    assert process.poll() is None


def test_checkpoints_need_no_links(train, monkeypatch, tmp_path):
    def fail(self, target):
        raise PermissionError("no links here")

    monkeypatch.setattr(tracking.Path, "hardlink_to", fail)
    run = train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 512")
    for name, step in (("checkpoint.pt", 512), ("checkpoint.prev.pt", 384)):
        assert torch.load(run.path / name, weights_only=True)["run"]["global_step"] == step


def test_sigterm_in_the_evaluation_ends_the_run_at_once(start, tmp_path):
    command = f"ppo_continuous_lrrl.py --env-id Pendulum-v1 {SMALL} --total-timesteps 256 --save-model"
    process = start(f"{command} --eval-episodes 1000000")
    wait_for(lambda: [*tmp_path.glob("runs/*/model.pt")], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert only_folder(tmp_path / "runs").summary["status"] == "interrupted"


def test_a_disk_that_is_full_from_the_start_does_not_end_the_training(start, tmp_path):
    process = start(f"ppo_continuous_lrrl.py --env-id Pendulum-v1 {SMALL} --total-timesteps 256", limit=1)
    output, error = process.communicate()
    assert process.returncode == 0 and "finished" in output and "Traceback" not in error, error
    assert all(
        f"{name} cannot be written" in error for name in ("config.json", "checkpoint.pt", "TensorBoard's events")
    )


def test_the_journal_keeps_the_rows_of_two_checkpoints_and_reads_them_in_order(tmp_path):
    journal = Journal(tmp_path / "replay.bin", "i8", rings=2, capacity=2500, spare=100)
    for i in range(6000):
        for ring in (0, 1):
            journal.write(ring, i, np.int64(10 * i + ring))
    for ring in (0, 1):
        for count in (6000, 5900):  # now, and a spare before
            blocks = [*journal.read(ring, count)]
            indices = [index + k for index, rows_read in blocks for k in range(len(rows_read))]
            assert indices == [*range(count - 2500, count)]
            assert [int(x) for _, rows_read in blocks for x in rows_read] == [10 * i + ring for i in indices]
    assert [*journal.read(0, 0)] == []


def test_a_full_disk_ends_the_checkpoints_and_not_the_training(start, tmp_path):
    command = f"sac_mujoco_lrrl.py --env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --total-timesteps 300 {NO}"
    process = start(command, limit=200_000)  # bytes of a file
    output, error = process.communicate()
    run = only_folder(tmp_path / "runs")
    assert process.returncode == 0 and run.summary["status"] == "finished", error
    assert error.count("checkpoint.pt cannot be written") == 1
    assert "is not complete: checkpoint.pt" in error and "Traceback" not in error
    assert not (run.path / "checkpoint.pt").exists() and not (run.path / "checkpoint.new.pt").exists()


def test_a_run_folder_that_goes_away_does_not_end_the_training(start, tmp_path):
    process = start(f"ppo_continuous_lrrl.py --env-id Pendulum-v1 {SMALL} --total-timesteps 12800")
    wait_for(lambda: [*(tmp_path / "runs").glob("*/checkpoint.pt")], process)
    shutil.rmtree(tmp_path / "runs")
    output, error = process.communicate()
    assert process.returncode == 0 and "finished" in output, error
    assert "checkpoint.pt cannot be written" in error and "is not complete" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("script", "where"),
    [("ppo_continuous_lrrl.py", {}), ("ppo_continuous_lrrl.py", {"IN_RESET": "1"}), ("sac_mujoco_lrrl.py", {})],
)
def test_an_environment_that_raises_leaves_whole_files_and_a_checkpoint_from_just_before(
    script, where, start, tmp_path
):
    small = {"ppo": SMALL, "sac": f"--batch-size 8 --learning-starts 20 {NO}"}[script[:3]]
    command = f"{script} --env-id tests.toy_envs:BreaksOnce-v0 {small} --total-timesteps 1024 --save-model --num-envs 2"
    command = command.replace("--checkpoint-interval 128", "--checkpoint-interval 1000")
    process = start(command, BROKEN=str(tmp_path / "broken"), **where)
    output, error = process.communicate()
    run = only_folder(tmp_path / "runs")
    assert process.returncode == 1 and run.summary["status"] == "failed" and "the simulator broke" in error
    at = torch.load(run.path / "checkpoint.pt", weights_only=True)["run"]
    assert at["global_step"] == {"ppo": 256, "sac": 298}[script[:3]]
    assert (run.path / "curves.png").exists()

    assert start(f"{script} --resume {run.path}", BROKEN=str(tmp_path / "broken"), **where).wait() == 0
    shutil.move(run.path, tmp_path / "resumed")
    assert (
        start(command, BROKEN=str(tmp_path / "broken"), **where).wait() == 0
    )  # there since it broke: it does so no more
    whole = only_folder(tmp_path / "runs").path
    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        assert (tmp_path / "resumed" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "options", ["--optimizer adamrel", "--optimizer rmsprop", "--lr-control cosine", "--lr-control cyclic"]
)
def test_other_optimizers_and_schedules_go_on_to_the_bit(options, train, monkeypatch, tmp_path):
    command = f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1024 --save-model {options}"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            train(ppo.main, command)
    resumed = resume(ppo.main, only_folder(tmp_path / "runs1").path)
    whole = train(ppo.main, command)
    for name in ("episodes.csv", "rounds.csv", "model.pt"):
        assert resumed.bytes(name) == whole.bytes(name)


def test_after_ctrl_c_no_process_and_no_thread_is_left(start, tmp_path):
    process = start(
        f"ppo_continuous_lrrl.py --env-id Pendulum-v1 {SMALL} --total-timesteps 1280000 --track", WANDB_MODE="offline"
    )
    wait_for(lambda: [*(tmp_path / "runs").glob("*/checkpoint.pt")], process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_wandb_goes_on_under_the_same_id(train, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        with pytest.raises(SystemExit):
            train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1024 --track")
    run = resume(ppo.main, only_folder(tmp_path / "runs1").path)
    ids = {path.name.rsplit("-", 1)[1] for path in (run.path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1 and len([*(run.path / "wandb").glob("offline-run-*")]) == 2

"""What all training scripts promise of runs that go on: they equal runs that never ended, to the bit."""

import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import dqn_atari_lrrl as dqn
import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from lrrl_utils.run import Run
from tests.conftest import (
    PENDULUM,
    RunFolder,
    assert_equal_to_the_bit,
    last_step,
    only_folder,
    resume,
    rows,
    scalars,
    wait_for,
)

KILLS = int(os.environ.get("KILLS", 1))  # of each script; `make soak` asks for more
ATARI = "--preset cleanrl --padding valid --batch-size 4 --learning-starts 80 --buffer-size 400 --noop-max 5"
ATARI += " --exploration-steps 500 --target-network-frequency 100 --bandit-interval 100 --checkpoint-interval 100"
MINATAR = "--preset minatar --batch-size 4 --learning-starts 80 --buffer-size 400 --exploration-steps 500"
MINATAR += " --target-network-frequency 100 --bandit-interval 100 --checkpoint-interval 100"
FEW = "--num-tau-samples 4 --num-tau-prime-samples 4 --num-quantile-samples 4"
SCRIPTS = {  # timesteps that are enough for a kill, options
    "ppo_continuous_lrrl.py": (
        4000,
        "--env-id Hopper-v5 --num-steps 128 --num-minibatches 4 --update-epochs 2 --checkpoint-interval 600"
        " --learning-rates 1e-4 1e-3 1e30",
    ),
    "sac_mujoco_lrrl.py": (
        300,
        "--env-id Hopper-v5 --batch-size 32 --learning-starts 60 --buffer-size 400 --bandit-interval 100"
        " --bandit-scope separate --checkpoint-interval 90",
    ),
    "dqn_atari_lrrl.py": (200, ATARI),
    "iqn_atari_lrrl.py": (200, f"{ATARI} {FEW}"),
    "dqn_minatar_lrrl.py": (400, MINATAR),
}


def kills_of(script):
    """(script, options, how many kills): half of KILLS with two environments; of PPO, an eighth with --compile."""
    two, one = KILLS - KILLS // 2, KILLS // 2
    compiled = KILLS // 8 if script == "ppo_continuous_lrrl.py" else 0
    cases = {"--num-envs 2": two, "--num-envs 1": one - compiled, "--num-envs 1 --compile": compiled}
    return [(script, options, kills) for options, kills in cases.items() if kills]


def scripts_to_kill():
    """That of the user, if there is one, or ours; IQN, whose loop is DQN's, only where many kills are asked for."""
    if "SCRIPT" in os.environ:
        return [os.environ["SCRIPT"]]
    return [script for script in SCRIPTS if KILLS > 1 or script != "iqn_atari_lrrl.py"]


def options_for(script):
    """Timesteps for a kill and options: those of the script in SCRIPTS that has most options in common with this one.

    What this one has no option for is left out, or no such choice.
    """
    if script in SCRIPTS:
        return SCRIPTS[script]
    source = Path(script).read_text()

    def is_known(name, *values):
        choices = [value for value in values if value.isalpha()]
        return f"    {name[2:].replace('-', '_')}:" in source and all(f'"{choice}"' in source for choice in choices)

    def in_common(options):
        words = re.findall(r"--[\w-]+[^-]*(?:-(?!-)[^-]*)*", options)
        return [word.strip() for word in words if is_known(*word.split())]

    timesteps, options = max(SCRIPTS.values(), key=lambda entry: len(in_common(entry[1])))
    return timesteps, " ".join(in_common(options))


def last_save(parent):
    """When the only run below `parent` has saved its last checkpoint, None before it has."""
    times = [path.stat().st_mtime_ns for path in parent.glob("*/checkpoint.pt")]
    return times[0] if times else None


@pytest.mark.parametrize(
    ("script", "options", "kills"),
    [case for script in scripts_to_kill() for case in kills_of(script)],
)
def test_a_run_that_is_killed_again_and_again_is_equal_to_one_that_never_was(script, options, kills, start, tmp_path):
    """`SCRIPT=path/to/my_ppo.py make soak` tries a script of your own, a changed copy of one of ours.

    It gets the options that the tests give ours, as far as it has them: it must know --checkpoint-interval, --resume,
    --save-model, --num-envs, and how to learn Hopper-v5 (or Breakout, if it is more like DQN).
    """
    script = str(Path(script).resolve()) if "SCRIPT" in os.environ else script
    timesteps, common = options_for(script)
    command = f"{script} {common} {options} --total-timesteps {timesteps * max(kills, 2)} --save-model"
    reference = start(command)
    assert reference.wait() == 0, reference.communicate()
    shutil.move(only_folder(tmp_path / "runs").path, tmp_path / "whole")
    generator = random.Random(script + options + str(KILLS))

    process, saved_at = start(command), None
    for _ in range(kills):
        wait_for(lambda before=saved_at: last_save(tmp_path / "runs") != before, process)
        time.sleep(generator.random() * 0.2)
        assert process.poll() is None, "it has come to its end before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        saved_at = last_save(tmp_path / "runs")
        folder = only_folder(tmp_path / "runs").path
        process = start(f"{script} --resume {folder}")
    output, error = process.communicate()
    assert process.returncode == 0, error

    assert_equal_to_the_bit(folder, tmp_path / "whole")
    assert not (folder / "replay.bin").exists() and not [*folder.glob(".*")]
    steps = [step for step, _ in scalars(folder, "charts/episodic_return")]
    assert steps == [int(row[0]) for row in rows(folder / "episodes.csv")]


def test_half_of_the_kills_have_two_environments():
    for script in SCRIPTS:
        cases = kills_of(script)
        assert sum(kills for *_, kills in cases) == KILLS
        assert sum(kills for _, options, kills in cases if "--num-envs 2" in options) == KILLS - KILLS // 2


def test_a_script_of_ones_own_gets_the_options_of_the_one_that_it_is_a_copy_of(tmp_path):
    copy = tmp_path / "my.py"
    for name, (timesteps, options) in SCRIPTS.items():
        copy.write_text(Path(name).read_text())
        assert options_for(copy) == (timesteps, options)
    copy.write_text(Path("ppo_continuous_lrrl.py").read_text().replace("    update_epochs:", "    epochs:"))
    assert options_for(copy)[1] == SCRIPTS["ppo_continuous_lrrl.py"][1].replace(" --update-epochs 2", "")


# --- what may change and what may not ---------------------------------------------------------------------------------


def test_a_run_may_get_more_timesteps_and_another_log(stopped):
    run = resume(ppo.main, stopped, "--total-timesteps 1280 --eval-episodes 1 --save-model")
    assert run.summary["global_step"] == 1280 and len(run.summary["eval_returns"]) == 1
    assert run.config["seed"] == 7 and (stopped / "model.pt").exists()


def test_a_run_that_is_to_get_more_timesteps_is_running_before_it_has_them(stopped, monkeypatch):
    """Else a kill between the two would leave a run that has finished, with timesteps that it does not have."""
    resume(ppo.main, stopped)

    def is_killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "write_summary", is_killed)
    with pytest.raises(KeyboardInterrupt):
        resume(ppo.main, stopped, "--total-timesteps 1280")
    assert RunFolder(stopped).config["total_timesteps"] == 1024


def test_what_a_run_was_resumed_with_is_in_its_config(stopped, monkeypatch, capsys):
    begun = resume(ppo.main, stopped).config
    assert [entry["global_step"] for entry in begun["resumed"]] == [384]
    monkeypatch.setattr("lrrl_utils.origin.git_commit", lambda folder: "another commit")
    config = resume(ppo.main, stopped, "--total-timesteps 1280").config
    assert f"begun with git_commit {begun['git_commit']}, this is another commit" in capsys.readouterr().err
    assert config["git_commit"] == "another commit" and config["resumed"][1]["git_commit"] == begun["git_commit"]
    assert [entry["global_step"] for entry in config["resumed"]] == [384, 1024]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--seed 8", ["--seed 8", "has 7"]),
        ("--num-steps 128", ["--num-steps 128", "has 64"]),
        ("--total-timesteps 512", ["--total-timesteps 512", "has 1024", "more"]),
        ("--learning-rates 1e-3", ["--learning-rates"]),
        ("--checkpoint-interval 64", ["--checkpoint-interval 64", "has 128"]),
        ("--no-norm-adv", ["--norm-adv False", "has True", "may change is --total-timesteps, --track, "]),
        ("--run-dir elsewhere", ["--run-dir elsewhere", "stays where it is"]),
    ],
)
def test_other_options_may_not_change(options, words, stopped, refused):
    before = {path.name: path.read_bytes() for path in stopped.iterdir()}
    error = refused(ppo.main, ["--resume", stopped, *options.split()])
    assert all(word in error for word in words), error
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_schedule_that_ends_with_the_run_may_not_get_more_timesteps(stop, train, refused):
    options = f"{PENDULUM} --total-timesteps 1024 --lr-control linear --save-model"
    folder = stop(ppo.main, options, 2)
    assert "--total-timesteps 2048" in refused(ppo.main, ["--resume", folder, "--total-timesteps", 2048])
    assert_equal_to_the_bit(resume(ppo.main, folder).path, train(ppo.main, options).path)


@pytest.mark.parametrize("main", [ppo.main, sac.main])
def test_a_finished_run_is_left_alone(main, train, refused):
    small = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda --checkpoint-interval 50"
    run = train(main, f"{PENDULUM if main is ppo.main else small} --total-timesteps 320")
    assert (run.path / "checkpoint.pt").exists() and not (run.path / "replay.bin").exists()
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    error = refused(main, ["--resume", run.path])
    assert "has finished" in error and "--total-timesteps" in error
    if main is sac.main:
        assert "replay.bin" in refused(main, ["--resume", run.path, "--total-timesteps", 640])
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


def test_a_run_without_a_checkpoint_is_told_so(train, refused):
    run = train(ppo.main, f"{PENDULUM} --total-timesteps 128 --checkpoint-interval 0")
    assert "holds no checkpoint" in refused(ppo.main, ["--resume", run.path, "--total-timesteps", 256])


def test_a_run_whose_exploration_ends_with_it_cannot_get_more_timesteps(stop, refused):
    folder = stop(dqn.main, f"{ATARI.replace('--exploration-steps 500', '--exploration-fraction 0.5')} --no-cuda", 1)
    assert "which is where a schedule ends" in refused(dqn.main, ["--resume", folder, "--total-timesteps", 60_000_000])


# --- to the bit -------------------------------------------------------------------------------------------------------


def test_a_finished_run_that_has_kept_its_replay_goes_on_to_the_bit(train):
    options = (
        "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda --checkpoint-interval 100 --save-model"
    )
    finished = train(sac.main, f"{options} --total-timesteps 300 --keep-replay")
    resumed = resume(sac.main, finished.path, "--total-timesteps 500 --no-keep-replay")
    assert_equal_to_the_bit(resumed.path, train(sac.main, f"{options} --total-timesteps 500").path)
    assert not (resumed.path / "replay.bin").exists()


def test_with_a_huge_interval_a_run_goes_on_to_the_bit(train, monkeypatch, tmp_path):
    """Such an interval means: a checkpoint only where the run is stopped."""
    options = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda --save-model"
    options += " --checkpoint-interval 1000000000000"
    end_step = Run.end_step

    def stop_at_150(self, global_step):
        if global_step == 150:
            signal.raise_signal(signal.SIGTERM)
        end_step(self, global_step)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Run, "end_step", stop_at_150)
        train(sac.main, f"{options} --total-timesteps 300")
    resumed = resume(sac.main, only_folder(tmp_path / "runs1").path, "--total-timesteps 400")
    assert_equal_to_the_bit(resumed.path, train(sac.main, f"{options} --total-timesteps 400").path)


def test_two_games_go_on_when_the_run_gets_more_timesteps(stop, train):
    options = f"{ATARI.replace('--buffer-size 400', '')} --num-envs 2 --save-model --no-cuda"
    resumed = resume(dqn.main, stop(dqn.main, f"{options} --total-timesteps 200", 1), "--total-timesteps 250")
    assert_equal_to_the_bit(resumed.path, train(dqn.main, f"{options} --total-timesteps 250").path)


@pytest.mark.parametrize(
    "options",
    [
        *("--optimizer adamrel --lr-control cosine", "--optimizer rmsprop --lr-control cyclic"),
        *("--optimizer sgd --lr-control kl", "--bandit lrrl", "--bandit exp3", "--bandit wucb"),
    ],
)
def test_other_optimizers_schedules_and_bandits_go_on_to_the_bit(options, stop, train):
    command = f"{PENDULUM} --total-timesteps 1024 --save-model {options}"
    assert_equal_to_the_bit(resume(ppo.main, stop(ppo.main, command, 3)).path, train(ppo.main, command).path)


@pytest.mark.parametrize("checkpoint", ["checkpoint.pt", "checkpoint.prev.pt"])
def test_a_replay_that_has_wrapped_is_whole_even_if_every_step_is_saved(checkpoint, stop, train, capsys):
    options = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --num-envs 8 --buffer-size 40 --save-model"
    options += " --no-cuda --total-timesteps 160 --checkpoint-interval 1"
    folder = stop(sac.main, options, 12)
    if checkpoint == "checkpoint.prev.pt":
        (folder / "checkpoint.pt").write_bytes(b"torn")
    run, whole = resume(sac.main, folder), train(sac.main, options)
    assert f"going on from {checkpoint}" in capsys.readouterr().err or checkpoint == "checkpoint.pt"
    assert_equal_to_the_bit(run.path, whole.path)


def test_a_run_goes_on_with_as_many_threads_as_it_had(stop):
    options = "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --no-cuda --total-timesteps 60"
    folder = stop(sac.main, f"{options} --checkpoint-interval 10", 3)
    assert torch.get_num_threads() == 1
    try:
        torch.set_num_threads(2)
        resume(sac.main, folder)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("script", "where"),
    [("ppo_continuous_lrrl.py", {}), ("ppo_continuous_lrrl.py", {"IN_RESET": "1"}), ("sac_mujoco_lrrl.py", {})],
)
def test_an_environment_that_raises_leaves_whole_files_and_a_checkpoint_from_just_before(
    script, where, start, tmp_path
):
    small = {"ppo": PENDULUM, "sac": "--batch-size 8 --learning-starts 20 --no-cuda"}[script[:3]]
    command = f"{script} {small} --env-id tests.toy_envs:BreaksOnce-v0 --total-timesteps 512 --save-model --num-envs 2"
    command += " --checkpoint-interval 1000"
    process = start(command, BROKEN=str(tmp_path / "broken"), **where)
    output, error = process.communicate()
    run = only_folder(tmp_path / "runs")
    assert process.returncode == 1 and run.summary["status"] == "failed" and "the simulator broke" in error
    assert last_step(run.path) == {"ppo": 256, "sac": 298}[script[:3]]
    assert (run.path / "curves.png").exists()

    trusted = "--env-id tests.toy_envs:BreaksOnce-v0"
    assert start(f"{script} --resume {run.path} {trusted}", BROKEN=str(tmp_path / "broken"), **where).wait() == 0
    shutil.move(run.path, tmp_path / "resumed")
    # the file is there since it broke: it does so no more
    assert start(command, BROKEN=str(tmp_path / "broken"), **where).wait() == 0
    assert_equal_to_the_bit(tmp_path / "resumed", only_folder(tmp_path / "runs").path)


def test_wandb_goes_on_under_the_same_id(stop, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    stopped = stop(ppo.main, f"{PENDULUM} --total-timesteps 1024 --track", 3)
    time.sleep(1)  # W&B names a folder after the second
    run = resume(ppo.main, stopped)
    ids = {path.name.rsplit("-", 1)[1] for path in (run.path / "wandb").glob("offline-run-*")}
    assert len(ids) == 1 and len([*(run.path / "wandb").glob("offline-run-*")]) == 2

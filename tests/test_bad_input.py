"""Wrong command lines over all programs: exit code 2, one line that names the option, no traceback, no run folder."""

import sys

import gymnasium as gym
import numpy as np
import pytest

import dqn_atari_lrrl as dqn
import iqn_atari_lrrl as iqn
import nonconvex_lrrl as nonconvex
import ppo_continuous_lrrl as ppo
import report
import sac_mujoco_lrrl as sac
from tests import toy_envs

AGENTS = [ppo, sac, dqn]  # IQN's loop is DQN's


class Unbounded(toy_envs.StepCounter):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


gym.register("Unbounded-v0", Unbounded)

BAD_INPUT = [  # programs, {command line: what the message says beside the option}
    (
        AGENTS,
        {
            "--lr-control cosine --learning-rates sparse3": "no meaning",
            "--lr-control constant --bandit uniform": "no meaning",
            "--lr-control linear --bandit-window 3": "no meaning",
            "--lr-control linear --bandit-step-size 3": "no meaning",
            "--lr-control exponential --bandit-decay 0.3": "no meaning",
            "--lr-control cosine --lr-decay-rate 1e-7": "no meaning",
            "--lr-decay-rate 1e-7": "no meaning",
            "--learning-rate 1e-3": "no meaning",
            "--lr-control cyclic --learning-rate 1e-3": "no meaning",
            "--lr-control linear --cyclic-base-lr 1e-5": "no meaning",
            "--lr-control linear --cyclic-max-lr 1e-5": "no meaning",
            "--cyclic-half-period 10": "no meaning",
            "--momentum 0.5": "no meaning",
            "--lr-control exponential --lr-decay-rate -1": "[0, inf)",
            "--lr-control cyclic --cyclic-half-period 0": "[1, inf)",
            "--lr-control cyclic --cyclic-base-lr 0.5 --cyclic-max-lr 0.1": "(0.5, ",
            "--lr-control constant --learning-rate 0": "[1e-37, 1e+37]",
            "--lr-control magic": "constant",
            "--optimizer sgd --momentum 1": "[0, 1)",
            "--optimizer adamw": "sgd",
            "--learning-rates lowest4": "lowest4",
            "--learning-rates": "at least one",
            "--learning-rates 1e-3 1e-3": "distinct",
            "--learning-rates 0": "[1e-37, 1e+37]",
            "--learning-rates 1e-3 -1e-3": "-0.001",
            "--learning-rates nan": "[1e-37, 1e+37]",
            "--learning-rates 1e39 1e-4": "[1e-37, 1e+37]",
            "--learning-rates 1e-3 fast": "fast",
            "--bandit magic": "uniform",
            "--bandit-interval 0": "must be in [",
            "--bandit lrrl --bandit-step-size 0": "(0, inf)",
            "--bandit lrrl --bandit-step-size inf": "(0, inf)",
            "--bandit exp3 --bandit-decay 1.5": "(0, 1]",
            "--bandit ducb --bandit-decay 0": "(0, 1]",
            "--bandit moss --bandit-decay 0.5": "needs --bandit lrrl or exp3 or ducb",
            "--bandit-step-size 0.5": "needs --bandit lrrl",
            "--bandit peak --bandit-step-size 0.5": "needs --bandit lrrl",
            "--bandit uniform --bandit-decay 0.5": "needs --bandit lrrl or exp3 or ducb",
            "--bandit-interval often": "auto",
            "--lr-range 1e-3 1e-4": "ascending",
            "--lr-range 1e-3": "--lr-range",
            "--lr-range 0 1e-3": "positive",
            "--lr-range 1e-3 inf": "positive",
            "--lr-range 1e-4 1e-3 --learning-rates 1e-3": "takes the place of",
            "--lr-control constant --lr-range 1e-4 1e-3": "no meaning",
            "--lr-control linear --no-rollback": "no meaning",
            "--checkpoint-interval -1": "[0, inf)",
            "--resume no/such/folder": "config.json",
            "--resume no/such,folder": "config.json",
            "--bandit-window 1": "[2, inf)",
            "--bandit-feedback applause": "return",
            "--num-envs 0": "[1, inf)",
            "--total-timesteps 0": "must be",
            "--total-timesteps 1.5": "INT",
            "--total-timesteps 1.5e0": "INT",
            "--total-timesteps 1e-3": "INT",
            "--total-timesteps 1e999": "INT",
            "--bandit-interval 2.5e0": "auto",
            "--num-envs 5e-1": "INT",
            "--lr 1e-3": "use --lr-control constant --learning-rate",
            "--lr=1e-3": "use --lr-control constant --learning-rate",
            "--anneal-lr": "use --lr-control linear",
            "--no-anneal-lr": "use --lr-control constant",
            "--q-lr 1e-3": "use --lr-control constant --learning-rate",
            "--learning-rates 1e-4,1e-3": "separated by spaces, like 1e-4 1e-3",
            "--learning-rates 1e-4, 1e-3": "separated by spaces",
            "--lr-range 1e-4,1e-3": "separated by spaces, like 1e-4 1e-3",
            "--seed -1": "[0, 4294967295]",
            "--seed one": "INT",
            "--eval-episodes -1": "[0, inf)",
            "--gamma 1.01": "[0, 1]",
            "--no-such-option 3": "no-such-option",
        },
    ),
    (
        [ppo],
        {
            "--env-id HalfCheeta-v5": "HalfCheetah",
            "--env-id HalfCheetah-v99": "HalfCheetah",
            "--env-id HalfCheetah-v3": "v3",
            "--env-id no.such.module:Foo-v0": "no",
            "--env-id CartPole-v1": "Box",
            "--total-timesteps -5": "2048",
            "--total-timesteps 2047": "2048",
            "--num-steps 0": "[1, inf)",
            "--num-minibatches 0": "[1, inf)",
            "--num-minibatches 7": "2048",
            "--num-minibatches 2048": "2048",
            "--update-epochs 0": "[1, inf)",
            "--gae-lambda nan": "[0, 1]",
            "--clip-coef 0": "(0, inf)",
            "--max-grad-norm -1": "(0, inf)",
            "--vf-coef inf": "[0, inf)",
            "--ent-coef -0.1": "[0, inf)",
            "--target-kl 0.01": "no meaning",
            "--lr-control kl --target-kl 0": "(0, inf)",
            "--lr-control kl --learning-rate 0.1": "[1e-06, 0.01]",
            "--lr-control kl --update-epochs 1 --num-minibatches 1": "two gradient steps",
        },
    ),
    (
        [sac],
        {
            "--env-id Hoper-v5": "Hopper",
            "--env-id CartPole-v1": "Box",
            "--env-id tests.test_bad_input:Unbounded-v0": "bounds",
            "--buffer-size 1000000000000000 --total-timesteps 1000000000000000": "allocate",
            "--keep-replay": "no meaning without --checkpoint-interval",
            "--batch-size 0": "[1, inf)",
            "--batch-size 5001": "[1, 5000]",
            "--buffer-size 255": "[256, inf)",
            "--learning-starts 1000 --total-timesteps 1000": "1000)",
            "--learning-starts 255": "[256, ",
            "--policy-lr 3e-4": "use --policy-lr-ratio (policy-lr / q-lr)",
            "--policy-lr-ratio 0": "(0, inf)",
            "--policy-lr-ratio -0.3": "(0, inf)",
            "--alpha-lr-ratio 0": "(0, inf)",
            "--alpha-lr-ratio nan": "(0, inf)",
            "--policy-frequency 0": "[1, inf)",
            "--target-network-frequency 0": "[1, inf)",
            "--tau 0": "(0, 1]",
            "--no-autotune --alpha 0": "(0, inf)",
            "--bandit-scope all": "separate",
            "--bandit-scope separate --learning-rate 1e-3": "no meaning",
            "--bandit-scope actor --policy-lr-ratio 0.1": "no meaning",
            "--lr-control constant --bandit-scope actor": "no meaning",
            "--alpha 0.1": "no meaning",
            "--no-autotune --alpha-lr-ratio 2": "no meaning",
        },
    ),
    (
        [dqn, iqn],
        {
            "--env-id BreakoutNoFrameskp-v4": "nearest: BreakoutNoFrameskip-v4",
            "--env-id ALE/Breakot-v5": "nearest: ALE/Breakout-v5",
            "--env-id Breakout-v4": "must be an Atari game",
            "--env-id CartPole-v1": "must be an Atari game",
            "--batch-size 0": "[1, inf)",
            "--buffer-size 31": "[32, inf)",
            "--learning-starts 1000 --total-timesteps 1000": "1000)",
            "--train-frequency 0": "[1, inf)",
            "--target-network-frequency 0": "[1, inf)",
            "--exploration-steps 0": "[1, inf)",
            "--exploration-fraction 0": "(0, 1]",
            "--exploration-fraction 0.1 --exploration-steps 5": "--exploration-steps",
            "--start-e 1.1": "[0, 1]",
            "--bandit-interval 3": "[4, inf)",
            "--bandit-interval 7 --train-frequency 8": "[8, inf)",
            "--optimizer-eps 0": "(0, inf)",
            "--preset rainbow": "dopamine",
            "--buffer-size 100000000": "needs 353.2 GB",
            "--optimizer sgd --optimizer-eps 1e-3": "no meaning",
            "--no-cuda --buffer-device cuda": "needs a GPU",
        },
    ),
    (
        [dqn],
        {
            "--buffer-size 80 --num-envs 16": "[144, inf)",
            "--learning-starts 1": "[2, ",
            "--update-horizon 0": "[1, inf)",
            "--loss hinge": "huber",
        },
    ),
    (
        [iqn],
        {
            "--num-tau-samples 0": "[1, inf)",
            "--num-tau-prime-samples 0": "[1, inf)",
            "--num-quantile-samples 0": "[1, inf)",
            "--kappa 0": "(0, inf)",
            "--update-horizon 0": "[1, inf)",
        },
    ),
    (
        [nonconvex],
        {
            "--num-starts 0": "[1, inf)",
            "--num-seeds 0": "[1, inf)",
            "--num-steps 0": "[1, inf)",
            "--bandit-interval 501": "[1, 500]",
            "--learning-rates 0.5": "two rates",
            "--learning-rates 0 1": "(0, inf)",
            "--learning-rates 1 1": "distinct",
            "--learning-rates 1,0.5": "separated by spaces, like 1 0.5",
            "--learning-rate 0": "(0, inf)",
            "--lr-decay-rate -1": "[0, inf)",
            "--cyclic-half-period 0 --seed 2": "[1, inf)",
            "--bandit-window 1 --seed 2": "[2, inf)",
            "--bandit-decay 2": "(0, 1]",
            "--bandit-step-size 0 --seed 2": "(0, inf)",
            "--seed -2": "[0, 4294967295]",
        },
    ),
    (
        [report],
        {
            "": "PATH parent of the run folders",
            "/no/such/folder": "FOLDER",
            "tests": "FOLDER",
            "tests --baselin x": "--baselin",
        },
    ),
]
CASES = [
    pytest.param(program, line, said, id=f"{program.__name__} {line}")
    for programs, lines in BAD_INPUT
    for program in programs
    for line, said in lines.items()
]


@pytest.mark.parametrize(("program", "line", "said"), CASES)
def test_bad_input_is_one_line_that_names_the_option_with_code_2(program, line, said, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["program.py"])
    parent = tmp_path / "runs"
    with pytest.raises(SystemExit) as end:
        program.main([*line.split(), *(["--run-dir", str(parent)] if program is not report else [])])
    output, error = capsys.readouterr()
    assert end.value.code == 2 and output == "" and error.count("\n") == 1 and not parent.exists()
    options = [word.split("=")[0] for word in line.split() if word.startswith("--")]
    assert said in error and (not options or any(option in error for option in options)), error


PROCESSES = [
    "ppo_continuous_lrrl.py --env-id CartPole-v1",
    "ppo_continuous_lrrl.py --seed x",
    "ppo_continuous_lrrl.py --learning-rates 1 1",
    "sac_mujoco_lrrl.py --env-id CartPole-v1",
    "sac_mujoco_lrrl.py --optimizer adamrel",
    "sac_mujoco_lrrl.py --alpha-lr-ratio -1",
    "dqn_atari_lrrl.py --env-id BreakoutNoFrameskp-v4",
    "dqn_atari_lrrl.py --preset rainbow",
    "dqn_atari_lrrl.py --bandit-interval 3",
    "iqn_atari_lrrl.py --kappa 0",
    "iqn_atari_lrrl.py --buffer-size 31",
    "nonconvex_lrrl.py --num-steps 0",
]


@pytest.mark.parametrize("command", PROCESSES)
def test_bad_input_of_a_real_process_shows_no_traceback(command, start, tmp_path):
    output, error = (process := start(command, fresh=command == PROCESSES[0])).communicate(timeout=120)
    assert process.returncode == 2 and output == "" and error.count("\n") == 1 and error.startswith(command.split()[0])
    assert not (tmp_path / "runs").exists()


def test_a_terminal_without_utf8_gets_the_same_line(start):
    lines = [start("ppo_continuous_lrrl.py --sed 3", PYTHONIOENCODING=x).communicate()[1] for x in ("utf-8", "ascii")]
    assert lines[0] == lines[1] != ""

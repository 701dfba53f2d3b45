"""What play.py promises beyond tests/test_docs.py and test_dqn_minatar.py: whose tasks it imports, how agents act."""

import gymnasium as gym
import pytest
import torch

import dqn_atari_lrrl as dqn
import dqn_minatar_lrrl as minatar
import iqn_atari_lrrl as iqn
import play
import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from lrrl_utils import environments
from lrrl_utils.atari import AtariGames
from tests.conftest import PENDULUM
from tests.toy_envs import StepCounter

TASK = "tests.test_play:NoScreen-v0"


class NoScreen(StepCounter):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        raise RuntimeError("no driver")


gym.register("NoScreen-v0", NoScreen)


def test_a_task_that_is_code_is_imported_once_it_is_named_again(train, refused, capsys):
    folder = str(train(ppo.main, f"{PENDULUM} --env-id {TASK} --total-timesteps 64 --save-model").path)
    assert f"if you trust it, add --env-id {TASK}" in refused(play.main, [folder])
    assert f"the run has {TASK}" in refused(play.main, [folder, "--env-id", "tests.toy_envs:Breaks-v0"])
    assert "rendering: no driver" in refused(play.main, [folder, "--env-id", TASK, "--record"])


GAMES = "--batch-size 4 --learning-starts 40 --buffer-size 200 --total-timesteps 80 --eval-e 0.3"
SCRIPTS = {
    "ppo": (ppo, f"{PENDULUM} --total-timesteps 128"),
    "sac": (sac, "--env-id Pendulum-v1 --batch-size 8 --learning-starts 20 --total-timesteps 60"),
    "dqn": (dqn, f"{GAMES} --padding same"),
    "iqn": (iqn, f"{GAMES} --padding valid --num-tau-samples 4 --num-tau-prime-samples 4 --num-quantile-samples 4"),
    "minatar": (minatar, GAMES),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_agent_acts_as_in_its_evaluation(name, train, monkeypatch):
    script, options = SCRIPTS[name]
    run = train(script.main, f"{options} --save-model --eval-episodes 1")
    make_env = environments.make_env
    monkeypatch.setattr(environments, "make_env", lambda args, render: make_env(args))  # without pictures
    monkeypatch.setattr(gym.wrappers, "RecordVideo", lambda env, *_, **__: env)
    monkeypatch.setattr(AtariGames, "write_film", lambda self, seed, actions: None)
    args = play.Args(run.path, record=True)
    play_it = play.play_task if name in ("ppo", "sac") else play.play_game
    torch.manual_seed(123)
    assert play_it(args, *play.load_run(run.path)) == run.summary["eval_returns"]
    assert name in ("ppo", "sac") or torch.initial_seed() == 1  # the run's, from which IQN draws quantiles

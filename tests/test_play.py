"""What play.py promises beyond tests/test_docs.py and test_dqn_minatar.py, which play: whose tasks it imports."""

import gymnasium as gym

import play
import ppo_continuous_lrrl as ppo
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

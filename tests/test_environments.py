"""What lrrl_utils/environments.py promises: tasks of any Box, seeds of their own, and that they can be played again."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

from lrrl_utils.environments import ContinuousTasks, evaluate, make_env
from lrrl_utils.state import capture, restore
from tests import toy_envs
from tests.test_state import plain, through_a_file


class Unbounded(toy_envs.StepCounter):
    action_space = gym.spaces.Box(-np.inf, np.inf, (1,))


gym.register("Unbounded-v1", Unbounded)


def options(env_id, num_envs=1, **others):
    return SimpleNamespace(env_id=env_id, num_envs=num_envs, seed=1, capture_video=False, **others)


def make_tasks(env_id, num_envs=1, seed=0):
    return ContinuousTasks(options(env_id, num_envs), np.random.default_rng(seed))


def play(tasks, rng, steps):
    """All that `steps` random steps come to, resets included."""
    seen = []
    for _ in range(steps):
        actions = rng.normal(0, 2, (len(tasks.envs), tasks.action_size)).astype(np.float32)
        for i, (obs, *others) in enumerate(tasks.step(actions)):
            seen.append((obs.tolist(), *others))
            if others[-1]:
                seen.append(tasks.reset(i).tolist())
    return seen


def test_sizes_are_flat_and_actions_are_clipped_to_their_bounds_in_their_shape():
    tasks = make_tasks("tests.toy_envs:OddSpaces-v0", num_envs=2)
    assert (tasks.obs_size, tasks.action_size) == (2 * 2 + 3, 6)
    assert tasks.low.tolist() == [-1, 0, 2] * 2 and tasks.high.tolist() == [1, 5, 2.5] * 2
    assert [tasks.reset(i).shape for i in range(2)] == [(7,)] * 2
    for n in range(1, 8):  # the task itself checks actions
        results = tasks.step(np.array([[9.0] * 6, [-9.0] * 6], np.float32))
        for obs, reward, terminated, truncated, episode in results:
            assert obs.shape == (7,) and (reward, terminated, truncated) == (0.5, n == 7, False)
            assert episode == ((3.5, 7) if n == 7 else None)
    assert (tasks.played[0][1][0] == tasks.high.reshape(2, 3)).all()


def test_a_step_tells_terminations_from_truncations_and_gives_the_last_observation():
    tasks, ends = make_tasks("tests.toy_envs:TwoEnds-v0"), []
    tasks.reset(0)
    for _ in range(5):
        ((obs, _, terminated, truncated, episode),) = tasks.step(np.zeros((1, 1), np.float32))
        if episode:
            ends.append((obs.item(), terminated, truncated, episode))
            assert tasks.reset(0).item() == 1
    assert ends == [(4, True, False, (3.0, 3)), (3, False, True, (2.0, 2))]


def test_every_episode_has_a_seed_of_its_own_and_draws_repeat():
    tasks = make_tasks("Pendulum-v1", num_envs=2)
    starts = [tasks.reset(i).tolist() for i in (0, 1, 0, 1)]
    assert len({tuple(start) for start in starts}) == 4
    again = make_tasks("Pendulum-v1", num_envs=2)
    assert [again.reset(i).tolist() for i in (0, 1, 0, 1)] == starts


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v4", "Pendulum-v1"])
@pytest.mark.parametrize("steps", [0, 37])
def test_tasks_go_on_alike_once_their_running_episodes_have_been_played_again(env_id, steps):
    rng = np.random.default_rng(2)
    tasks, others = make_tasks(env_id, 3, seed=5), make_tasks(env_id, 3, seed=6)
    for i in range(3):
        tasks.reset(i)
    play(tasks, rng, steps)
    restore(others, through_a_file(capture(tasks)))
    restore(others.rng, capture(tasks.rng))
    assert plain(capture(others)) == plain(capture(tasks))
    later = [play(x, np.random.default_rng(3), 150) for x in (tasks, others)]
    assert later[0] == later[1]


@pytest.mark.parametrize(("global_step", "prefix"), [(0, "rl-video"), (384, "rl-video-from-384")])
def test_videos_have_the_timestep_in_their_names_that_a_run_has_gone_on_from(
    global_step, prefix, monkeypatch, tmp_path
):
    names = []
    monkeypatch.setattr("gymnasium.wrappers.RecordVideo", lambda env, _, name_prefix: names.append(name_prefix) or env)
    tasks = make_tasks("Pendulum-v1")
    tasks.is_filmed = True
    tasks.reset(0)
    tasks.record_videos(tmp_path, global_step)
    assert names == [prefix]


def test_a_task_may_change_its_actions(monkeypatch):
    def step(self, action):
        action *= 2
        seen.append(action.tolist())
        return self.observe(0), 0.0, False, False, {}

    seen = []
    monkeypatch.setattr("tests.toy_envs.TwoEnds.step", step)
    tasks = make_tasks("tests.toy_envs:TwoEnds-v0")
    tasks.reset(0)
    tasks.step(np.full((1, 1), 0.25, np.float32))
    for _ in range(2):
        tasks.load_state_dict(tasks.state_dict())
    assert seen == [[0.5]] * 3


def test_evaluation_plays_whole_episodes_with_clipped_actions_and_repeats():
    args = options("Pendulum-v1", eval_episodes=3)
    asked = []
    run = SimpleNamespace(stop_if_asked=lambda: asked.append(True))
    returns = evaluate(args, lambda obs: np.float32([50 * obs[1]]), run)
    assert len(set(returns)) == 3 and len(asked) == 600
    assert returns == evaluate(args, lambda obs: np.float32([50 * obs[1]]), run)
    assert returns != evaluate(args, lambda obs: np.float32([0.0]), run)
    odd = options("tests.toy_envs:OddSpaces-v0", eval_episodes=2)  # which checks actions
    assert evaluate(odd, lambda obs: np.full(6, 9, np.float32), run) == [3.5, 3.5]


def test_an_evaluation_can_be_stopped():
    def stop():
        raise SystemExit(143)

    args = options("Pendulum-v1", eval_episodes=1)
    with pytest.raises(SystemExit):
        evaluate(args, lambda obs: np.float32([0.0]), SimpleNamespace(stop_if_asked=stop))


@pytest.mark.parametrize(
    ("env_id", "bounded", "said"),
    [
        ("HalfCheeta-v5", False, "HalfCheetah"),
        ("CartPole-v1", False, "Box action space of floats, not Discrete(2)"),
        ("tests.test_environments:Unbounded-v1", True, "actions have bounds"),
    ],
)
def test_a_task_that_will_not_do_is_named(env_id, bounded, said, refused):
    error = refused(lambda argv: make_env(options(env_id), bounded=bounded), [])
    assert said in error and f"--env-id {env_id}" in error


def test_actions_need_bounds_only_where_that_is_asked_for():
    tasks = make_tasks("Unbounded-v1")
    tasks.reset(0)
    tasks.step(np.float32([[1e9]]))
    assert tasks.played[0][1] == [np.float32([1e9])]

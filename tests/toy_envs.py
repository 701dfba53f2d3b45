"""Tiny environments whose right answers are known. `--env-id tests.toy_envs:Name-v0` makes them."""

import os

import gymnasium as gym
import numpy as np


class Toy(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.start(), {}

    def observe(self, value):
        return np.array([value], np.float32)


class StepCounter(Toy):
    """The reward of a timestep is its number since the counter was set to 0: 1, 2, 3, … Episodes take 10 steps."""

    total = 0

    def start(self):
        self.t = 0
        return self.observe(0)

    def step(self, action):
        StepCounter.total += 1
        self.t += 1
        return self.observe(self.t), float(StepCounter.total), False, self.t == 10, {}


class TwoEnds(Toy):
    """Observations 1, 2, 3, …, reward 1. Episodes in turn: three steps to a termination, two steps to a truncation."""

    episode = -1

    def start(self):
        self.episode += 1
        self.position = 1
        return self.observe(1)

    def step(self, action):
        self.position += 1
        terminated = self.episode % 2 == 0 and self.position == 4
        truncated = self.episode % 2 == 1 and self.position == 3
        return self.observe(self.position), 1.0, terminated, truncated, {}


class Breaks(StepCounter):
    """Raises an error in its 300th step."""

    def step(self, action):
        if StepCounter.total == 299:
            raise RuntimeError("the simulator broke")
        return super().step(action)


class BreaksOnce(Toy):
    """The reward is the action. Raises an error once, in the 300th step of a process or, with $IN_RESET, after it.

    Not if the file $BROKEN is there, which it makes.
    """

    steps = 0

    def break_once(self):
        if not os.path.exists(os.environ["BROKEN"]):
            open(os.environ["BROKEN"], "w").close()
            raise RuntimeError("the simulator broke")

    def start(self):
        self.t = 0
        if BreaksOnce.steps > 300 and "IN_RESET" in os.environ:
            self.break_once()
        return self.observe(self.np_random.random())

    def step(self, action):
        BreaksOnce.steps += 1
        if BreaksOnce.steps == 300 and "IN_RESET" not in os.environ:
            self.break_once()
        self.t += 1
        return self.observe(self.np_random.random()), np.float32(action[0]), False, self.t == 17, {}


class Point(Toy):
    """A point on a line, to be pushed to 0 and held there for 20 steps.

    The reward is -5 times the square of its distance before the push: what a push does pays off in the steps after it.
    """

    def start(self):
        self.t, self.position = 0, self.np_random.uniform(-1, 1)
        return self.observe(self.position)

    def step(self, action):
        self.t += 1
        reward = -5 * self.position**2
        self.position += 0.3 * float(action[0])
        return self.observe(self.position), reward, False, self.t == 20, {}


class OddSpaces(Toy):
    """A dictionary of observations and a matrix of actions with lopsided bounds, which it checks."""

    observation_space = gym.spaces.Dict({"a": gym.spaces.Box(-1, 1, (2, 2)), "b": gym.spaces.Discrete(3)})
    action_space = gym.spaces.Box(np.array([[-1, 0, 2]] * 2, np.float32), np.array([[1, 5, 2.5]] * 2, np.float32))

    def start(self):
        self.t = 0
        return self.observation_space.sample()

    def step(self, action):
        assert action.shape == (2, 3) and self.action_space.contains(action), action
        self.t += 1
        return self.observation_space.sample(), 0.5, self.t == 7, False, {}


for entry_point in (StepCounter, TwoEnds, Breaks, BreaksOnce, Point, OddSpaces):
    gym.register(f"{entry_point.__name__}-v0", entry_point, order_enforce=False)


class TinyGame:
    """Stands in for an Atari game, with the face of ale_py's vector environment.

    Every step has reward 1 (or those of `rewards`, in turn). A game takes three steps and ends in a termination or,
    with `truncates`, in a truncation. The brightness of a frame counts the steps.
    """

    def __init__(self, num_envs=1, truncates=False, rewards=(1,), length=3):
        self.num_envs, self.truncates, self.rewards, self.length = num_envs, truncates, rewards, length
        self.single_action_space = gym.spaces.Discrete(2)
        self.ale = self
        self.t = np.zeros(num_envs, int)
        self.total = 0

    def get_action_set(self):
        return [0, 2]  # no FIRE

    def observe(self):
        ages = np.arange(3, -1, -1)
        brightness = np.where(self.t[:, None] >= ages, 60 * (self.t[:, None] - ages + 1), 0).astype(np.uint8)
        return np.broadcast_to(brightness[..., None, None], (self.num_envs, 4, 84, 84)).copy()

    def reset(self, seed=None, options=None):
        self.t[(options or {}).get("reset_mask", slice(None))] = 0
        return self.observe(), {"lives": np.ones(self.num_envs, int)}

    def step(self, actions):
        self.t += 1
        rewards = np.full(self.num_envs, self.rewards[self.total % len(self.rewards)], np.int32)
        self.total += 1
        over, no = self.t >= self.length, np.zeros(self.num_envs, bool)
        ends = (no, over) if self.truncates else (over, no)
        return self.observe(), rewards, *ends, {"lives": np.ones(self.num_envs, int)}

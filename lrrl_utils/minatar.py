"""MinAtar's games, as `lrrl_utils/atari.py` has those of Atari. The package is optional and imported when one is made.

Young and Tian, "MinAtar: An Atari-Inspired Testbed for Thorough and Reproducible Reinforcement Learning Experiments",
arXiv 1903.03176.
"""

import difflib

import gymnasium as gym
import numpy as np

from lrrl_utils.atari import AtariGames
from lrrl_utils.terminal import reject, reject_errors


def make_env(args, render=None):
    """One game of MinAtar, rendered in the mode `render`; or `reject` its --env-id."""
    try:
        import minatar.gym
    except ImportError:
        reject(f"--env-id {args.env_id}: needs MinAtar, which is optional (GPL): pip install minatar==1.0.15")

    if not any(name.startswith("MinAtar/") for name in gym.registry):
        minatar.gym.register_envs()
    games = [name for name, spec in gym.registry.items() if spec.entry_point == "minatar.gym:BaseEnv"]
    if args.env_id not in games:
        nearest = difflib.get_close_matches(args.env_id, games, n=1, cutoff=0)[0]
        reject(f"--env-id {args.env_id}: must be a game of MinAtar, MinAtar/<Game>-v0 or -v1; nearest: {nearest}")
    with reject_errors(f"--env-id {args.env_id}"):  # no warning that v0, which has all six actions, is an old version
        return gym.make(args.env_id, disable_env_checker=True, render_mode=render)


class MinAtarEnvs:
    """Games of MinAtar, played one after the other, with the face of ale_py's vector environment.

    Observations are (num_envs, 10, 10, channels) bool. A game that is reset with a seed starts as in a new environment.
    """

    def __init__(self, args, num_envs):
        self.envs = [make_env(args) for _ in range(num_envs)]
        self.single_action_space = self.envs[0].action_space
        self.single_observation_space = self.envs[0].observation_space
        self.obs = np.zeros((num_envs, *self.single_observation_space.shape), bool)
        self.lives = {"lives": np.zeros(num_envs, np.int64)}  # there are none to lose

    def reset(self, seed=None, options=None):
        """Start a game wherever the mask says so; `seed` has a number for each of those, -1 for none."""
        started = np.flatnonzero((options or {}).get("reset_mask", np.ones(len(self.envs), bool)))
        self.obs = self.obs.copy()
        for env, number in zip(started, np.full(len(started), -1) if seed is None else seed):
            if number >= 0:
                self.envs[env].unwrapped.game.last_action = 0  # which the first action may stick to
            self.obs[env], _ = self.envs[env].reset(seed=int(number) if number >= 0 else None)
        return self.obs, self.lives

    def step(self, actions):
        steps = [env.step(action) for env, action in zip(self.envs, actions.tolist())]
        obs, rewards, terminations, truncations, _ = zip(*steps)
        self.obs = np.stack(obs)
        return self.obs, np.array(rewards, float), np.array(terminations), np.array(truncations), self.lives


class MinAtarGames(AtariGames):
    """Games of MinAtar side by side that can be played again; see `AtariGames`. Nothing has lives, FIRE or frames.

    Attributes:
        obs: (num_envs, 10, 10, channels) bool, the observations now.
    """

    SCREEN = 160, 160

    def make_envs(self, num_envs):
        return MinAtarEnvs(self._args, num_envs)

    def find_fire(self):
        return None

    @property
    def obs_shape(self):
        return self._envs.single_observation_space.shape

    def play_in_colour(self, seed, actions):
        with make_env(self._args, "rgb_array") as env:
            env.reset(seed=seed)
            for action in actions:
                yield (255 * env.render()).astype(np.uint8).repeat(16, 0).repeat(16, 1)
                env.step(action)

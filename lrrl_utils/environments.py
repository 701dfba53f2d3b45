"""MuJoCo-like tasks that can be played again: seeds and actions are all that a checkpoint needs of them."""

import os
import sys

import gymnasium as gym
import mujoco
import numpy as np

from lrrl_utils.terminal import reject, reject_errors, say

mujoco.set_mju_user_warning(lambda message: None)  # its notes would go to the screen and into a MUJOCO_LOG.TXT
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("MUJOCO_GL", "egl")  # lets a machine without a screen record videos


def make_env(args, render=None, bounded=False):
    """One task with flat observations and a Box of actions, rendered in the mode `render`; or `reject` its --env-id."""
    with reject_errors(f"--env-id {args.env_id}"):
        env = gym.make(args.env_id, disable_env_checker=True, **({"render_mode": render} if render else {}))
    if not (isinstance(env.action_space, gym.spaces.Box) and env.action_space.dtype.kind == "f"):
        reject(f"--env-id {args.env_id}: must be a task with a Box action space of floats, not {env.action_space}")
    if bounded and not env.action_space.is_bounded():
        reject(f"--env-id {args.env_id}: must be a task whose actions have bounds, not {env.action_space}")
    if render:
        import torch._dynamo  # noqa: F401  it loads Triton, which crashes if a software renderer has loaded its LLVM before

        with reject_errors("--capture-video" if args.capture_video else "rendering"):
            env.reset(seed=args.seed)
            env.render()
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return gym.wrappers.RecordEpisodeStatistics(env)


class ContinuousTasks:
    """`args.num_envs` tasks with continuous actions, stepped one after the other.

    Every episode gets a seed of its own, so that its seed and its actions are all it takes to play it again.

    Args:
        args: with `env_id`, `num_envs`, `seed`, `capture_video`.
        rng: draws the seeds.
        bounded: whether actions must have bounds.
    """

    def __init__(self, args, rng, bounded=False):
        self.envs = [
            make_env(args, "rgb_array" if args.capture_video and i == 0 else None, bounded)
            for i in range(args.num_envs)
        ]
        self.rng, self.is_filmed = rng, args.capture_video
        self.obs_size = self.envs[0].observation_space.shape[0]
        space = self.envs[0].action_space
        self.low, self.high, self.action_shape = space.low.ravel(), space.high.ravel(), space.shape
        self.action_size = self.low.size
        self.played = [(0, [])] * args.num_envs  # the running episodes: seed, actions

    def reset(self, i):
        """Start an episode in the `i`-th task; returns its first observation, (obs_size,)."""
        seed = int(self.rng.integers(2**31))
        self.played[i] = seed, []
        return self.envs[i].reset(seed=seed)[0]

    def step(self, actions):
        """A step in every task; `actions` are (num_envs, action_size), and clipped to their bounds.

        Returns:
            for each task: observation, reward, terminated, truncated and, if its episode has ended, its (return,
            length in timesteps), else None. `reset` comes next then.
        """
        actions = actions.clip(self.low, self.high).reshape(-1, *self.action_shape)
        results = []
        for env, action in zip(self.envs, actions):
            obs, reward, terminated, truncated, info = env.step(action.copy())  # a task may change it
            episode = (float(info["episode"]["r"]), info["episode"]["l"]) if terminated or truncated else None
            results.append((obs, reward, bool(terminated), bool(truncated), episode))
        for (_, played), action in zip(self.played, actions):
            played.append(action)
        return results

    def record_videos(self, folder, global_step):
        """With `capture_video`, film some episodes of the first task, the running one included.

        After a resumption they get other names.
        """
        if not self.is_filmed:
            return
        say("filming episodes 0, 1, 8, 27, … of the first task: rendering takes most of the time of a step")
        prefix = f"rl-video-from-{global_step}" if global_step else "rl-video"
        self.envs[0] = gym.wrappers.RecordVideo(self.envs[0], str(folder / "videos"), name_prefix=prefix)
        self.play_again(0)

    def close(self):
        for env in self.envs:
            env.close()

    def state_dict(self):
        return {"played": [(seed, np.array(actions)) for seed, actions in self.played]}

    def load_state_dict(self, state):
        """Play the running episodes again."""
        for i, (seed, actions) in enumerate(state["played"]):
            self.played[i] = seed, list(actions)
            self.play_again(i)

    def play_again(self, i):
        seed, actions = self.played[i]
        self.envs[i].reset(seed=seed)
        for action in actions:
            self.envs[i].step(action.copy())


def evaluate(args, policy, run):
    """Returns of `args.eval_episodes` episodes of `policy`, a function from an observation to an action."""
    returns = []
    with make_env(args) as env:
        low, high = env.action_space.low, env.action_space.high
        for episode in range(args.eval_episodes):
            obs, info = env.reset(seed=args.seed + episode)
            while "episode" not in info:
                obs, _, _, _, info = env.step(policy(obs).reshape(low.shape).clip(low, high))
                run.stop_if_asked()
            returns.append(float(info["episode"]["r"]))
    return returns

"""Show or record episodes of a trained agent, from the `model.pt` that `--save-model` leaves in a run folder.

    python play.py runs/Hopper-v5__ppo_continuous_lrrl__1__1795445904 --episodes 3

On a machine without a screen, or with --record, videos go to the folder `played` in the run folder. The agent acts as
in the evaluation: mean actions and frozen normalisation statistics; in games, an ε of --eval-e.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro

from lrrl_utils import atari, environments, minatar
from lrrl_utils.command_line import parse_args
from lrrl_utils.files import open_regular, read_json
from lrrl_utils.numpy_policy import numpy_policy
from lrrl_utils.ranges import Count
from lrrl_utils.terminal import reject, reject_errors, say

NO_SCREEN = sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional]  # a run folder with a model.pt
    env_id: str | None = None  # the run's task, once more, if it is code that Python would import: whether you trust it
    episodes: Count = 1  # episodes to play
    # whether to record videos and show nothing; games are always recorded (default: on a machine without a screen)
    record: bool = NO_SCREEN


def load_run(folder, env_id=None):
    """The script that a run was made by, its arguments, its model; or `reject` the folder. See `Args.env_id`."""
    with reject_errors(f"FOLDER {folder}"):
        config = read_json(folder / "config.json")
        file = next(iter(config.get("code", {config.get("exp_name", "") + ".py": ""})))
        if not (Path(file).name == file and Path(__file__).with_name(file).is_file()):
            reject(f"FOLDER {folder}: was made by {file!r}, which is not beside {Path(__file__).name}")
        if env_id not in (config["env_id"], None):
            reject(f"--env-id {env_id}: the run has {config['env_id']}")
        if ":" in config["env_id"] and not env_id:
            reject(
                f"FOLDER {folder}: its task is code that Python would import; "
                f"if you trust it, add --env-id {config['env_id']}"
            )
        with open(open_regular(folder / "model.pt"), "rb") as model:
            model = torch.load(model, map_location="cpu", weights_only=True)
    return importlib.import_module(Path(file).stem), SimpleNamespace(**config), model


def make_policy(script, env, model):
    """A function from an observation to an action, as the trained agent acts without noise."""
    obs_size, space = env.observation_space.shape[0], env.action_space
    if "agent" in model:  # PPO
        agent = script.Agent(obs_size, int(np.prod(space.shape)))
        agent.load_state_dict(model["agent"])
        policy, mean, std = numpy_policy(agent.actor_mean), model["obs_mean"].numpy(), model["obs_std"].numpy()
        return lambda obs: policy(((obs - mean) / std).clip(-10, 10).astype(np.float32))
    actor = script.Actor(obs_size, space.low.ravel(), space.high.ravel())  # SAC
    actor.load_state_dict(model["actor"])
    return torch.no_grad()(lambda obs: actor.get_action(torch.tensor(obs, dtype=torch.float32), 0).numpy())


def play_task(args, script, options, model):
    """Returns of episodes of a MuJoCo-like task."""
    options.num_envs, options.capture_video = 1, False
    env = environments.make_env(options, render="rgb_array" if args.record else "human")
    policy = make_policy(script, env, model)
    if args.record:
        env = gym.wrappers.RecordVideo(env, str(args.folder / "played"), episode_trigger=lambda episode: True)
    returns = []
    with env:
        for episode in range(args.episodes):
            obs, info = env.reset(seed=options.seed + episode)
            while "episode" not in info:
                action = policy(obs).reshape(env.action_space.shape).clip(env.action_space.low, env.action_space.high)
                obs, _, _, _, info = env.step(action)
            returns.append(float(info["episode"]["r"]))
            say(f"episode {episode + 1}: return {returns[-1]:.1f}")
    return returns


def play_game(args, script, options, model):
    """Raw returns of games of Atari or MinAtar, which are filmed in colour once they have ended."""
    options.capture_video, options.checkpoint_interval = True, 0
    rng = np.random.default_rng(options.seed)
    torch.manual_seed(options.seed)  # for IQN's quantiles
    is_minatar = options.env_id.startswith("MinAtar/")
    games_class = minatar.MinAtarGames if is_minatar else atari.AtariGames
    games = games_class(options, 1, rng, is_filmed=lambda game: True)
    games.record_videos(args.folder / "played")
    sizes = (games.obs_shape[-1], games.num_actions) if is_minatar else (games.num_actions,)
    quantiles = (options.num_quantile_samples,) if hasattr(options, "num_quantile_samples") else ()
    padding = (options.padding,) if hasattr(options, "padding") else ()
    q_network = script.QNetwork(*sizes, *quantiles, *padding)
    q_network.load_state_dict(model["q_network"])
    returns = []
    while len(returns) < args.episodes:
        actions = script.act(q_network, options, games.obs, options.eval_e, rng)
        games.press_fire(actions)
        _, _, terminations, truncations = games.step(actions)
        for episodic_return, _ in games.episodes:
            returns.append(episodic_return)
            say(f"game {len(returns)}: return {episodic_return:.1f}")
        games.start_games(terminations | truncations)
    return returns


def main(argv=None):
    args = parse_args(Args, argv)
    script, options, model = load_run(args.folder, args.env_id)
    play = play_game if "q_network" in model else play_task
    returns = play(args, script, options, model)
    has_videos = any((args.folder / "played").glob("*.mp4"))
    say(f"mean return {np.mean(returns):.1f}" + (f", videos in {args.folder / 'played'}" if has_videos else ""))


if __name__ == "__main__":
    main()

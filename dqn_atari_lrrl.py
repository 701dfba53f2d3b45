"""DQN on Atari, its learning rate chosen by a multi-armed bandit while it trains (LRRL).

    python dqn_atari_lrrl.py --env-id BreakoutNoFrameskip-v4 --seed 1

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598.
DQN: Mnih et al., "Human-level control through deep reinforcement learning", Nature 518, 2015.
"""

import difflib
import math
import os
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import ale_py
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from ale_py.vector_env import AtariVectorEnv
from gymnasium.utils.save_video import capped_cubic_video_schedule
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, ExponentialLR, LinearLR

from bandits import ArmSet, BanditName, bandits_with, choose_arms, make_bandit
from checkpoints import load_checkpoint
from command_line import check, check_meaning, given_options, parse_args, reject, reject_errors
from tracking import Run

gym.register_envs(ale_py)


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of every random generator"""
    torch_deterministic: bool = True
    """whether cuDNN is held to deterministic algorithms"""
    cuda: bool = True
    """whether to use a GPU if there is one"""
    compile: bool = False
    """whether to compile the loss with torch.compile; on a GPU the whole update is one CUDA graph then"""
    amp: bool = False
    """whether networks run in bfloat16, Q-values included (parameters, their updates and the loss stay float32)"""
    track: bool = False
    """whether to track the run with Weights & Biases (WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "lrrl"
    """the project in Weights & Biases"""
    wandb_entity: str | None = None
    """the entity (team) in Weights & Biases"""
    capture_video: bool = False
    """whether to record videos of the first game into the run folder"""
    save_model: bool = False
    """whether to save the trained Q-network into the run folder"""
    eval_episodes: int = 0
    """games to evaluate the trained agent on, with an ε of eval-e"""
    run_dir: str = "runs"
    """parent of the run folders"""
    checkpoint_interval: int = 0
    """timesteps between checkpoints in the run folder; 0: none"""
    resume: str | None = None
    """a run folder, to go on with from its last checkpoint; options that are not given stay as they were"""

    env_id: str = "BreakoutNoFrameskip-v4"
    """<Game>NoFrameskip-v4 has no sticky actions, ALE/<Game>-v5 repeats an action with probability 0.25"""
    preset: Literal["dopamine", "cleanrl"] = "dopamine"
    """whose defaults to use: those shown here, or those of CleanRL's dqn_atari.py; an option that is given wins"""
    total_timesteps: int = 50_000_000
    """timesteps of the run (4 frames each), summed over games"""
    num_envs: int = 1
    """games played side by side; the updates per timestep stay the same"""
    buffer_size: int = 1_000_000
    """capacity of the replay, in timesteps"""
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the replay's frames are; auto: with the network if they fit there"""
    gamma: float = 0.99
    """discount factor"""
    update_horizon: int = 1
    """n of the n-step returns"""
    target_network_frequency: int = 8_000
    """timesteps between copies to the target network"""
    batch_size: int = 32
    """transitions of a minibatch"""
    start_e: float = 1.0
    """ε, the probability of a random action, before it falls"""
    end_e: float = 0.01
    """ε after it has fallen"""
    eval_e: float = 0.001
    """ε in the evaluation"""
    exploration_steps: int = 250_000
    """timesteps over which ε falls, after learning has started"""
    exploration_fraction: float | None = None
    """instead: the share of total-timesteps over which ε falls, from the very start, as in CleanRL"""
    learning_starts: int = 20_000
    """timesteps before the first update"""
    train_frequency: int = 4
    """timesteps between updates"""
    loss: Literal["mse", "huber"] = "mse"
    """what the loss makes of the temporal-difference errors"""
    optimizer: Literal["adam", "adamrel", "rmsprop", "sgd"] = "adam"
    """adamrel: Adam that counts its steps anew with every target copy (Ellis et al., arXiv 2412.17113)"""
    momentum: float = 0.9
    """of rmsprop and sgd"""
    adam_eps: float = 1.5e-4
    """the ε of Adam and RMSProp"""
    noop_max: int = 0
    """a game starts with fewer than this many random no-ops (0: none)"""
    fire_reset: bool = False
    """whether FIRE is pressed at the start of a game and of a life, where the game has it"""
    terminal_on_life_loss: bool = False
    """whether a lost life ends the return that the agent learns from (the game goes on)"""

    lr_control: Literal["bandit", "constant", "linear", "exponential", "cosine", "cyclic"] = "bandit"
    """what sets the learning rate: a bandit, nothing, or a schedule (linear and cosine end at 0)"""
    learning_rate: float = 6.25e-5
    """the rate of the controls but bandit and cyclic (a schedule's first one)"""
    lr_decay_rate: float = 1e-7
    """d of the exponential schedule, learning-rate × exp(−d t), with t in timesteps"""
    cyclic_base_lr: float = 1.5625e-5
    """the lowest rate of the cyclic schedule, which goes up and down in straight lines (Smith, arXiv 1506.01186)"""
    cyclic_max_lr: float = 2.5e-4
    """the highest rate of the cyclic schedule"""
    cyclic_half_period: int = 1_000_000
    """timesteps of the cyclic schedule from its lowest rate to its highest"""
    learning_rates: tuple[float, ...] | ArmSet = (1.5625e-5, 3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4)
    """the bandit's arms: rates, or by name some of these five (all5, lowest3, middle3, highest3, sparse3)"""
    lr_range: tuple[float, float] | None = None
    """in place of arms: the ends of a range, from which 25 rates are taken in equal ratios"""
    bandit: BanditName = "drift"
    """drift: the rate that raises performance fastest; lrrl: the paper's rule; uniform: the control, which draws every
    arm with equal probability; exp3, moss, ducb, wucb: those of others, see bandits.py"""
    bandit_interval: int | Literal["auto"] = "auto"
    """κ, the shortest round in timesteps; auto: 2 to 8 stretches of 2,000, until their trend stands out of the noise"""
    bandit_step_size: float = 0.2
    """α, the step size of the weights"""
    bandit_decay: float | None = None
    """δ, what an arm keeps from round to round (default: lrrl 0.9; exp3 and ducb 0.98)"""
    bandit_window: int = 5
    """j, the rounds that an improvement is measured against"""
    bandit_feedback: Literal["reward", "raw-reward", "return"] = "reward"
    """a round's performance: mean clipped or raw reward of a timestep, or mean raw return of the games that ended"""
    rollback: bool = True
    """whether a round that leads to a collapse or to values that are not finite is undone and charged to its arm"""


CLEANRL = {  # of vwxyzjn/cleanrl's dqn_atari.py; the defaults above: google/dopamine's jax/agents/dqn/configs/dqn.gin
    "total_timesteps": 10_000_000,
    "target_network_frequency": 1_000,
    "learning_starts": 80_000,
    "exploration_fraction": 0.1,
    "learning_rate": 1e-4,
    "adam_eps": 1e-8,
    "noop_max": 30,
    "fire_reset": True,
    "terminal_on_life_loss": True,
}

OPTIONS_OF_CONTROLS = {  # option: the controls that it has a meaning for
    "learning_rate": ("constant", "linear", "exponential", "cosine"),
    "lr_decay_rate": ("exponential",),
    **dict.fromkeys(("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"), ("cyclic",)),
    **dict.fromkeys(("learning_rates", "lr_range", "bandit", "rollback"), ("bandit",)),
    **dict.fromkeys(("bandit_step_size", "bandit_decay", "bandit_window"), ("bandit",)),
}


def make_envs(args, num_envs, **options):
    """Atari games with the usual preprocessing, in C++: frames of 84 × 84 grey levels, 4 of them stacked, 4 skipped."""
    specs = {name: spec for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"}
    games = [name for name, spec in specs.items() if spec.kwargs["frameskip"] in (1, 4)]
    if args.env_id not in games:
        nearest = difflib.get_close_matches(args.env_id, games, n=1, cutoff=0)[0]
        forms = f"<Game>NoFrameskip-v4 or ALE/<Game>-v5; nearest: {nearest}"
        reject(f"--env-id {args.env_id}: must be an Atari game, {forms}")
    spec = specs[args.env_id].kwargs
    names = ("game", "repeat_action_probability", "full_action_space", "max_num_frames_per_episode")
    options = {"noop_max": args.noop_max, "use_fire_reset": args.fire_reset, "reward_clipping": False} | options
    return AtariVectorEnv(num_envs=num_envs, **{name: spec[name] for name in names}, **options)


class QNetwork(nn.Module):
    """Mnih et al. (2015). Observations are (batch, 4, 84, 84) grey levels, 0 to 255."""

    def __init__(self, num_actions):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(4, 32, 8, stride=4),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(inplace=True),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(3136, 512), nn.ReLU(inplace=True), nn.Linear(512, num_actions))
        self.num_actions = num_actions

    def q_values(self, obs):
        # channels last, as the weights are: the convolutions are faster then
        return self.head(self.features(obs.contiguous(memory_format=torch.channels_last) / 255))


def td_loss(q_network, target_network, args, obs, actions, rewards, next_obs, discounts):
    """The loss of one minibatch (Mnih et al., 2015) and, for the log, its Q-values; see `sample`."""
    with torch.no_grad(), torch.autocast(obs.device.type, torch.bfloat16, enabled=args.amp):
        next_q_values = target_network.q_values(next_obs).float().max(1).values
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=args.amp):
        q_values = q_network.q_values(obs).float().gather(1, actions[:, None]).squeeze(1)
    targets = rewards + discounts * next_q_values
    loss = F.mse_loss(q_values, targets) if args.loss == "mse" else F.huber_loss(q_values, targets)
    return loss, q_values.detach()


def make_optimizer(args, parameters, learning_rate):
    """An optimizer whose rate is a tensor: it changes in place, moments stay, a captured step is not captured again."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=args.momentum, fused=True)
    if args.optimizer == "rmsprop":
        options = {"alpha": 0.95, "eps": args.adam_eps, "momentum": args.momentum}
        return torch.optim.RMSprop(parameters, lr=learning_rate, **options, capturable=learning_rate.is_cuda)
    captured = args.compile and learning_rate.is_cuda
    return torch.optim.Adam(parameters, lr=learning_rate, eps=args.adam_eps, fused=True, capturable=captured)


def make_scheduler(args, num_steps):
    """The schedule of `--lr-control` over the run in `num_steps` steps, None without one.

    Its optimizer is there for the rate alone, a float64: float32 would round away a decay of 1e-7.
    """
    optimizer = torch.optim.SGD([torch.zeros(())], lr=args.learning_rate)
    timesteps = args.total_timesteps / num_steps  # of a step
    match args.lr_control:
        case "linear":
            scheduler = LinearLR(optimizer, 1, 0, num_steps)
        case "exponential":
            scheduler = ExponentialLR(optimizer, math.exp(-args.lr_decay_rate * timesteps))
        case "cosine":
            scheduler = CosineAnnealingLR(optimizer, num_steps)
        case "cyclic":
            rates = args.cyclic_base_lr, args.cyclic_max_lr
            scheduler = CyclicLR(optimizer, *rates, args.cyclic_half_period / timesteps, cycle_momentum=False)
        case _:
            return None
    optimizer.step()  # a scheduler whose optimizer has never made a step warns
    return scheduler


class ReplayBuffer:
    """A ring for each game, of single frames: stacks of 4 are put together when they are drawn.

    A slot holds the newest frame of an observation and what came of it. Frames may be on a GPU; all else is small and
    stays in NumPy, as do the draws. Memory is taken as the rings fill (on a GPU, all at once).
    """

    SLOT = np.dtype(
        [("frame", "u1", (84, 84)), ("age", "u1"), ("action", "u1"), ("reward", "f4")]
        + [("termination", "?"), ("truncation", "?"), ("final", "?")]
    )

    def __init__(self, args, frames_device, device):
        self.n, self.gamma, self.device = args.update_horizon, args.gamma, device
        self.capacity = args.buffer_size // args.num_envs
        self.frames = torch.empty((args.num_envs * self.capacity + 1, 84, 84), dtype=torch.uint8, device=frames_device)
        self.frames[-1] = 0  # the black frame that stands for those before the start of a game
        shape = (args.num_envs, self.capacity)
        self.age = np.zeros(shape, np.uint8)  # how many frames of the stack, up to 3, are older ones of the same game
        self.actions = np.zeros(shape, np.uint8)
        self.rewards = np.zeros(shape, np.float32)
        self.terminations, self.truncations, self.final = (np.zeros(shape, bool) for _ in range(3))
        self.count = np.zeros(args.num_envs, np.int64)  # of all slots ever written
        self.journal = None  # called with a game, an index and a SLOT

    @staticmethod
    def bytes_needed(timesteps):
        return timesteps * (84 * 84 + 9)

    def add(self, envs, frames, steps, actions=0, rewards=0.0, terminations=False, truncations=False, final=False):
        """Write a slot for each of `envs` (indices): (k, 84, 84) frames, `steps` into the game, and what followed.

        After a truncation the `final` observation has to follow as a slot of its own, to bootstrap from.
        """
        slots = np.empty(len(envs), self.SLOT)
        for name, values in zip(self.SLOT.names, (frames, np.minimum(steps, 3), actions, rewards, terminations)):
            slots[name] = values
        slots["truncation"], slots["final"] = truncations, final
        self.write(envs, self.count[envs], slots)
        if self.journal:
            for env, slot in zip(envs, slots):
                self.journal(env, self.count[env] - 1, slot)

    def write(self, envs, t, slots):
        """Write `slots`, (k,) SLOT, each of which is the `t`-th of its game, (k,)."""
        place = envs, t % self.capacity
        indices = torch.from_numpy(place[0] * self.capacity + place[1]).to(self.frames.device)
        self.frames[indices] = torch.from_numpy(slots["frame"]).to(self.frames.device)
        self.age[place], self.actions[place], self.rewards[place] = slots["age"], slots["action"], slots["reward"]
        self.terminations[place], self.truncations[place] = slots["termination"], slots["truncation"]
        self.final[place] = slots["final"]
        self.count[envs] = t + 1

    def stack(self, envs, t):
        """Where the 4 frames of the `t`-th observation of `envs` are, (k, 4); t counts as `self.count` does."""
        older = np.array([3, 2, 1, 0])
        frames = envs[:, None] * self.capacity + (t[:, None] - older) % self.capacity
        return np.where(self.age[envs, t % self.capacity][:, None] >= older, frames, len(self.frames) - 1)

    def sample(self, rng, batch_size):
        """Uniform transitions, as tensors: observations, actions, n-step returns, observations after them, discounts.

        A return is cut at the end of a game (or life). Its discount is γ to the power of its steps, 0 at a termination.
        """
        oldest = np.where(self.count > self.capacity, self.count - self.capacity + 3, 0)  # whose whole stack is there
        envs = rng.integers(len(self.count), size=batch_size)
        t = rng.integers(oldest[envs], self.count[envs] - self.n)
        while (final := self.final[envs, t % self.capacity]).any():  # nothing follows a final observation
            t[final] = rng.integers(oldest[envs[final]], self.count[envs[final]] - self.n)

        window = envs[:, None], (t[:, None] + np.arange(self.n)) % self.capacity
        ends = self.terminations[window] | self.truncations[window]
        reached = np.cumsum(ends, axis=1) - ends == 0  # (batch, n): no end came before this step
        steps = reached.sum(1)
        rewards = (self.rewards[window] * reached * self.gamma ** np.arange(self.n)).sum(1)
        discounts = self.gamma**steps * ~(self.terminations[window] & reached).any(1)

        indices = torch.from_numpy(np.concatenate([self.stack(envs, t), self.stack(envs, t + steps)]).ravel())
        frames = self.frames.index_select(0, indices.to(self.frames.device)).view(2, batch_size, 4, 84, 84)
        obs, next_obs = frames.to(self.device, non_blocking=True)
        others = (self.actions[envs, t % self.capacity].astype(np.int64), *np.float32([rewards, discounts]))
        actions, rewards, discounts = (torch.from_numpy(x).to(self.device, non_blocking=True) for x in others)
        return obs, actions, rewards, next_obs, discounts


def get_epsilon(args, global_step):
    """ε falls linearly: from the start as in CleanRL, or once learning has started as in Dopamine."""
    if args.exploration_fraction is not None:
        progress = global_step / (args.exploration_fraction * args.total_timesteps)
    else:
        progress = (global_step - args.learning_starts) / args.exploration_steps
    return args.start_e + (args.end_e - args.start_e) * min(max(progress, 0), 1)


def act(q_network, args, obs, epsilon, rng):
    """ε-greedy actions for observations, (k, 4, 84, 84) uint8, as an array."""
    explore = rng.random(len(obs)) < epsilon
    actions = rng.integers(q_network.num_actions, size=len(obs))
    if not explore.all():
        device = next(q_network.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            greedy = q_network.q_values(torch.from_numpy(obs).to(device)).argmax(1)
        actions = np.where(explore, actions, greedy.cpu().numpy())
    return actions


def evaluate(q_network, args):
    """Raw returns of `args.eval_episodes` games."""
    rng = np.random.default_rng(args.seed)
    envs = make_envs(args, 1)
    has_fire = ale_py.Action.FIRE in envs.ale.get_action_set()
    obs, info = envs.reset(seed=rng.integers(2**31, size=1))
    returns, lives, life_lost = [0.0], info["lives"], np.array([False])
    while len(returns) <= args.eval_episodes:
        actions = act(q_network, args, obs, args.eval_e, rng)
        if args.fire_reset and has_fire:
            actions[life_lost] = 1  # as in training
        obs, rewards, terminations, truncations, info = envs.step(actions)
        life_lost, lives = info["lives"] < lives, info["lives"]
        returns[-1] += float(rewards[0])
        if terminations[0] or truncations[0]:
            returns.append(0.0)
            obs, info = envs.reset()
            lives, life_lost = info["lives"], np.array([False])
    return returns[:-1]


def play_again(envs, plays):
    """Bring the games to where `plays`, a seed and the actions since for each, have led them."""
    seeds = np.array([seed for seed, _ in plays])
    lengths = np.array([len(actions) for _, actions in plays])
    envs.reset(seed=seeds)
    for left in range(lengths.max(), -1, -1):  # timesteps; short plays start late, so that all end together
        if (starts := lengths == left).any():
            envs.reset(seed=seeds[starts], options={"reset_mask": starts})
        if left:
            actions = [actions[-left] if len(actions) >= left else 0 for _, actions in plays]
            _, _, terminations, truncations, _ = envs.step(np.array(actions))
            if (done := terminations | truncations).any():
                envs.reset(seed=np.full(done.sum(), -1), options={"reset_mask": done})


def record_game(args, folder, game, seed=None, *actions):
    """Play a game again, from its seed and actions, for a video: what the agent itself sees is small and grey."""
    if not actions:
        return
    envs = make_envs(args, 1, grayscale=False, stack_num=1, img_height=210, img_width=160)
    (folder / "videos").mkdir(exist_ok=True)
    video = imageio_ffmpeg.write_frames(str(folder / f"videos/game-{game}.mp4"), (160, 210), fps=15, macro_block_size=2)
    video.send(None)
    obs, _ = envs.reset(seed=np.array([seed]))
    for action in actions:
        video.send(obs[0, 0].tobytes())
        obs, *_ = envs.step(np.array([action]))
    video.close()


def main(argv=None):
    args = parse_args(Args, argv, presets={"cleanrl": CLEANRL})
    given = given_options(args.command_line)
    if "exploration_steps" in given:
        if "exploration_fraction" in given:
            reject("--exploration-fraction: must be left out beside --exploration-steps")
        args.exploration_fraction = None
    check_meaning(args, given, "lr_control", OPTIONS_OF_CONTROLS)
    check_meaning(args, given, "bandit", {f"bandit_{x}": bandits_with(x) for x in ("step_size", "decay")})
    of_optimizers = {"momentum": ("rmsprop", "sgd"), "adam_eps": ("adam", "adamrel", "rmsprop")}
    check_meaning(args, given, "optimizer", of_optimizers)
    if {"learning_rates", "lr_range"} <= given:
        reject("--lr-range: takes the place of --learning-rates; give one of them")
    with reject_errors("--lr-range"):
        args.learning_rates = choose_arms(args.learning_rates, args.lr_range, Args.learning_rates)
    check(args, "[0, 4294967295]", "seed", "eval_episodes")
    check(args, "[0, 1000]", "noop_max")
    check(args, "[1, inf)", "num_envs", "batch_size", "update_horizon", "target_network_frequency", "train_frequency")
    check(args, "[1, inf)", "exploration_steps", "total_timesteps")
    check(args, "[2, inf)", "bandit_window")
    check(args, "[0, inf)", "lr_decay_rate", "checkpoint_interval")
    check(args, "[0, 1)", "momentum")
    check(args, f"({args.cyclic_base_lr}, 1e+37]", "cyclic_max_lr")
    check(args, "(0, inf)", "cyclic_half_period", "adam_eps", "bandit_step_size")
    check(args, "[1e-37, 1e+37]", "learning_rate", "learning_rates", "lr_range", "cyclic_base_lr")  # of a float32
    check(args, "[0, 1]", "gamma", "start_e", "end_e", "eval_e")
    check(args, "(0, 1]", "bandit_decay", "exploration_fraction")
    check(args, f"[{args.train_frequency}, inf)", "bandit_interval")
    check(args, f"[{max(args.batch_size, args.num_envs * (args.update_horizon + 8))}, inf)", "buffer_size")
    args.total_timesteps -= args.total_timesteps % args.num_envs
    check(args, f"[{args.num_envs * (args.update_horizon + 1)}, {args.total_timesteps})", "learning_starts")
    checkpoint = load_checkpoint(args, "replay.bin")

    # SET UP
    torch.manual_seed(args.seed)  # for initial weights (and IQN's quantiles); `rng` or the bandit draws all else
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    envs = make_envs(args, args.num_envs)
    has_fire = ale_py.Action.FIRE in envs.ale.get_action_set()
    num_actions = int(envs.single_action_space.n)
    q_network, target_network = (QNetwork(num_actions) for _ in range(2))
    target_network.load_state_dict(q_network.state_dict())
    for network in (q_network, target_network):
        network.to(device, memory_format=torch.channels_last)  # faster convolutions
    scheduler = make_scheduler(args, args.total_timesteps // args.num_envs)
    learning_rate = torch.tensor(scheduler.get_last_lr()[0] if scheduler else args.learning_rate, device=device)
    optimizer = make_optimizer(args, q_network.parameters(), learning_rate)
    has_bandit = args.lr_control == "bandit"
    stretch_length = 2000 if args.bandit_interval == "auto" else args.bandit_interval
    options = {n.removeprefix("bandit_"): x for n, x in vars(args).items() if n.startswith("bandit_")}
    with reject_errors("--learning-rates"):  # without a bandit, a one-armed one keeps the rounds
        bandit = make_bandit(
            args.bandit, args.learning_rates if has_bandit else [args.learning_rate], **options, seed=args.seed
        )

    on_gpu = device.type == "cuda"
    if args.buffer_device == "cuda" and not on_gpu:
        reject("--buffer-device cuda: needs a GPU")
    args.buffer_size = min(args.buffer_size, args.total_timesteps)
    replay_device = device
    if on_gpu and args.buffer_device != "cuda":
        fits = ReplayBuffer.bytes_needed(args.buffer_size) + 2**31 < torch.cuda.mem_get_info()[0]  # 2 GiB for the rest
        replay_device = device if fits and args.buffer_device == "auto" else torch.device("cpu")
    needed = ReplayBuffer.bytes_needed(args.buffer_size)
    available = torch.cuda.mem_get_info()[0] if replay_device.type == "cuda" else psutil.virtual_memory().available
    if needed > available:
        sizes = f"{needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available"
        reject(f"--buffer-size {args.buffer_size}: must be less, this run's replay needs {sizes}")
    replay = ReplayBuffer(args, replay_device, device)

    loss_function = torch.compile(td_loss) if args.compile else td_loss

    def update(*minibatch):
        loss, q_values = loss_function(q_network, target_network, args, *minibatch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), q_values.mean()

    if args.compile and on_gpu:
        from tensordict.nn import CudaGraphModule

        update = CudaGraphModule(update, warmup=3)

    def get_rate():
        return float(f"{learning_rate.item():.7g}")  # float32 has no more digits

    def training_tensors():
        """What the updates of a round change."""
        networks = [*q_network.state_dict().values(), *target_network.state_dict().values()]
        return networks + [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]

    def undo_round(reason):
        """Go back to the start of the round and charge its arm."""
        nonlocal losses
        losses = None  # or what the ruined networks had would be held against the next arm
        for now, then in zip_longest(training_tensors(), kept):
            now.zero_() if then is None else now.copy_(then)  # an optimizer has no state before its first step
        credit = (bandit.performance, bandit.arm, bandit.drawn_from, bandit.fail())
        run.log_round(global_step, get_rate(), *credit, rolled_back=reason)

    with Run(args, bandit.arms if has_bandit else None, device, (), checkpoint, replay_device=replay_device) as run:
        spare = 4 * (args.checkpoint_interval // args.num_envs + 1)
        journal = run.open_journal(replay.SLOT, args.num_envs, replay.capacity, spare)
        games = np.arange(args.num_envs)
        episode_returns, episode_steps = np.zeros(args.num_envs), np.zeros(args.num_envs, np.int64)
        lives, life_lost = np.zeros(args.num_envs, int), np.zeros(args.num_envs, bool)
        game, recording = 1, []  # the first environment's; its seed and its actions
        stretch_steps, stretch_reward, stretch_returns = 0, 0.0, []  # since the bandit's last observation
        losses, kept = None, None  # of the latest update; what a rollback goes back to
        plays, reseed = [], np.zeros(args.num_envs, bool)  # seeds and actions since; whose next game gets a seed

        def generators():
            on_gpus = torch.cuda.get_rng_state_all() if on_gpu else ()
            return {"rng": rng.bit_generator.state, "torch_rng": [torch.get_rng_state(), *on_gpus]}

        def state():
            """All that the rest of the run depends on, between two timesteps."""
            return {
                "networks": (q_network.state_dict(), target_network.state_dict()),
                "optimizer": optimizer.state_dict(),
                "schedule": scheduler and (scheduler.state_dict(), scheduler.get_last_lr()[0]),
                "bandit": bandit.state_dict(),
                "kept": kept,
                "replay_count": replay.count,
                **generators(),
                "plays": [(seed, np.array(played, np.uint8)) for seed, played in plays],
                "games": (obs, episode_returns, episode_steps, lives, life_lost, reseed),
                "loop": (game, recording, losses, stretch_steps, stretch_reward, stretch_returns),
            }

        if checkpoint:
            q_network.load_state_dict(checkpoint["networks"][0])
            target_network.load_state_dict(checkpoint["networks"][1])
            optimizer.load_state_dict(checkpoint["optimizer"])
            optimizer.param_groups[0]["lr"] = learning_rate.copy_(optimizer.param_groups[0]["lr"])
            if scheduler:
                scheduler.load_state_dict(checkpoint["schedule"][0])
                scheduler.optimizer.param_groups[0]["lr"] = checkpoint["schedule"][1]
            bandit.load_state_dict(checkpoint["bandit"])
            kept = checkpoint["kept"]
            for env, count in enumerate(checkpoint["replay_count"].numpy()):
                for t, slots in journal.read(env, count):
                    replay.write(np.full(len(slots), env), t + np.arange(len(slots)), slots)
            rng.bit_generator.state = checkpoint["rng"]
            torch.set_rng_state(checkpoint["torch_rng"][0])
            if on_gpu:
                torch.cuda.set_rng_state_all(checkpoint["torch_rng"][1 : torch.cuda.device_count() + 1])
            plays = [(seed, played.tolist()) for seed, played in checkpoint["plays"]]
            play_again(envs, plays)
            obs, episode_returns, episode_steps, lives, life_lost, reseed = (x.numpy() for x in checkpoint["games"])
            game, recording, losses, stretch_steps, stretch_reward, stretch_returns = checkpoint["loop"]
        else:
            seeds = rng.integers(2**31, size=args.num_envs)
            obs, info = envs.reset(seed=seeds)
            plays, lives = [(int(seed), []) for seed in seeds], info["lives"]
            recording = [int(seeds[0])] if args.capture_video else []
        replay.journal = run.write_journal if journal else None
        run.on_exit.callback(lambda: record_game(args, run.folder, game, *recording))

        for global_step in range(run.global_step + args.num_envs, args.total_timesteps + 1, args.num_envs):
            previous_step = global_step - args.num_envs

            # ACT
            undrawn = generators()
            actions = act(q_network, args, obs, get_epsilon(args, global_step), rng)
            if args.fire_reset and has_fire:
                actions[life_lost] = 1
            with run.saving(lambda step=previous_step, undrawn=undrawn: run.snapshot(step, state() | undrawn)):
                next_obs, rewards, terminations, truncations, info = envs.step(actions)
            clipped_rewards = rewards.clip(-1, 1)
            life_lost, lives = info["lives"] < lives, info["lives"]
            done = terminations | truncations

            # STORE
            ends = terminations | life_lost if args.terminal_on_life_loss else terminations
            replay.add(games, obs[:, -1], episode_steps, actions, clipped_rewards, ends, truncations)
            episode_steps += 1
            if truncations.any():
                replay.add(games[truncations], next_obs[truncations, -1], episode_steps[truncations], final=True)
            episode_returns += rewards
            ended_returns = episode_returns[done].tolist()
            for episodic_return, episodic_length in zip(ended_returns, episode_steps[done].tolist()):
                run.log_episode(global_step, episodic_return, episodic_length)
            if args.checkpoint_interval:
                for (_, played), action in zip(plays, actions.tolist()):
                    played.append(action)
            if recording:
                recording.append(int(actions[0]))
            if done.any():
                # The games' own generators go on, since a new seed would take 0.15 s. But the first game to start after
                # a checkpoint gets one, so that a resumed run need not play those before it again.
                seeded = done & reseed
                if done[0] and args.capture_video:
                    record_game(args, run.folder, game, *recording)
                    game, recording = game + 1, []
                    seeded[0] |= capped_cubic_video_schedule(game - 1)
                seeds = np.full(args.num_envs, -1)
                for env in np.flatnonzero(seeded):
                    seeds[env] = rng.integers(2**31)
                    plays[env], reseed[env] = (int(seeds[env]), []), False
                if done[0] and args.capture_video and capped_cubic_video_schedule(game - 1):
                    recording = [int(seeds[0])]
                next_obs, info = envs.reset(seed=seeds[done], options={"reset_mask": done})
                lives, life_lost[done] = info["lives"], False
                episode_returns[done], episode_steps[done] = 0, 0
            obs = next_obs

            # BANDIT: the agent earns a round's rewards while it learns with the round's rate. What is seen before the
            # first update shows where it starts. Before an update, a round that is over is closed, the next drawn.
            num_updates = global_step // args.train_frequency - previous_step // args.train_frequency
            if global_step <= args.learning_starts:
                num_updates = 0
            stretch_steps += args.num_envs
            stretch_reward += (rewards if args.bandit_feedback == "raw-reward" else clipped_rewards).sum()
            stretch_returns += ended_returns
            if num_updates or global_step <= args.learning_starts:
                if stretch_steps >= stretch_length and (stretch_returns or args.bandit_feedback != "return"):
                    performance = float(stretch_reward / stretch_steps)
                    if args.bandit_feedback == "return":
                        performance = sum(stretch_returns) / len(stretch_returns)
                    bandit.observe(performance, stretch_steps)
                    stretch_steps, stretch_reward, stretch_returns = 0, 0.0, []
                is_over, can_undo = bandit.round_is_over, args.rollback and has_bandit
                if can_undo and bandit.has_collapsed:
                    undo_round("performance has collapsed")
                elif can_undo and is_over and not all(x.isfinite().all() for x in training_tensors()):
                    undo_round("parameters are not finite")
                elif is_over:
                    performance, arm, probabilities = bandit.performance, bandit.arm, bandit.drawn_from
                    credit = (arm, probabilities, bandit.update(performance))
                    run.log_round(global_step, get_rate(), performance, *(credit if has_bandit else ()))
            if num_updates and bandit.arm is None:
                bandit.pull()
                kept = [tensor.clone() for tensor in training_tensors()]
                if has_bandit:
                    learning_rate.fill_(bandit.learning_rate)
                stretch_steps, stretch_reward, stretch_returns = 0, 0.0, []

            # LOG: the latest update so far; reading the actions has waited for it, so nothing waits here
            if global_step % (100 * args.num_envs) == 0 or global_step == args.total_timesteps:
                if losses is not None:
                    loss, q_value = (x.item() for x in losses)
                    scalars = {"losses/td_loss": loss, "losses/q_values": q_value}
                    run.log_scalars(scalars | {"charts/epsilon": get_epsilon(args, global_step)}, global_step)
                    if not math.isfinite(loss):
                        if not (args.rollback and has_bandit):
                            raise FloatingPointError(f"learning rate {get_rate():g} has led to an infinite loss")
                        undo_round("the loss is not finite")
                        num_updates = 0  # before the next one, an arm is drawn
                run.progress(global_step, get_rate() if losses is not None else None)

            # LEARN
            for _ in range(num_updates):
                losses = update(*replay.sample(rng, args.batch_size))
            if global_step // args.target_network_frequency > previous_step // args.target_network_frequency:
                target_network.load_state_dict(q_network.state_dict())
                if args.optimizer == "adamrel":
                    for values in optimizer.state.values():
                        values["step"].zero_()
            if scheduler:
                scheduler.step()
                learning_rate.fill_(scheduler.get_last_lr()[0])

            if args.checkpoint_interval and global_step % args.checkpoint_interval < args.num_envs:
                reseed[:] = True
            if run.wants_checkpoint(global_step):
                run.save_checkpoint(run.snapshot(global_step, state()))

        if args.save_model:
            torch.save({"q_network": q_network.state_dict()}, run.folder / "model.pt")
        if args.eval_episodes:
            run.summary["eval_returns"] = evaluate(q_network, args)


if __name__ == "__main__":
    main()

"""SAC on MuJoCo, its learning rates chosen by a multi-armed bandit while it trains (LRRL).

    python sac_mujoco_lrrl.py --env-id HalfCheetah-v5 --seed 1

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598.
SAC: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, ExponentialLR, LinearLR
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bandits import ArmSet, BanditName, bandits_with, choose_arms, make_bandit
from checkpoints import load_checkpoint
from command_line import check, check_meaning, given_options, parse_args, reject, reject_errors
from tracking import Run

mujoco.set_mju_user_warning(lambda message: None)  # its notes would go to the screen and into a MUJOCO_LOG.TXT
if sys.platform == "linux" and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
    os.environ.setdefault("MUJOCO_GL", "egl")  # lets a machine without a screen record videos


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
    """whether to compile the critics' loss; on a GPU the policy's too, and an update of either is a CUDA graph then"""
    track: bool = False
    """whether to track the run with Weights & Biases (WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "lrrl"
    """the project in Weights & Biases"""
    wandb_entity: str | None = None
    """the entity (team) in Weights & Biases"""
    capture_video: bool = False
    """whether to record videos of the first environment into the run folder"""
    save_model: bool = False
    """whether to save the trained networks into the run folder"""
    eval_episodes: int = 0
    """episodes to evaluate the trained policy's mean action on"""
    run_dir: str = "runs"
    """parent of the run folders"""
    checkpoint_interval: int = 0
    """timesteps between checkpoints in the run folder; 0: none"""
    resume: str | None = None
    """a run folder, to go on with from its last checkpoint; options that are not given stay as they were"""

    env_id: str = "Hopper-v5"
    """a gymnasium task with a bounded Box action space"""
    total_timesteps: int = 1_000_000
    """timesteps of the run, summed over environments"""
    num_envs: int = 1
    """environments stepped side by side; the updates per timestep stay the same"""
    buffer_size: int = 1_000_000
    """capacity of the replay, in timesteps"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """share of the critics that the target critics take over at a time"""
    batch_size: int = 256
    """transitions of a minibatch"""
    learning_starts: int = 5_000
    """timesteps of random actions before the first update"""
    policy_frequency: int = 2
    """timesteps between turns of the policy, each of as many updates"""
    target_network_frequency: int = 1
    """timesteps between updates of the target critics"""
    autotune: bool = True
    """whether the temperature α is learnt, to hold the policy's entropy at minus the number of action dimensions"""
    alpha: float = 0.2
    """the temperature where it is not learnt"""

    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    """of critics, policy and temperature alike (no adamrel: SAC's objective has no moment at which it changes)"""
    momentum: float = 0.9
    """of rmsprop and sgd"""

    lr_control: Literal["bandit", "constant", "linear", "exponential", "cosine", "cyclic"] = "bandit"
    """what sets the learning rates: a bandit, nothing, or a schedule (linear and cosine end at 0)"""
    learning_rate: float = 1e-3
    """the critics' rate where neither a bandit nor cyclic sets it (a schedule's first one)"""
    policy_lr_ratio: float = 0.3
    """the policy's learning rate in proportion to the critics', unless a bandit of its own sets it"""
    alpha_lr_ratio: float = 1.0
    """the temperature's learning rate in proportion to the critics'"""
    lr_decay_rate: float = 1e-7
    """d of the exponential schedule, learning-rate × exp(−d t), with t in timesteps"""
    cyclic_base_lr: float = 3e-5
    """the lowest rate of the cyclic schedule, which goes up and down in straight lines (Smith, arXiv 1506.01186)"""
    cyclic_max_lr: float = 3e-3
    """the highest rate of the cyclic schedule"""
    cyclic_half_period: int = 100_000
    """timesteps of the cyclic schedule from its lowest rate to its highest"""
    learning_rates: tuple[float, ...] | ArmSet = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    """the bandit's arms: rates, or by name some of these five (all5, lowest3, middle3, highest3, sparse3)"""
    lr_range: tuple[float, float] | None = None
    """in place of arms: the ends of a range, from which 25 rates are taken in equal ratios"""
    bandit: BanditName = "drift"
    """drift: the rate that raises performance fastest; lrrl: the paper's rule; uniform: the control, which draws every
    arm with equal probability; exp3, moss, ducb, wucb: those of others, see bandits.py"""
    bandit_scope: Literal["joint", "separate", "critic", "actor"] = "joint"
    """whose rate an arm is: joint: the critics', the others in proportion; separate: a bandit for the critics and one
    for the actor; critic, actor: of that one alone, the others keep learning-rate and its proportions"""
    bandit_interval: int | Literal["auto"] = "auto"
    """κ, the shortest round in timesteps; auto: 2 to 8 stretches of 1,000, until their trend stands out of the noise"""
    bandit_step_size: float = 0.2
    """α, the step size of the weights"""
    bandit_decay: float | None = None
    """δ, what an arm keeps from round to round (default: lrrl 0.9; exp3 and ducb 0.98)"""
    bandit_window: int = 5
    """j, the rounds that an improvement is measured against"""
    bandit_feedback: Literal["reward", "return"] | None = None
    """a round's performance: mean reward of a timestep (default of lrrl, as in the paper, of uniform and without a
    bandit), or mean return of the episodes that ended, one or more (default of the others)"""
    rollback: bool = True
    """whether a round that leads to a collapse or to values that are not finite is undone and charged to its arm"""


OPTIONS_OF_CONTROLS = {  # option: the controls that it has a meaning for
    "learning_rate": ("constant", "linear", "exponential", "cosine"),
    "lr_decay_rate": ("exponential",),
    **dict.fromkeys(("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"), ("cyclic",)),
    **dict.fromkeys(("learning_rates", "lr_range", "bandit", "bandit_scope", "rollback"), ("bandit",)),
    **dict.fromkeys(("bandit_step_size", "bandit_decay", "bandit_window"), ("bandit",)),
}
CONTROLLERS = {"joint": ("critic",), "separate": ("critic", "actor"), "critic": ("critic",), "actor": ("actor",)}


def make_env(args, render=False):
    with reject_errors(f"--env-id {args.env_id}"):
        env = gym.make(args.env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if render else {}))
    if not (isinstance(env.action_space, gym.spaces.Box) and env.action_space.dtype.kind == "f"):
        reject(f"--env-id {args.env_id}: must be a task with a Box action space of floats, not {env.action_space}")
    if not env.action_space.is_bounded():
        reject(f"--env-id {args.env_id}: must be a task whose actions have bounds, not {env.action_space}")
    if render:
        with reject_errors("--capture-video"):
            env.reset(seed=args.seed)
            env.render()
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return gym.wrappers.RecordEpisodeStatistics(env)


LOG_STD_MIN, LOG_STD_MAX = -5, 2


class Actor(nn.Module):
    """A Gaussian policy squashed by tanh into the box from `low` to `high`, (action_size,) each."""

    def __init__(self, obs_size, low, high):
        super().__init__()
        hidden = [nn.Linear(obs_size, 256), nn.ReLU(inplace=True), nn.Linear(256, 256), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*hidden, nn.Linear(256, 2 * low.size))
        self.register_buffer("scale", torch.tensor((high - low) / 2, dtype=torch.float32))
        self.register_buffer("center", torch.tensor((high + low) / 2, dtype=torch.float32))

    def forward(self, obs):
        """Mean and log standard deviation of the Gaussian, (batch, action_size) each."""
        mean, log_std = self.layers(obs).chunk(2, -1)
        return mean, LOG_STD_MIN + (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1) / 2

    def get_action(self, obs, noise):
        """Actions for `noise` of their shape: standard normal to draw them, 0 for the mean's."""
        mean, log_std = self(obs)
        return torch.tanh(mean + log_std.exp() * noise) * self.scale + self.center

    def get_action_and_log_prob(self, obs, noise):
        """Actions for standard normal `noise` of their shape, and their log-probabilities, (batch,)."""
        mean, log_std = self(obs)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # minus the log of the derivative of tanh, 1 - tanh(x)², in a form that does not round to 0 where x is large
        log_prob = log_prob - 2 * (math.log(2) - x - F.softplus(-2 * x)) - self.scale.log()
        return torch.tanh(x) * self.scale + self.center, log_prob.sum(-1)


class TwinCritics(nn.Module):
    """Two Q-networks as one: each layer is a batch of two matrices."""

    def __init__(self, obs_size, action_size):
        super().__init__()
        self.weight1, self.bias1 = self.make_layer(obs_size + action_size, 256)
        self.weight2, self.bias2 = self.make_layer(256, 256)
        self.weight3, self.bias3 = self.make_layer(256, 1)

    @staticmethod
    def make_layer(inputs, outputs):
        bound = 1 / math.sqrt(inputs)  # as nn.Linear
        shapes = (2, inputs, outputs), (2, 1, outputs)
        return [nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes]

    def forward(self, obs, actions):
        """The Q-values of both, (2, batch)."""
        x = torch.cat([obs, actions], -1).expand(2, -1, -1)
        x = F.relu(torch.baddbmm(self.bias1, x, self.weight1), inplace=True)
        x = F.relu(torch.baddbmm(self.bias2, x, self.weight2), inplace=True)
        # as torch.baddbmm, in a sixth of its time: a column is too thin for it
        return (x * self.weight3.mT).sum(-1) + self.bias3.squeeze(-1)


class ReplayBuffer:
    """A ring of transitions, each a row of one block of memory, which is taken as it fills (on a GPU, at once)."""

    def __init__(self, capacity, obs_size, action_size, device):
        self.sizes = (obs_size, action_size, obs_size, 1, 1)
        self.rows = torch.empty((capacity, sum(self.sizes)), device=device)
        self.count = 0  # of all rows ever written

    def add(self, obs, actions, next_obs, rewards, terminations):
        """Write k transitions: arrays of (k, size), rewards and terminations of (k,). Returns the rows, (k, width)."""
        columns = (obs, actions, next_obs, rewards[:, None], terminations[:, None])
        rows = np.concatenate(columns, axis=1, dtype=np.float32)
        self.write(self.count, rows)
        return rows

    def write(self, index, rows):
        """Write `rows`, (k, width), the first of which is the `index`-th of all."""
        self.count = index + len(rows)
        slots = torch.arange(index, self.count) % len(self.rows)
        self.rows[slots.to(self.rows.device)] = torch.from_numpy(rows).to(self.rows.device)

    def sample(self, rng, batch_size):
        """Uniform transitions, as float32 tensors in the order of `add`."""
        indices = torch.from_numpy(rng.integers(min(self.count, len(self.rows)), size=batch_size))
        rows = self.rows.index_select(0, indices.to(self.rows.device))
        obs, actions, next_obs, rewards, terminations = rows.split(self.sizes, 1)
        return obs, actions, next_obs, rewards.squeeze(1), terminations.squeeze(1)


def critic_loss(actor, critics, target_critics, log_alpha, args, minibatch, noise):
    """Soft Bellman error (arXiv 1812.05905, eq. 5) of both critics and, for the log, their values, (2, batch)."""
    obs, actions, next_obs, rewards, terminations = minibatch
    with torch.no_grad():
        next_actions, next_log_probs = actor.get_action_and_log_prob(next_obs, noise)
        next_values = target_critics(next_obs, next_actions).amin(0) - log_alpha.exp() * next_log_probs
        targets = rewards + args.gamma * (1 - terminations) * next_values
    values = critics(obs, actions)
    return (values - targets).square().mean(1).sum(), values.detach()


def actor_loss(actor, critics, log_alpha, obs, noise):
    """The policy's loss (arXiv 1812.05905, eq. 9) and the log-probabilities of its actions, (batch,)."""
    actions, log_probs = actor.get_action_and_log_prob(obs, noise)
    return (log_alpha.detach().exp() * log_probs - critics(obs, actions).amin(0)).mean(), log_probs.detach()


def make_optimizer(args, parameters, learning_rate):
    """An optimizer whose rate is a tensor: it changes in place, moments stay, a captured step is not captured again."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=args.momentum, fused=True)
    if args.optimizer == "rmsprop":
        options = {"alpha": 0.95, "eps": 1e-8, "momentum": args.momentum}
        return torch.optim.RMSprop(parameters, lr=learning_rate, **options, capturable=learning_rate.is_cuda)
    captured = args.compile and learning_rate.is_cuda
    return torch.optim.Adam(parameters, lr=learning_rate, eps=1e-8, fused=True, capturable=captured)


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


def evaluate(actor, args, device):
    """Returns of `args.eval_episodes` episodes of the mean action."""
    returns = []
    with make_env(args) as env, torch.no_grad():
        shape, low, high = env.action_space.shape, env.action_space.low, env.action_space.high
        for episode in range(args.eval_episodes):
            obs, info = env.reset(seed=args.seed + episode)
            while "episode" not in info:
                action = actor.get_action(torch.tensor(obs, dtype=torch.float32, device=device), 0)
                obs, _, _, _, info = env.step(action.cpu().numpy().reshape(shape).clip(low, high))
            returns.append(float(info["episode"]["r"]))
    return returns


def main(argv=None):
    args = parse_args(Args, argv)
    given = given_options(args.command_line)
    scope = args.bandit_scope if args.lr_control == "bandit" else None
    if scope in ("critic", "actor"):
        given.discard("learning_rate")  # has a meaning then: it is the rate of what the bandit does not control
    check_meaning(args, given, "lr_control", OPTIONS_OF_CONTROLS)
    check_meaning(args, given, "bandit", {f"bandit_{x}": bandits_with(x) for x in ("step_size", "decay")})
    check_meaning(args, given, "autotune", {"alpha": (False,), "alpha_lr_ratio": (True,)})
    if scope:
        check_meaning(args, given, "bandit_scope", {"policy_lr_ratio": ("joint", "critic")})
    if args.bandit_feedback is None:
        as_in_paper = args.lr_control != "bandit" or args.bandit in ("lrrl", "uniform")
        args.bandit_feedback = "reward" if as_in_paper else "return"
    check_meaning(args, given, "optimizer", {"momentum": ("rmsprop", "sgd")})
    if {"learning_rates", "lr_range"} <= given:
        reject("--lr-range: takes the place of --learning-rates; give one of them")
    with reject_errors("--lr-range"):
        args.learning_rates = choose_arms(args.learning_rates, args.lr_range, Args.learning_rates)
    check(args, "[0, 4294967295]", "seed", "eval_episodes")
    check(args, "[1, inf)", "total_timesteps", "num_envs", "batch_size", "policy_frequency", "target_network_frequency")
    check(args, "[2, inf)", "bandit_window")
    check(args, "[0, inf)", "lr_decay_rate", "checkpoint_interval")
    check(args, "[0, 1)", "momentum")
    check(args, f"({args.cyclic_base_lr}, 1e+37]", "cyclic_max_lr")
    check(args, "(0, inf)", "cyclic_half_period", "policy_lr_ratio", "alpha_lr_ratio", "alpha", "bandit_step_size")
    check(args, "[1e-37, 1e+37]", "learning_rate", "learning_rates", "lr_range", "cyclic_base_lr")  # of a float32
    check(args, "[0, 1]", "gamma")
    check(args, "(0, 1]", "tau", "bandit_decay")
    check(args, f"[{args.num_envs}, inf)", "bandit_interval")
    check(args, f"[{args.batch_size}, inf)", "buffer_size")
    args.total_timesteps -= args.total_timesteps % args.num_envs
    check(args, f"[1, {args.learning_starts}]", *given & {"batch_size"})
    check(args, f"[{args.batch_size}, {args.total_timesteps})", "learning_starts")
    checkpoint = load_checkpoint(args, "replay.bin")

    # SET UP
    torch.manual_seed(args.seed)  # for initial weights and the policy's noise; `rng` or the bandit draws all else
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"

    envs = [make_env(args, render=args.capture_video and i == 0) for i in range(args.num_envs)]
    obs_size = envs[0].observation_space.shape[0]
    low, high = envs[0].action_space.low.ravel(), envs[0].action_space.high.ravel()
    action_shape, action_size = envs[0].action_space.shape, low.size

    actor = Actor(obs_size, low, high).to(device)
    critics = TwinCritics(obs_size, action_size).to(device)
    target_critics = copy.deepcopy(critics).requires_grad_(False)
    move_targets = get_ema_multi_avg_fn(1 - args.tau)
    log_alpha = torch.tensor(0.0 if args.autotune else math.log(args.alpha), device=device, requires_grad=args.autotune)
    critic_lr, actor_lr, alpha_lr = (torch.zeros((), device=device) for _ in range(3))
    controlled_lr = {"critic": critic_lr, "actor": actor_lr}
    critic_optimizer = make_optimizer(args, critics.parameters(), critic_lr)
    actor_groups = [{"params": actor.parameters(), "lr": actor_lr}, {"params": [log_alpha], "lr": alpha_lr}]
    actor_optimizer = make_optimizer(args, actor_groups, actor_lr)
    scheduler = make_scheduler(args, args.total_timesteps // args.num_envs)
    stretch_length = 1000 if args.bandit_interval == "auto" else args.bandit_interval
    options = {n.removeprefix("bandit_"): x for n, x in vars(args).items() if n.startswith("bandit_")}
    bandits = {}
    with reject_errors("--learning-rates"):  # without a bandit, a one-armed one keeps the rounds
        for i, controller in enumerate(CONTROLLERS[scope or "joint"]):
            rates = args.learning_rates if scope else [args.learning_rate]
            bandits[controller] = make_bandit(args.bandit, rates, **options, seed=(args.seed, i))

    def set_rates(base):
        """Write the three rates, from the bandits' arms and from `base`, which is that of --learning-rate now."""
        arms = {controller: bandit.learning_rate for controller, bandit in bandits.items()} if scope else {}
        critic_lr.fill_(critic_rate := arms.get("critic", base))
        followed = base if scope in ("critic", "actor") else critic_rate
        actor_lr.fill_(arms.get("actor", followed * args.policy_lr_ratio))
        alpha_lr.fill_(followed * args.alpha_lr_ratio)

    def get_rate(learning_rate):
        return float(f"{learning_rate.item():.7g}")  # float32 has no more digits

    if not scope:
        set_rates(scheduler.get_last_lr()[0] if scheduler else args.learning_rate)

    critic_loss_function, actor_loss_function = critic_loss, actor_loss
    if args.compile:
        critic_loss_function = torch.compile(critic_loss)
        actor_loss_function = torch.compile(actor_loss) if on_gpu else actor_loss  # on a CPU it would be slower

    def update_critics(noise, *minibatch):
        loss, values = critic_loss_function(actor, critics, target_critics, log_alpha, args, minibatch, noise)
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        return {"losses/qf_loss": loss.detach() / 2, "losses/qf_values": values.mean()}

    def update_policy(noise, obs):
        critics.requires_grad_(False)  # the gradient goes through them, they need none of their own
        loss, log_probs = actor_loss_function(actor, critics, log_alpha, obs, noise)
        critics.requires_grad_(True)
        alpha_loss = -log_alpha.exp() * (log_probs.mean() - action_size)  # arXiv 1812.05905, eq. 18
        actor_optimizer.zero_grad()
        (loss + alpha_loss).backward()
        actor_optimizer.step()
        losses = {"actor_loss": loss, "alpha": log_alpha.exp()} | ({"alpha_loss": alpha_loss} if args.autotune else {})
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    if args.compile and on_gpu:
        from tensordict.nn import CudaGraphModule

        update_critics, update_policy = (CudaGraphModule(f, warmup=3) for f in (update_critics, update_policy))

    replay = ReplayBuffer(min(args.buffer_size, args.total_timesteps), obs_size, action_size, device)

    def act(obs, noise):
        with torch.no_grad():
            return actor.get_action(torch.from_numpy(obs).to(device), noise).cpu().numpy()

    def reset(i):
        """Start an episode with a seed of its own: seed and actions are all it takes to play it again."""
        episodes[i] = seed, _ = int(rng.integers(2**31)), []
        return envs[i].reset(seed=seed)[0]

    def training_tensors():
        """What the updates of a round change."""
        networks = [x for network in (actor, critics, target_critics) for x in network.state_dict().values()]
        states = [*critic_optimizer.state.values(), *actor_optimizer.state.values()]
        return [*networks, log_alpha.data, *(x for state in states for x in state.values() if torch.is_tensor(x))]

    def undo_round(reason):
        """Go back to the start of the round and charge its arms."""
        for now, then in zip_longest(training_tensors(), kept):
            now.zero_() if then is None else now.copy_(then)  # an optimizer has no state before its first step
        for controller, bandit in bandits.items():
            credit = (bandit.performance, bandit.arm, bandit.drawn_from, bandit.fail())
            run.log_round(
                global_step, get_rate(controlled_lr[controller]), *credit, controller=controller, rolled_back=reason
            )
            reason = None  # two bandits make one rollback

    with Run(args, args.learning_rates if scope else None, device, tuple(bandits), checkpoint) as run:
        if args.capture_video:
            prefix = f"rl-video-from-{run.global_step}" if checkpoint else "rl-video"
            video = gym.wrappers.RecordVideo(envs[0], str(run.folder / "videos"), name_prefix=prefix)
            envs[0] = run.on_exit.enter_context(video)
        row_type, spare = (np.float32, replay.rows.shape[1]), 2 * (args.checkpoint_interval + args.num_envs)
        journal = run.open_journal(row_type, 1, len(replay.rows), spare)
        episodes = [None] * args.num_envs  # those that are running: seed, actions
        rewards, terminations = np.zeros(args.num_envs, np.float32), np.zeros(args.num_envs, bool)
        stretch_steps, stretch_reward, stretch_returns = 0, 0.0, []  # since the bandits' last observation
        losses, kept = {}, None  # of the latest updates; what a rollback goes back to
        networks = {"actor": actor, "critics": critics, "target_critics": target_critics}
        optimizers = (critic_optimizer, actor_optimizer)

        def generators():
            on_gpus = torch.cuda.get_rng_state_all() if on_gpu else ()
            return {"rng": rng.bit_generator.state, "torch_rng": [torch.get_rng_state(), *on_gpus]}

        def state():
            """All that the rest of the run depends on, between two timesteps."""
            return {name: network.state_dict() for name, network in networks.items()} | {
                "log_alpha": log_alpha.data,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "schedule": scheduler and (scheduler.state_dict(), scheduler.get_last_lr()[0]),
                "bandits": {controller: bandit.state_dict() for controller, bandit in bandits.items()},
                "kept": kept,
                "replay_count": replay.count,
                **generators(),
                "episodes": [(seed, np.array(played)) for seed, played in episodes],
                "loop": (obs, losses, stretch_steps, stretch_reward, stretch_returns),
            }

        if checkpoint:
            for name, network in networks.items():
                network.load_state_dict(checkpoint[name])
            log_alpha.data.copy_(checkpoint["log_alpha"])
            for optimizer, values in zip(optimizers, checkpoint["optimizers"]):
                optimizer.load_state_dict(values)
            groups = critic_optimizer.param_groups + actor_optimizer.param_groups
            for group, rate in zip(groups, (critic_lr, actor_lr, alpha_lr)):
                group["lr"] = rate.copy_(group["lr"])
            if scheduler:
                scheduler.load_state_dict(checkpoint["schedule"][0])
                scheduler.optimizer.param_groups[0]["lr"] = checkpoint["schedule"][1]
            for controller, bandit in bandits.items():
                bandit.load_state_dict(checkpoint["bandits"][controller])
            kept = checkpoint["kept"]
            for index, rows in journal.read(0, checkpoint["replay_count"]):
                replay.write(index, rows)
            rng.bit_generator.state = checkpoint["rng"]
            torch.set_rng_state(checkpoint["torch_rng"][0])
            if on_gpu:
                torch.cuda.set_rng_state_all(checkpoint["torch_rng"][1 : torch.cuda.device_count() + 1])
            for i, (seed, played) in enumerate(checkpoint["episodes"]):
                episodes[i] = seed, list(played.numpy())
                envs[i].reset(seed=seed)
                for action in played.numpy():
                    envs[i].step(action)
            obs, losses, stretch_steps, stretch_reward, stretch_returns = checkpoint["loop"]
            obs = obs.numpy()
        else:
            obs = np.array([reset(i) for i in range(args.num_envs)], np.float32)
        next_obs = np.zeros_like(obs)

        for global_step in range(run.global_step + args.num_envs, args.total_timesteps + 1, args.num_envs):
            previous_step = global_step - args.num_envs

            # ACT
            undrawn = generators()
            if global_step <= args.learning_starts:
                actions = rng.uniform(low, high, (args.num_envs, action_size)).astype(np.float32)
            else:
                noise = torch.randn((args.num_envs, action_size), device=device)
                actions = act(obs, noise)
                if not np.isfinite(actions).all() and args.rollback and scope and kept:
                    undo_round("actions are not finite")
                    actions = act(obs, noise)
                if not np.isfinite(actions).all():
                    rates = f"{get_rate(critic_lr):g} (critics) and {get_rate(actor_lr):g} (policy)"
                    raise FloatingPointError(f"learning rates {rates} have led to actions that are not finite")

            # STORE
            step_reward, step_returns, ended = 0.0, [], []
            env_actions = actions.clip(low, high).reshape(-1, *action_shape)  # rounding may have left the box
            with run.saving(lambda step=previous_step, undrawn=undrawn: run.snapshot(step, state() | undrawn)):
                results = [env.step(action) for env, action in zip(envs, env_actions)]
            for i, (raw_obs, reward, terminated, truncated, info) in enumerate(results):
                episodes[i][1].append(env_actions[i])
                next_obs[i], terminations[i] = raw_obs, terminated
                rewards[i] = reward
                step_reward += float(reward)
                if terminations[i] or truncated:
                    ended.append(i)
                    step_returns.append(float(info["episode"]["r"]))
                    run.log_episode(global_step, step_returns[-1], info["episode"]["l"])
            if not (math.isfinite(step_reward) and np.isfinite(next_obs).all()):
                raise FloatingPointError(f"{args.env_id} has returned observations or rewards that are not finite")
            for i, row in enumerate(replay.add(obs, actions, next_obs, rewards, terminations)):
                run.write_journal(0, replay.count - args.num_envs + i, row)
            obs[:] = next_obs
            for i in ended:
                obs[i] = reset(i)

            # BANDIT: the agent earns a round's rewards while it learns with the round's rates. What is seen before the
            # first update shows where it starts. Before an update, a round that is over is closed, the next drawn.
            stretch_steps += args.num_envs
            stretch_reward += step_reward
            stretch_returns += step_returns
            if stretch_steps >= stretch_length and (stretch_returns or args.bandit_feedback == "reward"):
                performance = stretch_reward / stretch_steps
                if args.bandit_feedback == "return":
                    performance = sum(stretch_returns) / len(stretch_returns)
                for bandit in bandits.values():
                    bandit.observe(performance, stretch_steps)
                stretch_steps, stretch_reward, stretch_returns = 0, 0.0, []
            first = bandits["actor" if scope == "actor" else "critic"]  # all of them see the same
            is_over, can_undo = first.round_is_over, args.rollback and scope
            if can_undo and first.has_collapsed:
                undo_round("performance has collapsed")
            elif can_undo and is_over and not all(x.isfinite().all() for x in training_tensors()):
                undo_round("parameters are not finite")
            elif is_over:
                for controller, bandit in bandits.items():
                    performance, arm, probabilities = bandit.performance, bandit.arm, bandit.drawn_from
                    credit = (arm, probabilities, bandit.update(performance))
                    rate = get_rate(controlled_lr[controller])
                    run.log_round(global_step, rate, performance, *(credit if scope else ()), controller=controller)
            if global_step > args.learning_starts and first.arm is None:
                for bandit in bandits.values():
                    bandit.pull()
                kept = [tensor.clone() for tensor in training_tensors()]
                if scope:
                    set_rates(args.learning_rate)
                stretch_steps, stretch_reward, stretch_returns = 0, 0.0, []

            # LOG: the latest updates so far; reading the actions has waited for them, so nothing waits here
            if global_step % (100 * args.num_envs) == 0 or global_step == args.total_timesteps:
                if losses:
                    scalars = {name: value.item() for name, value in losses.items()}
                    run.log_scalars(scalars, global_step)
                shown_lr = controlled_lr["actor" if scope == "actor" else "critic"]
                run.progress(global_step, get_rate(shown_lr) if losses else None)

            # LEARN
            for step in range(max(previous_step, args.learning_starts) + 1, global_step + 1):
                obs_batch, *others = replay.sample(rng, args.batch_size)
                noise = torch.randn((1 + args.policy_frequency, args.batch_size, action_size), device=device)
                losses |= update_critics(noise[0], obs_batch, *others)
                if step % args.policy_frequency == 0:
                    for policy_noise in noise[1:]:
                        losses |= update_policy(policy_noise, obs_batch)
                if step % args.target_network_frequency == 0:
                    move_targets(list(target_critics.parameters()), list(critics.parameters()), None)
            if scheduler:
                scheduler.step()
                set_rates(scheduler.get_last_lr()[0])

            if run.wants_checkpoint(global_step):
                run.save_checkpoint(run.snapshot(global_step, state()))

        if args.save_model:
            torch.save({"actor": actor.state_dict(), "critics": critics.state_dict()}, run.folder / "model.pt")
        if args.eval_episodes:
            run.summary["eval_returns"] = evaluate(actor, args, device)


if __name__ == "__main__":
    main()

"""PPO for continuous actions, its learning rate chosen by a multi-armed bandit while it trains (LRRL).

    python ppo_continuous_lrrl.py --env-id HalfCheetah-v5 --seed 1

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598.
PPO: Schulman et al., arXiv 1707.06347, with the hyper-parameters of CleanRL's ppo_continuous_action.py.
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
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, ExponentialLR, LinearLR

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
    """whether to compile the loss with torch.compile (on a GPU with CUDA graphs); takes some 20 seconds at the start"""
    track: bool = False
    """whether to track the run with Weights & Biases (WANDB_MODE=offline needs no network)"""
    wandb_project_name: str = "lrrl"
    """the project in Weights & Biases"""
    wandb_entity: str | None = None
    """the entity (team) in Weights & Biases"""
    capture_video: bool = False
    """whether to record videos of the first environment into the run folder"""
    save_model: bool = False
    """whether to save the trained agent and its normalisation statistics into the run folder"""
    eval_episodes: int = 0
    """episodes to evaluate the trained agent on: mean actions, frozen normalisation statistics"""
    run_dir: str = "runs"
    """parent of the run folders"""
    checkpoint_interval: int = 0
    """timesteps between checkpoints in the run folder; 0: none"""
    resume: str | None = None
    """a run folder, to go on with from its last checkpoint; options that are not given stay as they were"""

    env_id: str = "HalfCheetah-v5"
    """any gymnasium task with a Box action space of floats"""
    total_timesteps: int = 1_000_000
    """timesteps of the run, summed over environments; rounded down to whole rollouts"""
    num_envs: int = 1
    """environments stepped side by side"""
    num_steps: int = 2048
    """steps of each environment in a rollout"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """λ of generalized advantage estimation"""
    num_minibatches: int = 32
    """minibatches of an epoch; must divide num-envs × num-steps"""
    update_epochs: int = 10
    """epochs of an update"""
    norm_adv: bool = True
    """whether to normalise the advantages of each minibatch"""
    clip_coef: float = 0.2
    """the surrogate's clipping coefficient"""
    clip_vloss: bool = True
    """whether to clip the value loss too"""
    ent_coef: float = 0.0
    """coefficient of the entropy"""
    vf_coef: float = 0.5
    """coefficient of the value loss"""
    max_grad_norm: float = 0.5
    """the norm to which gradients are clipped"""

    optimizer: Literal["adam", "adamrel", "rmsprop", "sgd"] = "adam"
    """adamrel: Adam that counts its steps anew with every rollout (Ellis et al., arXiv 2412.17113)"""
    momentum: float = 0.9
    """of rmsprop and sgd"""

    lr_control: Literal["bandit", "constant", "linear", "exponential", "cosine", "cyclic", "kl"] = "bandit"
    """what sets the learning rate: a bandit, nothing, a schedule (linear and cosine end at 0), or the updates' KL"""
    learning_rate: float = 3e-4
    """the rate of the controls but bandit and cyclic (the first one of a schedule and of kl)"""
    target_kl: float = 0.01
    """of kl: an epoch with more than twice this KL divides the rate by 1.5, one with less than half of it multiplies,
    within the bounds of rl_games, 1e-6 and 1e-2"""
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
    bandit_interval: int | Literal["auto"] = "auto"
    """κ, the shortest round in timesteps; auto: 2 to 8 rollouts, until their trend stands out of the noise"""
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
    "learning_rate": ("constant", "linear", "exponential", "cosine", "kl"),
    "lr_decay_rate": ("exponential",),
    "target_kl": ("kl",),
    **dict.fromkeys(("cyclic_base_lr", "cyclic_max_lr", "cyclic_half_period"), ("cyclic",)),
    **dict.fromkeys(("learning_rates", "lr_range", "bandit", "rollback"), ("bandit",)),
    **dict.fromkeys(("bandit_step_size", "bandit_decay", "bandit_window"), ("bandit",)),
}


def make_env(args, render=False):
    with reject_errors(f"--env-id {args.env_id}"):
        env = gym.make(args.env_id, disable_env_checker=True, **({"render_mode": "rgb_array"} if render else {}))
    if not (isinstance(env.action_space, gym.spaces.Box) and env.action_space.dtype.kind == "f"):
        reject(f"--env-id {args.env_id}: must be a task with a Box action space of floats, not {env.action_space}")
    if render:
        with reject_errors("--capture-video"):
            env.reset(seed=args.seed)
            env.render()
    if len(env.observation_space.shape or ()) != 1:
        env = gym.wrappers.FlattenObservation(env)
    return gym.wrappers.RecordEpisodeStatistics(env)


class RunningMeanStd:
    """Welford's running mean and standard deviation of floats or arrays; gymnasium's takes 18 µs, a tenth of a step."""

    def __init__(self, count=0, mean=0.0, squares=0.0):
        self.count, self.mean, self.squares = count, mean, squares  # squares: summed squared differences from the mean

    def update(self, x):
        self.count += 1
        delta = x - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (x - self.mean)

    @property
    def std(self):
        return (self.squares / self.count + 1e-8) ** 0.5

    def normalize(self, x):
        return ((x - self.mean) / self.std).clip(-10, 10)


def make_network(input_size, output_size, output_std):
    layers = [nn.Linear(input_size, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, output_size)]
    for layer, std in zip(layers[::2], (math.sqrt(2), math.sqrt(2), output_std), strict=True):
        nn.init.orthogonal_(layer.weight, std)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    def __init__(self, obs_size, action_size):
        super().__init__()
        self.critic = make_network(obs_size, 1, output_std=1.0)
        self.actor_mean = make_network(obs_size, action_size, output_std=0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(action_size))

    def flatten_parameters(self):
        """Move all parameters and gradients into one vector: clipping and Adam then take one call instead of 13."""
        vector = nn.Parameter(nn.utils.parameters_to_vector(self.parameters()).detach())
        vector.grad = torch.zeros_like(vector)
        sizes = [parameter.numel() for parameter in self.parameters()]
        for parameter, data, grad in zip(self.parameters(), vector.data.split(sizes), vector.grad.split(sizes)):
            parameter.data, parameter.grad = data.view_as(parameter), grad.view_as(parameter)
        return vector

    def get_value(self, obs):
        return self.critic(obs).squeeze(-1)

    def get_log_prob(self, obs, actions):
        z = (actions - self.actor_mean(obs)) / self.actor_logstd.exp()
        return -0.5 * z.square().sum(-1) - self.actor_logstd.sum() - 0.5 * math.log(2 * math.pi) * actions.shape[-1]

    def get_entropy(self):
        return (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()

    def numpy_policy(self):
        """The mean action as a NumPy function: on a single observation, torch would take ten times as long."""
        w1, b1, w2, b2, w3, b3 = (parameter.detach().cpu().numpy().T for parameter in self.actor_mean.parameters())
        return lambda obs: np.tanh(np.tanh(obs @ w1 + b1) @ w2 + b2) @ w3 + b3


def calculate_gae(args, rewards, values, next_values, terminations, truncations):
    """Generalized advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16); arrays of (num_steps, num_envs).

    `next_values` are those of the observations that the steps led to, before any reset. The end of an episode cuts the
    sum over later steps, but only a termination makes the next value 0; a truncation bootstraps from it.
    """
    deltas = rewards + args.gamma * next_values * ~terminations - values
    discounts = args.gamma * args.gae_lambda * ~(terminations | truncations)
    advantages = np.zeros_like(deltas)
    advantage = 0.0
    for t in reversed(range(len(deltas))):
        advantages[t] = advantage = deltas[t] + discounts[t] * advantage
    return advantages


def ppo_loss(agent, args, advantages, obs, actions, old_log_probs, old_values, returns):
    """The loss of one minibatch (arXiv 1707.06347, eq. 7 and 9) and, for the log, its terms before the mean."""
    log_ratio = agent.get_log_prob(obs, actions) - old_log_probs
    ratio = log_ratio.exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_losses = torch.max(-advantages * ratio, -advantages * clipped_ratio)

    values = agent.get_value(obs)
    value_errors = (values - returns).square()
    if args.clip_vloss:
        clipped_values = old_values + (values - old_values).clamp(-args.clip_coef, args.clip_coef)
        value_errors = torch.max(value_errors, (clipped_values - returns).square())

    loss = (policy_losses + 0.5 * args.vf_coef * value_errors).mean()
    if args.ent_coef > 0:
        loss = loss - args.ent_coef * agent.get_entropy()
    return loss, policy_losses.detach(), value_errors.detach(), log_ratio.detach()


def make_optimizer(args, parameters, learning_rate):
    """An optimizer whose rate is a tensor: it changes in place, moments stay, a captured step is not captured again."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=args.momentum, fused=True)
    if args.optimizer == "rmsprop":
        options = {"alpha": 0.95, "eps": 1e-5, "momentum": args.momentum}
        return torch.optim.RMSprop(parameters, lr=learning_rate, **options, capturable=learning_rate.is_cuda)
    return torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5, fused=True)


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


def evaluate(agent, obs_stats, args):
    """Returns of `args.eval_episodes` episodes of the mean action, with the normalisation statistics frozen."""
    policy = agent.numpy_policy()
    returns = []
    with make_env(args) as env:
        low, high = env.action_space.low, env.action_space.high
        for episode in range(args.eval_episodes):
            obs, info = env.reset(seed=args.seed + episode)
            while "episode" not in info:
                action = policy(obs_stats.normalize(obs).astype(np.float32))
                obs, _, _, _, info = env.step(action.reshape(low.shape).clip(low, high))
            returns.append(float(info["episode"]["r"]))
    return returns


def main(argv=None):
    args = parse_args(Args, argv)
    given = given_options(args.command_line)
    check_meaning(args, given, "lr_control", OPTIONS_OF_CONTROLS)
    check_meaning(args, given, "bandit", {f"bandit_{x}": bandits_with(x) for x in ("step_size", "decay")})
    if args.bandit_feedback is None:
        as_in_paper = args.lr_control != "bandit" or args.bandit in ("lrrl", "uniform")
        args.bandit_feedback = "reward" if as_in_paper else "return"
    check_meaning(args, given, "optimizer", {"momentum": ("rmsprop", "sgd")})
    if {"learning_rates", "lr_range"} <= given:
        reject("--lr-range: takes the place of --learning-rates; give one of them")
    with reject_errors("--lr-range"):
        args.learning_rates = choose_arms(args.learning_rates, args.lr_range, Args.learning_rates)
    check(args, "[0, 4294967295]", "seed", "eval_episodes")
    check(args, "[0, inf)", "ent_coef", "vf_coef", "checkpoint_interval", "lr_decay_rate")
    check(args, "[1, inf)", "num_envs", "num_steps", "num_minibatches", "update_epochs", "bandit_interval")
    check(args, "[2, inf)", "bandit_window")
    check(args, "[0, 1)", "momentum")
    check(args, f"({args.cyclic_base_lr}, 1e+37]", "cyclic_max_lr")
    check(args, "(0, inf)", "cyclic_half_period", "target_kl", "clip_coef", "max_grad_norm", "bandit_step_size")
    check(args, "[1e-37, 1e+37]", "learning_rate", "learning_rates", "lr_range", "cyclic_base_lr")  # of a float32
    check(args, "[1e-06, 0.01]", *({"learning_rate"} if args.lr_control == "kl" else ()))
    check(args, "[0, 1]", "gamma", "gae_lambda")
    check(args, "(0, 1]", "bandit_decay")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size == args.num_minibatches:
        reject(f"--num-minibatches {args.num_minibatches}: must divide num-envs × num-steps = {batch_size} and be less")
    if args.total_timesteps < batch_size:
        reject(f"--total-timesteps {args.total_timesteps}: must be num-envs × num-steps = {batch_size} or more")
    num_iterations = args.total_timesteps // batch_size
    args.total_timesteps = num_iterations * batch_size
    checkpoint = load_checkpoint(args)

    # SET UP
    torch.set_num_threads(1)  # the layers are too small to share
    torch.manual_seed(args.seed)  # for the initial weights; all that is random later comes from `rng` or the bandit
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    envs = [make_env(args, render=args.capture_video and i == 0) for i in range(args.num_envs)]
    obs_size = envs[0].observation_space.shape[0]
    low, high = envs[0].action_space.low, envs[0].action_space.high

    agent = Agent(obs_size, low.size).to(device)
    parameters = agent.flatten_parameters()
    scheduler = make_scheduler(args, num_iterations)
    learning_rate = torch.tensor(scheduler.get_last_lr()[0] if scheduler else args.learning_rate, device=device)
    optimizer = make_optimizer(args, [parameters], learning_rate)
    has_bandit = args.lr_control == "bandit"
    options = {n.removeprefix("bandit_"): x for n, x in vars(args).items() if n.startswith("bandit_")}
    with reject_errors("--learning-rates"):  # without a bandit, a one-armed one keeps the rounds
        bandit = make_bandit(
            args.bandit, args.learning_rates if has_bandit else [args.learning_rate], **options, seed=args.seed
        )
    loss_function = ppo_loss
    if args.compile:
        loss_function = torch.compile(ppo_loss, mode="reduce-overhead" if device.type == "cuda" else "default")

    # STORAGE
    shape = (args.num_steps, args.num_envs)
    observations = np.zeros((*shape, obs_size), np.float32)
    next_observations = np.zeros_like(observations)
    actions = np.zeros((*shape, low.size), np.float32)
    rewards, terminations, truncations = (np.zeros(shape, dtype) for dtype in (np.float32, bool, bool))
    obs_stats, return_stats = RunningMeanStd(mean=np.zeros(obs_size)), RunningMeanStd()

    def to_device(array):
        return torch.from_numpy(array.reshape(batch_size, *array.shape[2:])).to(device)

    def reset(i):
        """Start an episode with a seed of its own: seed and actions are all it takes to play it again."""
        episodes[i] = seed, _ = int(rng.integers(2**31)), []
        obs, _ = envs[i].reset(seed=seed)
        obs_stats.update(obs)
        return obs_stats.normalize(obs)

    def training_state():
        """What a round changes: tensors to be copied, normalisation statistics to be exchanged."""
        tensors = [parameters.data, *(x for x in optimizer.state.get(parameters, {}).values() if torch.is_tensor(x))]
        return tensors, (copy.copy(obs_stats), copy.copy(return_stats))

    def undo_round(reason):
        """Go back to the start of the round and charge its arm."""
        nonlocal obs_stats, return_stats
        tensors, (obs_stats, return_stats) = kept
        for now, then in zip_longest(training_state()[0], tensors):
            now.zero_() if then is None else now.copy_(then)  # an optimizer has no state before its first step
        credit = (bandit.performance, bandit.arm, bandit.drawn_from, bandit.fail())
        run.log_round(global_step, rate, *credit, rolled_back=reason)

    def end_iteration():
        run.progress(global_step, rate)
        if run.wants_checkpoint(global_step):
            run.save_checkpoint(run.snapshot(global_step, state()))

    with Run(args, bandit.arms if has_bandit else None, device, checkpoint=checkpoint) as run:
        if args.capture_video:
            prefix = f"rl-video-from-{run.global_step}" if checkpoint else "rl-video"
            video = gym.wrappers.RecordVideo(envs[0], str(run.folder / "videos"), name_prefix=prefix)
            envs[0] = run.on_exit.enter_context(video)
        global_step, rate, kept = 0, None, None
        episodes = [None] * args.num_envs  # those that are running: seed, actions
        discounted_returns = [0.0] * args.num_envs  # of the running episodes; their deviation scales the rewards
        stretch_timesteps, stretch_reward, stretch_returns = 0, 0.0, []  # since the bandit's last observation

        def state():
            """All that the rest of the run depends on, between two iterations."""
            return {
                "parameters": parameters.data,
                "optimizer": optimizer.state_dict(),
                "schedule": scheduler and (scheduler.state_dict(), scheduler.get_last_lr()[0]),
                "bandit": bandit.state_dict(),
                "statistics": (vars(obs_stats), vars(return_stats)),
                "kept": kept and (kept[0], [vars(statistics) for statistics in kept[1]]),
                "rng": rng.bit_generator.state,
                "episodes": [(seed, np.array(played)) for seed, played in episodes],
                "loop": (obs.copy(), discounted_returns, rate, stretch_timesteps, stretch_reward, stretch_returns),
            }

        def restored(values):
            return RunningMeanStd(**{name: x.numpy() if torch.is_tensor(x) else x for name, x in values.items()})

        if checkpoint:
            global_step = checkpoint["run"]["global_step"]
            parameters.data.copy_(checkpoint["parameters"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            optimizer.param_groups[0]["lr"] = learning_rate.copy_(optimizer.param_groups[0]["lr"])
            if scheduler:
                scheduler.load_state_dict(checkpoint["schedule"][0])
                scheduler.optimizer.param_groups[0]["lr"] = checkpoint["schedule"][1]
            bandit.load_state_dict(checkpoint["bandit"])
            obs_stats, return_stats = (restored(values) for values in checkpoint["statistics"])
            if checkpoint["kept"]:
                tensors, statistics = checkpoint["kept"]
                kept = tensors, [restored(values) for values in statistics]
            rng.bit_generator.state = checkpoint["rng"]
            for i, (seed, played) in enumerate(checkpoint["episodes"]):
                episodes[i] = seed, list(played.numpy())
                envs[i].reset(seed=seed)
                for action in played.numpy():
                    envs[i].step(action)
            obs, discounted_returns, rate, stretch_timesteps, stretch_reward, stretch_returns = checkpoint["loop"]
            obs = obs.numpy()
        else:
            obs = np.array([reset(i) for i in range(args.num_envs)], np.float32)
        next_obs = np.zeros_like(obs)

        for _ in range(global_step // batch_size, num_iterations):
            before = run.snapshot(global_step, state()) if args.checkpoint_interval else None

            # COLLECT ROLLOUT: in NumPy, whatever the device; values and log-probabilities follow for all steps at once
            policy = agent.numpy_policy()
            noise = agent.actor_logstd.detach().exp().cpu().numpy() * rng.standard_normal(actions.shape, np.float32)
            rollout_reward, rollout_returns = 0.0, []
            with run.saving(lambda before=before: before):  # if an environment fails
                for step in range(args.num_steps):
                    global_step += args.num_envs
                    observations[step] = obs
                    actions[step] = policy(obs) + noise[step]
                    for i, env in enumerate(envs):
                        action = actions[step, i].reshape(low.shape).clip(low, high)
                        raw_obs, reward, terminated, truncated, info = env.step(action)
                        episodes[i][1].append(action)
                        obs_stats.update(raw_obs)
                        next_obs[i] = obs[i] = obs_stats.normalize(raw_obs)
                        discounted_returns[i] = args.gamma * discounted_returns[i] + float(reward)
                        return_stats.update(discounted_returns[i])
                        rewards[step, i] = min(max(reward / return_stats.std, -10), 10)
                        terminations[step, i], truncations[step, i] = terminated, truncated
                        rollout_reward += float(reward)
                        if terminated or truncated:
                            rollout_returns.append(float(info["episode"]["r"]))
                            run.log_episode(global_step, rollout_returns[-1], info["episode"]["l"])
                            discounted_returns[i], obs[i] = 0.0, reset(i)
                    next_observations[step] = next_obs
            if not (math.isfinite(rollout_reward) and np.isfinite(next_observations).all()):
                raise FloatingPointError(f"{args.env_id} has returned observations or rewards that are not finite")

            # BANDIT: this rollout shows what the update before it did, so it counts for the arm of that update (and the
            # first rollout, before any update, for none). A round that is over is closed, and the next arm drawn.
            stretch_timesteps += batch_size
            stretch_reward += rollout_reward
            stretch_returns += rollout_returns
            if stretch_returns or args.bandit_feedback == "reward":
                performance = stretch_reward / stretch_timesteps
                if args.bandit_feedback == "return":
                    performance = sum(stretch_returns) / len(stretch_returns)
                bandit.observe(performance, stretch_timesteps)
                stretch_timesteps, stretch_reward, stretch_returns = 0, 0.0, []
            if args.rollback and has_bandit and bandit.has_collapsed:
                undo_round("performance has collapsed")
                end_iteration()
                continue  # this rollout is that of a policy given up; the next one shows where the agent starts from
            if bandit.round_is_over:
                performance, arm, probabilities = bandit.performance, bandit.arm, bandit.drawn_from
                credit = (arm, probabilities, bandit.update(performance))
                run.log_round(global_step, rate, performance, *(credit if has_bandit else ()))
            if bandit.arm is None:
                bandit.pull()
                tensors, statistics = training_state()
                kept = [tensor.clone() for tensor in tensors], statistics
                if has_bandit:
                    learning_rate.fill_(bandit.learning_rate)
                stretch_timesteps, stretch_reward, stretch_returns = 0, 0.0, []
            rate = float(f"{learning_rate.item():.7g}")  # float32 has no more digits

            # CALCULATE ADVANTAGES
            batch_obs, batch_actions = to_device(observations), to_device(actions)
            with torch.no_grad():
                batch_log_probs = agent.get_log_prob(batch_obs, batch_actions)
                batch_values = agent.get_value(batch_obs)
                next_values = agent.get_value(to_device(next_observations))
            values, next_values = (x.cpu().numpy().reshape(shape) for x in (batch_values, next_values))
            batch_advantages = to_device(calculate_gae(args, rewards, values, next_values, terminations, truncations))
            batch_returns = batch_advantages + batch_values
            batch = (batch_advantages, batch_obs, batch_actions, batch_log_probs, batch_values, batch_returns)

            # UPDATE NETWORK
            if args.optimizer == "adamrel":
                for values in optimizer.state.values():
                    values["step"].zero_()
            for _ in range(args.update_epochs):
                indices = torch.from_numpy(rng.permutation(batch_size)).to(device).view(args.num_minibatches, -1)
                minibatch_advantages, *others = (x[indices] for x in batch)
                if args.norm_adv:
                    std, mean = torch.std_mean(minibatch_advantages, dim=1, keepdim=True)
                    minibatch_advantages = (minibatch_advantages - mean) / (std + 1e-8)
                kls = []
                for minibatch in zip(minibatch_advantages, *others):
                    loss, policy_losses, value_errors, log_ratio = loss_function(agent, args, *minibatch)
                    parameters.grad.zero_()
                    loss.backward()
                    # as nn.utils.clip_grad_norm_ does, in a quarter of its time
                    parameters.grad *= (args.max_grad_norm / (parameters.grad.norm() + 1e-6)).clamp(max=1)
                    optimizer.step()
                    if args.lr_control == "kl":
                        kls.append((log_ratio.exp() - 1 - log_ratio).mean())  # http://joschu.net/blog/kl-approx.html
                if args.lr_control == "kl":  # as in rl_games
                    kl = torch.stack(kls).mean()
                    factor = 1.5 ** ((kl < args.target_kl / 2).float() - (kl > args.target_kl * 2).float())
                    learning_rate.mul_(factor).clamp_(1e-6, 1e-2)
            if scheduler:
                scheduler.step()
                learning_rate.fill_(scheduler.get_last_lr()[0])

            # LOG
            losses = {
                "losses/value_loss": 0.5 * value_errors.mean(),
                "losses/policy_loss": policy_losses.mean(),
                "losses/entropy": agent.get_entropy(),
                "losses/old_approx_kl": -log_ratio.mean(),
                "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
                "losses/clipfrac": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),
                "losses/explained_variance": 1 - (batch_returns - batch_values).var() / batch_returns.var(),
            }
            run.log_scalars({name: value.item() for name, value in losses.items()}, global_step)
            if not torch.isfinite(parameters).all():
                if not (args.rollback and has_bandit):
                    run.progress(global_step, rate)
                    raise FloatingPointError(f"learning rate {rate:g} has led to parameters that are not finite")
                undo_round("parameters are not finite")
            end_iteration()

        if args.save_model:
            statistics = {"obs_mean": torch.tensor(obs_stats.mean), "obs_std": torch.tensor(obs_stats.std)}
            torch.save({"agent": agent.state_dict()} | statistics, run.folder / "model.pt")
        if args.eval_episodes:
            run.summary["eval_returns"] = evaluate(agent, obs_stats, args)


if __name__ == "__main__":
    main()

"""SAC on MuJoCo, its learning rates chosen by a multi-armed bandit while it trains (LRRL).

    python sac_mujoco_lrrl.py --env-id HalfCheetah-v5 --seed 1

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598.
SAC: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905.
"""

import copy
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bandits import Rounds
from lrrl_utils.checkpoints import load_checkpoint
from lrrl_utils.command_line import bandit_options, check, decide_compile, given_options, parse_args
from lrrl_utils.environments import ContinuousTasks, evaluate
from lrrl_utils.optimizers import make_optimizer, make_update, relative_update
from lrrl_utils.ranges import Count, Momentum, NonNegative, Positive, PositiveShare, Rate, Seed, Share, Whole, Window
from lrrl_utils.rivals import BanditName, make_bandit
from lrrl_utils.run import Run
from lrrl_utils.schedules import ArmSet, scheduled_rate
from lrrl_utils.state import Undoable
from lrrl_utils.terminal import reject_errors


@dataclass
class Args:
    # RUN
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: Seed = 1  # seed of every random generator
    torch_deterministic: bool = True  # whether cuDNN is held to deterministic algorithms
    cuda: bool = True  # whether to use a GPU if there is one
    compile: bool = False  # whether to compile the updates (default: on a CPU, in runs of 20,000 timesteps or more)
    track: bool = False  # whether to track the run with Weights & Biases (WANDB_MODE=offline needs no network)
    wandb_project_name: str = "lrrl"  # the project in Weights & Biases
    wandb_entity: str | None = None  # the entity (team) in Weights & Biases
    capture_video: bool = False  # whether to record videos of the first environment into the run folder
    save_model: bool = False  # whether to save the trained networks into the run folder
    eval_episodes: Whole = 0  # episodes to evaluate the trained policy's mean action on
    run_dir: str = "runs"  # parent of the run folders
    checkpoint_interval: Whole = 0  # timesteps between checkpoints in the run folder; 0: none
    keep_replay: bool = False  # whether a finished run keeps the file of its replay, to go on with more timesteps later
    resume: str | None = None  # a run folder, to go on with from its last checkpoint; its options stay as they were

    # ALGORITHM
    env_id: str = "Hopper-v5"  # a gymnasium task with a bounded Box action space
    total_timesteps: Count = 1_000_000  # timesteps of the run, summed over environments
    num_envs: Count = 1  # environments, stepped in turn; the updates per timestep stay the same
    buffer_size: int = 1_000_000  # capacity of the replay, in timesteps
    gamma: Share = 0.99  # discount factor
    tau: PositiveShare = 0.005  # share of the critics that the target critics take over at a time
    batch_size: Count = 256  # transitions of a minibatch
    learning_starts: int = 5_000  # timesteps of random actions before the first update
    policy_frequency: Count = 2  # timesteps between the policy's turns of as many updates
    target_network_frequency: Count = 1  # timesteps between updates of the target critics
    # whether the temperature α is learnt, to hold the policy's entropy at minus the number of action dimensions
    autotune: bool = True
    alpha: Positive = 0.2  # the temperature where it is not learnt
    # of critics, policy and temperature alike (no adamrel: SAC's objective has no moment at which it changes)
    optimizer: Literal["adam", "rmsprop", "sgd"] = "adam"
    momentum: Momentum = 0.9  # of rmsprop and sgd

    # LEARNING RATE
    # what sets the learning rates: a bandit, nothing, or a schedule (linear and cosine end at 0)
    lr_control: Literal["bandit", "constant", "linear", "exponential", "cosine", "cyclic"] = "bandit"
    # the critics' rate, constant or a schedule's first; with bandit-scope critic, the two ratios are to it
    learning_rate: Rate = 1e-3
    policy_lr_ratio: Positive = 0.3  # the policy's rate in proportion to the critics', but for a bandit of its own
    alpha_lr_ratio: Positive = 1.0  # the temperature's learning rate in proportion to the critics'
    lr_decay_rate: NonNegative = 1e-7  # d of the exponential schedule, learning-rate × exp(−d t), t in timesteps
    cyclic_base_lr: Rate = 3e-5  # the lowest rate of the cyclic schedule, a triangle (Smith, arXiv 1506.01186)
    cyclic_max_lr: float = 3e-3  # the highest rate of the cyclic schedule
    cyclic_half_period: Count = 100_000  # timesteps from the lowest rate to the highest
    # the bandit's arms: rates, or by name some of these five (all5, lowest3, middle3, highest3, sparse3)
    learning_rates: tuple[Rate, ...] | ArmSet = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    lr_range: tuple[Rate, Rate] | None = None  # in place of arms: the ends of a range, 25 rates in equal ratios
    # peak: ours; lrrl: the paper's; uniform, prior: controls, which learn nothing; exp3, moss, ducb, wucb: others'
    bandit: BanditName = "peak"
    # whose rate an arm is: joint: the critics', the others in proportion; separate: a bandit for the critics and one
    # for the actor; critic, actor: of that one alone, the others keep learning-rate and its proportions
    bandit_scope: Literal["joint", "separate", "critic", "actor"] = "joint"
    # κ, the shortest round in timesteps; auto: 2 to 8 stretches of 1,000, until their trend stands out of the noise
    bandit_interval: Count | Literal["auto"] = "auto"
    bandit_step_size: Positive = 0.2  # α, the step size of the weights
    bandit_decay: PositiveShare | None = None  # δ, what an arm keeps from round to round (lrrl: 0.9; exp3, ducb: 0.98)
    bandit_window: Window = 5  # j, the rounds that an improvement is measured against
    # a round's performance: mean reward of a timestep (default of lrrl, as in the paper, of uniform and without a
    # bandit), or mean return of the episodes that ended, one or more (default of the others)
    bandit_feedback: Literal["reward", "return"] | None = None
    rollback: bool = True  # whether a round that ruins the agent or its numbers is undone and charged to its arm


CONTROLLERS = {"joint": ("critic",), "separate": ("critic", "actor"), "critic": ("critic",), "actor": ("actor",)}
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

    def act(self, obs, noise):
        """As `get_action`, from an array to an array."""
        with torch.no_grad():
            return self.get_action(torch.from_numpy(obs).to(self.scale.device), noise).cpu().numpy()

    def get_action_and_log_prob(self, obs, noise):
        """Actions for standard normal `noise` of their shape, and their log-probabilities, (batch,)."""
        mean, log_std = self(obs)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        # minus the log of the derivative of tanh, 1 - tanh(x)², in a form that does not round to 0 where x is large
        log_prob = log_prob - 2 * (math.log(2) - x - F.softplus(-2 * x)) - self.scale.log()
        return torch.tanh(x) * self.scale + self.center, log_prob.sum(-1)


class TwinCritics(nn.Module):
    """Two Q-networks as one: each layer is a batch of two matrices, on inputs of (2, batch, features)."""

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

    rings = 1

    def __init__(self, capacity, obs_size, action_size, device):
        self.sizes = (obs_size, action_size, obs_size, 1, 1)
        self.capacity, self.dtype = capacity, np.dtype((np.float32, sum(self.sizes)))
        self.rows = torch.empty((capacity, sum(self.sizes)), device=device)
        self.count = np.zeros(1, np.int64)  # of all rows ever written
        self.journal = None  # called with 0, an index and a row

    def add(self, obs, actions, next_obs, rewards, terminations):
        """Write k transitions: arrays of (k, size), rewards and terminations of (k,)."""
        columns = (obs, actions, next_obs, rewards[:, None], terminations[:, None])
        rows = np.concatenate(columns, axis=1, dtype=np.float32)
        indices = self.count + np.arange(len(rows))
        self.write(0, indices, rows)
        if self.journal:
            for index, row in zip(indices, rows):
                self.journal(0, index, row)

    def write(self, ring, indices, rows):
        """Write `rows`, (k, width), each the one of that index of all, (k,)."""
        slots = torch.from_numpy(indices % self.capacity).to(self.rows.device)
        self.rows[slots] = torch.from_numpy(rows).to(self.rows.device)
        self.count[ring] = indices[-1] + 1

    def sample(self, rng, batch_size):
        """Uniform transitions, as float32 tensors in the order of `add`."""
        indices = torch.from_numpy(rng.integers(min(self.count[0], self.capacity), size=batch_size))
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


def main(argv=None):
    args = parse_args(Args, argv)
    decide_compile(args, 20_000)
    given = given_options(args.command_line)
    scope = args.bandit_scope if args.lr_control == "bandit" else None
    check(args, f"[{args.num_envs}, inf)", "bandit_interval")
    check(args, f"[{args.batch_size}, inf)", "buffer_size")
    args.total_timesteps -= args.total_timesteps % args.num_envs
    check(args, f"[1, {args.learning_starts}]", *given & {"batch_size"})  # if it was given, it is to blame
    check(args, f"[{args.batch_size}, {args.total_timesteps})", "learning_starts")
    checkpoint = load_checkpoint(args)

    # SET UP
    torch.manual_seed(args.seed)  # for initial weights and the policy's noise; `rng` or the bandit draws all else
    torch.set_flush_denormal(True)  # dead ReLUs leave numbers that small in Adam's moments, which slow it down sixfold
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    envs = ContinuousTasks(args, rng, bounded=True)
    actor = Actor(envs.obs_size, envs.low, envs.high).to(device)
    critics = TwinCritics(envs.obs_size, envs.action_size).to(device)
    target_critics = copy.deepcopy(critics).requires_grad_(False)
    move_targets = get_ema_multi_avg_fn(1 - args.tau)
    log_alpha = torch.tensor(0.0 if args.autotune else math.log(args.alpha), device=device, requires_grad=args.autotune)
    critic_lr, actor_lr, alpha_lr = (torch.zeros((), device=device) for _ in range(3))
    critic_optimizer = make_optimizer(args, critics.parameters(), critic_lr, eps=1e-8)
    actor_groups = [{"params": actor.parameters(), "lr": actor_lr}, {"params": [log_alpha], "lr": alpha_lr}]
    actor_optimizer = make_optimizer(args, actor_groups, actor_lr, eps=1e-8)
    bandits = {}
    with reject_errors("--learning-rates"):
        for i, name in enumerate(CONTROLLERS[scope] if scope else ()):
            bandits[name] = make_bandit(args.bandit, args.learning_rates, (args.seed, i), **bandit_options(args))
    can_undo = args.rollback and bool(bandits)
    stretch = 1000 if args.bandit_interval == "auto" else args.bandit_interval
    rounds = Rounds(bandits, args.bandit_interval, stretch, args.bandit_feedback, can_undo)

    def set_rates(base=args.learning_rate):
        """Write the three rates, from the arms that are drawn and from `base`, which a schedule moves."""
        arms = {name: bandit.learning_rate for name, bandit in bandits.items()}
        critic_lr.fill_(critic_rate := arms.get("critic", base))
        followed = base if scope in ("critic", "actor") else critic_rate
        actor_lr.fill_(arms.get("actor", followed * args.policy_lr_ratio))
        alpha_lr.fill_(followed * args.alpha_lr_ratio)

    def critic_gradients(noise, *minibatch):
        loss, values = critic_loss(actor, critics, target_critics, log_alpha, args, minibatch, noise)
        losses = {"losses/qf_loss": loss.detach() / 2, "losses/qf_values": values.mean()}
        return torch.autograd.grad(loss, list(critics.parameters()), allow_unused=True), losses

    def policy_gradients(noise, obs):
        loss, log_probs = actor_loss(actor, critics, log_alpha, obs, noise)
        alpha_loss = -log_alpha.exp() * (log_probs.mean() - envs.action_size)  # arXiv 1812.05905, eq. 18
        losses = {"actor_loss": loss, "alpha": log_alpha.exp()} | ({"alpha_loss": alpha_loss} if args.autotune else {})
        losses = {f"losses/{name}": value.detach() for name, value in losses.items()}
        parameters = [*actor.parameters()] + [log_alpha] * args.autotune
        return torch.autograd.grad(loss + alpha_loss, parameters, allow_unused=True), losses

    update_critics = make_update(args, critic_optimizer, critic_gradients)
    update_policy = make_update(args, actor_optimizer, policy_gradients)

    with reject_errors("--buffer-size"):  # there may be no room
        replay = ReplayBuffer(min(args.buffer_size, args.total_timesteps), envs.obs_size, envs.action_size, device)
    obs = np.array([envs.reset(i) for i in range(args.num_envs)], np.float32)
    next_obs = np.zeros_like(obs)
    rewards, terminations = np.zeros(args.num_envs, np.float32), np.zeros(args.num_envs, bool)
    losses = {}  # of the latest updates
    trained = Undoable(actor, critics, target_critics, log_alpha, critic_optimizer, actor_optimizer)
    torch_rng = torch.cuda.default_generators[device.index or 0] if critic_lr.is_cuda else torch.default_generator
    state = {"trained": trained, "learning_rates": [critic_lr, actor_lr, alpha_lr], "bandits": bandits}
    state |= {"rounds": rounds, "rng": rng, "torch_rng": torch_rng, "envs": envs, "obs": obs, "losses": losses}

    def update_size(name):
        obs_batch, *others = replay.sample(rng, args.batch_size)
        noise = torch.randn((args.batch_size, envs.action_size), device=device)
        if name == "actor":
            return relative_update(trained, actor_optimizer, update_policy, noise, obs_batch)
        return relative_update(trained, critic_optimizer, update_critics, noise, obs_batch, *others)

    def undo_round(global_step, reason):
        trained.undo()
        run.log_rounds(global_step, rounds.fail(), critic_lr, rolled_back=reason)

    with Run(args, state, device, bandits, checkpoint, replay) as run:
        run.on_exit.callback(envs.close)
        run.on_exit.callback(torch.set_flush_denormal, False)
        envs.record_videos(run.folder, run.global_step)

        for global_step in range(run.global_step + args.num_envs, args.total_timesteps + 1, args.num_envs):
            previous_step = global_step - args.num_envs
            if not bandits:
                set_rates(scheduled_rate(args, previous_step))

            # ACT
            with run.checkpoint_if_it_fails(previous_step, "rng", "torch_rng"):
                if global_step <= args.learning_starts:
                    actions = rng.uniform(envs.low, envs.high, (args.num_envs, envs.action_size)).astype(np.float32)
                else:
                    noise = torch.randn((args.num_envs, envs.action_size), device=device)
                    actions = actor.act(obs, noise)
                    if not np.isfinite(actions).all() and can_undo and rounds.is_open:
                        undo_round(global_step, "actions are not finite")
                        actions = actor.act(obs, noise)
                    if not np.isfinite(actions).all():
                        rates = f"{critic_lr:g} (critics) and {actor_lr:g} (policy)"
                        raise FloatingPointError(f"learning rates {rates} have led to actions that are not finite")
                results = envs.step(actions)

            # STORE
            step_reward, step_returns = 0.0, []
            for i, (raw_obs, reward, terminated, _, episode) in enumerate(results):
                next_obs[i], rewards[i], terminations[i] = raw_obs, reward, terminated
                step_reward += float(reward)
                if episode:
                    step_returns.append(episode[0])
                    run.log_episode(global_step, *episode)
            if not (math.isfinite(step_reward) and np.isfinite(next_obs).all()):
                raise FloatingPointError(f"{args.env_id} has returned observations or rewards that are not finite")
            replay.add(obs, actions, next_obs, rewards, terminations)
            obs[:] = next_obs
            for i, (*_, episode) in enumerate(results):
                if episode:
                    obs[i] = envs.reset(i)

            # LOG: the latest updates so far; reading the actions has waited for them, so nothing waits here
            is_logged = global_step % (100 * args.num_envs) == 0 or global_step == args.total_timesteps
            if is_logged:
                shown_lr = actor_lr if scope == "actor" else critic_lr
                if losses:
                    scalars = {name: value.item() for name, value in losses.items()}
                    rates = {"/critic": critic_lr, "/actor": actor_lr} if len(bandits) > 1 else {"": shown_lr}
                    scalars |= {f"charts/learning_rate{name}": rate.item() for name, rate in rates.items()}
                    run.log_scalars(scalars, global_step)
                run.progress(global_step, shown_lr if losses else None)

            # BANDIT: the agent earns a round's rewards while it learns with the round's rates; those before the first
            # update count for no arm. When a round is over, its arms are credited, and others are drawn.
            rounds.earn(step_reward, args.num_envs, step_returns)
            if rounds.has_collapsed:
                undo_round(global_step, "performance has collapsed")
            elif losses and (is_logged or rounds.is_over) and rounds.is_ruined_by(losses["losses/qf_loss"].item()):
                undo_round(global_step, "the loss is ruinous")
            elif rounds.is_over and can_undo and not trained.is_finite:
                undo_round(global_step, "parameters are not finite")
            elif rounds.is_over:
                run.log_rounds(global_step, rounds.close(), critic_lr)
            if global_step > args.learning_starts and not rounds.is_open:
                for name, bandit in bandits.items():
                    if bandit.needs_update_size:
                        size = update_size(name)
                        bandit.set_update_size(size, args.batch_size, best_update=0.007, fall=0.0)  # unlike PPO's
                rounds.begin(previous_step / args.total_timesteps)  # draws an arm for each bandit
                trained.keep()
                if bandits:
                    set_rates()

            # LEARN
            for step in range(max(previous_step, args.learning_starts) + 1, global_step + 1):
                obs_batch, *others = replay.sample(rng, args.batch_size)
                noise = torch.randn((1 + args.policy_frequency, args.batch_size, envs.action_size), device=device)
                losses.update(update_critics(noise[0], obs_batch, *others))
                if step % args.policy_frequency == 0:
                    for policy_noise in noise[1:]:
                        losses.update(update_policy(policy_noise, obs_batch))
                if step % args.target_network_frequency == 0:
                    move_targets(list(target_critics.parameters()), list(critics.parameters()), None)
            run.end_step(global_step)

        if args.save_model:
            run.save_model({"actor": actor.state_dict(), "critics": critics.state_dict()})
        if args.eval_episodes:
            run.summary["eval_returns"] = evaluate(args, lambda obs: actor.act(obs.astype(np.float32), 0), run)


if __name__ == "__main__":
    main()

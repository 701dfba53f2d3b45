"""IQN on Atari, its learning rate chosen by a multi-armed bandit while it trains (LRRL).

    python iqn_atari_lrrl.py --env-id BreakoutNoFrameskip-v4 --seed 1

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598.
IQN: Dabney et al., "Implicit Quantile Networks for Distributional Reinforcement Learning", arXiv 1806.06923.
"""

import math
import os
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from bandits import Rounds
from lrrl_utils.atari import AtariGames, choose_replay_device, evaluate
from lrrl_utils.checkpoints import load_checkpoint
from lrrl_utils.command_line import bandit_options, check, given_options, parse_args
from lrrl_utils.optimizers import make_optimizer, make_update, relative_update, reset_step_counts, step_share
from lrrl_utils.ranges import Count, Momentum, NonNegative, Positive, PositiveShare, Rate, Seed, Share, Whole, Window
from lrrl_utils.rivals import BanditName, make_bandit
from lrrl_utils.run import Run
from lrrl_utils.schedules import ArmSet, scheduled_rate
from lrrl_utils.state import Undoable
from lrrl_utils.terminal import reject, reject_errors


@dataclass
class Args:
    # RUN
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # the name of this experiment
    seed: Seed = 1  # seed of every random generator
    torch_deterministic: bool = True  # whether cuDNN is held to deterministic algorithms
    cuda: bool = True  # whether to use a GPU if there is one
    compile: bool = False  # whether to compile the updates
    amp: bool = False  # whether networks run in bfloat16, Q-values included (parameters, updates and loss: float32)
    track: bool = False  # whether to track the run with Weights & Biases (WANDB_MODE=offline needs no network)
    wandb_project_name: str = "lrrl"  # the project in Weights & Biases
    wandb_entity: str | None = None  # the entity (team) in Weights & Biases
    capture_video: bool = False  # whether to record videos of the first game into the run folder
    save_model: bool = False  # whether to save the trained Q-network into the run folder
    eval_episodes: Whole = 0  # games to evaluate the trained agent on, with an ε of eval-e
    run_dir: str = "runs"  # parent of the run folders
    checkpoint_interval: Whole = 0  # timesteps between checkpoints in the run folder; 0: none
    keep_replay: bool = False  # whether a finished run keeps the file of its replay, to go on with more timesteps later
    resume: str | None = None  # a run folder, to go on with from its last checkpoint; its options stay as they were

    # ALGORITHM
    # <Game>NoFrameskip-v4 has no sticky actions, ALE/<Game>-v5 repeats an action with probability 0.25
    env_id: str = "BreakoutNoFrameskip-v4"
    # whose defaults to use: those shown here, or those of CleanRL's dqn_atari.py; an option that is given wins
    preset: Literal["dopamine", "cleanrl"] = "dopamine"
    total_timesteps: Count = 50_000_000  # timesteps of the run (4 frames each), summed over games
    num_envs: Count = 1  # games played side by side; the updates per timestep stay the same
    buffer_size: int = 1_000_000  # capacity of the replay, in timesteps
    buffer_device: Literal["auto", "cpu", "cuda"] = "auto"  # where replayed frames are; auto: on the GPU if they fit
    gamma: Share = 0.99  # discount factor
    update_horizon: Count = 3  # n of the n-step returns
    target_network_frequency: Count = 8_000  # timesteps between copies to the target network
    batch_size: Count = 32  # transitions of a minibatch
    start_e: Share = 1.0  # ε, the probability of a random action, before it falls
    end_e: Share = 0.01  # ε after it has fallen
    eval_e: Share = 0.001  # ε in the evaluation
    exploration_steps: Count = 250_000  # timesteps over which ε falls, after learning has started
    # instead: the share of total-timesteps over which ε falls, from the very start, as in CleanRL
    exploration_fraction: PositiveShare | None = None
    learning_starts: int = 20_000  # timesteps before the first update
    train_frequency: Count = 4  # timesteps between updates
    padding: Literal["same", "valid"] = "same"  # whether the convolutions see zeros beyond the frame, or only the frame
    initial_weights: Literal["dopamine", "pytorch"] = "dopamine"  # biases of 0 and larger weights, or PyTorch's
    num_tau_samples: Count = 64  # quantiles of the online network in the loss
    num_tau_prime_samples: Count = 64  # quantiles of the target network in the loss
    num_quantile_samples: Count = 32  # quantiles whose mean is a Q-value, wherever an action is chosen
    kappa: Positive = 1.0  # κ of the Huber loss, where it turns from quadratic to linear
    # adamrel: Adam that counts its steps anew with every target copy (Ellis et al., arXiv 2412.17113)
    optimizer: Literal["adam", "adamrel", "rmsprop", "sgd"] = "adam"
    momentum: Momentum = 0.9  # of rmsprop and sgd
    optimizer_eps: Positive = 3.125e-4  # the ε of Adam and RMSProp
    noop_max: Annotated[int, "[0, 1000]"] = 0  # a game starts with fewer than this many random no-ops (0: none)
    fire_reset: bool = False  # whether FIRE is pressed at the start of a game and of a life, where the game has it
    terminal_on_life_loss: bool = False  # whether a lost life ends the return that is learnt from (the game goes on)

    # LEARNING RATE
    # what sets the learning rate: a bandit, nothing, or a schedule (linear and cosine end at 0)
    lr_control: Literal["bandit", "constant", "linear", "exponential", "cosine", "cyclic"] = "bandit"
    learning_rate: Rate = 5e-5  # the constant rate, and the first one of linear, exponential and cosine
    lr_decay_rate: NonNegative = 1e-7  # d of the exponential schedule, learning-rate × exp(−d t), t in timesteps
    cyclic_base_lr: Rate = 1.5625e-5  # the lowest rate of the cyclic schedule, a triangle (Smith, arXiv 1506.01186)
    cyclic_max_lr: float = 2.5e-4  # the highest rate of the cyclic schedule
    cyclic_half_period: Count = 1_000_000  # timesteps from the lowest rate to the highest
    # the bandit's arms: rates, or by name some of these five (all5, lowest3, middle3, highest3, sparse3)
    learning_rates: tuple[Rate, ...] | ArmSet = (1.5625e-5, 3.125e-5, 6.25e-5, 1.25e-4, 2.5e-4)
    lr_range: tuple[Rate, Rate] | None = None  # in place of arms: the ends of a range, 25 rates in equal ratios
    # peak: ours; lrrl: the paper's; uniform, prior: controls, which learn nothing; exp3, moss, ducb, wucb: others'
    bandit: BanditName = "peak"
    # κ, the shortest round in timesteps; auto: 2 to 8 stretches of 2,000, until their trend stands out of the noise
    bandit_interval: Count | Literal["auto"] = "auto"
    bandit_step_size: Positive = 0.2  # α, the step size of the weights
    bandit_decay: PositiveShare | None = None  # δ, what an arm keeps from round to round (lrrl: 0.9; exp3, ducb: 0.98)
    bandit_window: Window = 5  # j, the rounds that an improvement is measured against
    # a round's performance: mean clipped or raw reward of a timestep, or mean raw return of the games that ended
    bandit_feedback: Literal["reward", "raw-reward", "return"] = "reward"
    rollback: bool = True  # whether a round that ruins the agent or its numbers is undone and charged to its arm


# of vwxyzjn/cleanrl's dqn_atari.py; the defaults above: google/dopamine's implicit_quantile.gin (jax/agents/)
CLEANRL = {"total_timesteps": 10_000_000, "learning_starts": 80_000, "exploration_fraction": 0.1}
CLEANRL |= {"target_network_frequency": 1_000, "learning_rate": 1e-4, "optimizer_eps": 1e-8, "padding": "valid"}
CLEANRL |= {"noop_max": 30, "fire_reset": True, "terminal_on_life_loss": True, "initial_weights": "pytorch"}


class QNetwork(nn.Module):
    """Dabney et al. (2018), eq. 4. Observations are (batch, 4, 84, 84) grey levels, 0 to 255."""

    def __init__(self, num_actions, num_quantile_samples, padding="same"):
        super().__init__()
        relu, same = nn.ReLU(inplace=True), padding == "same"  # Conv2d takes kernel, stride, padding
        layers = [nn.Conv2d(4, 32, 8, 4, 2 * same), relu, *[nn.ZeroPad2d((1, 2, 1, 2))] * same]  # as TensorFlow does
        layers += [nn.Conv2d(32, 64, 4, 2), relu, nn.Conv2d(64, 64, 3, 1, 1 * same), relu]
        self.features = nn.Sequential(*layers, nn.Flatten())
        size = 7744 if same else 3136
        self.embedding = nn.Sequential(nn.Linear(64, size), relu)
        self.head = nn.Sequential(nn.Linear(size, 512), relu, nn.Linear(512, num_actions))
        self.num_actions, self.num_quantile_samples = num_actions, num_quantile_samples

    def quantile_values(self, obs, num_taus):
        """Returns at random quantiles τ: values (batch, num_taus, num_actions) and τ (batch, num_taus)."""
        features = self.features(obs.contiguous(memory_format=torch.channels_last) / 255)
        taus = torch.rand(len(obs), num_taus, device=obs.device)
        cosines = torch.cos(math.pi * taus[..., None] * torch.arange(1, 65, device=obs.device))  # Dopamine's 1 to 64
        return self.head(features[:, None] * self.embedding(cosines)).float(), taus

    def q_values(self, obs):
        return self.quantile_values(obs, self.num_quantile_samples)[0].mean(1)


def td_loss(q_network, target_network, args, obs, actions, rewards, next_obs, discounts):
    """The loss of one minibatch (Dabney et al., 2018, eq. 3) and, for the log, its Q-values; see `sample`."""
    batch = torch.arange(len(obs), device=obs.device)
    with torch.no_grad(), torch.autocast(obs.device.type, torch.bfloat16, enabled=args.amp):
        num_taus = args.num_quantile_samples, args.num_tau_prime_samples
        next_values, _ = target_network.quantile_values(next_obs, sum(num_taus))  # at once: they share the features
        choosing, next_values = next_values.split(num_taus, 1)
        next_values = next_values[batch, :, choosing.mean(1).argmax(1)]
    with torch.autocast(obs.device.type, torch.bfloat16, enabled=args.amp):
        values, taus = q_network.quantile_values(obs, args.num_tau_samples)
    values = values[batch, :, actions]
    targets = rewards[:, None] + discounts[:, None] * next_values
    values, targets = torch.broadcast_tensors(values[:, :, None], targets[:, None, :])  # (batch, τ, τ')
    huber = F.huber_loss(values, targets, reduction="none", delta=args.kappa) / args.kappa
    loss = ((taus[:, :, None] - (targets < values).float()).abs() * huber).sum(1).mean()  # the mean over τ'
    return loss, values.detach()


class ReplayBuffer:
    """A ring for each game, of single frames: stacks of 4 are put together when they are drawn.

    A slot holds the newest frame of an observation and what came of it. Frames may be on a GPU; all else is small and
    stays in NumPy, as do the draws. Memory is taken as the rings fill (on a GPU, all at once).
    """

    # age: how many frames of the stack, up to 3, are older ones of the same game
    fields = [("age", "u1"), ("action", "u1"), ("reward", "f4")]
    fields += [("termination", "?"), ("truncation", "?"), ("final", "?")]
    dtype = np.dtype([("frame", "u1", (84, 84)), *fields])

    def __init__(self, args, buffer_size, frames_device, device):
        self.n, self.gamma, self.device = args.update_horizon, args.gamma, device
        self.rings, self.capacity = args.num_envs, buffer_size // args.num_envs
        self.frames = torch.empty((args.num_envs * self.capacity + 1, 84, 84), dtype=torch.uint8, device=frames_device)
        self.frames[-1] = 0  # the black frame that stands for those before the start of a game
        self.slots = np.zeros((args.num_envs, self.capacity), self.fields)
        self.count = np.zeros(args.num_envs, np.int64)  # of all slots ever written
        self.journal = None  # called with a game, an index and a slot

    def add(self, envs, frames, steps, actions=0, rewards=0.0, terminations=False, truncations=False, final=False):
        """Write a slot for each of `envs` (indices): (k, 84, 84) frames, `steps` into the game, and what followed.

        After a truncation the `final` observation has to follow as a slot of its own, to bootstrap from.
        """
        slots = np.empty(len(envs), self.dtype)
        for name, values in zip(self.dtype.names, (frames, np.minimum(steps, 3), actions, rewards, terminations)):
            slots[name] = values
        slots["truncation"], slots["final"] = truncations, final
        indices = self.count[envs]
        self.write(envs, indices, slots)
        if self.journal:
            for env, index, slot in zip(envs, indices, slots):
                self.journal(env, index, slot)

    def write(self, envs, t, slots):
        """Write `slots`, (k,), each of which is the `t`-th of its game, (k,); `envs` are indices, (k,) or one."""
        place = envs, t % self.capacity
        indices = torch.from_numpy(place[0] * self.capacity + place[1]).to(self.frames.device)
        self.frames[indices] = torch.from_numpy(slots["frame"]).to(self.frames.device)
        self.slots[place] = slots[[name for name, _ in self.fields]]
        np.maximum.at(self.count, np.broadcast_to(envs, t.shape), t + 1)

    def stack(self, envs, t):
        """Where the 4 frames of the `t`-th observation of `envs` are, (k, 4); t counts as `self.count` does."""
        older = np.array([3, 2, 1, 0])
        frames = envs[:, None] * self.capacity + (t[:, None] - older) % self.capacity
        return np.where(self.slots["age"][envs, t % self.capacity][:, None] >= older, frames, len(self.frames) - 1)

    def sample(self, rng, batch_size):
        """Uniform transitions, as tensors: observations, actions, n-step returns, observations after them, discounts.

        A return is cut at the end of a game (or life). Its discount is γ to the power of its steps, 0 at a termination.
        """
        oldest = np.where(self.count > self.capacity, self.count - self.capacity + 3, 0)  # whose whole stack is there
        envs = rng.integers(len(self.count), size=batch_size)
        t = rng.integers(oldest[envs], self.count[envs] - self.n)
        while (final := self.slots["final"][envs, t % self.capacity]).any():  # nothing follows a final observation
            t[final] = rng.integers(oldest[envs[final]], self.count[envs[final]] - self.n)

        window = self.slots[envs[:, None], (t[:, None] + np.arange(self.n)) % self.capacity]  # (batch, n)
        ends = window["termination"] | window["truncation"]
        reached = np.cumsum(ends, axis=1) - ends == 0  # no end came before this step
        steps = reached.sum(1)
        rewards = (window["reward"] * reached * self.gamma ** np.arange(self.n)).sum(1)
        discounts = self.gamma**steps * ~(window["termination"] & reached).any(1)

        indices = torch.from_numpy(np.concatenate([self.stack(envs, t), self.stack(envs, t + steps)]).ravel())
        frames = self.frames.index_select(0, indices.to(self.frames.device)).view(2, batch_size, 4, 84, 84)
        obs, next_obs = frames.to(self.device, non_blocking=True)
        others = (window["action"][:, 0].astype(np.int64), *np.float32([rewards, discounts]))
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
    explore, actions = rng.random(len(obs)) < epsilon, rng.integers(q_network.num_actions, size=len(obs))
    if not explore.all():
        device = next(q_network.parameters()).device
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
            greedy = q_network.q_values(torch.from_numpy(obs).to(device)).argmax(1)
        actions = np.where(explore, actions, greedy.cpu().numpy())
    return actions


def main(argv=None):
    args = parse_args(Args, argv, presets={"cleanrl": CLEANRL})
    if "exploration_steps" in (given := given_options(args.command_line)):
        if "exploration_fraction" in given:
            reject("--exploration-fraction: must be left out beside --exploration-steps")
        args.exploration_fraction = None
    check(args, f"[{args.train_frequency}, inf)", "bandit_interval")
    check(args, f"[{max(args.batch_size, args.num_envs * (args.update_horizon + 8))}, inf)", "buffer_size")
    args.total_timesteps -= args.total_timesteps % args.num_envs
    check(args, f"[{args.num_envs * (args.update_horizon + 1)}, {args.total_timesteps})", "learning_starts")
    checkpoint = load_checkpoint(args)

    # SET UP
    torch.manual_seed(args.seed)  # for initial weights (and IQN's quantiles); `rng` or the bandit draws all else
    torch.set_flush_denormal(True)  # dead ReLUs leave numbers that small in Adam's moments, which slow it down sixfold
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    games = AtariGames(args, args.num_envs, rng)
    q_network, target_network = (QNetwork(games.num_actions, args.num_quantile_samples, args.padding) for _ in range(2))
    if args.initial_weights == "dopamine":
        for parameter in q_network.parameters():
            bound = (math.sqrt(3) / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 0.0
            nn.init.uniform_(parameter, -bound, bound)
    for network in (q_network, target_network):
        network.to(device, memory_format=torch.channels_last)  # faster convolutions
    target_network.load_state_dict(q_network.state_dict())
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = make_optimizer(args, q_network.parameters(), learning_rate, args.optimizer_eps)
    bandits = {}
    if args.lr_control == "bandit":
        with reject_errors("--learning-rates"):
            bandits["agent"] = make_bandit(args.bandit, args.learning_rates, args.seed, **bandit_options(args))
    can_undo = args.rollback and bool(bandits)
    stretch = 2000 if args.bandit_interval == "auto" else args.bandit_interval
    rounds = Rounds(bandits, args.bandit_interval, stretch, args.bandit_feedback.removeprefix("raw-"), can_undo)
    buffer_size = min(args.buffer_size, args.total_timesteps)
    replay_device = choose_replay_device(args, buffer_size * ReplayBuffer.dtype.itemsize, device)
    replay = ReplayBuffer(args, buffer_size, replay_device, device)

    def gradients(*minibatch):
        loss, q_values = td_loss(q_network, target_network, args, *minibatch)
        losses = {"losses/td_loss": loss.detach(), "losses/q_values": q_values.mean()}
        return torch.autograd.grad(loss, list(q_network.parameters()), allow_unused=True), losses

    update = make_update(args, optimizer, gradients)
    losses = {}  # of the latest update
    trained = Undoable(q_network, target_network, optimizer)
    torch_rng = torch.cuda.default_generators[device.index or 0] if learning_rate.is_cuda else torch.default_generator
    state = {"trained": trained, "learning_rate": learning_rate, "bandits": bandits, "rounds": rounds}
    state |= {"rng": rng, "torch_rng": torch_rng, "games": games, "losses": losses}

    def undo_round(global_step, reason):
        trained.undo()
        run.log_rounds(global_step, rounds.fail(), learning_rate, rolled_back=reason)

    with Run(args, state, device, bandits, checkpoint, replay, replay_device=replay_device) as run:
        games.record_videos(run.folder / "videos")
        run.on_exit.callback(games.close)
        run.on_exit.callback(torch.set_flush_denormal, False)
        every_game = np.arange(args.num_envs)

        for global_step in range(run.global_step + args.num_envs, args.total_timesteps + 1, args.num_envs):
            previous_step = global_step - args.num_envs
            if not bandits:
                learning_rate.fill_(scheduled_rate(args, previous_step))

            # ACT
            with run.checkpoint_if_it_fails(previous_step, "rng", "torch_rng"):
                obs, steps = games.obs, games.steps.copy()
                actions = act(q_network, args, obs, get_epsilon(args, global_step), rng)
                games.press_fire(actions)
                next_obs, rewards, terminations, truncations = games.step(actions)
            for episodic_return, episodic_length in games.episodes:
                run.log_episode(global_step, episodic_return, episodic_length)

            # STORE
            clipped_rewards = rewards.clip(-1, 1)
            ends = terminations | games.life_lost if args.terminal_on_life_loss else terminations
            replay.add(every_game, obs[:, -1], steps, actions, clipped_rewards, ends, truncations)
            if truncations.any():
                replay.add(every_game[truncations], next_obs[truncations, -1], games.steps[truncations], final=True)
            games.start_games(terminations | truncations)

            # LOG: the latest update so far
            is_logged = global_step % (100 * args.num_envs) == 0 or global_step == args.total_timesteps
            if is_logged:
                run.progress(global_step, learning_rate if losses else None)
                if losses:
                    scalars = {name: value.item() for name, value in losses.items()}
                    scalars["charts/epsilon"] = get_epsilon(args, global_step)
                    run.log_scalars(scalars | {"charts/learning_rate": learning_rate.item()}, global_step)
                    if not can_undo and not math.isfinite(scalars["losses/td_loss"]):
                        raise FloatingPointError(f"learning rate {learning_rate:g}: the loss is not finite")

            # BANDIT: the agent earns a round's rewards while it learns with the round's rate; those before the first
            # update count for no arm. When a round is over, its arm is credited, and the next update draws another.
            # What `is_ruined_by` takes for a healthy loss is for rewards within ±1.
            learnt_until = max(previous_step, args.learning_starts)
            num_updates = max(global_step // args.train_frequency - learnt_until // args.train_frequency, 0)
            earned = rewards if args.bandit_feedback == "raw-reward" else clipped_rewards
            rounds.earn(earned.sum(), args.num_envs, [episodic_return for episodic_return, _ in games.episodes])
            if rounds.has_collapsed:
                undo_round(global_step, "performance has collapsed")
            elif losses and (is_logged or rounds.is_over) and rounds.is_ruined_by(losses["losses/td_loss"].item(), 2):
                undo_round(global_step, "the loss is ruinous")
            elif rounds.is_over and can_undo and not trained.is_finite:
                undo_round(global_step, "parameters are not finite")
            elif rounds.is_over:
                run.log_rounds(global_step, rounds.close(), learning_rate)
            if num_updates and not rounds.is_open:
                for bandit in bandits.values():
                    if bandit.needs_update_size:
                        size = relative_update(trained, optimizer, update, *replay.sample(rng, args.batch_size))
                        bandit.set_update_size(size, args.batch_size, best_update=0.007, fall=0.0)  # unlike PPO's
                rounds.begin(previous_step / args.total_timesteps, step_share(optimizer))  # draws an arm
                trained.keep()
                if bandits:
                    learning_rate.fill_(bandits["agent"].learning_rate)

            # LEARN
            for _ in range(num_updates):
                losses.update(update(*replay.sample(rng, args.batch_size)))
            if global_step // args.target_network_frequency > previous_step // args.target_network_frequency:
                target_network.load_state_dict(q_network.state_dict())
                if args.optimizer == "adamrel":
                    reset_step_counts(optimizer)

            if args.checkpoint_interval and global_step % args.checkpoint_interval < args.num_envs:
                games.reseed()  # so that who goes on from the checkpoint need not play them from the start
            run.end_step(global_step)

        if args.save_model:
            run.save_model({"q_network": q_network.state_dict()})
        if args.eval_episodes:
            policy = lambda obs, rng: act(q_network, args, obs, args.eval_e, rng)  # noqa: E731
            run.summary["eval_returns"] = evaluate(args, policy, run)


if __name__ == "__main__":
    main()

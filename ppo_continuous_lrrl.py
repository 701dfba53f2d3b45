"""PPO for continuous actions, its learning rate chosen by a multi-armed bandit while it trains (LRRL).

    python ppo_continuous_lrrl.py --env-id HalfCheetah-v5 --seed 1

LRRL: Donâncio et al., "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach", arXiv 2410.12598.
PPO: Schulman et al., arXiv 1707.06347, with the hyper-parameters of CleanRL's ppo_continuous_action.py.
"""

import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from bandits import Rounds
from lrrl_utils.checkpoints import load_checkpoint
from lrrl_utils.command_line import bandit_options, check, decide_compile, parse_args
from lrrl_utils.environments import ContinuousTasks, evaluate
from lrrl_utils.numpy_policy import numpy_policy
from lrrl_utils.optimizers import make_optimizer, make_update, relative_update, reset_step_counts
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
    compile: bool = False  # whether to compile the updates (default: on a CPU, in runs of 200,000 timesteps or more)
    track: bool = False  # whether to track the run with Weights & Biases (WANDB_MODE=offline needs no network)
    wandb_project_name: str = "lrrl"  # the project in Weights & Biases
    wandb_entity: str | None = None  # the entity (team) in Weights & Biases
    capture_video: bool = False  # whether to record videos of the first environment into the run folder
    save_model: bool = False  # whether to save the trained agent and its normalisation statistics into the run folder
    eval_episodes: Whole = 0  # episodes to evaluate the trained agent on: mean actions, frozen normalisation statistics
    run_dir: str = "runs"  # parent of the run folders
    checkpoint_interval: Whole = 0  # timesteps between checkpoints in the run folder; 0: none
    resume: str | None = None  # a run folder, to go on with from its last checkpoint; its options stay as they were

    # ALGORITHM
    env_id: str = "HalfCheetah-v5"  # any gymnasium task with a Box action space of floats
    total_timesteps: int = 1_000_000  # timesteps of the run, summed over environments; rounded down to whole rollouts
    num_envs: Count = 1  # environments, stepped in turn
    num_steps: Count = 2048  # steps of each environment in a rollout
    gamma: Share = 0.99  # discount factor
    gae_lambda: Share = 0.95  # λ of generalized advantage estimation
    num_minibatches: Count = 32  # minibatches of an epoch; must divide num-envs × num-steps
    update_epochs: Count = 10  # epochs of an update
    norm_adv: bool = True  # whether to normalise the advantages of each minibatch
    clip_coef: Positive = 0.2  # the surrogate's clipping coefficient
    clip_vloss: bool = True  # whether to clip the value loss too
    ent_coef: NonNegative = 0.0  # coefficient of the entropy
    vf_coef: NonNegative = 0.5  # coefficient of the value loss
    max_grad_norm: Positive = 0.5  # the norm to which gradients are clipped
    # adamrel: Adam that counts its steps anew with every rollout (Ellis et al., arXiv 2412.17113)
    optimizer: Literal["adam", "adamrel", "rmsprop", "sgd"] = "adam"
    momentum: Momentum = 0.9  # of rmsprop and sgd

    # LEARNING RATE
    # what sets the learning rate: a bandit, nothing, a schedule (linear and cosine end at 0), or the updates' KL
    lr_control: Literal["bandit", "constant", "linear", "exponential", "cosine", "cyclic", "kl"] = "bandit"
    learning_rate: Rate = 3e-4  # the constant rate, and the first one of linear, exponential, cosine and kl
    # of kl: an epoch over twice this KL divides the rate by 1.5, one under half of it multiplies; within 1e-6 and 1e-2
    target_kl: Positive = 0.01
    lr_decay_rate: NonNegative = 1e-7  # d of the exponential schedule, learning-rate × exp(−d t), t in timesteps
    cyclic_base_lr: Rate = 3e-5  # the lowest rate of the cyclic schedule, a triangle (Smith, arXiv 1506.01186)
    cyclic_max_lr: float = 3e-3  # the highest rate of the cyclic schedule
    cyclic_half_period: Count = 100_000  # timesteps from the lowest rate to the highest
    # the bandit's arms: rates, or by name some of these five (all5, lowest3, middle3, highest3, sparse3)
    learning_rates: tuple[Rate, ...] | ArmSet = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    lr_range: tuple[Rate, Rate] | None = None  # in place of arms: the ends of a range, 25 rates in equal ratios
    # peak: ours; lrrl: the paper's; uniform, prior: controls, which learn nothing; exp3, moss, ducb, wucb: others'
    bandit: BanditName = "peak"
    # κ, the shortest round in timesteps; auto: 2 to 8 rollouts, until their trend stands out of the noise
    bandit_interval: Count | Literal["auto"] = "auto"
    bandit_step_size: Positive = 0.2  # α, the step size of the weights
    bandit_decay: PositiveShare | None = None  # δ, what an arm keeps from round to round (lrrl: 0.9; exp3, ducb: 0.98)
    bandit_window: Window = 5  # j, the rounds that an improvement is measured against
    # a round's performance: mean reward of a timestep (default of lrrl, as in the paper, of uniform and without a
    # bandit), or mean return of the episodes that ended, one or more (default of the others)
    bandit_feedback: Literal["reward", "return"] | None = None
    rollback: bool = True  # whether a round that ruins the agent or its numbers is undone and charged to its arm


class RunningMeanStd:
    """Welford's running mean and standard deviation of floats or arrays; gymnasium's takes 18 µs, a tenth of a step."""

    def __init__(self, mean=0.0):
        self.count, self.mean, self.squares = 0, mean, 0.0  # squares: summed squared differences from the mean

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
    for layer in (layer for layer in layers if isinstance(layer, nn.Linear)):
        nn.init.orthogonal_(layer.weight, output_std if layer is layers[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


class Agent(nn.Module):
    def __init__(self, obs_size, action_size):
        super().__init__()
        self.critic = make_network(obs_size, 1, output_std=1.0)
        self.actor_mean = make_network(obs_size, action_size, output_std=0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(action_size))

    def flatten_parameters(self):
        """Move all parameters into one vector: an optimizer then takes one call instead of 13."""
        vector = nn.Parameter(nn.utils.parameters_to_vector(self.parameters()).detach())
        nn.utils.vector_to_parameters(vector.data, self.parameters())
        return vector

    def get_value(self, obs):
        return self.critic(obs).squeeze(-1)

    def get_log_prob(self, obs, actions):
        z = (actions - self.actor_mean(obs)) / self.actor_logstd.exp()
        return -0.5 * z.square().sum(-1) - self.actor_logstd.sum() - 0.5 * math.log(2 * math.pi) * actions.shape[-1]

    def get_entropy(self):
        return (self.actor_logstd + 0.5 * math.log(2 * math.pi * math.e)).sum()


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


def main(argv=None):
    args = parse_args(Args, argv)
    decide_compile(args, 200_000)
    if args.lr_control == "kl":
        check(args, "[1e-06, 0.01]", "learning_rate")
        if args.update_epochs * args.num_minibatches == 1:
            reject("--lr-control kl: needs two gradient steps an update or more, as before the first one the KL is 0")
    batch_size = args.num_envs * args.num_steps
    if batch_size % args.num_minibatches or batch_size == args.num_minibatches:
        reject(f"--num-minibatches {args.num_minibatches}: must divide num-envs × num-steps = {batch_size} and be less")
    if args.total_timesteps < batch_size:
        reject(f"--total-timesteps {args.total_timesteps}: must be num-envs × num-steps = {batch_size} or more")
    args.total_timesteps -= args.total_timesteps % batch_size
    checkpoint = load_checkpoint(args)

    # SET UP
    torch.set_num_threads(1)  # the layers are too small to share
    torch.manual_seed(args.seed)  # for the initial weights; all that is random later comes from `rng` or the bandit
    torch.backends.cudnn.deterministic = args.torch_deterministic
    rng = np.random.default_rng(args.seed)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")

    envs = ContinuousTasks(args, rng)
    agent = Agent(envs.obs_size, envs.action_size).to(device)
    vector, parameters = agent.flatten_parameters(), list(agent.parameters())
    learning_rate = torch.tensor(args.learning_rate, device=device)
    optimizer = make_optimizer(args, [vector], learning_rate, eps=1e-5)
    bandits = {}
    if args.lr_control == "bandit":
        with reject_errors("--learning-rates"):
            bandits["agent"] = make_bandit(args.bandit, args.learning_rates, args.seed, **bandit_options(args))
    can_undo = args.rollback and bool(bandits)
    rounds = Rounds(bandits, args.bandit_interval, batch_size, args.bandit_feedback, can_undo)

    def gradients(*minibatch):
        loss, *terms = ppo_loss(agent, args, *minibatch)
        flat = torch.cat([x.ravel() for x in torch.autograd.grad(loss, parameters, materialize_grads=True)])
        # as nn.utils.clip_grad_norm_ does, in a quarter of its time
        return [flat * (args.max_grad_norm / (flat.norm() + 1e-6)).clamp(max=1)], terms

    update = make_update(args, optimizer, gradients)

    # STORAGE
    shape = (args.num_steps, args.num_envs)
    observations = np.zeros((*shape, envs.obs_size), np.float32)
    next_observations = np.zeros_like(observations)
    actions = np.zeros((*shape, envs.action_size), np.float32)
    rewards, terminations, truncations = (np.zeros(shape, dtype) for dtype in (np.float32, bool, bool))
    obs_stats, return_stats = RunningMeanStd(mean=np.zeros(envs.obs_size)), RunningMeanStd()
    discounted_returns = [0.0] * args.num_envs  # of the running episodes; their deviation scales the rewards
    kl = torch.tensor(args.target_kl, device=device)  # of the last epoch

    def to_device(array):
        return torch.from_numpy(array.reshape(batch_size, *array.shape[2:])).to(device)

    def minibatches_of(batch):
        indices = torch.from_numpy(rng.permutation(batch_size)).to(device).view(args.num_minibatches, -1)
        advantages, *others = (x[indices] for x in batch)
        if args.norm_adv:
            std, mean = torch.std_mean(advantages, dim=1, keepdim=True)
            advantages = (advantages - mean) / (std + 1e-8)
        return zip(advantages, *others)

    def reset(i):
        raw_obs = envs.reset(i)
        obs_stats.update(raw_obs)
        return obs_stats.normalize(raw_obs)

    obs = np.array([reset(i) for i in range(args.num_envs)], np.float32)
    trained = Undoable(agent, optimizer, obs_stats, return_stats)
    state = {"trained": trained, "learning_rate": learning_rate, "kl": kl, "bandits": bandits, "rounds": rounds}
    state |= {"rng": rng, "envs": envs, "obs": obs, "discounted_returns": discounted_returns}

    def undo_round(global_step, reason):
        trained.undo()
        run.log_rounds(global_step, rounds.fail(), learning_rate, rolled_back=reason)

    with Run(args, state, device, bandits, checkpoint) as run:
        run.on_exit.callback(envs.close)
        envs.record_videos(run.folder, run.global_step)

        for global_step in range(run.global_step + batch_size, args.total_timesteps + 1, batch_size):
            previous_step = global_step - batch_size

            # COLLECT ROLLOUT: in NumPy, whatever the device; values and log-probabilities follow for all steps at once
            policy = numpy_policy(agent.actor_mean)
            rollout_reward, rollout_returns = 0.0, []
            with run.checkpoint_if_it_fails(previous_step):
                noise = agent.actor_logstd.detach().exp().cpu().numpy() * rng.standard_normal(actions.shape, np.float32)
                for step in range(args.num_steps):
                    observations[step] = obs
                    actions[step] = policy(obs) + noise[step]
                    for i, result in enumerate(envs.step(actions[step])):
                        raw_obs, reward, terminations[step, i], truncations[step, i], episode = result
                        obs_stats.update(raw_obs)
                        next_observations[step, i] = obs[i] = obs_stats.normalize(raw_obs)
                        discounted_returns[i] = args.gamma * discounted_returns[i] + float(reward)
                        return_stats.update(discounted_returns[i])
                        rewards[step, i] = min(max(reward / return_stats.std, -10), 10)
                        rollout_reward += float(reward)
                        if episode:
                            rollout_returns.append(episode[0])
                            run.log_episode(previous_step + (step + 1) * args.num_envs, *episode)
                            discounted_returns[i], obs[i] = 0.0, reset(i)
                    run.stop_if_asked()
            if not (math.isfinite(rollout_reward) and np.isfinite(next_observations).all()):
                raise FloatingPointError(f"{args.env_id} has returned observations or rewards that are not finite")

            # BANDIT: this rollout shows what the update before it did, so it counts for the arm of that update (and the
            # first rollout, before any update, for none). When a round is over, its arm is credited.
            rounds.earn(rollout_reward, batch_size, rollout_returns)
            if rounds.has_collapsed:
                undo_round(global_step, "performance has collapsed")
                run.log_scalars({"charts/learning_rate": learning_rate.item()}, global_step)
                run.progress(global_step, learning_rate)
                run.end_step(global_step)
                continue  # this rollout came from the networks just undone: nothing is learnt from it
            if rounds.is_over:
                run.log_rounds(global_step, rounds.close(), learning_rate)

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

            # LEARNING RATE: a new round draws an arm; before the first one, the bandit is told what a rate does here
            if not rounds.is_open:
                for bandit in bandits.values():
                    if bandit.needs_update_size:
                        minibatch = next(minibatches_of(batch))
                        size = relative_update(trained, optimizer, update, *minibatch)
                        bandit.set_update_size(size, len(minibatch[0]))
                rounds.begin(progress=previous_step / args.total_timesteps)
                trained.keep()
            if bandits:
                learning_rate.fill_(bandits["agent"].learning_rate)
            elif args.lr_control != "kl":
                learning_rate.fill_(scheduled_rate(args, previous_step))

            # UPDATE NETWORK
            if args.optimizer == "adamrel":
                reset_step_counts(optimizer)
            for _ in range(args.update_epochs):
                if args.lr_control == "kl":  # as in rl_games
                    factor = 1.5 ** ((kl < args.target_kl / 2).float() - (kl > args.target_kl * 2).float())
                    learning_rate.mul_(factor).clamp_(1e-6, 1e-2)
                kls = []
                for minibatch in minibatches_of(batch):
                    policy_losses, value_errors, log_ratio = update(*minibatch)
                    if args.lr_control == "kl":
                        kls.append((log_ratio.exp() - 1 - log_ratio).mean())  # http://joschu.net/blog/kl-approx.html
                if args.lr_control == "kl":
                    kl.copy_(torch.stack(kls).mean())

            # LOG
            scalars = {
                "charts/learning_rate": learning_rate,
                "losses/value_loss": 0.5 * value_errors.mean(),
                "losses/policy_loss": policy_losses.mean(),
                "losses/entropy": agent.get_entropy(),
                "losses/old_approx_kl": -log_ratio.mean(),
                "losses/approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
                "losses/clipfrac": ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(),
                "losses/explained_variance": 1 - (batch_returns - batch_values).var() / batch_returns.var(),
            }
            scalars = {name: value.item() for name, value in scalars.items()}
            run.log_scalars(scalars, global_step)
            run.progress(global_step, learning_rate)
            reason = None if trained.is_finite else "parameters are not finite"
            if reason and not can_undo:
                raise FloatingPointError(f"learning rate {learning_rate:g}: {reason}")
            if reason or rounds.is_ruined_by(scalars["losses/old_approx_kl"], healthy=0.1):
                undo_round(global_step, reason or "the KL is ruinous")
            run.end_step(global_step)

        if args.save_model:
            statistics = {"obs_mean": torch.tensor(obs_stats.mean), "obs_std": torch.tensor(obs_stats.std)}
            run.save_model({"agent": agent.state_dict()} | statistics)
        if args.eval_episodes:
            policy = numpy_policy(agent.actor_mean)
            frozen = lambda obs: policy(obs_stats.normalize(obs).astype(np.float32))  # noqa: E731
            run.summary["eval_returns"] = evaluate(args, frozen, run)


if __name__ == "__main__":
    main()

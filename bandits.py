"""The bandits that choose a learning rate while an agent trains. NumPy only: no agent, no environment, no files.

A *round* is a stretch of training with one learning rate. The training loop draws an arm at the start of a round and
reports the performance of the policy at its end:

    bandit = Drift(arms=[1e-4, 3e-4, 1e-3], seed=1)
    bandit.pull()                          # the index of the arm for this round
    rate = bandit.learning_rate            # its learning rate
    feedback = bandit.update(performance)  # close the round: any finite float, the larger the better

Reported piece by piece, as rollouts come in, performance shows a bandit more, and lets it end the round:

    bandit.observe(performance, timesteps)  # also before the first pull: where the agent starts from
    if bandit.round_is_over:
        feedback = bandit.update(bandit.performance)

To write a bandit of your own, subclass `Bandit`, define `probabilities` and `learn`, and add the class to `BANDITS`.
"""

import copy
import inspect
import math
from collections import deque
from typing import Literal

import numpy as np


def as_finite(performance):
    """`performance` as a float. Raises ValueError if it is not finite."""
    performance = float(performance)
    if not math.isfinite(performance):
        raise ValueError(f"the performance of a round must be a finite number, not {performance}")
    return performance


def check_share(name, x):
    """`x`. Raises ValueError if it is not in (0, 1]."""
    if not 0 < x <= 1:
        raise ValueError(f"{name} must be in (0, 1], not {x:g}")
    return x


def deviation(changes):
    """Standard deviation of what has these distances from one to the next, robust to outliers; 0 without any."""
    return float(np.median(changes)) / 0.6745 / math.sqrt(2) if changes else 0.0


class Bandit:
    """What every bandit has: its arms, its draws, its rounds and the performances of the last ones.

    Args:
        arms: K learning rates, positive, finite and distinct, in any order.
        interval: κ, the shortest round in timesteps, or "auto": a round takes 2 to 8 observations and ends when the
            slope across them, the observation before the round included, is more than twice its standard error.
        window: j, how many rounds, the one that closes included, an improvement is measured against (at least 2).
        seed: of the draws.

    Raises:
        ValueError: an argument is outside what is named above.
    """

    def __init__(self, arms, interval="auto", window=5, seed=0):
        self.arms = [float(rate) for rate in arms]
        if not self.arms:
            raise ValueError("at least one learning rate is needed")
        for rate in self.arms:
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"a learning rate must be positive and finite, not {rate:g}")
        if len(set(self.arms)) < len(self.arms):
            raise ValueError(f"the learning rates must be distinct, not {' '.join(f'{rate:g}' for rate in self.arms)}")
        if window < 2:
            raise ValueError(f"window must be at least 2, not {window}: with 1 every improvement would be zero")
        if not (interval == "auto" or interval > 0):
            raise ValueError(f'interval must be positive or "auto", not {interval}')
        self.interval = interval
        self.performances = deque(maxlen=int(window))  # of the last rounds
        self.observations = []  # of this round
        self.before = deque(maxlen=5)  # the last observations before it
        self.durations = []  # of the observations of this round, in timesteps
        self.changes = deque(maxlen=50)  # distances of observations that follow each other
        self.lowest, self.highest = math.inf, -math.inf  # of all observations
        self.floor = math.inf  # the lowest one before this round
        self.arm = None  # the arm in use; None between `update` and `pull`
        self.drawn_from = None  # the probabilities that it was drawn from
        # A spawn key keeps the draws independent of the caller's own np.random.default_rng(seed).
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0,))))

    @property
    def probabilities(self):
        """Probabilities of the next draw, (K,) float64, sum 1."""
        raise NotImplementedError

    def learn(self, feedback):
        """Take in the `feedback` f'_n that the arm `self.arm` earned; here, nothing."""

    @property
    def learning_rate(self):
        """The learning rate of the arm in use.

        Raises:
            RuntimeError: no arm is in use, `pull` comes first.
        """
        if self.arm is None:
            raise RuntimeError("no arm is in use: call pull() first")
        return self.arms[self.arm]

    def pull(self):
        """Draw the arm of a new round from `probabilities`; returns its index."""
        self.floor = self.lowest
        self.drawn_from = self.probabilities.tolist()
        self.arm = int(self.rng.choice(len(self.arms), p=self.drawn_from))
        return self.arm

    def observe(self, performance, timesteps):
        """Take in the performance of a stretch of `timesteps`: a part of the round, or what was before the first one.

        Guard: it is clipped to ±1e100, so that no square overflows.

        Raises:
            ValueError: `performance` is not finite. Nothing has changed then.
        """
        performance = min(max(as_finite(performance), -1e100), 1e100)
        self.changes.extend(abs(performance - last) for last in [*self.before, *self.observations][-1:])
        self.lowest, self.highest = min(self.lowest, performance), max(self.highest, performance)
        if self.arm is None:
            self.before.append(performance)
        else:
            self.observations.append(performance)
            self.durations.append(timesteps)

    @property
    def performance(self):
        """f_n = R / C: the mean of what was observed in this round, weighted by timesteps; None before anything was."""
        return float(np.average(self.observations, weights=self.durations)) if self.observations else None

    @property
    def noise(self):
        """Standard deviation of an observation, from the median distance of the last 50 neighbours; 0 before any."""
        return deviation(self.changes)

    @property
    def round_is_over(self):
        """Whether the round has had its interval."""
        if self.interval != "auto":
            return sum(self.durations) >= self.interval
        if not 2 <= len(self.observations) < 8:
            return len(self.observations) >= 8
        y = np.array([*list(self.before)[-1:], *self.observations])
        times = np.arange(len(y)) - (len(y) - 1) / 2
        slope, squares = times @ y / (times @ times), times @ times
        return bool(abs(slope) > 2 * self.noise / math.sqrt(squares))

    @property
    def has_collapsed(self):
        """Whether the round has ruined the policy beyond its noise.

        That is, the last two observations are both under all of the five before the round, by four standard deviations
        of an observation (by more while few are known) and by half of what those were above the lowest ever seen. What
        may be the fall itself, the largest change in the round, does not count as noise.
        """
        if len(self.observations) < 2 or not self.before:
            return False
        changes = list(self.changes)
        changes.remove(max(changes[-len(self.observations) :]))
        beyond_noise = (4 + 4 / len(changes)) * deviation(changes) if len(changes) > 1 else math.inf
        worst = min(self.before)
        return max(self.observations[-2:]) < worst - max(beyond_noise, (worst - self.floor) / 2)

    def update(self, performance):
        """Close the round: credit the arm in use with `performance`; returns the feedback f'_n.

        Raises:
            ValueError: `performance` is not finite. Nothing has changed then.
            RuntimeError: no arm is in use.
        """
        performance = as_finite(performance)
        if self.arm is None:
            raise RuntimeError("no arm is in use: call pull() first")
        if not self.observations:
            self.observe(performance, 1)
        return self.close_round(self.improvement(performance))

    def fail(self):
        """Close a round that has ruined the agent, which is then taken back to the start of it; returns f'_n.

        The arm is charged with a performance as far below the lowest seen as that is below the highest. What is
        observed before the next `pull` shows where the agent starts from again.

        Raises:
            RuntimeError: no arm is in use.
        """
        if self.arm is None:
            raise RuntimeError("no arm is in use: call pull() first")
        lowest, highest = (self.lowest, self.highest) if self.changes else (min(self.lowest, 0.0), 0.0)
        performances = self.performances.copy()  # or later rounds would be praised for being better than this one
        self.performances.extend([] if performances else self.before or [lowest])
        feedback = self.close_round(self.improvement(lowest - (highest - lowest or abs(lowest) or 1.0)))
        self.performances = performances
        self.before.clear()
        return feedback

    def close_round(self, feedback):
        self.learn(feedback)
        self.before.extend(self.observations)
        self.arm, self.observations, self.durations = None, [], []
        return feedback

    def improvement(self, performance):
        """f'_n = f_n − (1/min(n, j)) Σ_{i=0}^{min(n,j)−1} f_{n−i} (Donâncio et al., arXiv 2410.12598).

        The mean includes the round that closes, so the first round's improvement is 0.
        Guard: the result is clipped to ±1e6.
        """
        self.performances.append(performance)
        mean = sum(f / len(self.performances) for f in self.performances)  # dividing first, no finite sum overflows
        return min(max(performance - mean, -1e6), 1e6)

    def state_dict(self):
        """Every attribute whose name does not start with _, as plain numbers, strings, lists and dicts (JSON-safe)."""
        state = {name: x for name, x in vars(self).items() if name != "rng" and not name.startswith("_")}
        state = {name: list(x) if isinstance(x, deque) else x for name, x in copy.deepcopy(state).items()}
        state = {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in state.items()}
        return state | {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        """Go on from `state_dict()` of a bandit with the same arms.

        Raises:
            ValueError: the state belongs to other arms.
        """
        if list(state["arms"]) != self.arms:
            raise ValueError(f"the state belongs to the learning rates {state['arms']}, not to {self.arms}")
        state = copy.deepcopy(state)
        self.rng.bit_generator.state = state.pop("rng")
        for name, value in state.items():
            now = getattr(self, name, None)
            if isinstance(now, np.ndarray):
                value = np.array(value)
            elif isinstance(now, deque):
                value = deque(value, now.maxlen)
            setattr(self, name, value)


class Drift(Bandit):
    """Follows the level of performance and how fast each rate moves it; draws the rate that may move it up fastest.

    The policy has a level L of performance, seen through noise. While a rate k is in use, L drifts by d(k) from one
    observation to the next, and neighbouring rates have similar drifts: a Gaussian process over log10 η. The drifts
    wander back to their prior, so that what was learnt long ago fades. In units of σ, the noise of an observation:

        f_t = L_t + ε_t                                   ε_t ~ N(0, 1), errors beyond 3 cut to 3
        L_t = L_{t−1} + d_t(k_t) + 0.1 ξ_t                ξ_t ~ N(0, 1)
        d_t = m + ρ (d_{t−1} − m) + sqrt(1 − ρ²) GP(0, c) ρ = exp(−1/300), d_0 ~ GP(m, c)
        c(i, k) = s² [1 + exp(−½ (log10 η_i / η_k)² / 0.5²)]    m(i) = −s z_i²

    z runs from −1 at the lowest rate to 1 at the highest by rank: extremes are there in case they are needed. A Kalman
    filter (Kalman, 1960) gives the posterior of (L, d) for each of four sizes s of the drifts; σ² is the mean of its
    squared errors. The sizes are weighted by how well they have predicted. Nothing has a unit, so performances a f + b,
    a > 0, in place of f change no draw. Arms are drawn by Thompson (1933) sampling from that posterior, its standard
    deviations shrunk to 0.4, which costs less in a short run (Chapelle and Li, "An Empirical Evaluation of Thompson
    Sampling", NeurIPS 2011). The constants were chosen on simulated agents; none is to be tuned for a task.

    Exploration starts at the middle arm and spreads: what may be drawn are the arms next to those that were drawn, or
    within half a decade of them, upwards only from arms that have not failed. For a rate that is far too high can ruin
    an agent before its noise is known, and then nothing tells that it did.

    Arguments and errors as for `Bandit`.
    """

    SIZES, LENGTH, COMMON, MIDDLE = (0.05, 0.15, 0.45, 1.35), 0.5, 1.0, 1.0  # of the drifts' prior
    WALK, FADE, FORGET = 0.1, math.exp(-1 / 300), 0.98
    SHRINK, CUT = 0.4, 3.0

    def __init__(self, arms, interval="auto", window=5, seed=0):
        super().__init__(arms, interval, window, seed)
        log_rates = np.log10(self.arms)
        distances = log_rates[:, None] - log_rates
        # A name that starts with _ is no state: such things follow from the arms.
        ranks = log_rates.argsort().argsort()
        z = np.linspace(-1, 1, len(ranks))[ranks]
        sizes = np.array(self.SIZES)[:, None, None]
        self._prior_covariance = sizes**2 * (np.exp(-0.5 * (distances / self.LENGTH) ** 2) + self.COMMON)
        self._near = (abs(ranks[:, None] - ranks) <= 1) | (abs(distances) <= self.LENGTH)
        self._higher = distances > 0
        self._middle = ranks == (len(ranks) - 1) // 2
        self.survived, self.failed = np.zeros(len(z), bool), np.zeros(len(z), bool)  # the last round with each arm
        self._prior_mean = sizes[..., 0] * -self.MIDDLE * z**2
        # The mean of (L, d) is linear in the data and in σ: the last axis holds what data adds, and what σ times the
        # prior does. The first axis is the sizes.
        self.mean = np.zeros((len(sizes), len(z) + 1, 2))
        self.mean[:, 1:, 1] = self._prior_mean
        self.covariance = np.zeros((len(sizes), len(z) + 1, len(z) + 1))  # in units of σ²
        self.covariance[:, 1:, 1:] = self._prior_covariance
        self.origin = 0.0  # the first observation, from which data is counted
        self.level_is_known = False
        self.variance, self.errors = np.zeros(len(sizes)), 0  # σ² and the number of errors that it is the mean of
        self.evidence = np.zeros(len(sizes))  # log-likelihood
        self._normals = np.random.default_rng(0).standard_normal((1000, len(z)))  # the same for every draw

    def observe(self, performance, timesteps):
        super().observe(performance, timesteps)
        mean, covariance = self.mean, self.covariance
        # PREDICT
        mean[:, 1:] *= self.FADE
        mean[:, 1:, 1] += (1 - self.FADE) * self._prior_mean
        covariance[:, 1:] *= self.FADE
        covariance[:, :, 1:] *= self.FADE
        covariance[:, 1:, 1:] += (1 - self.FADE**2) * self._prior_covariance
        if self.arm is not None:
            mean[:, 0] += mean[:, self.arm + 1]
            covariance[:, 0] += covariance[:, self.arm + 1]
            covariance[:, :, 0] += covariance[:, :, self.arm + 1]
        covariance[:, 0, 0] += self.WALK**2
        # CORRECT
        performance = min(max(performance, -1e100), 1e100)
        if not self.level_is_known:
            self.origin = self.origin if self.errors else performance
            self.level_is_known = True
            mean[:, 0] = performance - self.origin, 0.0
            covariance[:, 0] = covariance[:, :, 0] = 0.0
            covariance[:, 0, 0] = 1.0
            return
        sigma, y = np.sqrt(self.variance), performance - self.origin
        error_variance = covariance[:, 0, 0] + 1
        error = np.abs(y - mean[:, 0, 0] - mean[:, 0, 1] * sigma) / np.sqrt(error_variance)
        cut = np.where((error > self.CUT * sigma) & (sigma > 0), self.CUT * sigma / np.where(error > 0, error, 1), 1.0)
        gain = covariance[:, :, 0] / error_variance[:, None]
        innovation = np.stack([y - mean[:, 0, 0], -mean[:, 0, 1]], axis=1) * cut[:, None]
        mean += gain[:, :, None] * innovation[:, None]
        covariance -= gain[:, :, None] * covariance[:, :1]
        if (sigma > 0).all():
            likelihood = -np.log(sigma) - 0.5 * np.log(error_variance) - 0.5 * (cut * error / sigma) ** 2
            self.evidence = self.FORGET * self.evidence + likelihood - likelihood.max()
        if (error > 0).all():  # σ is not known until something changes
            self.errors = min(self.errors + 1, 50)
            self.variance += ((cut * error) ** 2 - self.variance) / self.errors

    def fail(self):
        arm = self.arm
        feedback = super().fail()
        self.survived[arm], self.failed[arm] = False, True
        self.mean[:, arm + 1, 1] -= 5 * np.array(self.SIZES)
        self.level_is_known = False
        return feedback

    def learn(self, feedback):
        self.survived[self.arm], self.failed[self.arm] = True, False

    @property
    def reachable(self):
        """The arms that may be drawn, (K,) bool."""
        ways = self._near & (self.survived | self.failed & ~self._higher)
        return self._middle | ways.any(axis=1)

    @property
    def probabilities(self):
        sigma = np.sqrt(self.variance)[:, None]
        means = self.mean[:, 1:, 1] + np.where(sigma > 0, self.mean[:, 1:, 0] / np.where(sigma > 0, sigma, 1), 0)
        roots = np.linalg.cholesky(self.covariance[:, 1:, 1:] + 1e-9 * np.eye(len(self.arms)))
        weights = np.exp(self.evidence - self.evidence.max())
        probabilities = np.zeros(len(self.arms))
        for mean, root, weight in zip(means, roots, weights / weights.sum()):
            drifts = mean + self.SHRINK * self._normals @ root.T
            best = np.where(self.reachable, drifts, -np.inf).argmax(axis=1)
            probabilities += weight * np.bincount(best, minlength=len(mean)) / len(best)
        return probabilities / probabilities.sum()


class LRRL(Bandit):
    """The paper's rule: exponential weights that decay, fed with improvements.

    Donâncio, Barrier, South and Forbes, "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach",
    arXiv 2410.12598:

        p_n(k) = exp w_n(k) / Σ_i exp w_n(i)                 w_1 = 0
        w_{n+1}(k) = δ w_n(k) + α f'_n / exp(w_n(k))         for the arm k = k_n that was drawn
        w_{n+1}(k) = δ w_n(k)                                for every other arm

    The paper's δ and j are not published where we could read them; 0.9 and 5 are those of the bandit that it descends
    from (Moskovitz et al., "Tactical Optimism and Pessimism for Deep Reinforcement Learning", NeurIPS 2021).

    Two guards bind only far outside the rule's normal range: exp(w) is not taken below 1e-4 (the ancestor's guard), and
    f' and w are clipped to ±1e6, so that any finite performance leaves finite probabilities.

    Args:
        arms, window, seed: as for `Bandit`.
        step_size: α, positive.
        decay: δ in (0, 1]; 1 never forgets.

    Raises:
        ValueError: an argument is outside what is named above.
    """

    def __init__(self, arms, step_size=0.2, decay=0.9, interval="auto", window=5, seed=0):
        super().__init__(arms, interval, window, seed)
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be positive and finite, not {step_size:g}")
        self.step_size = step_size
        self.decay = check_share("decay", decay)
        self.weights = np.zeros(len(self.arms))

    @property
    def probabilities(self):
        exponentials = np.exp(self.weights - self.weights.max())  # the shift cancels out and keeps exp from overflowing
        return exponentials / exponentials.sum()

    def learn(self, feedback):
        inverse_exponential = math.exp(min(-self.weights[self.arm], math.log(1e4)))  # 1 / max(exp(w), 1e-4)
        self.weights *= self.decay
        self.weights[self.arm] += self.step_size * feedback * inverse_exponential
        self.weights.clip(-1e6, 1e6, out=self.weights)


class Exp3(Bandit):
    """Exponential weights with importance-weighted rewards, made to forget.

    Auer, Cesa-Bianchi, Freund and Schapire, "The Nonstochastic Multiarmed Bandit Problem", SIAM J. Comput. 2002, Exp3:

        p_n(k) = (1 − γ) exp(γ G_n(k) / K) / Σ_i exp(γ G_n(i) / K) + γ / K
        G_{n+1}(k) = δ G_n(k) + 1{k = k_n} x_n / p_n(k)

    x_n in [0, 1] is the feedback, scaled by the range of all feedbacks so far. δ = 1 is the original.

    Args:
        arms, interval, window, seed: as for `Bandit`.
        decay: δ in (0, 1].
        exploration: γ in (0, 1].

    Raises:
        ValueError: an argument is outside what is named above.
    """

    def __init__(self, arms, decay=0.98, exploration=0.1, interval="auto", window=5, seed=0):
        super().__init__(arms, interval, window, seed)
        self.decay = check_share("decay", decay)
        self.exploration = check_share("exploration", exploration)
        self.gains = np.zeros(len(self.arms))  # G
        self.worst, self.best = math.inf, -math.inf  # feedback so far

    @property
    def probabilities(self):
        gains = self.exploration / len(self.arms) * (self.gains - self.gains.max())
        return (1 - self.exploration) * np.exp(gains) / np.exp(gains).sum() + self.exploration / len(self.arms)

    def learn(self, feedback):
        self.worst, self.best = min(self.worst, feedback), max(self.best, feedback)
        reward = (feedback - self.worst) / (self.best - self.worst or 1.0)
        probability = self.probabilities[self.arm]
        self.gains *= self.decay
        self.gains[self.arm] += reward / probability


class UCB(Bandit):
    """What the bandits share that pull the arm of the largest index: mean reward plus `bonus`, new arms before others.

    Rewards are feedbacks, scaled to [0, 1] by the range of all of them so far, past ones included. What an arm has
    earned and how often it was pulled is discounted by `decay` each round. Other arguments and errors as for `Bandit`.
    """

    def __init__(self, arms, decay=1.0, interval="auto", window=5, seed=0):
        super().__init__(arms, interval, window, seed)
        self.decay = check_share("decay", decay)
        self.totals, self.pulls = np.zeros(len(self.arms)), np.zeros(len(self.arms))
        self.rounds = 0
        self.worst, self.best = math.inf, -math.inf  # feedback so far

    def bonus(self, pulls):
        """What is added to the mean rewards of arms with as many `pulls`, (K,) and positive."""
        raise NotImplementedError

    @property
    def probabilities(self):
        new = self.pulls <= 0
        pulls = np.where(new, 1.0, self.pulls)
        means = (self.totals / pulls - self.worst) / (self.best - self.worst or 1.0) if self.rounds else 0.0
        indices = np.where(new, np.inf, means + self.bonus(pulls))
        return np.eye(len(self.arms))[indices.argmax()]

    def learn(self, feedback):
        self.rounds += 1
        self.worst, self.best = min(self.worst, feedback), max(self.best, feedback)
        self.totals *= self.decay
        self.pulls *= self.decay
        self.totals[self.arm] += feedback
        self.pulls[self.arm] += 1


class MOSS(UCB):
    """Minimax-optimal strategy in the stochastic case, bonus sqrt(1.175 max(0, log(t / (K s_k))) / s_k) after t rounds.

    Audibert and Bubeck, "Minimax Policies for Adversarial and Stochastic Bandits", COLT 2009, in the form that needs
    no horizon, of Degenne and Perchet, "Anytime Optimal Algorithms in Stochastic Multi-Armed Bandits", ICML 2016, with
    their α = 1.35. Forgets nothing. Arguments and errors as for `Bandit`.
    """

    def __init__(self, arms, interval="auto", window=5, seed=0):
        super().__init__(arms, 1.0, interval, window, seed)

    def bonus(self, pulls):
        logarithm = np.log(max(self.rounds, 1) / (len(pulls) * pulls))
        return np.sqrt((1 + 1.35) / 2 * np.maximum(logarithm, 0.0) / pulls)


class DUCB(UCB):
    """Discounted UCB: N_k the discounted pulls of arm k, bonus 2 sqrt(½ log(Σ_i N_i) / N_k).

    Garivier and Moulines, "On Upper-Confidence Bound Policies for Switching Bandit Problems", ALT 2011, with their
    ξ = 1/2 and rewards bounded by 1. `decay` is their γ; 1 is UCB1. Arguments and errors as for `UCB`.
    """

    def __init__(self, arms, decay=0.98, interval="auto", window=5, seed=0):
        super().__init__(arms, decay, interval, window, seed)

    def bonus(self, pulls):
        return 2 * np.sqrt(0.5 * np.log(max(self.pulls.sum(), 1.0)) / pulls)


class WUCB(UCB):
    """UCB over the last `memory` rounds: N_k pulls of arm k among them, bonus sqrt(log(min(t, memory)) / N_k).

    The sliding window of Garivier and Moulines (ALT 2011), as ULTHO uses it for hyper-parameters (Yuan, Li, Jin and
    Zeng, arXiv 2503.06101), with its c = 1. Other arguments and errors as for `Bandit`.
    """

    def __init__(self, arms, memory=50, interval="auto", window=5, seed=0):
        super().__init__(arms, 1.0, interval, window, seed)
        if memory < 1:
            raise ValueError(f"memory must be 1 or more, not {memory}")
        self.memory = memory
        self.history = []  # [arm, feedback] of the rounds in memory

    def bonus(self, pulls):
        return np.sqrt(math.log(max(min(self.rounds, self.memory), 1)) / pulls)

    def learn(self, feedback):
        super().learn(feedback)
        self.history = [*self.history, [self.arm, feedback]][-self.memory :]
        arms, feedbacks = zip(*self.history)
        self.pulls = np.bincount(arms, minlength=len(self.arms)).astype(float)
        self.totals = np.bincount(arms, feedbacks, minlength=len(self.arms))


class Uniform(Bandit):
    """The control: draws every arm with the same probability for ever. A bandit that is no better has learnt nothing.

    Its feedback is the improvement that `LRRL` would have seen. Arguments and errors as for `Bandit`.
    """

    @property
    def probabilities(self):
        return np.full(len(self.arms), 1 / len(self.arms))


ARM_SETS = {  # the paper's subsets of its five Atari rates, as slices of five rates in ascending order
    "all5": slice(0, 5),
    "lowest3": slice(0, 3),
    "middle3": slice(1, 4),
    "highest3": slice(2, 5),
    "sparse3": slice(0, 5, 2),
}
ArmSet = Literal[tuple(ARM_SETS)]

BANDITS = {"drift": Drift, "lrrl": LRRL, "uniform": Uniform, "exp3": Exp3, "moss": MOSS, "ducb": DUCB, "wucb": WUCB}
BanditName = Literal[tuple(BANDITS)]


def choose_arms(rates, lr_range, five):
    """The learning rates that the options mean, a tuple.

    Args:
        rates: what --learning-rates gives, rates or the name of a set of `five`.
        lr_range: what --lr-range gives instead: None or the ends of a range, for 25 rates in equal ratios.

    Raises:
        ValueError: the ends of the range are not positive, finite and in ascending order.
    """
    if lr_range:
        low, high = lr_range
        if not 0 < low < high < math.inf:
            raise ValueError(f"must be two positive rates in ascending order, not {low:g} {high:g}")
        return tuple(float(rate) for rate in np.geomspace(low, high, 25))
    return five[ARM_SETS[rates]] if isinstance(rates, str) else rates


def bandits_with(option):
    """Names of the bandits whose constructor has `option`."""
    return tuple(name for name, bandit in BANDITS.items() if option in inspect.signature(bandit).parameters)


def make_bandit(name, arms, **options):
    """The bandit that `--bandit NAME` means; of `options` it gets those that its constructor has and that are not None.

    Raises:
        ValueError: there is no such bandit, or the bandit refuses its arguments.
    """
    if name not in BANDITS:
        raise ValueError(f"there is no bandit {name!r}; there are {', '.join(BANDITS)}")
    accepted = inspect.signature(BANDITS[name]).parameters
    return BANDITS[name](arms, **{n: x for n, x in options.items() if n in accepted and x is not None})

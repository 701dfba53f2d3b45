"""The bandits that choose a learning rate while an agent trains. NumPy only: no agent, no environment, no files.

A *round* is a stretch of training with one learning rate. A bandit draws an arm for it and is told what it earned:

    bandit = LRRL(arms=[1e-4, 3e-4, 1e-3], seed=1)
    bandit.pull()                    # the index of the arm for this round
    rate = bandit.learning_rate      # its learning rate
    feedback = bandit.update(f)      # close the round with performance f: any finite float, the larger the better

`Rounds` decides when a round ends, measures what it earned and notices when it has ruined the agent:

    rounds = Rounds({"agent": bandit})
    rounds.earn(reward, timesteps, returns)  # what came in; before the first round, it shows where the agent starts
    if rounds.is_over:
        rounds.close()
    if not rounds.is_open:
        rounds.begin()

To write a bandit of your own, subclass `Bandit`, define `probabilities` and `learn`, and add the class to `BANDITS`.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np


def as_finite(performance):
    """`performance` as a float. Raises ValueError if it is not finite."""
    performance = float(performance)
    if not math.isfinite(performance):
        raise ValueError(f"a performance must be a finite number, not {performance}")
    return performance


class Bandit:
    """What every bandit has: its arms, its draws and the performances of the last rounds.

    Attributes are its state, which checkpoints keep; those whose name starts with _ follow from the arguments.

    Args:
        arms: K learning rates, positive, finite and distinct, in any order.
        window: j, how many rounds, the one that closes included, an improvement is measured against (at least 2).
        seed: of the draws.

    Raises:
        ValueError: an argument is outside what is named above.
    """

    needs_update_size = False  # whether `set_update_size` is still to be called, see `Peak`

    def __init__(self, arms, window=5, seed=0):
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
        self.performances = deque(maxlen=int(window))  # of the last rounds
        self.progress = 0.0  # the share of the training that was over at the last draw
        self.step_share = 1.0  # what an optimizer's ε left of its steps then, see `lrrl_utils.optimizers.step_share`
        self.arm = None  # the arm in use; None between `update` and `pull`
        self.drawn_from = None  # the probabilities that it was drawn from
        self.has_observed = False  # in this round
        # A spawn key keeps the draws independent of the caller's own np.random.default_rng(seed).
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0,))))

    @property
    def probabilities(self):
        """Probabilities of the next draw, (K,) float64, sum 1."""
        raise NotImplementedError(f"{type(self).__name__} must define the property probabilities")

    def learn(self, feedback):
        """Take in the `feedback` f'_n that the arm `self.arm` earned."""
        raise NotImplementedError(f"{type(self).__name__} must define learn(self, feedback)")

    @property
    def learning_rate(self):
        """The learning rate of the arm in use. Raises RuntimeError if there is none."""
        self.check_pulled()
        return self.arms[self.arm]

    def check_pulled(self):
        if self.arm is None:
            raise RuntimeError("no arm is in use: call pull() first")

    def pull(self):
        """Draw the arm of a new round from `probabilities`; returns its index."""
        self.drawn_from = np.asarray(self.probabilities, dtype=np.float64).tolist()
        self.arm, self.has_observed = int(self.rng.choice(len(self.arms), p=self.drawn_from)), False
        return self.arm

    def observe(self, performance):
        """See the performance of a part of the round, or of what was before the first one; returns it, clipped.

        Guard: the clip at ±1e100 lets no square overflow. Raises ValueError if it is not finite.
        """
        self.has_observed = True
        return min(max(as_finite(performance), -1e100), 1e100)

    def update(self, performance):
        """Close the round: credit the arm in use with `performance`; returns the feedback f'_n.

        Raises:
            ValueError: `performance` is not finite. Nothing has changed then.
            RuntimeError: no arm is in use.
        """
        performance = as_finite(performance)
        self.check_pulled()
        if not self.has_observed:
            self.observe(performance)
        feedback = self.improvement(performance)
        self.learn(feedback)
        self.arm = None
        return feedback

    def fail(self, performance, before=()):
        """Close a round that has ruined the agent, which is then taken back to the start of it; returns f'_n.

        `performance` is what the arm is charged with, `before` what a first round is measured against. Neither is
        remembered, or later rounds would be praised for being better than this one. Raises as `update` does.
        """
        performance = as_finite(performance)
        self.check_pulled()
        performances = self.performances.copy()
        self.performances.extend(() if performances else before)
        feedback = self.improvement(performance)
        self.learn(feedback)
        self.performances, self.arm = performances, None
        return feedback

    def improvement(self, performance):
        """f'_n = f_n − (1/min(n, j)) Σ_{i=0}^{min(n,j)−1} f_{n−i} (Donâncio et al., arXiv 2410.12598).

        The mean includes the round that closes, so the first round's improvement is 0.
        Guard: the result is clipped to ±1e6.
        """
        self.performances.append(performance)
        mean = sum(f / len(self.performances) for f in self.performances)  # dividing first, no finite sum overflows
        return min(max(performance - mean, -1e6), 1e6)


class LRRL(Bandit):
    """The paper's rule: exponential weights that decay, fed with improvements.

    Donâncio, Barrier, South and Forbes, "Dynamic Learning Rate for Deep Reinforcement Learning: A Bandit Approach",
    arXiv 2410.12598:

        p_n(k) = exp w_n(k) / Σ_i exp w_n(i)                 w_1 = 0
        w_{n+1}(k) = δ w_n(k) + α f'_n / exp(w_n(k))         for the arm k = k_n that was drawn
        w_{n+1}(k) = δ w_n(k)                                for every other arm

    The paper's δ and j are not known to us; 0.9 and 5 are those of the bandit that it descends from (Moskovitz et al.,
    "Tactical Optimism and Pessimism for Deep Reinforcement Learning", NeurIPS 2021).

    Two guards bind only far outside the rule's normal range: exp(w) is not taken below 1e-4 (the ancestor's guard), and
    f' and w are clipped to ±1e6, so that any finite performance leaves finite probabilities.

    Args:
        arms, window, seed: as for `Bandit`.
        step_size: α, positive.
        decay: δ in (0, 1]; 1 never forgets.

    Raises:
        ValueError: an argument is outside what is named above.
    """

    def __init__(self, arms, step_size=0.2, decay=0.9, window=5, seed=0):
        super().__init__(arms, window, seed)
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be positive and finite, not {step_size:g}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {decay:g}")
        self.step_size, self.decay = step_size, decay
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


class Uniform(Bandit):
    """The control: draws every arm with the same probability for ever. A bandit that is no better has learnt nothing.

    Its feedback is the improvement that `LRRL` would have seen. Arguments and errors as for `Bandit`.
    """

    @property
    def probabilities(self):
        return np.full(len(self.arms), 1 / len(self.arms))

    def learn(self, feedback):
        pass


@dataclass
class ClosedRound:
    """What there is to know of a round that has closed; without a bandit, its performance alone."""

    performance: float | None  # None if it failed before anything was observed
    bandit: str | None = None  # its name
    arm: int | None = None
    learning_rate: float | None = None
    probabilities: tuple = ()  # that the arm was drawn from, (K,)
    feedback: float | None = None  # f'_n


class Rounds:
    """When a round starts and ends, what it earned, and whether it has ruined the agent.

    Args:
        bandits: {name: bandit}, all of which see the same rounds; empty where something else sets the rate.
        interval: κ, the shortest round in timesteps, or "auto": a round takes 2 to 8 observations and ends when the
            slope across them, the observation before the round included, is more than twice its standard error.
        stretch: timesteps of an observation, at least.
        feedback: what is observed: "reward", the mean reward of a timestep, or "return", the mean return of the
            episodes that ended (an observation then waits for the first one).
        rollback: whether `has_collapsed` and `is_ruined_by` watch out.

    Raises:
        ValueError: an argument is outside what is named above.
    """

    def __init__(self, bandits, interval="auto", stretch=1, feedback="reward", rollback=True):
        if interval != "auto" and (isinstance(interval, str) or not interval > 0):
            raise ValueError(f'interval must be positive or "auto", not {interval!r}')
        if feedback not in ("reward", "return"):
            raise ValueError(f'feedback must be "reward" or "return", not {feedback!r}')
        self._bandits, self._interval, self._stretch = bandits, interval, stretch
        self._feedback, self._rollback = feedback, rollback
        self.is_open = False
        self.count = 0  # of all rounds that have ended
        self.start_observation()
        self.observations, self.durations = [], []  # of this round; durations in timesteps
        self.before = deque(maxlen=5)  # the last observations before it
        self.changes = deque(maxlen=50)  # distances of observations that follow each other
        self.lowest, self.highest = math.inf, -math.inf  # of all observations
        self.lowest_before, self.highest_before = math.inf, -math.inf  # of those before this round
        self.largest_sign, self.largest_sign_closed = 0.0, 0.0  # of this round, and of all that were not undone
        self.largest_sign_failed, self.limit = 0.0, math.inf  # of the round before, if it was undone; of signs

    def earn(self, reward, timesteps, returns=()):
        """Take in the summed `reward` of some `timesteps` and the `returns` of the episodes that ended in them.

        Raises:
            ValueError: there is no timestep, or something is not finite. Nothing has changed then.
        """
        if timesteps < 1:
            raise ValueError(f"timesteps must be 1 or more, not {timesteps}")
        reward, returns = as_finite(reward), [as_finite(x) for x in returns]
        self.reward += reward
        self.timesteps += int(timesteps)
        self.returns += returns
        if self.timesteps >= self._stretch and (self.returns or self._feedback == "reward"):
            of_reward = self._feedback == "reward"
            self.observe(self.reward / self.timesteps if of_reward else sum(self.returns) / len(self.returns))

    def observe(self, performance):
        performance = min(max(as_finite(performance), -1e100), 1e100)  # as the bandits do
        self.changes.extend(abs(performance - last) for last in [*self.before, *self.observations][-1:])
        self.lowest, self.highest = min(self.lowest, performance), max(self.highest, performance)
        if self.is_open:
            self.observations.append(performance)
            self.durations.append(self.timesteps)
        else:
            self.before.append(performance)
        for bandit in self._bandits.values():
            bandit.observe(performance)
        self.start_observation()

    def start_observation(self):
        self.timesteps, self.reward, self.returns = 0, 0.0, []  # so far
        self._is_over = None  # found when it is asked for, at every timestep in some scripts

    def begin(self, progress=0.0, step_share=1.0):
        """Start a round: every bandit draws its arm, and is told `progress` and `step_share` (see `Bandit`)."""
        self.is_open, self.lowest_before, self.highest_before, self.largest_sign = True, self.lowest, self.highest, 0.0
        self.start_observation()
        for bandit in self._bandits.values():
            bandit.progress, bandit.step_share = progress, step_share
            bandit.pull()

    def is_ruined_by(self, sign, healthy=0.0):
        """Take in a `sign` that grows with the harm, a loss or a KL divergence, and say whether the round is ruinous.

        Call it whenever there is one. The round is ruinous if a sign in it is not finite, or more than a hundred times
        what is `healthy` anywhere and the largest of all earlier rounds that were not undone; while both are 0, only
        what is not finite counts. Always False without `rollback`, and while no round is open.
        """
        self.largest_sign = max(self.largest_sign, sign if math.isfinite(sign) else math.inf)
        self.limit = 100 * max(healthy, self.largest_sign_closed) or math.inf
        return self._rollback and self.is_open and (self.largest_sign > self.limit or self.largest_sign == math.inf)

    @property
    def performance(self):
        """f_n: the mean of what was observed in this round, weighted by timesteps; None before anything was."""
        return float(np.average(self.observations, weights=self.durations)) if self.observations else None

    @staticmethod
    def noise(changes):
        """Standard deviation of what has these distances from one to the next, robust to outliers; 0 without any."""
        return float(np.median(changes)) / 0.6745 / math.sqrt(2) if changes else 0.0

    @property
    def is_over(self):
        """Whether the round may be closed: it has had its interval or, with "auto", it shows a trend or is long."""
        if self._is_over is None:
            self._is_over = self._find_whether_it_is_over()
        return self._is_over

    def _find_whether_it_is_over(self):
        if self._interval != "auto":
            return sum(self.durations) >= self._interval
        if not 2 <= len(self.observations) < 8:
            return len(self.observations) >= 8
        y = np.array([*list(self.before)[-1:], *self.observations])
        times = np.arange(len(y)) - (len(y) - 1) / 2
        slope, squares = times @ y / (times @ times), times @ times
        # whether an observation tells of ruin, the next one decides
        return bool(abs(slope) > 2 * self.noise(self.changes) / math.sqrt(squares)) and not self._is_ruinous(y[-1])

    @property
    def has_collapsed(self):
        """Whether the round has ruined the policy: its last two observations are under all of the five before it.

        They are by four standard deviations of an observation (by more while few are known), and by half of the way to
        the lowest before the round. The largest change in the round may be the fall itself, and is no noise.
        """
        return len(self.observations) > 1 and self._is_ruinous(max(self.observations[-2:]))

    def _is_ruinous(self, performance):
        if not self._rollback or not self.before:
            return False
        worst, changes = min(self.before), list(self.changes)
        changes.remove(max(changes[-len(self.observations) :]))
        beyond_noise = (4 + 4 / len(changes)) * self.noise(changes) if len(changes) > 1 else math.inf
        return performance < worst - max(beyond_noise, (worst - self.lowest_before) / 2)

    def close(self):
        """End the round and credit its arms; returns a `ClosedRound` for each bandit (one where there is none).

        Raises:
            RuntimeError: no round is open, or nothing was observed in it.
        """
        performance, observations = self.performance, self.observations
        if self.is_open and performance is None:
            raise RuntimeError("nothing was observed in this round")
        closed = self._end(lambda bandit: bandit.update(performance))
        self.before.extend(observations)
        self.largest_sign_closed = max(self.largest_sign_closed, self.largest_sign)
        self.largest_sign_failed = 0.0
        return closed

    def fail(self):
        """End a round that has ruined the agent, which has been taken back to the start of it; returns as `close`.

        Its arms are charged with a performance as far below the lowest seen as that is below the highest (below 0 while
        one observation is known). What was observed in the round is forgotten, but for the noise; what is observed
        before the next `begin` shows where the agent starts again. If two rounds in a row are beyond the limit of
        signs, it rises to twice their smaller: it is the task's, not an arm's. Raises RuntimeError if none is open.
        """
        lowest, highest = (self.lowest, self.highest) if self.lowest < self.highest else (min(self.lowest, 0.0), 0.0)
        charge = lowest - (highest - lowest or abs(lowest) or 1.0)
        before = list(self.before or [lowest])
        closed = self._end(lambda bandit: bandit.fail(charge, before))
        self.lowest, self.highest = self.lowest_before, self.highest_before
        common = min(self.largest_sign, self.largest_sign_failed)
        if self.limit < common < math.inf:
            self.largest_sign_closed = max(self.largest_sign_closed, common / 50)
        self.largest_sign_failed = self.largest_sign
        self.before.clear()
        return closed

    def _end(self, credit):
        if not self.is_open:
            raise RuntimeError("no round is open: call begin() first")
        performance, closed = self.performance, []
        for name, bandit in self._bandits.items():
            drawn = bandit.arm, bandit.learning_rate, bandit.drawn_from
            closed.append(ClosedRound(performance, name, *drawn, credit(bandit)))
        self.is_open, self.observations, self.durations = False, [], []
        self.count += 1
        self.start_observation()
        return closed or [ClosedRound(performance)]


# what --bandit chooses from, beside `peak`, its control and the rivals
BANDITS = {"lrrl": LRRL, "uniform": Uniform}

"""The bandits that choose a learning rate while an agent trains. NumPy only: no agent, no environment, no files.

A *round* is a stretch of training with one learning rate. The training loop draws an arm at the start of a round and
reports the performance of the policy at its end:

    bandit = LRRL(arms=[1e-4, 3e-4, 1e-3], seed=1)
    bandit.pull()                          # the index of the arm for this round
    rate = bandit.learning_rate            # its learning rate
    feedback = bandit.update(performance)  # close the round: any finite float, the larger the better

To write a bandit of your own, subclass `Bandit`, define `probabilities` and `learn`, and add the class to `BANDITS`.
"""

import inspect
import math
from collections import deque
from typing import Literal

import numpy as np


class Bandit:
    """What every bandit has: its arms, its draws, the performances of the last rounds.

    Args:
        arms: K learning rates, positive, finite and distinct, in any order.
        window: j, how many rounds, the one that closes included, an improvement is measured against (at least 2).
        seed: of the draws.

    Raises:
        ValueError: an argument is outside what is named above.
    """

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
        self.performances = deque(maxlen=int(window))
        self.arm = None  # the arm in use; None between `update` and `pull`
        # A spawn key keeps the draws independent of the caller's own np.random.default_rng(seed).
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0,))))

    @property
    def probabilities(self):
        """Probabilities of the next draw, (K,) float64, sum 1."""
        raise NotImplementedError

    def learn(self, feedback):
        """Take in the `feedback` f'_n that the arm `self.arm` earned."""
        raise NotImplementedError

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
        self.arm = int(self.rng.choice(len(self.arms), p=self.probabilities))
        return self.arm

    def update(self, performance):
        """Close the round: credit the arm in use with `performance`; returns the feedback f'_n.

        Raises:
            ValueError: `performance` is not finite. Nothing has changed then.
            RuntimeError: no arm is in use.
        """
        performance = float(performance)
        if not math.isfinite(performance):
            raise ValueError(f"the performance of a round must be a finite number, not {performance}")
        if self.arm is None:
            raise RuntimeError("no arm is in use: call pull() first")
        feedback = self.improvement(performance)
        self.learn(feedback)
        self.arm = None
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
        """All that changes while the bandit learns, as plain numbers, strings, lists and dicts (JSON-safe)."""
        return {
            "arms": self.arms,
            "arm": self.arm,
            "performances": list(self.performances),
            "rng": self.rng.bit_generator.state,
        }

    def load_state_dict(self, state):
        """Go on from `state_dict()` of a bandit with the same arms.

        Raises:
            ValueError: the state belongs to other arms.
        """
        if list(state["arms"]) != self.arms:
            raise ValueError(f"the state belongs to the learning rates {state['arms']}, not to {self.arms}")
        self.arm = state["arm"]
        self.performances = deque(state["performances"], maxlen=self.performances.maxlen)
        self.rng.bit_generator.state = state["rng"]


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

    def __init__(self, arms, step_size=0.2, decay=0.9, window=5, seed=0):
        super().__init__(arms, window, seed)
        if not (math.isfinite(step_size) and step_size > 0):
            raise ValueError(f"step_size must be positive and finite, not {step_size:g}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be in (0, 1], not {decay:g}")
        self.step_size = step_size
        self.decay = decay
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

    def state_dict(self):
        return super().state_dict() | {"weights": self.weights.tolist()}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.weights = np.array(state["weights"])


class Uniform(Bandit):
    """The control: draws every arm with the same probability for ever. A bandit that is no better has learnt nothing.

    Its feedback is the improvement that `LRRL` would have seen. Arguments and errors as for `Bandit`.
    """

    @property
    def probabilities(self):
        return np.full(len(self.arms), 1 / len(self.arms))

    def learn(self, feedback):
        pass


ArmSet = Literal["all5", "lowest3", "middle3", "highest3", "sparse3"]
ARM_SETS = {  # the paper's subsets of its five Atari rates, as slices of five rates in ascending order
    "all5": slice(0, 5),
    "lowest3": slice(0, 3),
    "middle3": slice(1, 4),
    "highest3": slice(2, 5),
    "sparse3": slice(0, 5, 2),
}

BANDITS = {"lrrl": LRRL, "uniform": Uniform}


def make_bandit(name, arms, **options):
    """The bandit that `--bandit NAME` means; of `options` it gets those that its constructor has.

    Raises:
        ValueError: there is no such bandit, or the bandit refuses its arguments.
    """
    if name not in BANDITS:
        raise ValueError(f"there is no bandit {name!r}; there are {', '.join(BANDITS)}")
    accepted = inspect.signature(BANDITS[name]).parameters
    return BANDITS[name](arms, **{option: value for option, value in options.items() if option in accepted})

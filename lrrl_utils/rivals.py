"""The bandits of others, each with its paper and equation, and `make_bandit`, which finds any bandit by its name.

They expect rewards in [0, 1]: feedbacks are scaled by the range of all of them so far.
"""

import inspect
import math
from typing import Literal

import numpy as np

from bandits import BANDITS, Bandit
from peak import Peak, Prior


def check_share(name, x):
    """`x`. Raises ValueError if it is not in (0, 1]."""
    if not 0 < x <= 1:
        raise ValueError(f"{name} must be in (0, 1], not {x:g}")
    return x


class ScaledBandit(Bandit):
    """What the bandits of others share: the range of all feedbacks so far. Arguments and errors as for `Bandit`."""

    def __init__(self, arms, window=5, seed=0):
        super().__init__(arms, window, seed)
        self.worst, self.best = math.inf, -math.inf  # feedback so far

    def learn(self, feedback):
        self.worst, self.best = min(self.worst, feedback), max(self.best, feedback)

    def fail(self, performance, before=()):
        worst, best = self.worst, self.best
        feedback = super().fail(performance, before)
        self.worst, self.best = worst, best  # in a range that the charge has widened, all other arms would look alike
        return feedback

    def scale(self, feedback):
        """`feedback`, a number or an array, in the range so far: in [0, 1]."""
        size = self.best - self.worst
        return np.clip((feedback - self.worst) / size, 0.0, 1.0) if size > 0 else 0.0 * feedback


class Exp3(ScaledBandit):
    """Exponential weights with importance-weighted rewards, made to forget.

    Auer, Cesa-Bianchi, Freund and Schapire, "The Nonstochastic Multiarmed Bandit Problem", SIAM J. Comput. 2002, Exp3:

        p_n(k) = (1 − γ) exp(γ G_n(k) / K) / Σ_i exp(γ G_n(i) / K) + γ / K
        G_{n+1}(k) = δ G_n(k) + 1{k = k_n} x_n / p_n(k)

    x_n in [0, 1] is the scaled feedback. δ = 1 is the original.

    Args:
        arms, window, seed: as for `Bandit`.
        decay: δ in (0, 1].
        exploration: γ in (0, 1].

    Raises:
        ValueError: an argument is outside what is named above.
    """

    def __init__(self, arms, decay=0.98, exploration=0.1, window=5, seed=0):
        super().__init__(arms, window, seed)
        self.decay = check_share("decay", decay)
        self.exploration = check_share("exploration", exploration)
        self.gains = np.zeros(len(self.arms))  # G

    @property
    def probabilities(self):
        gains = self.exploration / len(self.arms) * (self.gains - self.gains.max())
        return (1 - self.exploration) * np.exp(gains) / np.exp(gains).sum() + self.exploration / len(self.arms)

    def learn(self, feedback):
        super().learn(feedback)
        probability = self.probabilities[self.arm]
        self.gains *= self.decay
        self.gains[self.arm] += self.scale(feedback) / probability


class UCB(ScaledBandit):
    """What the bandits share that pull the arm of the largest index: mean reward plus `bonus`, new arms before others.

    Past rewards are scaled anew when the range grows. What an arm has earned and how often it was pulled is discounted
    by `decay` each round. Other arguments and errors as for `Bandit`.
    """

    def __init__(self, arms, decay=1.0, window=5, seed=0):
        super().__init__(arms, window, seed)
        self.decay = check_share("decay", decay)
        self.totals, self.pulls = np.zeros(len(self.arms)), np.zeros(len(self.arms))
        self.rounds = 0

    def bonus(self, pulls):
        """What is added to the mean rewards of arms with as many `pulls`, (K,) and positive."""
        raise NotImplementedError

    @property
    def means(self):
        """Mean feedback of each arm, (K,); of new arms, anything."""
        return self.totals / np.where(self.pulls > 0, self.pulls, 1.0)

    @property
    def probabilities(self):
        new = self.pulls <= 0
        pulls = np.where(new, 1.0, self.pulls)
        means = self.scale(self.means) if self.rounds else 0.0
        indices = np.where(new, np.inf, means + self.bonus(pulls))
        return np.eye(len(self.arms))[indices.argmax()]

    def learn(self, feedback):
        super().learn(feedback)
        self.rounds += 1
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

    def __init__(self, arms, window=5, seed=0):
        super().__init__(arms, 1.0, window, seed)

    def bonus(self, pulls):
        logarithm = np.log(max(self.rounds, 1) / (len(pulls) * pulls))
        return np.sqrt((1 + 1.35) / 2 * np.maximum(logarithm, 0.0) / pulls)


class DUCB(UCB):
    """Discounted UCB: N_k the discounted pulls of arm k, bonus 2 sqrt(½ log(Σ_i N_i) / N_k).

    Garivier and Moulines, "On Upper-Confidence Bound Policies for Switching Bandit Problems", ALT 2011, with
    ξ = 1/2 and rewards bounded by 1. `decay` is their γ; 1 is UCB1. Arguments and errors as for `UCB`.
    """

    def __init__(self, arms, decay=0.98, window=5, seed=0):
        super().__init__(arms, decay, window, seed)

    def bonus(self, pulls):
        return 2 * np.sqrt(0.5 * np.log(max(self.pulls.sum(), 1.0)) / pulls)


class WUCB(UCB):
    """UCB with the mean of the last `memory` feedbacks of each arm; N_k counts all its pulls: bonus sqrt(log t / N_k).

    After ULTHO, with one hyper-parameter (Yuan, Li, Jin and Zeng, arXiv 2503.06101); the window and the coefficient, 1,
    are those of its public `ale/scripts/ppo_ucb.sh`, others of its scripts have up to 100 and up to 5. In its code,
    feedback is the mean value target of a rollout, in its own unit; it chooses anew after each rollout and credits the
    arm just chosen with what was collected before its update; and no arm has to be pulled once at first. Here it is as
    for all bandits of this kind: the improvement, scaled, of the round that shows what the arm did, and each arm once
    at first. Other arguments and errors as for `Bandit`.
    """

    def __init__(self, arms, memory=10, window=5, seed=0):
        super().__init__(arms, 1.0, window, seed)
        if memory < 1:
            raise ValueError(f"memory must be 1 or more, not {memory}")
        self.memory = memory
        self.recent = [[] for _ in self.arms]  # feedbacks

    def bonus(self, pulls):
        return np.sqrt(math.log(max(self.rounds, 1)) / pulls)

    @property
    def means(self):
        return np.array([sum(feedbacks) / max(len(feedbacks), 1) for feedbacks in self.recent])

    def learn(self, feedback):
        super().learn(feedback)
        self.recent[self.arm] = [*self.recent[self.arm], feedback][-self.memory :]


RIVALS = {"exp3": Exp3, "moss": MOSS, "ducb": DUCB, "wucb": WUCB}


def all_bandits():
    """{name: class} of what `--bandit` chooses from."""
    return {"peak": Peak} | BANDITS | {"prior": Prior} | RIVALS


BanditName = Literal[tuple(all_bandits())]


def find_bandit(name):
    """The class that `--bandit NAME` means. Raises ValueError if there is none."""
    if bandit := all_bandits().get(name):
        return bandit
    raise ValueError(f"there is no bandit {name!r}; there are {', '.join(all_bandits())}")


def bandits_with(option):
    """Names of the bandits whose constructor has `option`."""
    return [name for name, bandit in all_bandits().items() if option in inspect.signature(bandit).parameters]


def make_bandit(name, arms, seed=0, **options):
    """The bandit that `--bandit NAME` means; of `options` it gets those that its constructor has and that are not None.

    Raises:
        ValueError: there is no such bandit, or the bandit refuses its arguments.
        TypeError: no bandit has such an option.
    """
    bandit = find_bandit(name)
    if unknown := [option for option in options if not bandits_with(option)]:
        raise TypeError(f"no bandit has an option {', '.join(unknown)}")
    accepted = inspect.signature(bandit).parameters
    return bandit(arms, seed=seed, **{n: x for n, x in options.items() if n in accepted and x is not None})

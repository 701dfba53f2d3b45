"""Our own bandit, `Peak`, and its control. NumPy only, as `bandits.py`, which it needs."""

import copy
import math

import numpy as np

from bandits import Bandit


class Peak(Bandit):
    """Learns how fast performance rises at each learning rate and draws the one at which it rises fastest.

    The policy has a level L of performance, seen through noise. While a rate k is in use, L drifts by d(k) from one
    observation to the next. The drifts are a parabola over log10 η, of which place, height and width are not known, and
    small deviations from it (a Gaussian process). In units of σ, the noise of an observation:

        f_t = L_t + ε_t                                ε_t ~ N(0, 1)
        L_t = L_{t−1} + d_t(k_t) + 0.1 ξ_t             ξ_t ~ N(0, 1)
        d_t(k) = m_t(k) + c_t min(10^z_t(k), 1) + b_t z_t(k) + a_t z_t(k)² + g_t(k)
        m_t(k) = −s (z_t(k)² + max(z_t(k), 0)³)
        c ~ N(s, s²)    b, a ~ N(0, s² diag(1, 0.3²))    g ~ GP(0, (0.2 s)² exp(−½ log10(η_i / η_k)² / 0.5²))

    s is the size of drifts. z is how many decades a rate is above the one that is expected to be best: that which moves
    the parameters by `best_update` of their first norm in a gradient step, and `fall` decades lower at the end. That is
    for minibatches of 64 and grows with the square root of their size (Malladi et al., "On the SDEs and Scaling Rules
    for Adaptive Gradient Algorithms", NeurIPS 2022). Where an optimizer's ε shortens steps, it is higher, and falls as
    gradients grow (`step_share`). c is what there is to gain now: a rate below the expected best gets c
    times η over that one. b is where the peak is, a how wide, g the deviations. All of them move (Ornstein-Uhlenbeck
    processes): what was learnt of b, a and g fades to 37 % in a thousand observations, of c in two hundred. The cube is
    caution: too low a rate costs time, one that is far too high may cost the agent.

    A Kalman filter (Kalman, 1960) gives the posterior of (L, c, b, a, g) for each of four sizes s of the drifts; each
    has its σ², the mean of its first 50 squared errors in units of their variance, then a running mean with weight
    1/50. Once five errors are known, those beyond 3 standard deviations count as 3. The sizes are weighted by how well
    they have predicted lately. Nothing has a unit: performances u f + v, u > 0, in place of f change no draw.

    Arms are drawn by Thompson (1933) sampling from that posterior, with 1,000 fixed samples. Their standard deviations
    are multiplied by 0.4, as exploration costs much in a short run (Chapelle and Li, "An Empirical Evaluation of
    Thompson Sampling", NeurIPS 2011). In the samples, c is at least 0. After some bad luck, a negative c would favour
    low rates; the lower they are, the less they change, and the less there is to contradict it. The constants were
    chosen on simulated agents and real tasks (results/README.md); none is to be tuned.

    Exploration starts at the arm that is expected to be best and spreads: what may be drawn are the arms next to those
    that were drawn, or within half a decade of them, upwards only from arms whose last round has not failed. For a rate
    that is far too high can ruin an agent before its noise is known, and then nothing tells that it did. Of a round
    that has failed, one thing is kept: its arm and those above it are thought to drift by 3 s less than before.

    Call `set_update_size` before the first draw. Without it, the middle arm is expected to be best at the start.
    Arguments and errors as for `Bandit`.
    """

    BATCH_SIZE = 64  # of the minibatches that `best_update` is for
    SIZES = (0.05, 0.15, 0.45, 1.35)  # s
    COMMON, PLACE, WIDTH, DEVIATION, LENGTH = 1.0, 1.0, 0.3, 0.2, 0.5
    WALK, COMMON_FADE, FADE, CUT = 0.1, math.exp(-1 / 200), math.exp(-1 / 1000), 3.0
    FORGET = 0.98  # of how well a size has predicted
    SHRINK = 0.4
    FILTER = ("mean", "covariance", "variance", "errors", "evidence")

    def __init__(self, arms, window=5, seed=0):
        super().__init__(arms, window, seed)
        self.needs_update_size = True
        self._log_rates = np.log10(self.arms)
        self._distances = self._log_rates[:, None] - self._log_rates
        ranks = self._log_rates.argsort().argsort()
        self._near = (abs(ranks[:, None] - ranks) <= 1) | (abs(self._distances) <= 0.5)
        self.best = np.sort(self._log_rates)[(len(ranks) - 1) // 2]  # log10 of the rate expected best, if ε is 0
        self.fall = 0.3  # decades
        self.survived, self.failed = np.zeros((2, len(ranks)), bool)  # how the last round with each arm ended
        # The mean of (L, c, b, a, g) is linear in the data and in σ, but for errors that are cut: the last axis holds
        # what data adds, and what σ times the prior does. The first axis is the sizes.
        self.mean = np.zeros((len(self.SIZES), 4 + len(ranks), 2))
        self.mean[:, 1, 1] = self.SIZES  # training is expected to help
        prior = np.diag([0.0, self.COMMON, self.PLACE, self.WIDTH] + [0.0] * len(ranks)) ** 2
        prior[4:, 4:] = self.DEVIATION**2 * np.exp(-0.5 * (self._distances / self.LENGTH) ** 2)
        self._prior_covariance = np.array(self.SIZES)[:, None, None] ** 2 * prior
        self.covariance = self._prior_covariance.copy()  # in units of σ²
        self.origin = 0.0  # the first observation, from which data is counted
        self.level_is_known = False
        self.variance, self.errors = np.zeros(len(self.SIZES)), 0  # σ², and errors so far, at most 50
        self.evidence = np.zeros(len(self.SIZES))  # log-likelihoods, each relative to the largest of its observation
        self.at_start = self.copy_filter()  # of this round
        self._normals = np.random.default_rng(0).standard_normal((1000, 3 + len(ranks)))  # the same for every draw

    def set_update_size(self, size, batch_size=BATCH_SIZE, best_update=0.002, fall=0.3):
        """Say that a gradient step at a learning rate of 1 moves the parameters by `size` of their norm, ‖Δθ‖ / ‖θ‖.

        `batch_size` is the number of samples that its gradient is a mean of. `best_update` is the relative update that
        is expected to be best at the start, with minibatches of 64, and `fall` how many decades the best one falls
        until the end. The defaults are PPO's. Where values are learnt from targets of their own (SAC, DQN), practice
        has settled on updates near 0.7 % and on constant rates: pass 0.007 and 0. A size that is 0 or not finite says
        nothing: the middle arm stays the one that is expected to be best. Raises RuntimeError once an arm was drawn.
        """
        if self.drawn_from is not None:
            raise RuntimeError("an arm was drawn already: call set_update_size() before the first pull()")
        self.needs_update_size, self.fall = False, fall
        if 0 < size < math.inf:
            best_update *= math.sqrt(batch_size / self.BATCH_SIZE)
            self.best = math.log10(best_update) - math.log10(size)

    @property
    def decades(self):
        """z: how many decades each arm is above the rate that is expected to be best, (K,)."""
        return self._log_rates - self.best + self.fall * self.progress + math.log10(self.step_share)

    @property
    def prior_mean(self):
        """m, for each size, (4, K)."""
        z = self.decades
        return -np.array(self.SIZES)[:, None] * (z**2 + np.maximum(z, 0) ** 3)

    @property
    def features(self):
        """What (c, b, a, g) are multiplied with to give what the drift of each arm has beside m, (K, 3 + K)."""
        z = self.decades
        return np.column_stack([10 ** np.minimum(z, 0), z, z**2, np.eye(len(z))])

    def observe(self, performance):
        performance = super().observe(performance)
        self.predict()
        if self.level_is_known:
            self.correct(performance - self.origin)
            return
        if not self.errors:
            self.origin = performance
        self.level_is_known = True
        self.mean[:, 0] = performance - self.origin, 0.0
        self.covariance[:, 0] = self.covariance[:, :, 0] = 0.0
        self.covariance[:, 0, 0] = 1.0

    def predict(self):
        fades = np.array([1.0, self.COMMON_FADE] + [self.FADE] * (2 + len(self.arms)))
        both = np.multiply.outer(fades, fades)
        self.mean = fades[:, None] * self.mean
        self.mean[:, 1, 1] += (1 - self.COMMON_FADE) * np.array(self.SIZES)
        self.covariance = both * self.covariance + (1 - both) * self._prior_covariance
        if self.arm is not None:
            step = np.eye(4 + len(self.arms))
            step[0, 1:] = self.features[self.arm]
            self.mean, self.covariance = step @ self.mean, step @ self.covariance @ step.T
            self.mean[:, 0, 1] += self.prior_mean[:, self.arm]
        self.covariance[:, 0, 0] += self.WALK**2

    def correct(self, y):
        mean, covariance, sigma = self.mean, self.covariance, np.sqrt(self.variance)
        error_variance = covariance[:, 0, 0] + 1
        error = np.abs(y - mean[:, 0, 0] - mean[:, 0, 1] * sigma) / np.sqrt(error_variance)
        can_cut = (error > self.CUT * sigma) & (self.errors >= 5)
        cut = np.where(can_cut, self.CUT * sigma / np.where(error > 0, error, 1), 1.0)
        gain = covariance[:, :, 0] / error_variance[:, None]
        innovation = np.stack([y - mean[:, 0, 0], -mean[:, 0, 1]], axis=1) * cut[:, None]
        mean += gain[:, :, None] * innovation[:, None]
        covariance -= gain[:, :, None] * covariance[:, :1]
        if (sigma > 0).all():
            squares = np.minimum(error / sigma, self.CUT) ** 2
            likelihood = -np.log(sigma) - 0.5 * np.log(error_variance) - 0.5 * squares
            self.evidence = self.FORGET * self.evidence + likelihood - likelihood.max()
        if (error > 1e-12 * abs(self.origin)).all():  # σ is not known until more than rounding changes
            self.errors = min(self.errors + 1, 50)
            self.variance += ((cut * error) ** 2 - self.variance) / self.errors

    def copy_filter(self):
        return copy.deepcopy({name: getattr(self, name) for name in self.FILTER})

    def pull(self):
        self.at_start = self.copy_filter()
        return super().pull()

    def learn(self, feedback):
        self.survived[self.arm], self.failed[self.arm] = True, False

    def fail(self, performance, before=()):
        arm = self.arm
        feedback = super().fail(performance, before)
        self.survived[arm], self.failed[arm] = False, True
        # or a catastrophe would be taken for noise, or for a drift
        for name, value in copy.deepcopy(self.at_start).items():
            setattr(self, name, value)
        as_high = self._distances[:, arm] >= 0
        self.mean[:, 4:, 1] -= 3 * np.multiply.outer(self.SIZES, as_high)
        self.level_is_known = False
        return feedback

    @property
    def reachable(self):
        """The arms that may be drawn, (K,) bool."""
        start = np.abs(self._log_rates - self.best)
        ways = self._near & (self.survived | self.failed & (self._distances <= 0))
        return (start == start.min()) | ways.any(axis=1)

    @property
    def probabilities(self):
        sigma = np.sqrt(self.variance)[:, None]
        data = np.where(sigma > 0, self.mean[:, 1:, 0] / np.where(sigma > 0, sigma, 1), 0)
        roots = np.linalg.cholesky(self.covariance[:, 1:, 1:] + 1e-9 * np.eye(3 + len(self.arms)))
        beliefs = (self.mean[:, 1:, 1] + data)[:, None] + self.SHRINK * self._normals @ roots.swapaxes(1, 2)
        beliefs[:, :, 0] = np.maximum(beliefs[:, :, 0], 0)
        drifts = self.prior_mean[:, None] + beliefs @ self.features.T
        weights = np.exp(self.evidence - self.evidence.max())
        probabilities = np.zeros(len(self.arms))
        for best, weight in zip(np.where(self.reachable, drifts, -np.inf).argmax(axis=2), weights / weights.sum()):
            probabilities += weight * np.bincount(best, minlength=len(self.arms)) / len(best)
        return probabilities / probabilities.sum()


class Prior(Peak):
    """The control of `Peak`: draws from its prior for ever, any arm from the start, and learns nothing."""

    @property
    def reachable(self):
        return np.ones(len(self.arms), bool)

    def observe(self, performance):
        return Bandit.observe(self, performance)

    def fail(self, performance, before=()):
        return Bandit.fail(self, performance, before)

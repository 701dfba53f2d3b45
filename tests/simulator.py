"""Simulated agents: performance that moves with the learning rate, for thousands of bandit lives without training.

Noise, outliers, delay and speed are those of real PPO, SAC and DQN runs, in `calibration.json`, which

    PYTHONPATH=. python tests/simulator.py

makes from the published runs under results/. What the real runs cannot tell is how the drift depends on the rate and on
time; that is a scenario, and there are several. DESIGN are those that the constants of `bandits.Drift` were chosen on,
HELD_OUT are others that were not looked at before.
"""

import json
from pathlib import Path

import numpy as np

from bandits import Rounds
from lrrl_utils.compact import read_parquet

ARMS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
CALIBRATION = Path(__file__).parent / "calibration.json"
SOURCES = {"ppo": "ppo_halfcheetah", "sac": "sac_hopper", "dqn": "dqn_breakout"}


class Agent:
    """A simulated agent with a level of performance that drifts, once a step, by an amount that the rate decides.

    In units of the noise's standard deviation, the best rate at a time drifts by `speed`. Rates below the best are
    slower in proportion to (η / η*)^0.8, rates above it fall off and then do harm.

    Args:
        seed: of its noise, its best rate and how that moves.
        calibration: {"noise": …, "outliers": …, "delay": …, "speed": …, "steps": …}.
        scenario: one of DESIGN or HELD_OUT.
    """

    def __init__(self, seed, calibration, scenario):
        self.rng = np.random.default_rng(seed)
        self.calibration, self.scenario = calibration, scenario
        self.level = self.seen = 0.0
        self.t = 0
        self.start, self.end = self.rng.uniform(-4.5, -2.5, 2)  # log10 of the best rate
        if scenario in ("falling", "plateau"):
            self.end = max(self.start - self.rng.uniform(0, 1), -4.8)
        elif scenario == "rising":
            self.end = min(self.start + self.rng.uniform(0.5, 1.5), -2.3)
        elif scenario in ("cliff", "standing"):
            self.end = self.start

    def drifts(self, rates):
        """What each of `rates` would add to the level in the next step, (K,)."""
        u = self.t / self.calibration["steps"]
        if self.scenario == "jump":
            best = self.start if u < 0.5 else self.end
        else:
            best = self.start + (self.end - self.start) * u
        z = np.log10(rates) - best
        if self.scenario == "plateau":  # every rate has a level of its own that it leads to, high rates soon and low
            span = 1.3 * self.calibration["speed"] * self.calibration["steps"]
            plateaus = span * np.where(z < 0, 1.0, np.maximum(1 - 0.7 * z, 0.1))
            return np.minimum(0.02 * 10 ** (0.7 * z), 0.5) * (plateaus - self.level)
        above = np.where(z < 0.3, 1.0, -3.0) if self.scenario == "cliff" else np.maximum(1 - 0.8 * z - 3 * z**2, -1.5)
        return self.calibration["speed"] * np.where(z < 0, 10 ** (0.8 * z), above)

    def step(self, rate):
        """One more step of training with `rate`; returns the performance that is observed."""
        self.level += self.drifts(np.array([rate]))[0]
        self.t += 1
        return self.observe()

    def observe(self):
        """The performance of now: the level, late, with noise that is normal but for some outliers below."""
        self.seen += (1 - self.calibration["delay"]) * (self.level - self.seen)
        noise = self.rng.standard_normal()
        return self.seen + (-4 * abs(noise) if self.rng.random() < self.calibration["outliers"] else noise)


DESIGN = ("falling", "jump", "plateau")
HELD_OUT = ("rising", "cliff", "standing")


def live(bandit, agent):
    """A whole life: `bandit` chooses the rates of `agent`. Returns the level that it ends at, and the arms used."""
    arms, rounds = [], Rounds({"agent": bandit})
    rounds.earn(agent.observe(), 1)
    for _ in range(agent.calibration["steps"]):
        if not rounds.is_open:
            rounds.begin()
        arms.append(bandit.arm)
        rounds.earn(agent.step(bandit.learning_rate), 1)
        if rounds.is_over:
            rounds.close()
    return agent.level, arms


def calibrate(folder):
    """The statistics of the published runs of a study, medians over runs; noise is 1 by definition.

    With f the performances of a run and a line fitted through each 15 of them that follow each other: the noise is the
    deviation from the lines; outliers are further below than 3 robust deviations; the delay is the correlation of
    neighbouring deviations; the speed is the steepest tenth of the lines' slopes, over the noise.
    """
    rows = []
    for record in sorted(read_parquet(Path(f"{folder}.parquet")), key=lambda record: record.folder):
        performances = record.rounds["performance"]
        t = np.arange(15) - 7.0
        slopes, residuals, products = [], [], []
        for i in range(len(performances) - 14):
            window = performances[i : i + 15]
            slopes.append(t @ window / (t @ t))
            deviations = window - window.mean() - slopes[-1] * t
            residuals.append(deviations[7])
            products.append(deviations[7] * deviations[8])
        noise = np.median(np.abs(residuals)) / 0.6745
        tails = np.mean(np.array(residuals) < -3 * noise)
        delay = max(np.mean(products) / np.mean(np.square(residuals)), 0)
        rows.append((tails, delay, np.quantile(slopes, 0.9) / noise, len(performances)))
    outliers, delay, speed, steps = np.median(rows, axis=0)
    rounded = {"outliers": outliers, "delay": delay, "speed": speed}
    return {name: round(float(x), 3) for name, x in rounded.items()} | {"steps": int(steps), "runs": len(rows)}


if __name__ == "__main__":
    results = Path(__file__).parent.parent / "results"
    table = {name: calibrate(results / source) for name, source in SOURCES.items()}
    CALIBRATION.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(table, indent=2))

"""Simulated agents: performance that moves with the learning rate, for thousands of bandit lives without training.

Noise, outliers, delay and speed are those of real PPO, SAC and DQN runs, in `calibration.json`, which

    PYTHONPATH=. python tests/simulator.py

makes from the published runs under results/. How the drift depends on the rate and on time is a scenario, and there are
several; DESIGN are those that a first bandit's constants were chosen on, HELD_OUT are others that were not looked at
before. Or it is measured: results/landscapes/ has what each rate does at each moment of real runs. MEASURED_HELD_OUT
are those of tasks that no choice had seen up to the third version of `peak`. Levels that bandits and constants end at:

    PYTHONPATH=. python tests/simulator.py levels

and what becomes of `peak` and `prior` where the rate that they expect to be best is not:

    PYTHONPATH=. python tests/simulator.py expectations
"""

import csv
import itertools
import json
import sys
from pathlib import Path

import numpy as np

from bandits import Rounds, Uniform
from lrrl_utils.compact import read_parquet
from lrrl_utils.files import read_json
from lrrl_utils.rivals import make_bandit

ARMS = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
CALIBRATION = Path(__file__).parent / "calibration.json"
RESULTS = Path(__file__).parent.parent / "results"
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


class MeasuredAgent(Agent):
    """A simulated agent whose drifts are those of a measured landscape, its rates displaced a little in each life.

    Between the rates and moments that were measured, gains are interpolated in log η and in time. Below the lowest
    rate, a drift is in proportion to the rate; above the highest, it falls on as it does between the last two.

    Args:
        seed: of its noise and its displacement.
        name: the landscape, one of LANDSCAPES.
    """

    def __init__(self, seed, name):
        algorithm, timesteps, step = LANDSCAPES[name]
        calibration = json.loads(CALIBRATION.read_text())[algorithm]
        super().__init__(seed, calibration | {"steps": timesteps // step}, name)
        self.log_rates, self.moments, self.gains = read_landscape(name, step)
        self.moments = self.moments / step
        self.displacement = 0.15 * self.rng.standard_normal()

    def drifts(self, rates):
        x = np.log10(rates) + self.displacement
        now = np.array([np.interp(self.t, self.moments, gains) for gains in self.gains])
        above = np.maximum(x - self.log_rates[-1], 0) * (now[-1] - now[-2]) / (self.log_rates[-1] - self.log_rates[-2])
        below = 10 ** np.minimum(x - self.log_rates[0], 0)
        return np.interp(x, self.log_rates, now) * below + np.minimum(above, 0)


# name: algorithm, timesteps of a run, of a step
LANDSCAPES = {name: ("ppo", 300_000, 2048) for name in ("halfcheetah", "hopper", "walker2d")}
MEASURED_HELD_OUT = ("walker2d",)
UPDATE_SIZES = {"ppo": 5.7}  # relative to the parameters, at a rate of 1; nearly the same in all runs


def read_landscape(name, step):
    """log10 of the rates, (R,), the moments, (M,), and gains per `step` timesteps, (R, M), in units of the noise.

    The noise is that of the mean return of the episodes in a step. It follows from the errors of the gains. A branch
    that has diverged counts as the worst that did not.
    """
    folder = RESULTS / "landscapes" / name
    length = read_json(folder / "landscape.json")["length"]
    with open(folder / "landscape.csv") as file:
        rows = [{k: float(row[k]) for k in COLUMNS} for row in csv.DictReader(file)]
    rates, moments = (sorted({row[k] for row in rows}) for k in ("learning_rate", "moment"))
    errors = [row["standard_error"] * length / 1e4 for row in rows]
    noises = [e / np.sqrt(1 / r["episodes_before"] + 1 / r["episodes_after"]) for e, r in zip(errors, rows)]
    episodes = np.median([row["episodes_after"] for row in rows]) * step / (length / 2)
    noise = np.nanmedian(noises) / np.sqrt(max(episodes, 1))
    worst = np.nanmin([row["gain"] for row in rows])
    gains = [[[] for _ in moments] for _ in rates]
    for row in rows:
        gain = row["gain"] if np.isfinite(row["gain"]) else worst
        gains[rates.index(row["learning_rate"])][moments.index(row["moment"])].append(gain)
    return np.log10(rates), np.array(moments), np.mean(gains, axis=2) * step / 1e4 / noise


COLUMNS = ("learning_rate", "moment", "episodes_before", "episodes_after", "gain", "standard_error")


def live(bandit, agent):
    """A whole life: `bandit` chooses the rates of `agent`. Returns the level that it ends at, and the arms used."""
    arms, rounds = [], Rounds({"agent": bandit})
    rounds.earn(agent.observe(), 1)
    for _ in range(agent.calibration["steps"]):
        if not rounds.is_open:
            rounds.begin(agent.t / agent.calibration["steps"])
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


def simulate(name, make, lives=40, factor=1.0):
    """The levels, (lives,), that agents of the landscape `name` end at, in units of the noise.

    `make(seed)` makes a bandit; one that asks for the size of its updates is told `factor` times what it is.
    """
    levels = []
    for seed in range(1000, 1000 + lives):
        bandit = make(seed)
        if bandit.needs_update_size:
            bandit.set_update_size(factor * UPDATE_SIZES[LANDSCAPES[name][0]])
        levels.append(live(bandit, MeasuredAgent(seed, name))[0])
    return np.array(levels)


def print_levels():
    """A table of what constants and bandits end at on each measured landscape, for arms wherever they lie."""
    sets = {"3e-5 to 3e-3": ARMS, "3e-4 to 3e-2": np.multiply(ARMS, 10), "3e-6 to 3e-4": np.divide(ARMS, 10)}
    sets["1e-6 to 1"] = np.geomspace(1e-6, 1, 25)
    for name in LANDSCAPES:
        for rate in (1e-5, *ARMS, 1e-2):
            print(f"{name}: constant {rate:g}: {simulate(name, lambda seed, r=rate: Uniform([r])).mean():.1f}")
        for title, arms in sets.items():
            for kind in ("peak", "prior", "lrrl", "uniform"):
                levels = simulate(name, lambda seed, k=kind, a=arms: make_bandit(k, list(a), seed))
                print(f"{name}: {kind}, {title}: {levels.mean():.1f} ± {levels.std() / len(levels) ** 0.5:.1f}")


def print_expectations():
    """A table of what `peak` and `prior` end at on each measured landscape if what they expect is wrong."""
    arms = list(np.geomspace(1e-6, 1, 25))
    print("| landscape | expected rate, times the right one | prior | peak | peak minus prior |\n|-|-|-|-|-|")
    for name, factor in itertools.product(LANDSCAPES, (0.1, 0.3, 1, 3, 10)):
        makers = [lambda seed, k=kind: make_bandit(k, arms, seed) for kind in ("prior", "peak")]
        prior, peak = (simulate(name, make, factor=1 / factor) for make in makers)
        cells = [f"{x.mean():.1f} ± {1.96 * x.std(ddof=1) / len(x) ** 0.5:.1f}" for x in (prior, peak, peak - prior)]
        print(f"| {name} | {factor:g} | {' | '.join(cells)} |")


if __name__ == "__main__" and sys.argv[1:] == ["levels"]:
    print_levels()
elif __name__ == "__main__" and sys.argv[1:] == ["expectations"]:
    print_expectations()
elif __name__ == "__main__":
    table = {name: calibrate(RESULTS / source) for name, source in SOURCES.items()}
    CALIBRATION.write_text(json.dumps(table, indent=2) + "\n")
    print(json.dumps(table, indent=2))

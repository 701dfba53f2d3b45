"""How large and how noisy a round's performance is with clipped and with raw rewards, while the policy never changes.

    PYTHONPATH=. python results/atari_feedback/measure.py

A random policy plays 40 rounds of 1,000 timesteps. Whatever `lrrl` prefers then is noise.
"""

import numpy as np

from bandits import LRRL
from dqn_atari_lrrl import Args
from lrrl_utils.atari import make_envs

GAMES = [
    "Pong",
    "Breakout",
    "Freeway",
    "Seaquest",
    "SpaceInvaders",
    "MsPacman",
    "Qbert",
    "BeamRider",
    "Atlantis",
    "VideoPinball",
]

print("| game | f, clipped | f, raw | deviation of f', clipped | raw | largest probability, clipped | raw |")
print("|-|-|-|-|-|-|-|")
for game in GAMES:
    envs = make_envs(Args(env_id=f"ALE/{game}-v5", noop_max=0, fire_reset=False), 4)
    envs.reset(seed=np.arange(4))
    rng = np.random.default_rng(0)
    performances = np.zeros((2, 40))  # clipped, raw
    for n in range(40):
        for _ in range(250):
            _, rewards, terminations, truncations, _ = envs.step(rng.integers(envs.single_action_space.n, size=4))
            performances[:, n] += rewards.clip(-1, 1).sum() / 1000, rewards.sum() / 1000
            if (done := terminations | truncations).any():
                envs.reset(options={"reset_mask": done})
    deviations, largest = [], []
    for row in performances:
        bandit, feedbacks, probabilities = LRRL([1e-5, 3e-5, 1e-4, 3e-4, 1e-3]), [], []
        for performance in row:
            bandit.pull()
            feedbacks.append(bandit.update(performance))
            probabilities.append(bandit.probabilities.max())
        deviations.append(np.std(feedbacks))
        largest.append(max(probabilities))
    cells = (*performances.mean(1), *deviations, *largest)
    print(f"| {game} | {' | '.join(f'{cell:.3g}' for cell in cells)} |", flush=True)

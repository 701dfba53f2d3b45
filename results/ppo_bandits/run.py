"""Runs the published comparison of bandits and fixed rates; stopped at any moment, it goes on when started again.

    python results/ppo_bandits/run.py

A run is skipped if this folder holds it already, finished. 150 runs of 300,000 timesteps, two at a time.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5")
SEEDS = (1, 2, 3, 4, 5)
ARMS = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
VARIANTS = [  # what differs from the defaults
    *({"lr_control": "constant", "learning_rate": rate} for rate in (3e-4, 1e-3, 1e-4, 3e-3, 3e-5)),
    {"lr_control": "linear"},
    *({"bandit": bandit} for bandit in ("drift", "uniform", "lrrl")),
    {"bandit": "drift", "learning_rates": [*ARMS, 0.1, 1.0]},  # two rates that wreck the policy
]
DEFAULTS = {"lr_control": "bandit", "learning_rate": 3e-4, "learning_rates": list(ARMS)}


def is_done(options):
    for summary in FOLDER.glob(f"{options['env_id']}__*__{options['seed']}__*/summary.json"):
        config = json.loads((summary.parent / "config.json").read_text())
        finished = json.loads(summary.read_text())["status"] == "finished"
        if finished and all(config[name] == value for name, value in (DEFAULTS | options).items()):
            return True
    return False


def run(options):
    if is_done(options):
        return
    command = [sys.executable, "ppo_continuous_lrrl.py", "--compile", "--run-dir", str(FOLDER)]
    for name, value in (options | {"total_timesteps": 300_000}).items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{name.replace('_', '-')}", *map(str, values)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=FOLDER.parent.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
    print(options, flush=True)


with ThreadPoolExecutor(2) as pool:
    grid = [{"env_id": task, "seed": seed} | variant for variant in VARIANTS for seed in SEEDS for task in TASKS]
    list(pool.map(run, grid))

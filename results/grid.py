"""Runs a published grid of PPO runs: two at a time, skips those that its folder holds already, finished."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor


def is_done(folder, options, defaults):
    for summary in folder.glob(f"{options['env_id']}__*__{options['seed']}__*/summary.json"):
        config = json.loads((summary.parent / "config.json").read_text())
        finished = json.loads(summary.read_text())["status"] == "finished"
        if finished and all(config.get(name) == value for name, value in (defaults | options).items()):
            return True
    return False


def run_grid(folder, grid, defaults):
    """Run PPO with each {option: value} of `grid`; `defaults` are those options that tell the runs of it apart."""

    def run(options):
        if is_done(folder, options, defaults):
            return
        run_dir = str(folder.relative_to(folder.parent.parent))
        command = [sys.executable, "ppo_continuous_lrrl.py", "--compile", "--run-dir", run_dir]
        for name, value in (options | {"total_timesteps": 300_000}).items():
            values = value if isinstance(value, list) else [value]
            command += [f"--{name.replace('_', '-')}", *map(str, values)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=folder.parent.parent, env=environment, check=True, stdout=subprocess.DEVNULL)
        print(options, flush=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, grid))

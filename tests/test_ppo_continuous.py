"""What ppo_continuous_lrrl.py promises: credit, advantages, equal bytes, whole files, and that it learns."""

import csv
import fcntl
import importlib.metadata
import json
import math
import os
import signal
import struct
import termios
import time
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ppo_continuous_lrrl as ppo
from lrrl_utils.environments import evaluate
from lrrl_utils.numpy_policy import numpy_policy
from lrrl_utils.optimizers import without_hooks
from tests import toy_envs
from tests.conftest import RunFolder, only_folder, rows, wait_for

SCRIPT = "ppo_continuous_lrrl.py"
SMALL = "--num-steps 64 --num-minibatches 4 --update-epochs 2 --bandit-interval 64"


@pytest.fixture
def step_counter():
    toy_envs.StepCounter.total = 0
    return "--env-id tests.toy_envs:StepCounter-v0"


# --- the bandit in the loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rollouts", [1, 3])
def test_a_round_is_credited_with_the_rollouts_that_follow_its_updates(rollouts, train, step_counter, monkeypatch):
    rates_used = {}  # the number of timesteps taken when an update was made: the rates of its gradient steps

    class SpyAdam(torch.optim.Adam):
        def step(self, closure=None):
            rates_used.setdefault(toy_envs.StepCounter.total, set()).add(self.param_groups[0]["lr"].item())
            return super().step(closure)

    monkeypatch.setattr(torch.optim, "Adam", SpyAdam)
    interval = (rollouts - 1) * 64 + 1  # rounded up to whole rollouts
    run = train(ppo.main, f"{step_counter} {SMALL} --total-timesteps 832 --bandit uniform --bandit-interval {interval}")

    assert (
        len(run.rounds["round"]) == 12 // rollouts
    )  # 13 rollouts: the first is a baseline, no data follow the last update
    for n, end in enumerate(run.rounds["global_step"]):
        first = 64 + 64 * rollouts * n  # the timestep of the round's first update
        assert end == first + 64 * rollouts
        # The reward of timestep t is t, so the mean tells exactly which timesteps were credited.
        assert run.rounds["performance"][n] == np.mean(np.arange(first + 1, end + 1))
        for update in range(first, int(end), 64):
            assert rates_used[update] == {np.float32(run.rounds["learning_rate"][n])}
    arms = run.rounds["arm"].astype(int)
    assert [run.config["learning_rates"][arm] for arm in arms] == run.rounds["learning_rate"].tolist()
    assert run.summary["pulls"] == np.bincount(arms, minlength=5).tolist()
    assert len(set(arms)) > 1


def test_performance_is_of_raw_rewards_and_the_return_feedback_waits_for_an_episode(train, step_counter, monkeypatch):
    monkeypatch.setattr(toy_envs.StepCounter, "step", long_episodes(150))
    run = train(ppo.main, f"{step_counter} {SMALL} --total-timesteps 640 --bandit-feedback return")
    # Episodes end at 150, 300, 450, 600; rollouts at 64, 128, 192, …; rounds begin after 64.
    assert run.rounds["global_step"].tolist() == [192, 320, 512, 640]
    sums = [sum(range(start + 1, start + 151)) for start in (0, 150, 300, 450)]
    assert run.rounds["performance"].tolist() == sums == run.episodes["episodic_return"].tolist()


def long_episodes(length):
    def step(self, action):
        toy_envs.StepCounter.total += 1
        self.t += 1
        return self.observe(self.t), float(toy_envs.StepCounter.total), False, self.t == length, {}

    return step


def test_the_probabilities_in_a_row_are_those_its_arm_was_drawn_from(train, step_counter):
    run = train(ppo.main, f"{step_counter} {SMALL} --total-timesteps 640 --bandit lrrl --bandit-step-size 1")
    p = np.array([run.rounds[f"p_{arm}"] for arm in range(5)]).T
    assert p.sum(1) == pytest.approx(1)
    assert p[0].tolist() == [0.2] * 5
    assert run.rounds["feedback"][0] == 0 and p[1].tolist() == [0.2] * 5  # one round alone shows no improvement
    second = int(run.rounds["arm"][1])
    assert run.rounds["feedback"][1] > 0 and p[2].argmax() == second  # from row 3 on, the second round's arm leads


@pytest.mark.parametrize("control", ["constant", "linear"])
def test_without_a_bandit_rounds_are_logged_without_arms(control, train, step_counter):
    run = train(ppo.main, f"{step_counter} {SMALL} --total-timesteps 640 --lr-control {control} --learning-rate 1e-3")
    assert list(run.rounds) == ["round", "global_step", "arm", "learning_rate", "performance", "feedback"]
    assert np.isnan(run.rounds["arm"]).all() and np.isnan(run.rounds["feedback"]).all()
    assert run.rounds["global_step"].tolist() == list(range(128, 641, 64))
    assert run.summary["pulls"] is None and run.summary["bandit"] is None
    expected = [1e-3 * (1 - i / 10) if control == "linear" else 1e-3 for i in range(9)]  # CleanRL's, update by update
    assert run.rounds["learning_rate"] == pytest.approx(expected, rel=1e-6)


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_equal_those_worked_out_by_hand(train, monkeypatch):
    """γ = λ = 0.5, V(s) = s, reward 1. Three steps to a termination, two to a truncation, in turn.

    Termination: δ = 1 + ½·2 − 1 = 1, 1 + ½·3 − 2 = ½, 1 + 0 − 3 = −2; A = 1 + ¼·0 = 1, ½ + ¼·(−2) = 0, −2.
    Truncation (next value 3, that of the final observation): δ = 1, 1 + ½·3 − 2 = ½; A = 1 + ¼·½ = 1.125, ½.
    """
    advantages = []

    def spy(*args):
        advantages.append(calculate_gae(*args)[:, 0].tolist())
        return calculate_gae(*args)

    calculate_gae = ppo.calculate_gae
    monkeypatch.setattr(ppo, "calculate_gae", spy)
    monkeypatch.setattr(ppo.RunningMeanStd, "normalize", lambda self, x: x)
    monkeypatch.setattr(ppo.RunningMeanStd, "std", 1.0)
    monkeypatch.setattr(ppo.Agent, "get_value", lambda self, obs: obs[..., 0])
    options = "--num-steps 12 --num-minibatches 2 --total-timesteps 24 --gamma 0.5 --gae-lambda 0.5"
    train(ppo.main, f"--env-id tests.toy_envs:TwoEnds-v0 {options}")
    cycle = [1, 0, -2, 1.125, 0.5]
    # The first rollout ends in mid-episode, where it bootstraps from V(3); the second one goes on from there.
    assert advantages == [[*cycle, *cycle, 1.125, 0.5], [-2, 1.125, 0.5, *cycle, 1, 0, -2, 1]]


def test_gae_keeps_environments_apart():
    rng = np.random.default_rng(0)
    args = SimpleNamespace(gamma=0.9, gae_lambda=0.8)
    rewards, values, next_values = rng.normal(size=(3, 20, 4))
    terminations, truncations = rng.random((2, 20, 4)) < 0.15
    advantages = ppo.calculate_gae(args, rewards, values, next_values, terminations, truncations)
    for i in range(4):
        for t in range(20):
            expected, discount = 0.0, 1.0
            for later in range(t, 20):  # the definition: a discounted sum of temporal-difference errors
                bootstrap = 0.0 if terminations[later, i] else next_values[later, i]
                expected += discount * (rewards[later, i] + 0.9 * bootstrap - values[later, i])
                if terminations[later, i] or truncations[later, i]:
                    break
                discount *= 0.9 * 0.8
            assert advantages[t, i] == pytest.approx(expected)


# --- the pieces of the agent ------------------------------------------------------------------------------------------


def test_log_probabilities_entropy_and_numpy_policy_agree_with_torch_distributions():
    torch.manual_seed(0)
    agent = ppo.Agent(5, 3)
    agent.actor_logstd.data = torch.tensor([-0.5, 0.1, 0.7])
    obs, actions = torch.randn(10, 5), torch.randn(10, 3)
    distribution = torch.distributions.Normal(agent.actor_mean(obs), agent.actor_logstd.exp())
    assert torch.allclose(agent.get_log_prob(obs, actions), distribution.log_prob(actions).sum(1), atol=1e-5)
    assert torch.allclose(agent.get_entropy(), distribution.entropy().sum(1).mean())
    assert numpy_policy(agent.actor_mean)(obs.numpy()) == pytest.approx(
        agent.actor_mean(obs).detach().numpy(), abs=1e-6
    )


@pytest.fixture
def learn(train, monkeypatch):
    """learn(options) trains, and returns its optimizer, its function of gradients and what these were taken of."""

    def run(options):
        learnt = SimpleNamespace(minibatches=[])

        def spy(args, optimizer, gradients, make_update=ppo.make_update):
            learnt.optimizer, learnt.gradients = optimizer, gradients
            update = make_update(args, optimizer, gradients)
            return lambda *minibatch: learnt.minibatches.append(minibatch) or update(*minibatch)

        with monkeypatch.context() as patch:
            patch.setattr(ppo, "make_update", spy)
            train(ppo.main, f"{SMALL} --total-timesteps 128 --lr-control constant {options}")
        return learnt

    return run


def test_gradients_are_clipped_together_to_a_norm(learn, step_counter):
    norms = []
    for limit in (0.5, 1e9):
        learnt = learn(f"{step_counter} --vf-coef 100 --max-grad-norm {limit}")
        (gradient,), _ = learnt.gradients(*learnt.minibatches[0])
        norms.append(gradient.norm().item())
    assert norms[0] == pytest.approx(0.5, rel=1e-4) and norms[1] > 1 and learnt.optimizer.defaults["eps"] == 1e-5


@pytest.mark.parametrize("norm_adv", [True, False])
def test_advantages_have_mean_0_and_deviation_1_in_each_minibatch_unless_told_not_to(norm_adv, learn, step_counter):
    minibatches = learn(f"{step_counter} {'' if norm_adv else '--no-norm-adv'}").minibatches
    means, stds = np.transpose([(x[0].mean().item(), x[0].std().item()) for x in minibatches])
    assert len(minibatches) == 2 * 2 * 4
    assert (np.allclose(means, 0, atol=1e-5) and np.allclose(stds, 1, atol=1e-3)) == norm_adv


def test_rewards_are_divided_by_the_deviation_of_discounted_returns_that_start_anew_with_every_episode(
    learn, step_counter, monkeypatch
):
    rollouts, calculate_gae = [], ppo.calculate_gae
    monkeypatch.setattr(
        ppo,
        "calculate_gae",
        lambda args, rewards, *x: rollouts.append(rewards.copy()) or calculate_gae(args, rewards, *x),
    )
    learn(step_counter)
    discounted, returns, expected = 0.0, [], []
    for t in range(1, 129):  # whose reward is t; episodes take ten steps
        discounted = 0.99 * discounted + t
        returns.append(discounted)
        expected.append(min(t / max(np.std(returns), 1e-4), 10))
        discounted *= t % 10 > 0
    assert np.concatenate(rollouts).ravel() == pytest.approx(expected, rel=1e-4)


def test_layers_are_orthogonal_and_as_large_as_in_cleanrl():
    agent = ppo.Agent(5, 3)
    for network, last in ((agent.actor_mean, 0.01), (agent.critic, 1.0)):
        for layer, std in zip(network[::2], (math.sqrt(2), math.sqrt(2), last)):
            weight = layer.weight if len(layer.weight) <= layer.in_features else layer.weight.T
            assert torch.allclose(weight @ weight.T, std**2 * torch.eye(len(weight)), atol=1e-5)
            assert not layer.bias.any()
    assert not agent.actor_logstd.any()


def test_one_step_on_the_flat_parameters_equals_clipping_and_adam_on_each():
    def agent_and_loss():
        torch.manual_seed(0)
        agent = ppo.Agent(5, 3)
        obs, actions, rest = torch.randn(16, 5), torch.randn(16, 3), torch.randn(4, 16)
        return agent, lambda: ppo.ppo_loss(agent, ppo.Args(ent_coef=0.01), rest[0], obs, actions, *rest[1:])[0]

    plain, plain_loss = agent_and_loss()
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, eps=1e-5)
    for _ in range(3):
        optimizer.zero_grad()
        plain_loss().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()

    flat, flat_loss = agent_and_loss()
    parameters = flat.flatten_parameters()
    optimizer = torch.optim.Adam([parameters], lr=torch.tensor(1e-2), eps=1e-5, fused=True)
    for _ in range(3):
        gradient = torch.cat([x.ravel() for x in torch.autograd.grad(flat_loss(), list(flat.parameters()))])
        parameters.grad = gradient * (0.5 / (gradient.norm() + 1e-6)).clamp(max=1)
        without_hooks(optimizer)()
    for a, b in zip(plain.parameters(), flat.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_loss_equals_a_slow_reference():
    torch.manual_seed(0)
    agent = ppo.Agent(5, 3)
    args = ppo.Args(ent_coef=0.01)
    obs, actions, returns = torch.randn(32, 5), torch.randn(32, 3), torch.randn(32)
    advantages, old_log_probs, old_values = torch.randn(32), torch.randn(32) - 4, torch.randn(32)
    loss, *_ = ppo.ppo_loss(agent, args, advantages, obs, actions, old_log_probs, old_values, returns)
    distribution = torch.distributions.Normal(agent.actor_mean(obs), agent.actor_logstd.exp())
    expected = 0.0
    for i in range(32):
        ratio = math.exp(distribution.log_prob(actions)[i].sum().item() - old_log_probs[i].item())
        advantage, value, old, target = (x[i].item() for x in (advantages, agent.get_value(obs), old_values, returns))
        expected -= min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
        clipped = old + min(max(value - old, -0.2), 0.2)
        expected += 0.5 * 0.5 * max((value - target) ** 2, (clipped - target) ** 2)
    expected = expected / 32 - 0.01 * distribution.entropy()[0].sum().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_running_statistics_equal_those_of_all_data():
    data = np.random.default_rng(0).normal(3.0, 2.0, (500, 4))
    stats = ppo.RunningMeanStd(mean=np.zeros(4))
    scalar = ppo.RunningMeanStd()
    for row in data:
        stats.update(row)
        scalar.update(row[0])
    assert stats.mean == pytest.approx(data.mean(0)) and stats.std == pytest.approx(data.std(0))
    assert scalar.mean == pytest.approx(data[:, 0].mean()) and scalar.std == pytest.approx(data[:, 0].std())
    assert np.abs(stats.normalize(np.full(4, 1e9))).max() == 10


def test_evaluation_leaves_the_agent_and_its_statistics_alone(train, monkeypatch):
    updates, update = [], ppo.RunningMeanStd.update
    monkeypatch.setattr(ppo.RunningMeanStd, "update", lambda self, x: (updates.append(x), update(self, x))[1])
    options = f"--env-id Pendulum-v1 {SMALL} --total-timesteps 640 --save-model"
    runs, counts = [], []
    for episodes in (0, 3):
        updates.clear()
        runs.append(train(ppo.main, f"{options} --eval-episodes {episodes}"))
        counts.append(len(updates))
    assert "eval_returns" not in runs[0].summary and len(runs[1].summary["eval_returns"]) == 3
    assert runs[0].bytes("episodes.csv") == runs[1].bytes("episodes.csv") and counts[0] == counts[1] > 0
    a, b = (torch.load(run.path / "model.pt", weights_only=True) for run in runs)
    assert all(torch.equal(a["agent"][name], b["agent"][name]) for name in a["agent"])


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_everything_that_the_readme_lists(train, figures):
    options = "--env-id Pendulum-v1 --total-timesteps 4096 --num-steps 512 --eval-episodes 2 --save-model --seed 5"
    run = train(ppo.main, f"{options} --bandit-interval 2048 --no-rollback")
    assert run.path.name.startswith("Pendulum-v1__ppo_continuous_lrrl__5__")
    assert run.config["learning_rates"] == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert run.config["versions"]["torch"] == importlib.metadata.version("torch") and run.config["device"] == "cpu"
    assert run.episodes["global_step"].tolist() == list(range(200, 4001, 200))
    assert (run.episodes["episodic_length"] == 200).all()
    assert run.rounds["global_step"].tolist() == [2560]  # κ = 2,048, four rollouts; the second round lacks one
    summary = run.summary
    assert summary["status"] == "finished" and summary["global_step"] == 4096 and len(summary["eval_returns"]) == 2
    assert summary["final_return"] == pytest.approx(run.episodes["episodic_return"][-10:].mean())
    assert summary["auc"] is not None and summary["sps"] > 0 and summary["peak_rss_mb"] > 50
    assert sum(summary["pulls"]) == 1
    assert matplotlib.image.imread(run.path / "curves.png").std() > 0.05

    model = torch.load(run.path / "model.pt", weights_only=True)
    agent, mean, std = ppo.Agent(3, 1), model["obs_mean"].numpy(), model["obs_std"].numpy()
    agent.load_state_dict(model["agent"])
    act = lambda obs: numpy_policy(agent.actor_mean)(((obs - mean) / std).clip(-10, 10).astype(np.float32))  # noqa: E731
    args = ppo.Args(env_id="Pendulum-v1", eval_episodes=2, seed=5)
    assert evaluate(args, act, SimpleNamespace(stop_if_asked=lambda: None)) == summary["eval_returns"]

    events = EventAccumulator(str(run.path))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {"charts/episodic_return", "charts/episodic_length", "charts/learning_rate", "charts/SPS"}
    assert scalars >= {"lrrl/arm", "lrrl/performance", "lrrl/feedback", "lrrl/entropy", "lrrl/pull_entropy"}
    assert scalars >= {f"lrrl/probability/{rate:g}" for rate in run.config["learning_rates"]}
    assert scalars >= {"losses/value_loss", "losses/policy_loss", "losses/approx_kl", "losses/explained_variance"}
    assert [event.step for event in events.Scalars("charts/episodic_return")] == run.episodes["global_step"].tolist()


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(start, tmp_path):
    options = "--env-id Hopper-v5 --total-timesteps 2048 --num-steps 512 --update-epochs 2 --bandit-interval 512"
    # one as a user starts it, and two forked: also what every process makes anew, as its seed of hashes, is no matter
    processes = [start(f"{SCRIPT} {options} --seed {seed}", fresh=n == 0) for n, seed in enumerate((3, 3, 4))]
    for process in processes:
        assert process.wait() == 0, process.communicate()
    runs = [RunFolder(path) for path in (tmp_path / "runs").iterdir()]
    assert len(runs) == 3  # two of them may well have started within the same second
    same = [run for run in runs if run.config["seed"] == 3]
    (other,) = [run for run in runs if run.config["seed"] == 4]
    for name in ("episodes.csv", "rounds.csv"):
        assert same[0].bytes(name) == same[1].bytes(name) != other.bytes(name)


@pytest.mark.parametrize("env_id", ["HalfCheetah-v4", "InvertedPendulum-v5", "tests.toy_envs:OddSpaces-v0"])
def test_one_or_many_environments_of_any_box_task(env_id, train):
    run = train(ppo.main, f"--env-id {env_id} --num-envs 3 {SMALL} --total-timesteps 600 --eval-episodes 1")
    assert run.summary["status"] == "finished" and run.summary["global_step"] == 576
    assert (run.episodes["global_step"] % 3 == 0).all()


def wandb_records(path):
    """The records of a W&B run file, which is a LevelDB log: blocks of 32 KiB, a record in one or more fragments."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, payload = path.read_bytes(), 7, b""  # behind W&B's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # too little left in this block for a fragment's header
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last fragment of one
            yield Record.FromString(payload)
            payload = b""


def test_tracking_offline_stores_the_scalars_and_the_config(start, tmp_path):
    options = f"--env-id Pendulum-v1 {SMALL} --total-timesteps 2560 --track"
    process = start(f"{SCRIPT} {options}", fresh=True, WANDB_MODE="offline")
    assert process.wait() == 0, process.communicate()
    run = only_folder(tmp_path / "runs")
    (log,) = run.path.glob("wandb/offline-run-*/run-*.wandb")
    config, history = {}, {}
    for record in wandb_records(log):
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        for item in record.history.item:
            history.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
    assert config["learning_rates"] == run.config["learning_rates"] and config["env_id"] == "Pendulum-v1"
    assert history["charts/episodic_return"] == run.episodes["episodic_return"].tolist()
    assert history["lrrl/performance"] == run.rounds["performance"].tolist()
    assert {"losses/value_loss", "charts/learning_rate", "global_step", "lrrl/probability/0.0003"} <= set(history)


def test_a_terminal_shows_one_bar_and_a_pipe_plain_lines(start):
    terminal, terminal_end = os.openpty()
    fcntl.ioctl(terminal_end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    options = f"--env-id Pendulum-v1 {SMALL} --total-timesteps 640 --lr-control constant"
    processes = [start(f"{SCRIPT} {options}", fresh=True, stderr=terminal_end), start(f"{SCRIPT} {options}")]
    assert [process.wait() for process in processes] == [0, 0]
    bar = os.read(terminal, 100_000).decode()
    assert "100%|" in bar and "640/640" in bar and "learning rate 0.0003" in bar and "SPS" in bar and "<" in bar
    lines = processes[1].stdout.read().splitlines()
    assert lines[0].startswith("step 64 of 640") and "learning rate 0.0003" in lines[0] and "finished" in lines[-1]
    os.close(terminal), os.close(terminal_end)


def test_videos_are_recorded_off_screen(start, tmp_path):
    process = start(f"{SCRIPT} --env-id InvertedPendulum-v5 {SMALL} --total-timesteps 64 --capture-video", fresh=True)
    assert process.wait() == 0, process.communicate()
    videos = sorted((only_folder(tmp_path / "runs").path / "videos").glob("*.mp4"))
    assert [video.name[-5] for video in videos[:2]] == ["0", "1"]
    assert all(video.stat().st_size > 1000 for video in videos)


# --- trouble ----------------------------------------------------------------------------------------------------------


def wait_for_rounds(tmp_path, count, process):
    wait_for(lambda: any(len(rows(path)) >= count for path in tmp_path.glob("runs/*/rounds.csv")), process)
    return only_folder(tmp_path / "runs").path


def assert_whole(path, columns):
    text = path.read_text()
    assert text.endswith("\n") and {len(row) for row in csv.reader(text.splitlines())} == {columns}


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_everything_and_says_so(signum, code, start, tmp_path):
    process = start(f"{SCRIPT} --num-steps 512 --bandit-interval 512 --no-compile")
    wait_for_rounds(tmp_path, 4, process)
    process.send_signal(signum)
    time.sleep(0.3)
    process.send_signal(signum)  # an impatient second one tears nothing
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code and "Traceback" not in errors
    run = only_folder(tmp_path / "runs")
    assert run.summary["status"] == "interrupted" and sum(run.summary["pulls"]) == len(run.rounds["round"]) >= 4
    assert (run.path / "curves.png").stat().st_size > 1000
    assert_whole(run.path / "rounds.csv", 11)


def test_a_killed_run_leaves_what_had_happened(start, tmp_path):
    process = start(f"{SCRIPT} --num-steps 512 --bandit-interval 512 --no-compile")
    path = wait_for_rounds(tmp_path, 6, process)
    process.kill()
    process.wait()
    assert_whole(path / "rounds.csv", 11)
    assert_whole(path / "episodes.csv", 3)
    summary = RunFolder(path).summary  # as it was a few seconds before
    assert summary["status"] == "running" and summary["global_step"] > 0
    events = EventAccumulator(str(path))
    events.Reload()
    run = RunFolder(path)
    assert len(events.Scalars("lrrl/performance")) >= len(run.rounds["round"]) - 1 >= 5
    assert len(run.episodes["global_step"]) >= 3  # 1,000 steps each


def test_a_rate_that_diverges_ends_the_run_with_code_3_and_is_named(train, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        train(ppo.main, f"--env-id Pendulum-v1 --total-timesteps 4096 {SMALL} --no-rollback --learning-rates 1e30")
    assert end.value.code == 3
    assert "1e+30" in capsys.readouterr().err
    run = only_folder(tmp_path / "runs1")
    assert run.summary["status"] == "diverged"


def test_an_environment_that_raises_leaves_whole_files_and_its_error(train, tmp_path):
    toy_envs.StepCounter.total = 0
    with pytest.raises(RuntimeError, match="the simulator broke"):
        train(ppo.main, f"--env-id tests.toy_envs:Breaks-v0 {SMALL} --total-timesteps 640")
    run = only_folder(tmp_path / "runs1")
    assert run.summary["status"] == "failed" and len(run.episodes["global_step"]) == 29


def test_an_environment_that_returns_nan_is_named_and_not_the_learning_rate(train, capsys, monkeypatch):
    monkeypatch.setattr(
        toy_envs.StepCounter, "step", lambda self, action: (self.observe(0), math.nan, False, False, {})
    )
    with pytest.raises(SystemExit) as end:
        train(ppo.main, f"--env-id tests.toy_envs:StepCounter-v0 {SMALL} --total-timesteps 640")
    error = capsys.readouterr().err
    assert end.value.code == 3 and "StepCounter-v0 has returned" in error


def test_a_run_dir_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        ppo.main(["--run-dir", str(tmp_path / "file")])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1 and "--run-dir" in error


def test_a_missing_gpu_is_said_once_and_only_where_one_was_wanted(train, capsys):
    train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 64 --cuda")
    assert capsys.readouterr().err.count("no GPU") == 1
    train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 64 --no-cuda")
    assert "GPU" not in capsys.readouterr().err


# --- compilation and learning -----------------------------------------------------------------------------------------


def test_a_changing_rate_compiles_nothing_anew(train, monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, compile = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend=counter))
    run = train(ppo.main, f"--env-id Pendulum-v1 {SMALL} --total-timesteps 1280 --bandit uniform --compile")
    assert len(set(run.rounds["learning_rate"])) > 2
    assert counter.frame_count == 1


@pytest.mark.parametrize("control", ["", "--lr-control constant --learning-rate 3e-3"])
def test_it_learns_to_push_a_point_home(control, train):
    """The last 10 of 120 episodes return more than -12 on average; random play returns about -75."""
    options = f"--num-steps 200 --num-minibatches 4 --total-timesteps 2400 {control}"
    run = train(ppo.main, f"--env-id tests.toy_envs:Point-v0 {options}")
    assert run.episodes["episodic_return"][-10:].mean() > -12

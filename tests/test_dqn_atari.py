"""What dqn_atari_lrrl.py promises, and iqn_atari_lrrl.py with it: frames, replay, targets, credit, bytes, presets."""

import difflib
import inspect
import math
import signal
import time
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dqn_atari_lrrl as dqn
import iqn_atari_lrrl as iqn
from lrrl_utils import atari
from tests.conftest import RunFolder, only_folder
from tests.toy_envs import TinyGame

SCRIPT = "dqn_atari_lrrl.py"
SMALL = "--padding valid --buffer-size 1000 --learning-starts 40 --exploration-steps 100 --batch-size 4"
SMALL += " --bandit-interval 40"
FEW_QUANTILES = "--num-tau-samples 4 --num-tau-prime-samples 4 --num-quantile-samples 4"


@pytest.fixture(params=["dqn", "iqn"])
def script(request):
    """Both scripts in turn, or the one that is named: the module, and options that keep it small.

    Their replays and loops are the same to the letter, see `test_the_two_scripts_differ_in_the_algorithm_alone`.
    """
    return {"dqn": (dqn, SMALL), "iqn": (iqn, f"{SMALL} --update-horizon 1 {FEW_QUANTILES}")}[request.param]


@pytest.fixture
def updates(monkeypatch):
    """Counts the minibatches that dqn_atari_lrrl.py learns from, at the timestep of its latest action."""
    record = SimpleNamespace(step=0, at=[], targets=[], online=[])
    real_act, real_loss = dqn.get_epsilon, dqn.td_loss

    def get_epsilon(args, global_step):
        record.step = global_step
        return real_act(args, global_step)

    def td_loss(q_network, target_network, *rest):
        record.at.append(record.step)
        record.online.append(q_network.head[-1].weight.sum().item())
        record.targets.append(target_network.head[-1].weight.sum().item())
        return real_loss(q_network, target_network, *rest)

    monkeypatch.setattr(dqn, "get_epsilon", get_epsilon)
    monkeypatch.setattr(dqn, "td_loss", td_loss)
    return record


def play(monkeypatch, game):
    monkeypatch.setattr("lrrl_utils.atari.make_envs", lambda args, num_envs, **options: game)


# --- replay -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_envs", [1, 3])
def test_the_replay_equals_brute_force_over_stored_stacks(n, num_envs):
    """Around starts and ends of games, lost lives, truncations and the seam of a ring that turns over three times."""
    rng = np.random.default_rng(0)
    args = SimpleNamespace(update_horizon=n, gamma=0.9, num_envs=num_envs)
    replay = dqn.ReplayBuffer(args, 60 * num_envs, "cpu", "cpu")
    frame = lambda: rng.integers(1, 255, (84, 84), np.uint8)  # noqa: E731
    start = lambda: [np.zeros((84, 84), np.uint8)] * 3 + [frame()]  # noqa: E731
    stacks, steps = [start() for _ in range(num_envs)], np.zeros(num_envs, int)
    history = [[] for _ in range(num_envs)]  # of each game: stack, action, reward, end, truncation, next stack
    seen = set()
    for t in range(200):
        actions, rewards = rng.integers(18, size=num_envs), rng.integers(-1, 2, size=num_envs)
        game_over, life_lost = rng.random(num_envs) < 0.08, rng.random(num_envs) < 0.1
        truncations = (rng.random(num_envs) < 0.08) & ~game_over
        games = np.arange(num_envs)
        ends = game_over | life_lost
        replay.add(games, np.stack([stack[-1] for stack in stacks]), steps, actions, rewards, ends, truncations)
        for i in games:
            following = stacks[i][1:] + [frame()]
            history[i].append((stacks[i], actions[i], rewards[i], ends[i], truncations[i], following))
            stacks[i] = following
        steps += 1
        if truncations.any():
            final = np.stack([stacks[i][-1] for i in games[truncations]])
            replay.add(games[truncations], final, steps[truncations], final=True)
        for i in games[game_over | truncations]:
            stacks[i], steps[i] = start(), 0
        if t < n + 3:
            continue

        by_stack = {np.stack(step[0]).tobytes(): (i, k) for i in games for k, step in enumerate(history[i])}
        for obs, action, n_step_return, next_obs, discount in zip(*replay.sample(rng, 16)):
            i, k = by_stack[obs.numpy().tobytes()]  # a stack that was never seen is a KeyError here
            seen.add((i, k))
            expected_return, factor = 0.0, 1.0
            for _, _, reward, end, truncation, following in history[i][k : k + n]:  # noqa: B007
                expected_return, factor = expected_return + factor * reward, factor * 0.9
                if end or truncation:
                    break
            assert action == history[i][k][1]
            assert n_step_return.item() == pytest.approx(expected_return)
            assert discount.item() == pytest.approx(0 if end else factor)
            assert end or (next_obs.numpy() == np.stack(following)).all()
    assert len(seen) > 150 * num_envs


def test_draws_are_uniform_over_the_transitions_in_the_replay():
    args = SimpleNamespace(update_horizon=1, gamma=0.9, num_envs=2)
    replay = dqn.ReplayBuffer(args, 40, "cpu", "cpu")
    for t in range(27):  # the rings of 20 have lost the first 7 slots, and 3 stacks lack a frame
        replay.add(np.arange(2), np.zeros((2, 84, 84), np.uint8), np.full(2, t), actions=[t, 100 + t])
    rng = np.random.default_rng(0)
    counts = np.bincount(np.concatenate([replay.sample(rng, 64)[1].numpy() for _ in range(100)]), minlength=127)
    drawn = np.flatnonzero(counts)
    assert drawn.tolist() == [*range(10, 26), *range(110, 126)]
    assert counts[drawn].min() > 140 and counts[drawn].max() < 260  # 200 expected, standard deviation 14


def test_the_agent_learns_from_exactly_what_it_saw(train, monkeypatch):
    seen, learnt = set(), []

    def act(q_network, args, obs, epsilon, rng, act=dqn.act):
        seen.update(stack.tobytes() for stack in obs)
        return act(q_network, args, obs, epsilon, rng)

    def sample(self, rng, batch_size, sample=dqn.ReplayBuffer.sample):
        learnt.append(batch := sample(self, rng, batch_size))
        return batch

    monkeypatch.setattr(dqn, "act", act)
    monkeypatch.setattr(dqn.ReplayBuffer, "sample", sample)
    train(dqn.main, f"{SMALL} --bandit uniform --total-timesteps 600 --buffer-size 300 --num-envs 2")
    assert len(learnt) == (600 - 40) // 4
    for obs, _, _, next_obs, discounts in learnt:
        assert all(stack.numpy().tobytes() in seen for stack in obs)
        assert all(stack.numpy().tobytes() in seen for stack in next_obs[discounts > 0])


def test_the_default_replay_is_under_8_gb_and_taken_as_it_fills(train, monkeypatch):
    assert dqn.Args.buffer_size * dqn.ReplayBuffer.dtype.itemsize < 7.5e9
    before = psutil.Process().memory_info().rss
    args = SimpleNamespace(update_horizon=1, gamma=0.9, num_envs=1)
    replay = dqn.ReplayBuffer(args, dqn.Args.buffer_size, "cpu", "cpu")
    stored = sum(x.nbytes for x in vars(replay).values() if isinstance(x, np.ndarray | torch.Tensor))
    assert stored <= dqn.Args.buffer_size * dqn.ReplayBuffer.dtype.itemsize + 84 * 84 + 8
    for t in range(5000):
        replay.add(np.array([0]), np.full((1, 84, 84), 7, np.uint8), np.array([t]))
    assert psutil.Process().memory_info().rss - before < 100e6  # 35 MB are in use


# --- learning ---------------------------------------------------------------------------------------------------------


def test_the_td_loss_equals_a_slow_reference():
    torch.manual_seed(0)
    q_network, target_network = dqn.QNetwork(3), dqn.QNetwork(3)
    batch = 5
    obs, next_obs = (torch.randint(0, 256, (batch, 4, 84, 84), dtype=torch.uint8) for _ in range(2))
    actions, rewards = torch.tensor([0, 1, 2, 1, 0]), torch.tensor([1.0, 0.0, -1.0, 5.0, 0.5])
    discounts = torch.tensor([0.99, 0.0, 0.99, 0.5, 0.99])
    errors = []
    for i in range(batch):
        best = max(target_network.q_values(next_obs[i : i + 1])[0].tolist())
        value = q_network.q_values(obs[i : i + 1])[0, actions[i]].item()
        errors.append(rewards[i].item() + discounts[i].item() * best - value)
    inputs = (obs, actions, rewards, next_obs, discounts)
    mse, q_values = dqn.td_loss(q_network, target_network, dqn.Args(), *inputs)
    huber, _ = dqn.td_loss(q_network, target_network, dqn.Args(loss="huber"), *inputs)
    assert mse.item() == pytest.approx(np.mean(np.square(errors)), rel=1e-4)
    assert huber.item() == pytest.approx(np.mean([e**2 / 2 if abs(e) < 1 else abs(e) - 0.5 for e in errors]), rel=1e-4)
    assert q_values.shape == (batch,)
    mse.backward()
    assert all(parameter.grad is None for parameter in target_network.parameters())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("module", "options"), [(dqn, ()), (iqn, (8,))])
def test_convolutions_are_padded_as_in_tensorflow_or_not_at_all(module, options, padding):
    torch.manual_seed(0)
    network, x = module.QNetwork(3, *options, padding), torch.rand(2, 4, 84, 84)
    features = network.features(x.clone())
    for layer in (layer for layer in network.features if isinstance(layer, torch.nn.Conv2d)):
        size, (kernel, _), (stride, _) = x.shape[-1], layer.kernel_size, layer.stride
        total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0) if padding == "same" else 0
        before, after = total // 2, total - total // 2
        x = torch.nn.functional.pad(x, (before, after, before, after))
        x = torch.nn.functional.conv2d(x, layer.weight, layer.bias, layer.stride).relu()
    assert torch.allclose(features, x.flatten(1), atol=1e-5) and x.shape[1] * x.shape[2] ** 2 == features.shape[1]
    assert features.shape[1] == {"same": 7744, "valid": 3136}[padding]


@pytest.mark.parametrize("preset", ["dopamine", "cleanrl"])
def test_initial_weights_are_those_of_the_preset(script, preset, train, monkeypatch):
    module, small = script
    play(monkeypatch, TinyGame())
    hardly = "--learning-starts 44 --total-timesteps 48 --lr-control constant --learning-rate 1e-30"
    run = train(module.main, f"{small} {hardly} --preset {preset} --save-model")
    weights = torch.load(run.path / "model.pt", weights_only=True)["q_network"]
    for name in {key.rsplit(".", 1)[0] for key in weights}:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        inputs, outputs = weight[0].numel(), weight[:, 0].numel()
        if preset == "cleanrl":
            bound = 1 / math.sqrt(inputs)
        else:
            bound = math.sqrt(6 / (inputs + outputs)) if module is dqn else math.sqrt(math.sqrt(3) / inputs)
        assert 0.97 * bound < weight.abs().max() <= bound * 1.0001
        assert (bias.abs().max() > 1e-9) == (preset == "cleanrl")


@pytest.mark.parametrize("truncates", [False, True])
def test_q_values_track_the_returns_of_a_tiny_game(truncates, train, monkeypatch):
    """Reward 1 a step, γ = 0.5, games of three steps: 1.75, 1.5, 1 to a termination, 2 through a truncation.

    IQN learns its values in tests/test_iqn_atari.py.
    """
    play(monkeypatch, TinyGame(truncates=truncates))
    rate = "--lr-control constant --learning-rate 5e-4 --optimizer-eps 1e-5 --gamma 0.5 --target-network-frequency 40"
    run = train(dqn.main, f"{SMALL} --total-timesteps 800 {rate} --save-model --no-cuda --batch-size 8 --seed 2")
    network = dqn.QNetwork(2, "valid")
    network.load_state_dict(torch.load(run.path / "model.pt", weights_only=True)["q_network"])
    game = TinyGame()
    obs = []
    for t in range(3):
        game.t[:] = t
        obs.append(game.observe())
    values = network.q_values(torch.from_numpy(np.concatenate(obs))).detach().numpy()
    # The value of a final observation is never learnt, so what bootstraps from it is less sure.
    expected, tolerance = ([2, 2, 2], 0.35) if truncates else ([1.75, 1.5, 1], 0.15)
    assert values == pytest.approx(np.tile(np.array(expected)[:, None], 2), abs=tolerance)


def test_the_target_network_is_copied_at_its_period_and_at_no_other_time(train, updates, monkeypatch):
    play(monkeypatch, TinyGame())
    train(dqn.main, f"{SMALL} --total-timesteps 240 --target-network-frequency 60 --lr-control constant")
    assert updates.at == list(range(44, 241, 4))
    for n in range(1, len(updates.at)):
        copied = updates.at[n - 1] // 60 < updates.at[n] // 60 and updates.at[n] % 60 or updates.at[n - 1] % 60 == 0
        expected = updates.online[n] if copied else updates.targets[n - 1]  # a copy follows the update of its timestep
        assert updates.targets[n] == expected, updates.at[n]


@pytest.mark.parametrize(("num_envs", "learning_starts"), [(1, 70), (2, 64), (4, 70), (16, 64), (16, 70)])
def test_many_games_keep_the_replay_ratio(num_envs, learning_starts, train, updates, monkeypatch):
    play(monkeypatch, TinyGame(num_envs))
    options = f"--bandit uniform --total-timesteps 320 --learning-starts {learning_starts} --num-envs {num_envs}"
    train(dqn.main, f"{SMALL} {options}")
    assert len(updates.at) == 320 // 4 - learning_starts // 4


def test_a_lost_life_ends_a_return_only_where_the_preset_says_so(train, monkeypatch):
    added = {"terminations": 0, "fires": 0}
    lives = []

    def add(
        self, envs, frames, steps, actions=0, rewards=0.0, terminations=False, *rest, add=dqn.ReplayBuffer.add, **kw
    ):
        added["terminations"] += int(np.sum(terminations))
        lives.append((terminations[0], int(actions[0])))
        return add(self, envs, frames, steps, actions, rewards, terminations, *rest, **kw)

    monkeypatch.setattr(dqn.ReplayBuffer, "add", add)
    options = f"{SMALL} --total-timesteps 900 --learning-starts 899"
    games = len(train(dqn.main, options).episodes["episodic_return"])
    assert added["terminations"] == games > 2

    added["terminations"] = 0
    lives.clear()
    games = len(train(dqn.main, f"{options} --preset cleanrl").episodes["episodic_return"])
    assert 5 * games <= added["terminations"] < 5 * (games + 1)  # Breakout has five lives
    ends = [t for t, (end, _) in enumerate(lives[:-1]) if end]
    fired = [lives[t + 1][1] == 1 for t in ends]
    assert np.mean(fired) > 0.75  # FIRE starts every life but a game's first, which the reset starts


# --- the bandit in the loop -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback", ["raw-reward", "reward"])
def test_a_round_is_credited_with_the_rewards_earned_while_its_rate_is_in_use(feedback, train, monkeypatch):
    rewards = np.random.default_rng(0).integers(-3, 9, 1000)
    play(monkeypatch, TinyGame(rewards=rewards.tolist()))
    rates = {}  # timestep of an update: rate

    class SpyAdam(torch.optim.Adam):
        def step(self, closure=None):
            rates[game.total] = self.param_groups[0]["lr"].item()
            return super().step(closure)

    game = atari.make_envs(None, 1)
    monkeypatch.setattr(torch.optim, "Adam", SpyAdam)
    options = f"{SMALL} --total-timesteps 500 --bandit uniform --bandit-interval 50 --bandit-feedback {feedback}"
    run = train(dqn.main, options)
    earned = rewards if feedback == "raw-reward" else rewards.clip(-1, 1)
    start = 44  # the first update
    assert run.rounds["global_step"].tolist() == list(range(start + 50, 501, 52))
    for end, rate, performance in zip(*(run.rounds[x] for x in ("global_step", "learning_rate", "performance"))):
        assert performance == pytest.approx(np.mean(earned[start : int(end)]))
        assert {rates[step] for step in rates if start <= step < end} == {np.float32(rate)}
        start = 4 * math.ceil(end / 4)  # the next update
    assert len(set(run.rounds["learning_rate"])) > 1


def test_the_return_feedback_waits_for_the_end_of_a_game(train, monkeypatch):
    play(monkeypatch, TinyGame(rewards=(7,), length=100))
    run = train(dqn.main, f"{SMALL} --total-timesteps 500 --bandit-interval 8 --bandit-feedback return")
    assert run.rounds["global_step"].tolist() == [100, 200, 300, 400, 500]
    assert set(run.rounds["performance"]) == {700.0} == set(run.episodes["episodic_return"])


@pytest.mark.parametrize("control", ["constant", "linear"])
def test_without_a_bandit_rounds_are_logged_without_arms(control, train, monkeypatch):
    play(monkeypatch, TinyGame())
    run = train(dqn.main, f"{SMALL} --total-timesteps 400 --lr-control {control} --learning-rate 1e-3")
    assert run.rounds["global_step"].tolist() == list(range(84, 401, 40))
    assert np.isnan(run.rounds["arm"]).all() and not any(name.startswith("p_") for name in run.rounds)
    expected = 1e-3 * (1 - (run.rounds["global_step"] - 1) / 400) if control == "linear" else np.full(8, 1e-3)
    assert run.rounds["learning_rate"] == pytest.approx(expected, rel=1e-5)


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dqn", "iqn"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(name, start, tmp_path):
    few = FEW_QUANTILES if name == "iqn" else ""
    options = f"{SMALL} {few} --total-timesteps 400 --learning-starts 320 --end-e 0.5 --save-model"  # a game must end
    command = f"{name}_atari_lrrl.py --env-id ALE/Breakout-v5 {options}"
    seeds = [1, 1, 2] if name == "dqn" else [1, 1]
    processes = [start(f"{command} --seed {seed} --exp-name {n}") for n, seed in enumerate(seeds)]
    assert not any(process.wait() for process in processes)
    first, second, *others = map(RunFolder, sorted((tmp_path / "runs").iterdir(), key=lambda p: p.name[-20:]))
    assert len(first.episodes["episodic_return"]) > 0
    for file in ("episodes.csv", "rounds.csv", "model.pt"):
        assert first.bytes(file) == second.bytes(file)
        assert file == "rounds.csv" or all(first.bytes(file) != x.bytes(file) for x in others)


def test_a_real_game_leaves_whole_unclipped_games_and_finite_losses(train, monkeypatch):
    """2,000 timesteps with sticky actions; losses are checked in the loop, which ends with an error if one is not."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = "--env-id ALE/SpaceInvaders-v5 --total-timesteps 2000 --learning-starts 1500 --exploration-steps 300"
    options += " --padding valid"
    run = train(
        dqn.main, f"{options} --batch-size 8 --buffer-size 2000 --target-network-frequency 500 --eval-episodes 1"
    )
    assert run.summary["status"] == "finished" and run.summary["global_step"] == 2000
    assert len(run.episodes["episodic_return"]) >= 2
    assert (run.episodes["episodic_return"] % 5 == 0).all() and run.episodes["episodic_return"].max() > 50
    lengths = run.episodes["episodic_length"]
    assert (np.diff(run.episodes["global_step"], prepend=0) == lengths).all()
    assert len(run.summary["eval_returns"]) == 1 and run.summary["eval_returns"][0] % 5 == 0
    (events,) = run.path.glob("events.out.tfevents.*")
    log = EventAccumulator(str(events)).Reload()
    losses = [event.value for event in log.Scalars("losses/td_loss")]
    assert len(losses) == 5 and np.isfinite(losses).all() and max(losses) > 0
    epsilons = [event.value for event in log.Scalars("charts/epsilon")]
    assert epsilons[0] > epsilons[1] > epsilons[-1] == pytest.approx(0.01)


def test_a_game_ends_at_the_frame_limit_of_its_id_and_its_last_step_bootstraps(train, monkeypatch):
    limits = {"game": "pong", "repeat_action_probability": 0.0, "full_action_space": False, "frameskip": 4}
    gym.register("ShortPong-v0", "ale_py.env:AtariEnv", kwargs=limits | {"max_num_frames_per_episode": 80})
    steps, learnt = set(), []

    class Spy(atari.AtariVectorEnv):
        def reset(self, **options):
            self.obs, info = super().reset(**options)
            return self.obs, info

        def step(self, actions):
            obs, *others = super().step(actions)
            steps.add((self.obs.tobytes(), obs.tobytes()))
            self.obs = obs
            return obs, *others

    def sample(self, rng, batch_size, sample=dqn.ReplayBuffer.sample):
        learnt.append(batch := sample(self, rng, batch_size))
        return batch

    monkeypatch.setattr(atari, "AtariVectorEnv", Spy)
    monkeypatch.setattr(dqn.ReplayBuffer, "sample", sample)
    run = train(dqn.main, f"--env-id ShortPong-v0 {SMALL} --total-timesteps 330")
    assert run.episodes["episodic_length"].tolist() == [20] * 16
    for obs, _, _, next_obs, discounts in learnt:
        assert (discounts > 0).all()
        for before, after in zip(obs, next_obs):
            assert (before.numpy().tobytes(), after.numpy().tobytes()) in steps


def test_videos_are_those_of_its_games_and_the_saved_model_plays(train):
    options = "--env-id ALE/Breakout-v5 --total-timesteps 700 --end-e 1 --capture-video --save-model"
    run = train(dqn.main, f"{SMALL} {options}")
    lengths = run.episodes["episodic_length"].astype(int).tolist()
    frames = [imageio_ffmpeg.count_frames_and_secs(str(run.path / f"videos/game-{n}.mp4"))[0] for n in (1, 2)]
    assert frames == lengths[:2] and len(lengths) < 9 and len([*(run.path / "videos").iterdir()]) == 2
    dqn.QNetwork(4, "valid").load_state_dict(torch.load(run.path / "model.pt", weights_only=True)["q_network"])


def test_the_last_film_ends_with_the_run(train):
    run = train(dqn.main, f"{SMALL} --total-timesteps 60 --capture-video")
    assert imageio_ffmpeg.count_frames_and_secs(str(run.path / "videos/game-1.mp4"))[0] == 60


def test_presets_fill_what_is_not_given(train, monkeypatch):
    play(monkeypatch, TinyGame())
    short = "--total-timesteps 100 --learning-starts 50 --buffer-size 100 --lr-control constant"
    dopamine = train(dqn.main, short).config
    cleanrl = train(dqn.main, f"{short} --preset cleanrl --optimizer-eps 1e-3 --exploration-steps 7").config
    fraction = train(dqn.main, f"{short} --exploration-fraction 0.5").config
    names = ("learning_rate", "target_network_frequency", "terminal_on_life_loss", "noop_max", "optimizer_eps")
    assert [dopamine[name] for name in names] == [6.25e-5, 8000, False, 0, 1.5e-4]
    assert [cleanrl[name] for name in names] == [1e-4, 1000, True, 30, 1e-3]
    exploration = [(c["exploration_steps"], c["exploration_fraction"]) for c in (dopamine, cleanrl, fraction)]
    assert exploration == [(250_000, None), (7, None), (250_000, 0.5)]


def test_epsilon_falls_as_in_dopamine_or_as_in_cleanrl():
    args = dqn.Args(exploration_steps=100, learning_starts=50, total_timesteps=1000)
    steps = (1, 50, 100, 150, 999)
    assert [dqn.get_epsilon(args, step) for step in steps] == pytest.approx([1, 1, 0.505, 0.01, 0.01])
    args = dqn.Args(exploration_fraction=0.2, learning_starts=50, total_timesteps=1000)
    assert [dqn.get_epsilon(args, step) for step in steps] == pytest.approx([0.99505, 0.7525, 0.505, 0.2575, 0.01])


def test_the_agent_acts_greedily_but_for_a_share_of_epsilon():
    """In all three scripts: that their `act` is the same has a test of its own, here and in test_dqn_minatar.py."""

    class Network:
        num_actions = 3

        def parameters(self):
            return iter([torch.zeros(1)])

        def q_values(self, obs):
            return torch.tensor([[0.0, 5.0, 1.0]]).expand(len(obs), 3)

    obs, rng = np.zeros((3000, 1), np.uint8), np.random.default_rng(0)
    shares = [np.mean(dqn.act(Network(), dqn.Args(), obs, epsilon, rng) == 1) for epsilon in (0.0, 0.3, 1.0)]
    assert shares == pytest.approx([1, 0.8, 1 / 3], abs=0.03) and shares[0] == 1


def test_the_agent_learns_from_clipped_rewards(train, monkeypatch):
    play(monkeypatch, TinyGame(rewards=(7, -3, 0)))
    seen, sample = set(), dqn.ReplayBuffer.sample

    def spy(self, *args):
        minibatch = sample(self, *args)
        seen.update(minibatch[2].tolist())
        return minibatch

    monkeypatch.setattr(dqn.ReplayBuffer, "sample", spy)
    run = train(dqn.main, f"{SMALL} --total-timesteps 200 --bandit-feedback raw-reward")
    assert seen == {1.0, 0.0, -1.0} and set(run.episodes["episodic_return"]) == {4.0}


def test_the_two_scripts_differ_in_the_algorithm_alone():
    for name in ("ReplayBuffer", "get_epsilon", "act"):
        assert inspect.getsource(getattr(dqn, name)) == inspect.getsource(getattr(iqn, name)), name
    ours, theirs = (inspect.getsource(module.main).splitlines() for module in (dqn, iqn))
    changes = [line[0] for line in difflib.ndiff(ours, theirs)]
    # the networks' constructor, their initial weights, and a healthy loss
    assert (changes.count("-"), changes.count("+")) == (3, 4)


def test_gradients_of_bfloat16_are_those_of_float32_but_for_rounding(script):
    module, _ = script
    torch.manual_seed(0)
    networks = [module.QNetwork(3, *[8] * (module is iqn), padding="valid") for _ in range(2)]
    obs, next_obs = torch.randint(0, 256, (2, 8, 4, 84, 84), dtype=torch.uint8)
    minibatch = obs, torch.randint(0, 3, (8,)), torch.randn(8), next_obs, torch.full((8,), 0.9)
    gradients = []
    for amp in (False, True):
        torch.manual_seed(1)  # of IQN's quantiles
        loss, values = module.td_loss(*networks, module.Args(amp=amp), *minibatch)
        assert loss.dtype == values.dtype == torch.float32
        gradients.append(torch.cat([x.ravel() for x in torch.autograd.grad(loss, list(networks[0].parameters()))]))
    plain, other = gradients
    assert not torch.equal(plain, other) and torch.cosine_similarity(plain, other, dim=0) > 0.99


@pytest.mark.parametrize("options", ["--compile", "--amp"])
def test_compiled_and_bfloat16_runs_end_as_plain_ones_do(options, script, monkeypatch, train):
    module, small = script
    play(monkeypatch, TinyGame())
    compiled = []
    real_compile = torch.compile
    count = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, **_: compiled.append(1) or real_compile(f, backend=count))
    small = f"{small} --total-timesteps 140 --bandit uniform --save-model --gamma 0.5"
    plain, other = train(module.main, small), train(module.main, f"{small} {options}")
    assert len(compiled) == (options == "--compile") and count.frame_count <= 1  # every rate runs the same code
    a, b = (torch.load(run.path / "model.pt", weights_only=True)["q_network"] for run in (plain, other))
    assert options == "--compile" or not all(torch.equal(a[name], b[name]) for name in a)
    if module is dqn and options == "--compile":  # IQN's quantiles are drawn by another generator once compiled
        assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


# --- trouble ----------------------------------------------------------------------------------------------------------


def test_a_rate_that_diverges_ends_the_run_with_code_3_and_is_named(train, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        train(dqn.main, f"{SMALL} --total-timesteps 3000 --lr-control constant --learning-rate 1e30")
    run = only_folder(tmp_path / "runs1")
    assert end.value.code == 3 and run.summary["status"] == "diverged"
    assert "learning rate 1e+30" in capsys.readouterr().err


def test_an_interrupted_run_keeps_everything_and_says_so(start, tmp_path):
    process = start(f"{SCRIPT} {SMALL} --total-timesteps 1000000")
    assert process.stdout.readline().startswith("step ")
    deadline = time.monotonic() + 60
    while len(only_folder(tmp_path / "runs").rounds["round"]) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    run = only_folder(tmp_path / "runs")
    assert run.summary["status"] == "interrupted" and run.summary["global_step"] >= 100 and len(run.rounds["round"]) > 1

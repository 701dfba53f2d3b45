"""What dqn_minatar_lrrl.py and lrrl_utils/minatar.py promise: the authors' games and updates, resumption."""

import difflib
import inspect
import runpy
import sys
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dqn_atari_lrrl as atari
import dqn_minatar_lrrl as dqn
import play
from lrrl_utils.minatar import MinAtarGames
from lrrl_utils.optimizers import make_optimizer, make_update
from lrrl_utils.state import capture, restore
from tests.conftest import assert_equal_to_the_bit, resume

GAMES = {"asterix": 4, "breakout": 4, "freeway": 7, "seaquest": 10, "space_invaders": 6}  # channels
SMALL = "--learning-starts 40 --exploration-steps 100 --target-network-frequency 50 --no-cuda"


def env_id_of(game, version="v0"):
    return f"MinAtar/{game.title().replace('_', '')}-{version}"


# --- games ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", GAMES)
def test_games_are_those_of_the_authors(game):
    """Sticky actions across the ends of games included; -v1 has the actions of the minimal set."""
    from minatar import Environment

    for version in ("v0", "v1"):
        args = dqn.Args(env_id=env_id_of(game, version), checkpoint_interval=1)
        games = MinAtarGames(args, 1, np.random.default_rng(0))
        env, rng, returned, length = Environment(game), np.random.default_rng(1), 0, 0
        actions = range(6) if version == "v0" else env.minimal_action_set()
        assert games.num_actions == len(actions) and games.obs_shape == (10, 10, GAMES[game])
        env.seed(games.played[0][0])
        env.reset()
        for _ in range(300):
            assert (games.obs[0] == env.state()).all() and games.obs.dtype == bool
            action = rng.integers(len(actions))
            reward, terminal = env.act(actions[action])
            next_obs, rewards, terminations, truncations = games.step(np.array([action]))
            returned, length = returned + reward, length + 1
            assert (next_obs[0] == env.state()).all() and not truncations.any()
            assert (rewards[0], terminations[0]) == (reward, terminal)
            assert games.episodes == [(returned, length)] * terminal
            games.start_games(terminations)
            if terminal:
                env.reset()
                returned = length = 0


@pytest.mark.parametrize("reseeds", [False, True])
def test_games_go_on_from_their_state_to_the_byte(reseeds):
    """With many seeds, for it is a rare first action that sticks to the one before."""
    args = dqn.Args(env_id="MinAtar/Asterix-v0", checkpoint_interval=100)

    def see(games, steps, rng):
        seen = []
        for _ in range(steps):
            next_obs, rewards, terminations, truncations = games.step(rng.integers(6, size=2))
            seen.append([x.tobytes() for x in (next_obs, rewards, terminations, games.steps)])
            games.start_games(terminations | truncations)
        return seen

    for seed in range(40):
        rng, game_rng = np.random.default_rng(seed), np.random.default_rng(seed + 100)
        games = MinAtarGames(args, 2, game_rng)
        see(games, 50, rng)
        if reseeds:
            games.reseed()
        see(games, 60, rng)
        saved = capture({"games": games, "rng": rng, "game_rng": game_rng})
        expected = see(games, 60, rng)
        again = MinAtarGames(args, 2, game_rng)
        see(again, 10, rng)
        restore({"games": again, "rng": rng, "game_rng": game_rng}, saved)
        assert see(again, 60, rng) == expected


def test_without_the_package_a_line_says_how_to_get_it(refused, monkeypatch, tmp_path):
    for name in ("minatar", "minatar.gym"):
        monkeypatch.setitem(sys.modules, name, None)
    error = refused(dqn.main, ["--run-dir", tmp_path / "runs"])
    assert "pip install minatar==1.0.15" in error and not (tmp_path / "runs").exists()
    runpy.run_path("lrrl_utils/minatar.py")  # what any script may import


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--env-id MinAtar/Breakot-v1", "nearest: MinAtar/Breakout-v1"),
        ("--env-id CartPole-v1", "must be a game of MinAtar"),
        ("--buffer-size 31", "[32, inf)"),
        ("--preset cleanrl", "minatar"),
        ("--momentum 0.5", "rmsprop or sgd"),
        ("--bandit-feedback raw-reward", "return"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, reason, refused, tmp_path):
    assert reason in refused(dqn.main, [*options.split(), "--run-dir", tmp_path / "runs"])
    assert not (tmp_path / "runs").exists()


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "num_envs"), [(1, 1), (3, 2)])
def test_the_replay_equals_brute_force(n, num_envs):
    """Around terminations, truncations and the seam of a ring that turns over three times."""
    rng = np.random.default_rng(0)
    replay = dqn.ReplayBuffer(
        SimpleNamespace(update_horizon=n, gamma=0.9, num_envs=num_envs), 60 * num_envs, (10, 10, 4), "cpu"
    )
    draw = lambda: rng.random((10, 10, 4)) < 0.5  # noqa: E731
    obs, history, games = [draw() for _ in range(num_envs)], [[] for _ in range(num_envs)], np.arange(num_envs)
    seen = set()
    for t in range(200):
        actions, rewards = rng.integers(6, size=num_envs), rng.integers(3, size=num_envs)
        ends = rng.random(num_envs) < 0.1
        truncations = (rng.random(num_envs) < 0.1) & ~ends
        following = [draw() for _ in games]
        replay.add(games, np.stack(obs), actions, rewards, ends, truncations)
        if truncations.any():
            replay.add(games[truncations], np.stack(following)[truncations], final=True)
        for i in games:
            history[i].append((obs[i], actions[i], rewards[i], ends[i], truncations[i], following[i]))
            obs[i] = draw() if ends[i] or truncations[i] else following[i]
        if t < n + 3:
            continue
        by_obs = {step[0].tobytes(): (i, k) for i in games for k, step in enumerate(history[i])}
        for drawn, action, n_step_return, next_obs, discount in zip(*replay.sample(rng, 16)):
            i, k = by_obs[drawn.numpy().tobytes()]  # a final observation is a KeyError here
            seen.add((i, k))
            assert k >= t - 60
            expected, factor = 0.0, 1.0
            for _, _, reward, end, truncation, after in history[i][k : k + n]:  # noqa: B007
                expected, factor = expected + factor * reward, factor * 0.9
                if end or truncation:
                    break
            assert action == history[i][k][1] and n_step_return.item() == pytest.approx(expected)
            assert discount.item() == pytest.approx(0 if end else factor)
            assert end or (next_obs.numpy() == after).all()
    assert len(seen) > 150 * num_envs


def test_a_run_learns_as_that_of_the_authors_does_from_what_it_saw(train, monkeypatch):
    """Against a slow copy of their update, with their constants: examples/dqn.py in kenjyoung/MinAtar."""
    seen, batches, networks = set(), [], []

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.hidden, self.output = nn.Conv2d(4, 16, 3), nn.Linear(1024, 128), nn.Linear(128, 6)

        def forward(self, obs):
            x = torch.relu(self.conv(obs.permute(0, 3, 1, 2).float()))
            return self.output(torch.relu(self.hidden(x.flatten(1))))

    def make_update(args, optimizer, gradients, make=dqn.make_update):
        networks.append(Network())
        values = [x.detach().clone() for group in optimizer.param_groups for x in group["params"]]
        for parameter, value in zip(networks[0].parameters(), values, strict=True):
            parameter.data = value
        return make(args, optimizer, gradients)

    def step(self, actions, step=MinAtarGames.step):
        before = self.obs[0]
        next_obs, rewards, terminations, truncations = step(self, actions)
        after = None if terminations[0] else next_obs[0].tobytes()
        seen.add((before.tobytes(), int(actions[0]), float(rewards[0]), after))
        return next_obs, rewards, terminations, truncations

    def sample(self, rng, batch_size, sample=dqn.ReplayBuffer.sample):
        batches.append(batch := sample(self, rng, batch_size))
        return batch

    monkeypatch.setattr(dqn, "make_update", make_update)
    monkeypatch.setattr(MinAtarGames, "step", step)
    monkeypatch.setattr(dqn.ReplayBuffer, "sample", sample)
    run = train(dqn.main, f"{SMALL} --total-timesteps 240 --lr-control constant --save-model")
    (network,), target = networks, Network()
    target.load_state_dict(network.state_dict())
    optimizer = torch.optim.RMSprop(network.parameters(), lr=0.00025, alpha=0.95, centered=True, eps=0.01)
    assert len(batches) == 200
    for global_step, (obs, actions, rewards, next_obs, discounts) in enumerate(batches, start=41):
        goes_on = discounts > 0
        for transition in zip(obs, actions, rewards, next_obs, goes_on):
            before, action, reward, after, has_next = (x.numpy() for x in transition)
            assert (before.tobytes(), int(action), float(reward), after.tobytes() if has_next else None) in seen
        values = torch.zeros(32)
        values[goes_on] = target(next_obs[goes_on]).detach().max(1).values
        q_values = network(obs).gather(1, actions[:, None]).squeeze(1)
        loss = nn.functional.smooth_l1_loss(rewards + 0.99 * values, q_values)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if global_step % 50 == 0:
            target.load_state_dict(network.state_dict())
    learnt = torch.load(run.path / "model.pt", weights_only=True)["q_network"].values()
    for parameter, value in zip(network.parameters(), learnt, strict=True):
        assert torch.allclose(parameter, value, rtol=1e-4, atol=1e-6)
    assert not all(goes_on) and rewards.any()


def test_a_compiled_step_of_rmsprop_is_the_plain_one(monkeypatch):
    """One graph for all rates, in place: `Undoable` and checkpoints copy into what it has."""
    count, real = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **_: real(f, backend=count) if callable(f) else f)
    weights = []
    for compiles in (False, True):
        torch.manual_seed(0)
        network, rate = nn.Linear(5, 3), torch.tensor(1e-3)
        args = SimpleNamespace(optimizer="centered-rmsprop", compile=compiles)
        optimizer = make_optimizer(args, network.parameters(), rate, eps=0.01)
        parameters = list(network.parameters())
        update = make_update(
            args, optimizer, lambda x, p=parameters, f=network: (torch.autograd.grad(f(x).square().sum(), p), {})
        )
        for n in range(6):
            rate.fill_(1e-3 * (1 + n % 3))
            update(torch.randn(4, 5))
        weights.append([x.detach().clone() for x in network.parameters()])
        assert all(values["step"] == 6 for values in optimizer.state.values())
    assert count.frame_count == 2
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*weights))


def test_it_differs_from_the_atari_script_in_network_replay_and_games_alone():
    for name in ("td_loss", "act"):
        ours, theirs = (inspect.getsource(getattr(module, name)) for module in (dqn, atari))
        assert ours.split('"""', 2)[2] == theirs.split('"""', 2)[2], name
    main, other = (inspect.getsource(module.main).splitlines() for module in (dqn, atari))
    new = [line[2:].strip().partition("  #")[0] for line in difflib.ndiff(other, main) if line.startswith("+ ")]
    assert new == [
        'args = parse_args(Args, argv, presets={"dopamine": DOPAMINE})',
        "torch.manual_seed(args.seed)",
        "torch.set_flush_denormal(True)",
        "games = MinAtarGames(args, args.num_envs, rng)",
        "q_network, target_network = (QNetwork(games.obs_shape[-1], games.num_actions).to(device) for _ in range(2))",
        "rounds = Rounds(bandits, args.bandit_interval, stretch, args.bandit_feedback, can_undo)",
        'with reject_errors("--buffer-size"):',
        "replay = ReplayBuffer(args, min(args.buffer_size, args.total_timesteps), games.obs_shape, device)",
        "with Run(args, state, device, bandits, checkpoint, replay) as run:",
        "obs = games.obs",
        "replay.add(every_game, obs, actions, rewards, terminations, truncations)",
        "replay.add(every_game[truncations], next_obs[truncations], final=True)",
        "rounds.earn(rewards.sum(), args.num_envs, [episodic_return for episodic_return, _ in games.episodes])",
        'run.summary["eval_returns"] = evaluate(args, policy, run, MinAtarGames)',
    ]


# --- a run ------------------------------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_equals_one_that_was_not(stop, train):
    """Two games, a replay that has turned over, rounds that were undone, the bandit's arms beyond all reason."""
    options = f"{SMALL} --num-envs 2 --total-timesteps 400 --buffer-size 120 --checkpoint-interval 60 --save-model"
    options += " --learning-rates 1e-4 1e-3 1e30 --bandit uniform --bandit-interval 30 --end-e 0.5"
    whole = train(dqn.main, options)
    assert whole.summary["rollbacks"] > 0 and len(whole.episodes["episodic_return"]) > 10
    assert_equal_to_the_bit(resume(dqn.main, stop(dqn.main, options, 4)).path, whole.path)


def test_a_trained_agent_is_filmed_evaluated_and_played(train, capsys):
    options = f"{SMALL} --preset dopamine --total-timesteps 300 --capture-video --save-model --eval-episodes 2"
    run = train(dqn.main, f"{options} --bandit-interval 50 --env-id MinAtar/Seaquest-v1")
    lengths = run.episodes["episodic_length"].astype(int).tolist()
    frames = [imageio_ffmpeg.count_frames_and_secs(str(run.path / f"videos/game-{n}.mp4"))[0] for n in (1, 2)]
    assert frames == lengths[:2]
    assert len(run.summary["eval_returns"]) == 2 and run.config["optimizer"] == "adam"
    arms = run.config["learning_rates"]
    assert 2.5e-4 in arms and len(run.rounds["round"]) >= 1 and set(run.rounds["learning_rate"]) <= set(arms)
    play.main([str(run.path)])
    assert "mean return" in capsys.readouterr().out and (run.path / "played/game-1.mp4").exists()

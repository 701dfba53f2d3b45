"""What lrrl_utils/atari.py promises: frames, lives, seeds, videos, and games that can be played again."""

import gc
import weakref
from types import SimpleNamespace

import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
import torch

import dqn_atari_lrrl as dqn
from lrrl_utils import atari
from lrrl_utils.atari import AtariGames, make_envs
from lrrl_utils.state import capture, restore

RUN = SimpleNamespace(stop_if_asked=lambda: None)


def play(games, steps, rng):
    """Play `steps` timesteps of random actions; returns all that could be seen."""
    seen = []
    for _ in range(steps):
        actions = rng.integers(games.num_actions, size=len(games.steps))
        games.press_fire(actions)
        next_obs, rewards, terminations, truncations = games.step(actions)
        seen.append([x.tobytes() for x in (next_obs, rewards, terminations, games.life_lost, games.steps)])
        games.start_games(terminations | truncations)
    return seen


def test_games_that_are_closed_are_let_go_of():
    games = AtariGames(dqn.Args(env_id="ALE/Breakout-v5"), 1, np.random.default_rng(1))
    envs = weakref.ref(games._envs)
    games.close()
    gc.collect()
    assert envs() is None


# --- frames -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("game", ["Breakout", "Pong", "Seaquest"])
def test_frames_and_rewards_equal_those_of_gymnasiums_own_preprocessing(game):
    """Not to the byte, as OpenCV's resizing differs by a rounding between versions and processors."""
    args = dqn.Args(env_id=f"{game}NoFrameskip-v4", noop_max=0, fire_reset=False)
    ours = make_envs(args, 1)
    theirs = gym.wrappers.AtariPreprocessing(gym.make(args.env_id), noop_max=0)
    theirs = gym.wrappers.FrameStackObservation(theirs, 4, padding_type="zero")
    rng = np.random.default_rng(1)
    obs, reference = ours.reset(seed=np.array([1]))[0], theirs.reset(seed=1)[0]
    close = []
    for _ in range(1200):
        close.append((np.abs(obs[0].astype(int) - reference) <= 1).mean())
        action = rng.integers(ours.single_action_space.n)
        obs, rewards, terminations, truncations, _ = ours.step(np.array([action]))
        reference, reward, terminated, truncated, _ = theirs.step(action)
        assert (rewards[0], terminations[0], truncations[0]) == (reward, terminated, truncated)
        if terminated or truncated:
            obs, reference = ours.reset(options={"reset_mask": np.array([True])})[0], theirs.reset()[0]
    assert np.mean(close) >= 0.99


def test_ale_games_can_be_made(monkeypatch):
    v4, v5 = ([name for name in gym.registry if part in name] for part in ("NoFrameskip-v4", "ALE/"))
    assert (len(v4), len(v5)) == (62, 104)
    games = set()

    def spy(game, num_envs, make=atari.AtariVectorEnv, **options):
        games.add(game)
        assert 3 <= make(game, num_envs, **options).single_action_space.n <= 18

    monkeypatch.setattr(atari, "AtariVectorEnv", spy)
    for env_id in v4[::5] + v5[::4]:  # all of them take too long
        make_envs(dqn.Args(env_id=env_id, noop_max=0, fire_reset=False), 1)
    assert len(games) >= 26


def test_the_id_of_a_game_decides_on_sticky_actions():
    def frames_for_two_seeds(env_id):
        envs = make_envs(dqn.Args(env_id=env_id, noop_max=0, fire_reset=False), 2)
        envs.reset(seed=np.array([1, 2]))
        return [envs.step(np.full(2, action))[0] for action in [1, 2, 3] * 30]

    assert all((obs[0] == obs[1]).all() for obs in frames_for_two_seeds("BreakoutNoFrameskip-v4"))
    assert any((obs[0] != obs[1]).any() for obs in frames_for_two_seeds("ALE/Breakout-v5"))


# --- games ------------------------------------------------------------------------------------------------------------


def test_it_knows_returns_lengths_and_lives_of_games_side_by_side():
    games = AtariGames(dqn.Args(env_id="ALE/Breakout-v5"), 3, np.random.default_rng(0))
    rng, returns, steps, lives, ended = np.random.default_rng(1), np.zeros(3), np.zeros(3, int), np.full(3, 5), 0
    for _ in range(400):
        _, rewards, terminations, truncations = games.step(rng.integers(games.num_actions, size=3))
        returns, steps = returns + rewards, steps + 1
        assert games.episodes == [*zip(returns[terminations].tolist(), steps[terminations].tolist())]
        assert (games.lives == lives - games.life_lost).all() and not games.lives[terminations].any()
        lives = games.lives.copy()
        games.start_games(terminations | truncations)
        ended += terminations.sum()
        returns[terminations], steps[terminations], lives[terminations] = 0, 0, 5
        assert (games.steps == steps).all() and not games.life_lost[terminations].any()
        assert games.obs[terminations][:, :3].max(initial=0) == 0 and (games.obs[:, 3].max((1, 2)) > 0).all()
    assert ended > 3


@pytest.mark.parametrize("fire_reset", [True, False])
def test_fire_is_pressed_after_a_lost_life_where_it_is_asked_for(fire_reset):
    games = AtariGames(dqn.Args(fire_reset=fire_reset), 2, np.random.default_rng(0))
    rng, lost = np.random.default_rng(1), 0
    for _ in range(300):
        chosen = rng.choice([0, 2, 3], size=2)
        actions = chosen.copy()
        games.press_fire(actions)
        assert (actions == np.where(games.life_lost & fire_reset, 1, chosen)).all()
        lost += games.life_lost.sum()
        _, _, terminations, truncations = games.step(actions)
        games.start_games(terminations | truncations)
    assert lost >= (5 if fire_reset else 0)


def test_a_game_without_fire_has_none_to_press():
    args = dqn.Args(env_id="FreewayNoFrameskip-v4", fire_reset=True)
    games = AtariGames(args, 1, np.random.default_rng(0))
    games.life_lost[:] = True
    actions = np.array([2])
    games.press_fire(actions)
    assert actions == [2]


# --- played again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reseeds", "steps", "num_envs"), [(False, 0, 3), (False, 400, 1), (False, 400, 3), (True, 40, 1), (True, 400, 3)]
)
def test_games_go_on_from_their_state_to_the_byte(reseeds, steps, num_envs):
    """Sticky actions and no-ops: it takes the games' own generators to be where they were."""
    args = dqn.Args(env_id="ALE/Breakout-v5", noop_max=5, fire_reset=True, checkpoint_interval=100)
    rng, game_rng = np.random.default_rng(1), np.random.default_rng(2)
    games = AtariGames(args, num_envs, game_rng)
    play(games, steps // 2, rng)
    if reseeds:
        games.reseed()
    play(games, steps // 2, rng)
    saved = capture({"games": games, "rng": rng, "game_rng": game_rng})
    expected = play(games, 200, rng)

    rng, game_rng = np.random.default_rng(7), np.random.default_rng(8)
    again = AtariGames(args, num_envs, game_rng)
    play(again, 10, rng)
    restore({"games": again, "rng": rng, "game_rng": game_rng}, saved)
    assert play(again, 200, rng) == expected


def test_a_game_after_reseed_gets_a_seed_so_that_those_before_need_not_be_played_again():
    args = dqn.Args(env_id="ALE/Breakout-v5", checkpoint_interval=100)
    games, rng = AtariGames(args, 2, np.random.default_rng(0)), np.random.default_rng(1)
    play(games, 300, rng)
    assert [len(actions) for _, actions in games.played] == [300, 300] and not games.wants_seed.any()
    games.reseed()
    while games.wants_seed.any():
        play(games, 1, rng)
    assert all(len(actions) < 300 for _, actions in games.played)


def test_without_checkpoints_no_action_is_remembered():
    games = AtariGames(dqn.Args(), 1, np.random.default_rng(0))
    play(games, 10, np.random.default_rng(1))
    assert games.played[0][1] == [] and games.film == []


# --- videos -----------------------------------------------------------------------------------------------------------


def test_videos_show_the_games_again(tmp_path, monkeypatch):
    args = dqn.Args(env_id="ALE/Breakout-v5", capture_video=True)
    games, rng, films = AtariGames(args, 2, np.random.default_rng(0)), np.random.default_rng(1), {}
    games.record_videos(tmp_path / "videos")
    finish_film = AtariGames.finish_film

    def spy(self):
        films[self.game] = list(self.film), self.returns[0]
        finish_film(self)

    monkeypatch.setattr(AtariGames, "finish_film", spy)
    while games.game < 9:
        play(games, 1, rng)
    videos = sorted(path.name for path in (tmp_path / "videos").iterdir())
    assert videos == ["game-1.mp4", "game-2.mp4"]  # of games 1, 2, 9, 28, …, those that have ended
    for game in (1, 2):
        (seed, *actions), episodic_return = films[game]
        path = str(tmp_path / f"videos/game-{game}.mp4")
        assert imageio_ffmpeg.count_frames_and_secs(path)[0] == len(actions) > 10
        envs = make_envs(args, 1)
        envs.reset(seed=np.array([seed]))
        assert sum(int(envs.step(np.array([action]))[1][0]) for action in actions) == episodic_return
    assert not films[3][0] and games.film


def test_a_film_is_in_colour_and_of_the_size_of_the_screen(tmp_path):
    args = dqn.Args(capture_video=True)
    games = AtariGames(args, 1, np.random.default_rng(0))
    games.record_videos(tmp_path)
    play(games, 30, np.random.default_rng(1))
    games.finish_film()
    frames = imageio_ffmpeg.read_frames(str(tmp_path / "game-1.mp4"))
    assert next(frames)["size"] == (160, 210)
    pictures = [np.frombuffer(frame, np.uint8).reshape(210, 160, 3).astype(int) for frame in frames]
    redness = np.abs(pictures[-1][..., 0] - pictures[-1][..., 2])
    assert len(pictures) == 30 and redness.max() > 50  # Breakout has red bricks and blue ones


def test_a_film_that_cannot_be_written_ends_nothing(tmp_path, capsys):
    games = AtariGames(dqn.Args(capture_video=True), 1, np.random.default_rng(0))
    games.record_videos(tmp_path / "gone" / "videos")
    play(games, 30, np.random.default_rng(1))
    games.close()
    assert "game 1 cannot be filmed: No such file or directory" in capsys.readouterr().err


# --- evaluation and memory --------------------------------------------------------------------------------------------


def test_an_evaluation_presses_fire_in_every_life_where_training_does(monkeypatch):
    args = dqn.parse_args(dqn.Args, ["--preset", "cleanrl", "--eval-episodes", "1"], presets={"cleanrl": dqn.CLEANRL})
    played = []
    step = atari.AtariVectorEnv.step
    monkeypatch.setattr(atari.AtariVectorEnv, "step", lambda self, a: played.append(int(a[0])) or step(self, a))
    assert len(atari.evaluate(args, lambda obs, rng: np.zeros(len(obs), int), RUN)) == 1
    assert played.count(1) == 4 and len(played) < 1000  # five lives, the reset starts the first


def test_an_evaluation_films_nothing_and_repeats_itself(tmp_path):
    args = dqn.Args(eval_episodes=2, capture_video=True, checkpoint_interval=10)
    policy = lambda obs, rng: rng.integers(4, size=len(obs))  # noqa: E731
    assert atari.evaluate(args, policy, RUN) == atari.evaluate(args, policy, RUN)
    assert args.capture_video and args.checkpoint_interval == 10


def test_a_replay_that_does_not_fit_is_told_what_it_needs(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1_000_000_000))
    error = refused(dqn.main, ["--run-dir", tmp_path / "runs"])
    assert "--buffer-size 1000000" in error and "7.1 GB" in error and "1.0 GB" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("device", "wanted", "needed", "place"),
    [
        ("cuda", "auto", 5e9, "cuda"),
        ("cuda", "auto", 9e9, "cpu"),  # 2 GiB are for the rest
        ("cuda", "cuda", 9e9, "cuda"),
        ("cuda", "cpu", 1e9, "cpu"),
        ("cpu", "auto", 5e9, "cpu"),
        ("cuda", "cuda", 11e9, None),
        ("cpu", "cpu", 21e9, None),
        ("cpu", "cuda", 1e9, None),
    ],
)
def test_the_replay_goes_where_it_fits(device, wanted, needed, place, monkeypatch, capsys):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=20e9))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10e9, 12e9))
    args = dqn.Args(buffer_device=wanted)
    if place:
        assert atari.choose_replay_device(args, needed, torch.device(device)).type == place
        return
    with pytest.raises(SystemExit):
        atari.choose_replay_device(args, needed, torch.device(device))
    assert "--buffer-" in capsys.readouterr().err

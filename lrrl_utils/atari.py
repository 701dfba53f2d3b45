"""Atari games side by side that can be played again: seeds and actions are all that a checkpoint needs of them."""

import copy
import difflib

import ale_py
import gymnasium as gym
import imageio_ffmpeg
import numpy as np
import psutil
import torch
from ale_py.vector_env import AtariVectorEnv
from gymnasium.utils.save_video import capped_cubic_video_schedule

from lrrl_utils.terminal import reject, say

gym.register_envs(ale_py)


def make_envs(args, num_envs, **options):
    """Atari games with the usual preprocessing, in C++: frames of 84 × 84 grey levels, 4 of them stacked, 4 skipped."""
    specs = {name: spec for name, spec in gym.registry.items() if spec.entry_point == "ale_py.env:AtariEnv"}
    games = [name for name, spec in specs.items() if spec.kwargs["frameskip"] in (1, 4)]
    if args.env_id not in games:
        nearest = difflib.get_close_matches(args.env_id, games, n=1, cutoff=0)[0]
        forms = f"<Game>NoFrameskip-v4 or ALE/<Game>-v5; nearest: {nearest}"
        reject(f"--env-id {args.env_id}: must be an Atari game, {forms}")
    spec = specs[args.env_id].kwargs
    names = ("game", "repeat_action_probability", "full_action_space", "max_num_frames_per_episode")
    options = {"noop_max": args.noop_max, "use_fire_reset": args.fire_reset, "reward_clipping": False} | options
    return AtariVectorEnv(num_envs=num_envs, **{name: spec[name] for name in names}, **options)


class AtariGames:
    """`num_envs` games of `args.env_id`, with what a loop has to know of them.

    A game's own generator goes on from game to game, since a new seed would take 0.15 s. But the first game to start
    after `reseed` gets one, so that those before it need not be played again.

    Args:
        args: with `env_id`, `noop_max`, `fire_reset`, `capture_video`, `checkpoint_interval`.
        num_envs: how many.
        rng: draws the seeds.
        is_filmed: which games of the first environment to film with `capture_video`, by their number from 0.

    Attributes:
        obs: (num_envs, 4, 84, 84) uint8, the observations now.
        steps: (num_envs,) timesteps into the game.
        life_lost: (num_envs,) bool, whether the last timestep cost a life.
        episodes: the (return, length in timesteps) of the games that ended with the last timestep.
    """

    SCREEN = 160, 210  # width and height of a film

    def __init__(self, args, num_envs, rng, is_filmed=capped_cubic_video_schedule):
        self._args, self._rng, self._is_filmed = args, rng, is_filmed
        self._envs = self.make_envs(num_envs)
        self._fire = self.find_fire()
        self._folder = None  # for videos
        self.returns, self.steps = np.zeros(num_envs), np.zeros(num_envs, np.int64)
        self.life_lost = np.zeros(num_envs, bool)
        self.episodes = []
        self.wants_seed = np.zeros(num_envs, bool)  # with its next game
        self.game, self.film = 1, []  # of the first environment: number; seed and actions, if it is to be filmed
        seeds = rng.integers(2**31, size=num_envs)
        self.played = [(int(seed), []) for seed in seeds]  # seeds, and all actions since
        self.obs, info = self._envs.reset(seed=seeds)
        self.lives = info["lives"]
        self.start_film(int(seeds[0]))

    def make_envs(self, num_envs):
        return make_envs(self._args, num_envs)

    def find_fire(self):
        """The action FIRE where the game has it and --fire-reset asks for it, else None."""
        actions = self._envs.ale.get_action_set() if self._args.fire_reset else []
        return actions.index(ale_py.Action.FIRE) if ale_py.Action.FIRE in actions else None

    @property
    def num_actions(self):
        return int(self._envs.single_action_space.n)

    def press_fire(self, actions):
        """Where a life was lost, FIRE takes the place of the agent's action, with --fire-reset."""
        if self._fire is not None:
            actions[self.life_lost] = self._fire

    def step(self, actions):
        """A timestep of every game, whose own rewards come back.

        Returns:
            next_obs (num_envs, 4, 84, 84), rewards, terminations, truncations (num_envs,). After the end of a game,
            `next_obs` is its last observation and `obs` the first of the next game, once `start_games` was called.
        """
        self.obs, rewards, terminations, truncations, info = self._envs.step(actions)
        self.life_lost, self.lives = info["lives"] < self.lives, info["lives"]
        self.returns += rewards
        self.steps += 1
        done = terminations | truncations
        self.episodes = list(zip(self.returns[done].tolist(), self.steps[done].tolist()))
        if self._args.checkpoint_interval:
            for (_, played), action in zip(self.played, actions.tolist()):
                played.append(action)
        if self.film:
            self.film.append(int(actions[0]))
        return self.obs, rewards, terminations, truncations

    def start_games(self, done):
        """Start a game wherever one is `done`, (num_envs,) bool."""
        if not done.any():
            return
        seeded = done & self.wants_seed
        if done[0] and self._args.capture_video:
            self.finish_film()
            self.game += 1
            seeded[0] |= self._is_filmed(self.game - 1)
        seeds = np.full(len(done), -1)
        for env in np.flatnonzero(seeded):
            seeds[env] = self._rng.integers(2**31)
            self.played[env], self.wants_seed[env] = (int(seeds[env]), []), False
        if done[0]:
            self.start_film(int(seeds[0]))
        self.obs, info = self._envs.reset(seed=seeds[done], options={"reset_mask": done})
        self.lives, self.life_lost[done] = info["lives"], False
        self.returns[done], self.steps[done] = 0, 0

    def reseed(self):
        """Let the next game of every environment start from a seed of its own."""
        self.wants_seed[:] = True

    # VIDEOS

    def record_videos(self, folder):
        """Film some games of the first environment into `folder`: played again in colour, once they have ended."""
        self._folder = folder

    def start_film(self, seed):
        self.film = [seed] if self._args.capture_video and self._is_filmed(self.game - 1) else []

    def close(self):
        """Finish the film and let go of the games, which a compiled update would keep alive to the very end."""
        self.finish_film()
        del self._envs

    def finish_film(self):
        """Play the filmed game again for a video, in colour: what the agent itself sees is small and grey."""
        if self._folder is None or len(self.film) < 2:
            return
        seed, *actions = self.film
        self.film = []
        say(f"filming game {self.game}, {len(actions)} timesteps")
        try:
            self.write_film(seed, actions)
        except OSError as error:  # as with any other log, that is no reason to stop
            say(f"game {self.game} cannot be filmed: {error.strerror or error}", "stderr")

    def write_film(self, seed, actions):
        self._folder.mkdir(exist_ok=True)
        path = str(self._folder / f"game-{self.game}.mp4")
        video = imageio_ffmpeg.write_frames(path, self.SCREEN, fps=15, macro_block_size=2)
        video.send(None)
        for frame in self.play_in_colour(seed, actions):
            video.send(frame.tobytes())
        video.close()

    def play_in_colour(self, seed, actions):
        """The picture before each of `actions`."""
        envs = make_envs(self._args, 1, grayscale=False, stack_num=1, img_height=210, img_width=160)
        obs, _ = envs.reset(seed=np.array([seed]))
        for action in actions:
            yield obs[0, 0]
            obs, *_ = envs.step(np.array([action]))

    # CHECKPOINTS

    def state_dict(self):
        names = ("obs", "returns", "steps", "lives", "life_lost", "wants_seed")
        state = {name: getattr(self, name).copy() for name in names}
        played = [(seed, np.array(actions, np.uint8)) for seed, actions in self.played]
        return state | {"played": played, "game": self.game, "film": list(self.film)}

    def load_state_dict(self, state):
        """Play the games again up to where they were."""
        self.played = [(seed, actions.tolist()) for seed, actions in state["played"]]
        self.play_again()
        self.game, self.film = state["game"], list(state["film"])
        for name in ("obs", "returns", "steps", "lives", "life_lost", "wants_seed"):
            setattr(self, name, state[name])

    def play_again(self):
        seeds = np.array([seed for seed, _ in self.played])
        lengths = np.array([len(actions) for _, actions in self.played])
        self._envs.reset(seed=seeds)
        for left in range(lengths.max(), -1, -1):  # timesteps; short plays start late, so that all end together
            if (starts := lengths == left).any():
                self._envs.reset(seed=seeds[starts], options={"reset_mask": starts})
            if left:
                actions = [actions[-left] if len(actions) >= left else 0 for _, actions in self.played]
                _, _, terminations, truncations, _ = self._envs.step(np.array(actions))
                if (done := terminations | truncations).any():
                    self._envs.reset(seed=np.full(done.sum(), -1), options={"reset_mask": done})


def evaluate(args, act, run, games_class=AtariGames):
    """Raw returns of `args.eval_episodes` games; `act` is a function from observations and a generator to actions."""
    args = copy.copy(args)
    args.capture_video, args.checkpoint_interval = False, 0
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)  # for IQN's quantiles
    games, returns = games_class(args, 1, rng), []
    while len(returns) < args.eval_episodes:
        actions = act(games.obs, rng)
        games.press_fire(actions)  # as in training
        _, _, terminations, truncations = games.step(actions)
        returns += [episodic_return for episodic_return, _ in games.episodes]
        games.start_games(terminations | truncations)
        run.stop_if_asked()
    return returns


def choose_replay_device(args, needed, device):
    """Where a replay memory of `needed` bytes goes: with the network on `device` if there is room, or as told.

    That is what --buffer-device says; `reject` the --buffer-size that fits nowhere.
    """
    on_gpu = device.type == "cuda"
    if args.buffer_device == "cuda" and not on_gpu:
        reject("--buffer-device cuda: needs a GPU")
    available = {"cpu": psutil.virtual_memory().available, "cuda": torch.cuda.mem_get_info()[0] if on_gpu else 0}
    place = args.buffer_device
    if place == "auto":
        place = "cuda" if needed + 2**31 < available["cuda"] else "cpu"  # 2 GiB for the rest
    if needed > available[place]:
        sizes = f"{needed / 1e9:.1f} GB of memory, {available[place] / 1e9:.1f} GB are available"
        reject(f"--buffer-size {args.buffer_size}: must be less, this run's replay needs {sizes}")
    return torch.device(place)

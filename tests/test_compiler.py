"""What lrrl_utils/compiler.py promises: the same gradients, in one graph; the plain run where nothing can compile."""

import contextlib
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import dqn_atari_lrrl as dqn
import dqn_minatar_lrrl as minatar
import iqn_atari_lrrl as iqn
import ppo_continuous_lrrl as ppo
import sac_mujoco_lrrl as sac
from lrrl_utils.compiler import compiled
from lrrl_utils.optimizers import make_optimizer, make_update
from tests import GPUS
from tests.conftest import ROOT, only_folder

CPU = torch.device("cpu")


def ppo_problem(device="cpu"):
    agent = ppo.Agent(5, 3).to(device)
    obs, actions, rest = (torch.randn(*shape, device=device) for shape in ((16, 5), (16, 3), (4, 16)))
    minibatch = rest[0], obs, actions, *rest[1:]
    return list(agent.parameters()), lambda *x: ppo.ppo_loss(agent, ppo.Args(ent_coef=0.01), *x), minibatch


def critic_problem(device="cpu"):
    actor = sac.Actor(3, -np.ones(2), np.ones(2)).to(device)
    critics, targets = sac.TwinCritics(3, 2).to(device), sac.TwinCritics(3, 2).to(device)
    log_alpha, args = torch.zeros((), device=device), sac.Args()
    shapes = ((16, 3), (16, 2), (16, 3), (16,), (16,), (16, 2))
    loss = lambda *x: sac.critic_loss(actor, critics, targets, log_alpha, args, x[:5], x[5])  # noqa: E731
    return list(critics.parameters()), loss, [torch.rand(*shape, device=device) for shape in shapes]


def actor_problem(device="cpu"):
    actor, critics = sac.Actor(3, -np.ones(2), np.ones(2)).to(device), sac.TwinCritics(3, 2).to(device)
    log_alpha = torch.zeros((), device=device)
    inputs = [torch.randn(*shape, device=device) for shape in ((16, 3), (16, 2))]
    return list(actor.parameters()), lambda *x: sac.actor_loss(actor, critics, log_alpha, *x), inputs


def td_problem(device="cpu", module=dqn, options=()):
    online, target = (module.QNetwork(3, *options).to(device) for _ in range(2))
    obs, next_obs = (torch.randint(0, 256, (4, 4, 84, 84), dtype=torch.uint8, device=device) for _ in range(2))
    others = (torch.zeros(4, dtype=torch.int64, device=device), *torch.rand(2, 4, device=device))
    inputs = obs, *others[:2], next_obs, others[2]
    return list(online.parameters()), lambda *x: module.td_loss(online, target, module.Args(), *x), inputs


def quantile_problem(device="cpu"):
    return td_problem(device, iqn, (8, "valid"))


def minatar_problem(device="cpu"):
    online, target = (minatar.QNetwork(7, 3).to(device) for _ in range(2))
    obs, next_obs = torch.rand(2, 4, 10, 10, 7, device=device) < 0.1
    others = (torch.zeros(4, dtype=torch.int64, device=device), *torch.rand(2, 4, device=device))
    inputs = obs, *others[:2], next_obs, others[2]
    return list(online.parameters()), lambda *x: minatar.td_loss(online, target, minatar.Args(), *x), inputs


PROBLEMS = [ppo_problem, critic_problem, actor_problem, td_problem, quantile_problem, minatar_problem]


@pytest.mark.parametrize(
    ("problem", "backend"),
    [(ppo_problem, "inductor"), (critic_problem, "aot_eager"), (actor_problem, "aot_eager"), (td_problem, "inductor")],
)
def test_compiled_gradients_are_those_of_autograd_and_come_from_one_graph(problem, backend, monkeypatch):
    """Of PPO and DQN as C++; of SAC's small networks, whose C++ takes as long, the graph alone."""
    torch.manual_seed(0)
    parameters, loss, inputs = problem()

    def gradients(*inputs):
        value, *terms = loss(*inputs)
        return torch.autograd.grad(value, parameters), value.detach(), terms

    counter, real_compile = CompileCounterWithBackend(backend), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: real_compile(function, backend=counter))
    fast = compiled(gradients, CPU)
    for _ in range(2):
        (ours, value, _), (plain, plain_value, _) = fast(*inputs), gradients(*inputs)
        assert torch.allclose(value, plain_value, rtol=1e-5)
        for a, b in zip(ours, plain, strict=True):
            assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item())
    assert counter.frame_count == 1


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_update_is_a_plain_step_of_torch(problem, optimizer_name):
    """Gradients of convolutions may lie in memory otherwise than their parameters, and a fused step does not look."""
    torch.manual_seed(0)
    parameters, loss, inputs = problem()
    others = [nn.Parameter(x.detach().clone()) for x in parameters]
    plain = torch.optim.Adam(others, lr=1e-2) if optimizer_name == "adam" else torch.optim.SGD(others, 1e-2, 0.9)
    args = SimpleNamespace(optimizer=optimizer_name, momentum=0.9, compile=False)
    torch.manual_seed(1)  # IQN draws quantiles
    for other, gradient in zip(others, torch.autograd.grad(loss(*inputs)[0], parameters)):
        other.grad = gradient
    plain.step()
    torch.manual_seed(1)
    optimizer = make_optimizer(args, parameters, torch.tensor(1e-2), 1e-8)
    make_update(args, optimizer, lambda *x: (torch.autograd.grad(loss(*x)[0], parameters), {}))(*inputs)
    for ours, theirs in zip(parameters, others, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def step_on_meta(*lists, lr, **_):
    """Stands in for the fused steps, of which torch has none on the meta device: all that they take has to be there."""
    tensors = [lr, *(x for tensors in lists for x in tensors)]
    if {x.device.type for x in tensors} != {"meta"}:
        raise RuntimeError("expected all tensors on the meta device")


@pytest.fixture(scope="module")
def fused_steps():
    library = torch.library.Library("aten", "IMPL")
    for name in ("_fused_adam_", "_fused_sgd_"):
        library.impl(f"{name}.tensor_lr", step_on_meta, "Meta")
    yield
    library._destroy()


def move_to_meta(tensors):
    for tensor in tensors:
        moved = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
        torch.utils.swap_tensors(tensor, nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved)


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_update_keeps_to_one_device(problem, optimizer_name, fused_steps, monkeypatch):
    """The meta device takes no tensor of another device, as a GPU would not."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # unknown there
    parameters, loss, inputs = problem("meta")
    args = SimpleNamespace(optimizer=optimizer_name, momentum=0.9, compile=False)
    learning_rate, stand_ins = torch.tensor(1e-3), [nn.Parameter(torch.zeros(x.shape)) for x in parameters]
    optimizer = make_optimizer(args, stand_ins, learning_rate, 1e-8)  # made there, it could not read the rate
    move_to_meta([learning_rate, *stand_ins, *(x for values in optimizer.state.values() for x in values.values())])

    def gradients(*inputs):
        value, *_ = loss(*inputs)
        return torch.autograd.grad(value, parameters), value.detach()

    update = make_update(args, optimizer, gradients)
    assert update(*inputs).device.type == "meta"
    with pytest.raises(RuntimeError, match="meta"):
        update(*inputs[:-1], torch.zeros(inputs[-1].shape))
    optimizer.param_groups[0]["lr"] = torch.tensor(1e-3)
    with pytest.raises(RuntimeError, match="meta"):
        update(*inputs)


def test_a_number_that_changes_is_noticed(monkeypatch):
    real_compile = torch.compile  # whose checks before each call do not depend on what the graph becomes

    def without_inductor(function, options, dynamic):
        options = {"guard_filter_fn": options["guard_filter_fn"]}
        return real_compile(function, backend="eager", options=options, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", without_inductor)
    args = ppo.Args(ent_coef=0.5)
    x = torch.ones(3, requires_grad=True)
    fast = compiled(lambda y: torch.autograd.grad((args.ent_coef * x * y).sum(), x)[0], CPU)
    assert fast(torch.ones(3)).tolist() == [0.5] * 3
    args.ent_coef = 2.0
    assert fast(torch.ones(3)).tolist() == [2.0] * 3


def test_without_a_compiler_a_run_says_so_in_one_line_and_is_the_plain_run(train, tmp_path):
    options = "--env-id Pendulum-v1 --num-steps 128 --num-minibatches 4 --update-epochs 2 --total-timesteps 512"
    options += " --save-model"
    no_compiler = {"CXX": "/no/compiler", "PATH": "/no", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, str(ROOT / "ppo_continuous_lrrl.py"), *options.split(), "--compile", "--run-dir", "new"]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | no_compiler, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("--compile"))
    assert "goes on without" in line and "compiler" in line
    folders = only_folder(tmp_path / "new").path, train(ppo.main, f"{options} --no-compile").path
    a, b = (torch.load(folder / "model.pt", weights_only=True)["agent"] for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(shutil.which("nvidia-smi") is None or GPUS == "", reason="needs a GPU")
@pytest.mark.parametrize("options", ["", "--compile"])
@pytest.mark.parametrize(
    "command",
    [
        "ppo_continuous_lrrl.py --env-id Hopper-v5 --total-timesteps 12288",
        "sac_mujoco_lrrl.py --env-id Hopper-v5 --total-timesteps 2000 --learning-starts 500",
        "dqn_atari_lrrl.py --total-timesteps 2000 --learning-starts 500 --buffer-size 4000 --bandit-interval 200",
        "iqn_atari_lrrl.py --total-timesteps 2000 --learning-starts 500 --buffer-size 4000 --bandit-interval 200",
        "dqn_minatar_lrrl.py --total-timesteps 2000 --learning-starts 500 --buffer-size 4000 --bandit-interval 200",
    ],
)
def test_every_script_runs_on_a_gpu(command, options, tmp_path):
    script, *words = f"{command} {options}".split()
    environment = {key: x for key, x in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if GPUS == "all" else {"CUDA_VISIBLE_DEVICES": GPUS}
    command = [sys.executable, str(ROOT / script), *words]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and "goes on without" not in result.stderr, result.stderr
    assert only_folder(tmp_path / "runs").config["device"].startswith("cuda")

"""What lrrl_utils/numpy_policy.py promises: what torch computes, whatever the network is made of."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from lrrl_utils.numpy_policy import numpy_policy
from tests.conftest import ROOT, only_folder
from tests.processes import run_forked


class Custom(nn.Module):
    """No nn.Sequential, and none of its layers tell what becomes of them."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(torch.sin(self.first(x))) + x[..., :3]


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def layers(*activations):
    return [nn.Linear(5, 8), *activations, nn.Linear(8, 3)]


NETWORKS = {
    "tanh": lambda: nn.Sequential(*layers(nn.Tanh()), nn.Tanh()),
    "relu": lambda: nn.Sequential(*layers(nn.ReLU()), nn.ReLU(inplace=True)),
    "identity": lambda: nn.Sequential(nn.Identity(), *layers()),
    "one layer": lambda: nn.Linear(5, 3),
    "unknown to it: layer normalisation": lambda: nn.Sequential(*layers(nn.LayerNorm(8), nn.ELU())),
    "unknown to it: no bias": lambda: nn.Sequential(nn.Linear(5, 3, bias=False)),
    "unknown to it: nested": lambda: nn.Sequential(nn.Sequential(*layers(nn.Tanh())), nn.Tanh()),
    "unknown to it: a subclass": lambda: Doubled(*layers(nn.Tanh())),
    "unknown to it: a module": Custom,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5)])
def test_it_computes_what_torch_does(name, shape):
    torch.manual_seed(0)
    network = NETWORKS[name]()
    x = np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)
    before, outputs = x.copy(), []
    for _ in range(3):
        with torch.no_grad():
            expected = network(torch.from_numpy(x.copy())).numpy()
        output = numpy_policy(network)(x)
        assert output.dtype == np.float32 and output.shape == (*shape[:-1], 3)
        assert output == pytest.approx(expected, rel=1e-5, abs=1e-5) and (x == before).all()
        outputs.append(output)
        with torch.no_grad():  # as training does
            for parameter in network.parameters():
                parameter += torch.randn_like(parameter)
    assert not np.allclose(outputs[0], outputs[1])


def test_torch_is_only_asked_where_there_is_a_layer_that_numpy_does_not_know(monkeypatch):
    networks = {name: make() for name, make in NETWORKS.items()}
    monkeypatch.setattr(nn.Module, "__call__", lambda *x: pytest.fail("asks torch"))
    for name, network in networks.items():
        policy = numpy_policy(network)
        if name.startswith("unknown"):
            with pytest.raises(pytest.fail.Exception):
                policy(np.zeros((1, 5), np.float32))
        else:
            policy(np.zeros((1, 5), np.float32))


COMPARISONS = {  # a line of ppo_continuous_lrrl.py: what a copy has before it
    "batch_values = agent.get_value(batch_obs)": (
        "means = agent.actor_mean(batch_obs).numpy().reshape(actions.shape)\n"
        "                assert np.allclose(actions - noise, means, atol=1e-5)"
    ),
    "if args.save_model:": (
        "with torch.no_grad():\n"
        "            means = agent.actor_mean(batch_obs)\n"
        "        assert np.allclose(numpy_policy(agent.actor_mean)(batch_obs.numpy()), means.numpy(), atol=1e-5)\n"
        "        print('LAYERS', *agent.actor_mean, 'SPREAD', means.std().item())"
    ),
}


@pytest.mark.parametrize("activation", ["ReLU", "GELU"])
def test_a_copied_and_changed_script_acts_in_every_rollout_with_the_policy_that_it_trains(activation, tmp_path):
    code = (ROOT / "ppo_continuous_lrrl.py").read_text()
    assert code.count("nn.Tanh()") == 2
    code = code.replace("nn.Tanh()", f"nn.{activation}()")
    for line, comparison in COMPARISONS.items():
        assert code.count(f" {line}\n") == 1
        indentation = code.split(f"{line}\n")[0].rsplit("\n", 1)[1]
        code = code.replace(f" {line}\n", f" {comparison}\n{indentation}{line}\n")
    path = tmp_path / "my_ppo.py"
    path.write_text(code)
    options = "--env-id Pendulum-v1 --num-steps 256 --num-minibatches 4 --total-timesteps 1024 --no-cuda"
    command = [sys.executable, str(path), *options.split(), "--run-dir", str(tmp_path / "runs")]
    process = run_forked(command, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert activation in process.stdout and float(process.stdout.split("SPREAD ")[1].split()[0]) > 1e-3
    run = only_folder(tmp_path / "runs")
    assert (
        run.summary["status"] == "finished" and run.config["exp_name"] == "my_ppo" and "my_ppo.py" in run.config["code"]
    )

"""What lrrl_utils/roofline.py promises: a bound from parts that are those of DQN."""

import re

import torch

from dqn_atari_lrrl import QNetwork
from lrrl_utils import roofline


def test_its_layers_are_those_of_the_network():
    network = QNetwork(4, "valid")
    weights = [tuple(x.shape) for x in network.parameters() if x.ndim > 1]
    convolutions = [(outputs, inputs, k, k) for inputs, outputs, k, *_ in roofline.CONVOLUTIONS]
    assert weights == convolutions + [(m, n) for n, m in roofline.LAYERS]
    assert torch.nn.utils.parameters_to_vector(network.parameters()).numel() == 1_686_180


def test_the_bound_is_that_of_the_sum_of_its_parts(capsys):
    roofline.main(repeats=3)
    *parts, bound = capsys.readouterr().out.splitlines()
    total = sum(float(re.search(r": ([\d.]+) ms", line)[1]) for line in parts)
    assert len(parts) == 4 and abs(float(bound.split()[2]) - 4000 / total) < 2

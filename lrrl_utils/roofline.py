"""How fast DQN could be on this CPU if there were nothing but its products: a bound for its timesteps per second.

    OMP_NUM_THREADS=1 python -m lrrl_utils.roofline

For each update of 32 observations and the four timesteps before it: acting four times, the forward pass of both
networks, the backward pass of one, and Adam's step; no games, no replay, no activations, no loss, no padding.
"""

import time

import torch
import torch.nn.functional as F

CONVOLUTIONS = ((4, 32, 8, 4, 84), (32, 64, 4, 2, 20), (64, 64, 3, 1, 9))  # channels, kernel, stride, size of the input
LAYERS = ((3136, 512), (512, 4))


def milliseconds(function, repeats=30):
    """The median time of `function`, after a warm-up."""
    times = []
    for _ in range(repeats + 5):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times[5:])[repeats // 2]


def passes(batch_size):
    """Two functions: the products of a forward pass, and those of a backward pass."""
    convolutions = []
    for inputs, outputs, kernel, stride, size in CONVOLUTIONS:
        x, weight = torch.randn(batch_size, inputs, size, size), torch.randn(outputs, inputs, kernel, kernel)
        x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
        convolutions.append((F.conv2d(x, weight, stride=stride), x, weight, stride))
    linear = [(torch.randn(batch_size, n), torch.randn(m, n), torch.randn(batch_size, m)) for n, m in LAYERS]

    def forward():
        for _, x, weight, stride in convolutions:
            F.conv2d(x, weight, stride=stride)
        for x, weight, _ in linear:
            F.linear(x, weight)

    def backward():
        for i, (gradient, x, weight, stride) in enumerate(convolutions):
            wanted = [i > 0, True, False]  # observations need no gradient
            stretch = [stride, stride], [0, 0], [1, 1], False, [0, 0], 1
            torch.ops.aten.convolution_backward(gradient, x, weight, None, *stretch, wanted)
        for x, weight, gradient in linear:
            gradient.T @ x, gradient @ weight

    return forward, backward


def main(repeats=30):
    parameter = torch.randn(1_686_180, requires_grad=True)
    parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam([parameter], fused=True)
    acting, (forward, backward) = passes(1)[0], passes(32)
    parts = {"acting, 4 times": (acting, 4), "forward, twice": (forward, 2), "backward": (backward, 1)}
    parts["Adam"] = adam.step, 1
    total = 0.0
    for name, (function, times) in parts.items():
        total += (spent := times * milliseconds(function, repeats))
        print(f"{name}: {spent:.1f} ms")
    print(f"at most {4e3 / total:.0f} timesteps per second")


if __name__ == "__main__":
    main()

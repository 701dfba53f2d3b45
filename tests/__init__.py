"""Tests run on the CPU, but for those that need a GPU. This is said before anything imports torch, which then looks."""

import os

# workers of xdist come here, too, with the environment of the process that started them
GPUS = os.environ.setdefault("GPUS_OF_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""

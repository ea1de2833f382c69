import os

import torch
from hypothesis import HealthCheck, settings

# Two threads are slower than one on operations this small, several times so on a busy machine.
torch.set_num_threads(1)

# "ci" draws the same examples every time. To search further, with fresh examples on each run:
#   make test ARGS="--hypothesis-profile=thorough"
settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "thorough",
    derandomize=False,
    deadline=None,
    max_examples=1000,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The first backward pass of a process decides whether its forks may use autograd. A compile or an
# export before it would register a GPU that is not there, and they might not.
torch.ones((), requires_grad=True).backward()

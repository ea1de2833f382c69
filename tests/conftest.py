import gc
import os

import torch
from files import own_modules
from hypothesis import HealthCheck, settings

# Two threads are slower than one on operations this small, several times so on a busy machine.
torch.set_num_threads(int(os.environ.get("DENSEKIT_TEST_THREADS", "1")))


def pytest_configure(config):
    # A warning fails a test if a line of ours causes it. What others say to themselves, such as
    # torch about the interpreter, is shown at the end: it must not fail a supported version.
    config.addinivalue_line("filterwarnings", rf"error:::({'|'.join(own_modules())})(\.|\Z)")


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

# A fork keeps what the tests before it left to the garbage collector. A process group among it,
# collected in the fork, would wait for threads that are not there.
os.register_at_fork(after_in_child=gc.freeze)

# The first backward pass of a process decides whether its forks may use autograd. A compile or an
# export before it would register a GPU that is not there, and they might not.
torch.ones((), requires_grad=True).backward()

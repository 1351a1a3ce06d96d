"""Eight CPU devices, set before any backend starts, and strict numerics in every test."""

import os

import hypothesis
import jax

jax.config.update("jax_platforms", "cpu")
os.environ["JAX_PLATFORMS"] = "cpu"  # Of the processes that tests start.
jax.config.update("jax_num_cpu_devices", 8)
# LLVM's level 1 in place of 3: train_step compiles in half the time, and the tests of the sampler,
# the losses and the steps together take 13% less.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=1"
)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, none remembered on disk, no limit on a first compile.
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("reproducible")


def pytest_collection_modifyitems(items):
    """The longest file first: the others are done meanwhile, in another process."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")

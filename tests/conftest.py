"""Eight CPU devices, set before any backend starts, and strict numerics in every test."""

import os
import tempfile

# For the processes that tests start, too. All share what one has compiled: not what a user has,
# nor where a user would find it.
os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="klear_jax_compiled_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import hypothesis
import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every run, none remembered on disk, no limit on a first compile.
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, database=None, deadline=None
)
hypothesis.settings.load_profile("reproducible")


def pytest_collection_modifyitems(items):
    """The longest file first: the others are done meanwhile, in another process."""
    items.sort(key=lambda item: item.path.name != "test_processes.py")

"""Host memory of loading and saving a large sharded Hugging Face folder.

    python -m tests.bench.weights [--gigabytes=4] [--folder=DIR]

Writes a synthetic model of so many GB in bfloat16, in shards of 1 GB, loads it onto 8 devices
of this CPU (fsdp 4 x tensor 2) and saves it again, each in a process of its own. Prints what
the process held at most beyond the arrays themselves, in units of the largest tensor.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

import jax
import numpy as np

from configs import sections
from klear_jax import hf_weights, qwen3, sharding

RULES = sections.mesh(1, 1, 1).rules.to_dict()


def config_of(gigabytes):
    """Shapes of Qwen3-1.7B, with as many layers as it takes."""
    shape = {"vocab_size": 151_936, "width": 2_048, "num_heads": 16, "num_kv_heads": 8}
    shape |= {"head_dim": 128, "mlp_width": 6_144, "rope_theta": 1e6, "norm_eps": 1e-6}
    shape |= {"qk_norm": True, "tied": True, "max_positions": 40_960}
    one = qwen3.Config(num_layers=1, **shape)
    table = qwen3.param_table(one)
    layer = sum(int(np.prod(p.shape)) for p in table["layers"].values())
    layers = max(round((gigabytes * 1e9 / 2 - 151_936 * 2_048) / layer), 1)
    return qwen3.Config(num_layers=layers, **shape)


class Peak:
    """The most memory that this process holds in the meantime, of its own and with files
    that it has mapped."""

    def __enter__(self):
        self.own = self.all = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.wait(0.005):
            self.own = max(self.own, memory("RssAnon"))
            self.all = max(self.all, memory("VmRSS"))


def memory(field):
    """Bytes, as the kernel says of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def write(folder, gigabytes):
    config = config_of(gigabytes)
    hf_weights.SHARD_BYTES = 1_000_000_000
    zero = np.zeros((), jax.numpy.bfloat16)
    params = jax.tree.map(
        lambda param: np.broadcast_to(zero, param.shape), qwen3.param_table(config)
    )
    hf_weights.save(folder, params, config)


def measure(folder, output):
    largest = 151_936 * 2_048 * 2
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 4, 2, RULES))
    layout = sharding.Layout(mesh, RULES)
    jax.block_until_ready(jax.numpy.zeros(()))
    found, before = {}, memory("VmRSS")
    start = time.perf_counter()
    with Peak() as peak:
        params, config = hf_weights.load(
            folder, dtype=jax.numpy.bfloat16, layout=layout
        )
        jax.block_until_ready(params)
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    found["arrays_gb"] = arrays / 1e9
    found["load_seconds"] = time.perf_counter() - start
    found["load_beyond"] = (peak.all - before - arrays) / largest
    before, start = memory("VmRSS"), time.perf_counter()
    with Peak() as peak:
        hf_weights.save(output, params, config)
    found["save_seconds"] = time.perf_counter() - start
    found["save_beyond"] = (peak.all - before) / largest
    print(json.dumps({name: round(x, 3) for name, x in found.items()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=4)
    parser.add_argument("--folder")
    parser.add_argument("--step", nargs="*")
    args = parser.parse_args()
    if args.step:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", 8)
        measure(*args.step)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        source, target = f"{folder}/source", f"{folder}/target"
        write(source, args.gigabytes)
        files = sorted(p.name for p in pathlib.Path(source).iterdir())
        size = sum(p.stat().st_size for p in pathlib.Path(source).iterdir())
        print(f"{len(files)} files, {size / 1e9:.2f} GB")
        subprocess.run([sys.executable, __file__, "--step", source, target], check=True)


if __name__ == "__main__":
    main()

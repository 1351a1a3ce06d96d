"""What the sampler's scheduler costs the host: a phase of rollouts on no device at all.

python -m tests.bench.host --slots=4096 --groups=512
"""

import argparse
import collections
import time

import numpy as np

from klear_jax import sampler
from klear_jax.scheduler import Prompt, Request, Scheduler, Shape

SAMPLES = 8  # Of a group.


class NoDevice:
    """Draws zeros at once."""

    def __init__(self, shape: Shape):
        self.shape = shape.decode_steps, shape.replicas, shape.slots

    def prefill(self, batch):
        pass

    def decode(self, batch):
        return np.zeros(self.shape, np.int32), np.zeros(self.shape, np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--slots", type=int, default=512, help="of a replica")
    parser.add_argument(
        "--groups", type=int, default=64, help=f"{SAMPLES} samples each"
    )
    args = parser.parse_args()
    shape = Shape(args.replicas, args.slots, 5 * args.slots, 16, 4, 64, 16, 8)
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(
            np.arange(17),
            collections.deque(
                Request((i, j), np.zeros(4, np.uint32), int(rng.integers(15, 47)))
                for j in range(SAMPLES)
            ),
        )
        for i in range(args.groups)
    ]
    plan = Scheduler(shape, prompts, [7])
    start = time.perf_counter()
    count = len(list(sampler.run(plan, NoDevice(shape), ahead=0)))
    seconds, calls = time.perf_counter() - start, plan.stats["decode_calls"]
    print(
        f"{count} samples: {seconds * 1e3:.0f} ms, {seconds / calls * 1e3:.1f} a call"
    )


if __name__ == "__main__":
    main()

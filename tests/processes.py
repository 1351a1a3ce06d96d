"""One process of several that sample together: a program of its own, see test_processes.

    python tests/processes.py PORT COUNT INDEX

Prints, as JSON, the tokens and log-probs that it returned, and what it decided on the way.
"""

import json
import sys

import jax
import numpy as np


def main(port, count, index):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(f"localhost:{port}", count, index)
    import test_sampler as shared

    from klear_jax import qwen3, sampler, sharding

    config = sharding.MeshConfig(2, 2, 2, shared.RULES)
    layout = sharding.Layout(sharding.make_mesh(config), shared.RULES)
    params = sharding.put(
        jax.tree.map(np.asarray, shared.make_params()),
        qwen3.params_shardings(shared.CONFIG, layout),
    )
    order = []
    got = sampler.generate(
        params,
        shared.CONFIG,
        shared.PROMPTS,
        **shared.SAMPLED,
        layout=layout,
        num_slots=4,
        page_tokens=8,
        pool_tokens=256,
        on_finish=lambda i, j, sample: order.append((i, j)),
    )
    print(
        json.dumps(
            {
                "tokens": [[s.tokens for s in group] for group in got],
                "logprobs": [[s.logprobs.tolist() for s in group] for group in got],
                "order": order,
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

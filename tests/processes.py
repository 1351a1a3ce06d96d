"""One process of several, a program of its own; see test_processes.

    python tests/processes.py PORT COUNT INDEX

Prints, as JSON: the losses of five updates, the tokens and log-probs that it sampled, what it
decided on the way, and what the processes told each other.
"""

import json
import os
import sys

import jax
import numpy as np


def main(port, count, index):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    os.environ["JAX_COORDINATOR_ADDRESS"] = f"localhost:{port}"
    os.environ["JAX_NUM_PROCESSES"] = str(count)
    os.environ["JAX_PROCESS_ID"] = str(index)
    from klear_jax import hosts

    hosts.join()
    import test_sampler as shared
    import test_steps

    from klear_jax import qwen3, sampler, sharding

    told = hosts.gather({"process": index, "text": "é" * 100_000 * index})
    params = test_steps.make_params()
    rows = test_steps.make_rows(params)
    layout = test_steps.make_layout(2, 2, 2)
    losses = {
        name: test_steps.five_updates(name, layout, params, rows)
        for name in ("lm", "gppo")
    }
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
                "told": [(one["process"], len(one["text"])) for one in told],
                "losses": losses,
                "tokens": [[s.tokens for s in group] for group in got],
                "logprobs": [[s.logprobs.tolist() for s in group] for group in got],
                "order": order,
            }
        )
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

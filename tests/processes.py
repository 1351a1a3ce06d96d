"""One process of several, a program of its own; see test_processes.

    python tests/processes.py PORT COUNT INDEX FOLDER

Prints, as JSON: the losses of five updates, the tokens and log-probs that it sampled, what it
decided on the way, what the processes told each other, and which steps it saved to FOLDER.
"""

import dataclasses
import json
import os
import sys
import time

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "a model"


class Data:
    def get_state(self):
        return 7


def save_while_deleting(state, folder):
    """Saves within a step when the first process still deletes an old checkpoint, as it does for
    long where that is large, on a bucket. Returns what is then saved within a step."""
    from klear_jax import checkpoint, hosts

    config = checkpoint.CheckpointConfig(every=1, keep=1, keep_best="", grace_s=20.0)
    with checkpoint.Checkpoints(folder, config, Config()) as checkpoints:
        deleter = checkpoints._between._checkpoint_deleter
        delete_steps = deleter.delete_steps

        def slowly(old):
            time.sleep(3.0 if old and hosts.first() else 0.0)
            return delete_steps(old)

        deleter.delete_steps = slowly
        checkpoints.save(1, state, Data(), {})
        checkpoints.save(2, state, Data(), {})  # For which 1 is deleted, behind.
        time.sleep(1.0)
        checkpoints.save_preempted(2, state, Data(), {"so": "far"}, begun=True)
    with checkpoint.Checkpoints(folder, config, Config()) as checkpoints:
        return checkpoints.under_way()


def main(port, count, index, folder):
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

    from klear_jax import qwen3, sampler, sharding, steps

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
    some = jax.tree.leaves(params)[0]
    state = steps.TrainState(step=some, params=params, opt_state=params)
    under_way = save_while_deleting(state, folder)
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
                "under_way": under_way,
            }
        )
    )


if __name__ == "__main__":
    *numbers, where = sys.argv[1:]
    main(*map(int, numbers), where)

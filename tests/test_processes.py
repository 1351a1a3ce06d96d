"""Two processes of four devices each, joined by jax.distributed, sample as one would."""

import json
import pathlib
import socket
import subprocess
import sys

import numpy as np
import test_sampler as shared

from klear_jax import sampler


def test_two_processes_draw_what_one_does():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = pathlib.Path(__file__).with_name("processes.py")
    command = [sys.executable, str(script), str(port), "2"]
    workers = [
        subprocess.Popen(
            [*command, str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    results = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=300)
            assert worker.returncode == 0, err[-3000:]
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for worker in workers:
            worker.kill()
    # The same samples, bit for bit, in the same order: the same decisions.
    assert results[0] == results[1]
    want = sampler.generate(
        shared.make_params(), shared.CONFIG, shared.PROMPTS, **shared.SAMPLED
    )
    assert results[0]["tokens"] == [[s.tokens for s in group] for group in want]
    for group, other in zip(results[0]["logprobs"], want, strict=True):
        for logprobs, sample in zip(group, other, strict=True):
            np.testing.assert_allclose(logprobs, sample.logprobs, atol=1e-5)

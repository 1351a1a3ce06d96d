"""How fast programs are scored: responses x 16 tests through the reward pool's sandbox.

    python -m tests.bench.code_rewards --responses=1024 --hanging=0.01

Every response is a program of its own (no verdict is remembered). Of `hanging` responses
the program never ends, in each of its 16 tests of 2 s. Prints tests a second, how long the
caller was kept by handing tasks in, and what became of them.
"""

import argparse
import collections
import time

from klear_jax.rewards import sandbox
from klear_jax.rewards.pool import Pool

TESTS = {
    "inputs": [f"{i} {i + 1}\n" for i in range(16)],
    "outputs": [f"{2 * i + 1}\n" for i in range(16)],
    "timeout": 2,
}


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--responses", type=int, default=1024)
    parser.add_argument("--hanging", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    print(sandbox.choose())
    start = time.perf_counter()
    for i in range(20):
        assert (
            sandbox.run("print(int(input()) + 1)", stdin=str(i)).stdout == f"{i + 1}\n"
        )
    single = (time.perf_counter() - start) / 20
    print(
        f"one program in a sandbox of its own: {1 / single:.0f} a second, one at a time"
    )
    every = round(1 / args.hanging) if args.hanging else 0
    with Pool(args.workers, task_timeout_s=600, memory_mb=4096) as pool:
        pool.submit("code", answer("pass", 0), TESTS, isolation="auto").result()
        start = time.perf_counter()
        futures = []
        for i in range(args.responses):
            hangs = every and i % every == every - 1
            body = (
                "while True: pass" if hangs else "print(sum(map(int, input().split())))"
            )
            futures.append(
                pool.submit("code", answer(body, i), TESTS, isolation="auto")
            )
        submitted = time.perf_counter() - start
        outcomes = [future.result() for future in futures]
        seconds = time.perf_counter() - start
    tests = 16 * args.responses
    print(f"{tests} tests in {seconds:.1f} s: {tests / seconds:.0f} a second")
    print(f"the caller was kept for {submitted:.2f} s")
    print(collections.Counter((o.status, o.score) for o in outcomes))


def answer(program, number):
    return f"<think></think>\n```python\n# {number}\n{program}\n```"


if __name__ == "__main__":
    main()

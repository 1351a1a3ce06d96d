"""How fast prepare_data is, and what memory it takes, on chains of thought of our own making.

    python -m tests.bench.prepare --tokenizer=FOLDER [--samples=20000,100000] [--kills=5]

Each sample has about 2,000 tokens; 1% are duplicates, 1% hold nine words of a benchmark. With
--kills, the first data set is made once more, killed with SIGKILL so often at random moments
and started again; its bytes must be the same. Memory is that of all processes together,
shared pages counted once.
"""

import argparse
import hashlib
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import ml_collections

from configs.data import sft

BENCHMARKS = sorted(
    (pathlib.Path(__file__).parent.parent / "golden/benchmarks").glob("*")
)
COMMON = (
    "the of and to in is that we have so let us compute sum equals therefore thus if "
    "then x y n prime integer positive"
).split()


def write_samples(path: pathlib.Path, count: int) -> None:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = [
        "".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)
    ]
    problem = json.loads(BENCHMARKS[0].read_text().splitlines()[5])["messages"][0]
    passage = problem["content"]

    def text(words: int) -> str:
        rare = [
            str(rng.randint(0, 999)) if rng.random() < 0.3 else "" for _ in range(words)
        ]
        many = rng.choices(vocabulary, k=words)
        often = rng.choices(COMMON, k=words)
        return " ".join(
            o if rng.random() < 0.6 else r or m
            for o, r, m in zip(often, rare, many, strict=True)
        )

    lines: list[str] = []
    with path.open("w") as file:
        for i in range(count):
            chain = text(int(min(16_000, rng.lognormvariate(6.65, 0.7))))
            prompt = f"Problem {i}: {text(60)}"
            if rng.random() < 0.01:
                prompt = f"{prompt} {passage.upper()}"
            row = {
                "prompt": prompt,
                "response": f"<think>\n{chain}\n</think>\n\n\\boxed{{{i}}}",
                "answer": str(i),
            }
            line = json.dumps(row) + "\n"
            if lines and rng.random() < 0.01:
                line = rng.choice(lines)
            if len(lines) < 1000:
                lines.append(line)
            file.write(line)


def write_config(path: pathlib.Path, raw: pathlib.Path, tokenizer: str) -> None:
    c = sft.get_config()
    c.tokenizer = tokenizer
    c.clean.benchmarks = tuple(map(str, BENCHMARKS))
    c.sources = ml_collections.ConfigDict()
    c.sources.made = {"path": str(raw), "shape": "any", "fields": {}, "weight": 1.0}
    path.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({c.to_dict()!r})\n"
    )


def start(config: pathlib.Path, output: pathlib.Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "klear_jax.prepare_data", f"--config={config}"]
    command.append(f"--output={output}")
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def memory_mib(pid: int) -> float:
    """Of a process and all below it, shared pages counted once (PSS)."""
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            lines = pathlib.Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            children = pathlib.Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue  # It has ended.
        waiting += map(int, children.split())
        total += sum(int(x.split()[1]) for x in lines if x.startswith("Pss:")) / 1024
    return total


def digest(folder: pathlib.Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()


def measure(config: pathlib.Path, output: pathlib.Path) -> dict[str, float]:
    began, peak = time.monotonic(), 0.0
    with start(config, output) as process:
        while process.poll() is None:
            peak = max(peak, memory_mib(process.pid))
            time.sleep(0.2)
        if process.returncode:
            sys.exit(process.stderr.read().decode())
    return {"seconds": time.monotonic() - began, "peak_mib": peak}


def kill_and_go_on(
    config: pathlib.Path, output: pathlib.Path, kills: int, seconds: float
) -> int:
    rng, done = random.Random(1), 0
    while done < kills:
        with start(config, output) as process:
            try:
                process.wait(rng.uniform(4, seconds * 0.7))
                break  # Too late: it had done nearly all before.
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                done += 1
    measure(config, output)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--samples", default="20000,100000")
    parser.add_argument("--kills", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        for i, count in enumerate(map(int, args.samples.split(","))):
            raw, config = folder / f"{count}.jsonl", folder / f"{count}.py"
            write_samples(raw, count)
            write_config(config, raw, args.tokenizer)
            found = measure(config, folder / str(count))
            made = folder / str(count) / "klear_sft" / "1.0.0"
            report = json.loads((made / "report.json").read_text())
            found["raw_mib"] = raw.stat().st_size / 2**20
            found["made_mib"] = sum(p.stat().st_size for p in made.iterdir()) / 2**20
            tokens = sum(one["tokens"] for one in report["splits"].values())
            found["tokens_per_s"] = tokens / found["seconds"]
            found["samples_per_s"] = count / found["seconds"]
            dropped = report["sources"]["made"]["dropped"]
            print(
                json.dumps({"samples": count} | found | {"dropped": dropped}),
                flush=True,
            )
            if args.kills and not i:
                done = kill_and_go_on(
                    config, folder / "again", args.kills, found["seconds"]
                )
                same = digest(folder / "again" / "klear_sft" / "1.0.0") == digest(made)
                print(json.dumps({"kills": done, "same_bytes": same}), flush=True)


if __name__ == "__main__":
    main()

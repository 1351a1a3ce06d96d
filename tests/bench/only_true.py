"""Does it pay to learn from right responses alone? Table 2 of the paper, in miniature.

    python -m tests.bench.only_true --output=runs/only_true [--seeds=5]

A teacher, stopped early, answers sums of 3 to 6 numbers eight times each. prepare_data judges
the answers and splits the prompts by the teacher's pass rate, easy above one half. Students
learn from scratch, as many updates each, from the right responses or from all of them; they
are tested on other sums. All of it goes to the output folder; run again, it goes on, and
prints a table with the difference of the two, paired by seed, and its 95% interval (t).
"""

import argparse
import json
import pathlib

import ml_collections
import numpy as np

from configs import sections, sft_tiny
from configs.data import sft as data_config
from klear_jax import config, evaluate, prepare_data, train
from klear_jax.data import prepare

TEACHER_STEPS, STUDENT_STEPS = 220, 300
PROMPTS, RESPONSES = 4_000, 8
SETS = {"easy": "train_easy", "hard": "train_hard", "overall": "train_easy+train_hard"}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 8: 2.36, 10: 2.26}


def run_config(output: pathlib.Path) -> ml_collections.ConfigDict:
    c = sft_tiny.get_config()
    c.tokenizer = str(output / "problems" / "tokenizer")
    c.data.path = c.evaluation.data = str(output / "problems/arithmetic/1.0.0")
    c.data.row_tokens = 96
    c.evaluation.max_new_tokens = 80
    c.evaluation.greedy = False
    c.checkpoint.keep = 1
    return c


def run(c: ml_collections.ConfigDict, workdir: pathlib.Path) -> float:
    """Trains, if that is not done, and returns the accuracy at the end."""
    c.workdir = str(workdir)
    c.checkpoint.every = c.evaluation.every = c.num_steps
    done = workdir / "metrics.jsonl"
    if not done.exists() or f'"step": {c.num_steps - 1}' not in done.read_text():
        task, parsed = train.parse(c.to_dict())
        train.TASKS[task][1](parsed)
    return json.loads(done.read_text().splitlines()[-1])["eval/accuracy"]


def sample(c: ml_collections.ConfigDict, teacher: pathlib.Path, path: pathlib.Path):
    """The teacher's answers to prompts that it has not learnt."""
    file = path.with_name("sampling.py")
    c.evaluation.split, c.evaluation.num_problems = "rl", PROMPTS
    c.evaluation.num_samples = RESPONSES
    write_config(file, c)
    evaluate.main(
        ["evaluate", f"--config={file}", f"--model={teacher}", f"--samples={path}"]
    )


def write_config(file: pathlib.Path, c: ml_collections.ConfigDict) -> None:
    file.write_text(
        "import ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict({c.to_dict()!r})\n"
    )


def prepare_samples(output: pathlib.Path, samples: pathlib.Path, right: bool):
    c = data_config.get_config()
    c.output, c.tokenizer = str(output), str(output / "problems" / "tokenizer")
    c.name, c.num_workers = "right" if right else "mixed", 1
    c.sources = ml_collections.ConfigDict()
    c.sources.teacher = sections.source(str(samples), "any")
    c.clean.benchmarks = ()
    c.clean.max_tokens = 96
    c.choose.judge, c.choose.only_right = True, right
    c.choose.easy_above = 0.5
    c.choose.responses_per_prompt = 0
    c.choose.validation_percent = 0.0
    c.rewards = sections.rewards(num_workers=2)
    return prepare.prepare(config.build(prepare.PrepareConfig, c.to_dict()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    output = args.output
    prepare_data.make_problems(
        output / "problems",
        {
            "task": "chain_sum",
            "num_problems": 60_000,
            "seed": 0,
            "direct_share": 0.0,
            "generator": {"min_terms": 3, "max_terms": 6},
        },
    )
    c = run_config(output)
    c.seed, c.num_steps = 1_000, TEACHER_STEPS
    print("teacher", run(c, output / "teacher"), flush=True)
    samples = output / "samples.jsonl"
    if not (output / "mixed").exists():
        sample(run_config(output), output / "teacher", samples)
    folders = {
        kind: prepare_samples(output, samples, kind == "right")
        for kind in ("right", "mixed")
    }
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(args.seeds):
        for name, split in SETS.items():
            for kind, folder in folders.items():
                c = run_config(output)
                c.seed, c.num_steps = seed, STUDENT_STEPS
                c.data.path, c.data.split = str(folder), split
                accuracy = run(c, output / f"student_{name}_{kind}_{seed}")
                found.setdefault(name, {}).setdefault(kind, []).append(accuracy)
                print(seed, name, kind, accuracy, flush=True)
    for kind, folder in folders.items():
        print(kind, json.loads((folder / "report.json").read_text())["splits"])
    for name, both in found.items():
        right, mixed = (100 * np.array(both[kind]) for kind in ("right", "mixed"))
        gain = right - mixed
        half = T_95[len(gain)] * gain.std(ddof=1) / np.sqrt(len(gain))
        print(
            f"{name}: right {right.mean():.1f}, mixed {mixed.mean():.1f}, difference "
            f"{gain.mean():+.1f} ({gain.mean() - half:+.1f} to {gain.mean() + half:+.1f})"
        )


if __name__ == "__main__":
    main()

"""Runs a study of configs/study: every variant on every seed, two runs at a time.

    python -m tests.bench.study --study=clip [--workers=2] [--variants="A;B"] [--seeds=0,1]
    python -m tests.bench.study --study=clip --check="VARIANT;SEED"   # the same again?

A run that is recorded in configs/study/results, for this study or another that has the same
variant, is not done again; each is written to STUDY.jsonl there as it ends: metrics of every
step, and of the evaluation. A worker has a core to itself, and keeps its programs from run to
run. SFT checkpoints lie in runs/study, made when they are missing; what each can do, on the
problems that runs are measured on, is in SETTING_starts.json. On another kind of CPU, the bits
are others.
"""

import argparse
import concurrent.futures
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import operator
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections
import numpy as np

from configs.study import setting
from klear_jax import config, evaluate, losses, tokens, train

RESULTS = pathlib.Path("configs/study/results")
KEPT = """
    reward/correct reward/any_correct reward/mean entropy grad_norm grad_norm_max kl_old ratio/max ratio/min
    clip/low clip/high clip/dual clip_movable/low clip_movable/high clip_movable/dual
    clip/movable_tokens grad_mass/low grad_mass/high grad_mass/dual samples/length
    samples/truncated samples/groups_used logprob_gap/mean updates eval/avg@8 eval/greedy
    eval/pass@8 eval/length updates_skipped
""".split()
# Of tokens, that are told apart; see `kinds_of` and `places_of`.
KINDS = ("at once", "think", "chain", "answer")
PLACES = ("right", "mistake", "after")
# As launch/setup.sh: memory that is given back to the kernel must be had again at every step.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
# Then fresh processes, for compiled programs pile up. The executor's own max_tasks_per_child
# stopped once all of them had ended together.
RUNS_A_WORKER = 16


def begin_worker(core: int) -> None:
    """Before JAX computes: on how many threads a product is computed shows in its bits."""
    os.sched_setaffinity(0, {core})
    config.stay_on_cpu()
    config.keep_programs()
    config.trim_after_compilations()


def begin_one_of(cores) -> None:
    begin_worker(cores.get())


def config_of(study: setting.Study, variant: str, seed: int):
    base = module(study.setting)
    c = base.get_config()
    c.update_from_flattened_dict(study.variants[variant])
    c.seed = seed
    c.init_from = base.get_sft_config(sft_seed(seed)).workdir
    return c


def sft_seed(seed: int) -> int:
    """Of the checkpoint that a run of this seed starts from."""
    [found] = [sft for seeds, sft in setting.SFT_SEEDS.items() if seed in seeds]
    return found[seed % len(found)]


def run(study: setting.Study, variant: str, seed: int) -> dict:
    """One run, in this process: what is recorded of it."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as workdir:
        c = config_of(study, variant, seed)
        c.workdir = workdir
        train_as(c)
        lines = read_lines(pathlib.Path(workdir) / "metrics.jsonl")
        files = sorted((pathlib.Path(workdir) / "rollouts").iterdir())
        samples = list(itertools.chain.from_iterable(map(read_lines, files)))
        tokenizer = tokens.load(c.tokenizer)
        found = {"clipped": clipped(samples, KINDS, kinds_of(tokenizer), c.loss)}
        if study.setting == "setting":
            places = clipped(samples, PLACES, places_of(tokenizer), c.loss)
            found["clipped_places"] = places
    metrics = {
        name: [round_(line.get(name)) for line in lines]
        for name in KEPT
        if any(name in line for line in lines)
    }
    return {
        "variant": variant,
        "seed": seed,
        "cpu": cpu(),
        "seconds": round(time.perf_counter() - start, 1),
        "metrics": metrics,
        **found,
    }


def cpu() -> str:
    """Its kind, which shows in the bits: another has other instructions."""
    lines = pathlib.Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    found = dict(re.split(r"\s*: ?", line, maxsplit=1) for line in lines)
    names = ("vendor_id", "cpu family", "model")
    return " ".join(found.get(name, "?") for name in names)


def read_lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def clipped(
    samples: Iterable[dict],
    sorts: Sequence[str],
    sort: Callable[[dict], list[str]],
    loss: ml_collections.ConfigDict,
) -> dict[str, dict[str, list[float]]]:
    """Which tokens were beyond the bounds when they were learnt from, over all of a run.

    Args:
      samples: lines of rollouts/.
      sorts: of tokens, that are told apart;
      sort: from a sample to the sort of each of its tokens, '' for what is not counted.
      loss: the bounds.

    Returns:
      side -> sort -> how many could move that way (by their advantage and
      `losses.MOVABLE_LOGP`), how many of them were beyond the bound, and of these the mean old
      probability and the mean log-ratio.
    """
    low, high = math.log(1 - loss.clip_low), math.log(1 + loss.clip_high)
    found = {side: {one: [] for one in sorts} for side in ("low", "high")}
    for sample in samples:
        if not sample["advantage"] or "tokens" not in sample:
            continue
        side = "low" if sample["advantage"] < 0 else "high"
        columns = (sort(sample), sample["old_logp"], sample["log_ratio"])
        for one, old, ratio in zip(*columns, strict=True):
            if one and old < losses.MOVABLE_LOGP and ratio is not None:
                found[side][one].append((math.exp(old), ratio))
    return {
        side: {one: _summary(x, side, low, high) for one, x in moved.items()}
        for side, moved in found.items()
    }


def kinds_of(tokenizer: tokens.Tokenizer) -> Callable[[dict], list[str]]:
    """The KINDS: the choice to answer 'at once' or to 'think', which is a response's second token;
    the 'chain' of thought; the 'answer' behind it."""
    [think_end] = tokenizer.encode("</think>")

    def kinds(sample: dict) -> list[str]:
        found, thinks = [], True
        for place, token in enumerate(sample["tokens"]):
            kind = "chain" if thinks else "answer"
            thinks = thinks and token != think_end
            if place == 1:
                kind = "think" if thinks else "at once"
            found.append(kind)
        return found

    return kinds


def places_of(tokenizer: tokens.Tokenizer) -> Callable[[dict], list[str]]:
    """The PLACES in a response that works its sum out: what is 'right', as far as it goes, its
    first 'mistake', and what comes 'after'. A response that does not is not counted."""
    begins_at_once = tokenizer.encode("<think></think>")

    def places(sample: dict) -> list[str]:
        mine = sample["tokens"]
        if mine[:2] == begins_at_once:
            return [""] * len(mine)
        right = tokenizer.encode(setting.right_response(sample["prompt"]))
        pairs = enumerate(zip(mine, right, strict=False))
        first = next((place for place, (a, b) in pairs if a != b), len(mine))
        return (["right"] * first + ["mistake"] + ["after"] * len(mine))[: len(mine)]

    return places


def _summary(moved, side: str, low: float, high: float) -> list[float]:
    beyond = [(p, r) for p, r in moved if (r < low if side == "low" else r > high)]
    means = np.mean(beyond, axis=0).tolist() if beyond else [0.0, 0.0]
    return [len(moved), len(beyond), *map(round_, means)]


def make_sft(name: str, seed: int) -> dict:
    """The checkpoint, if it is missing (what was begun goes on), and what it can do.

    Args:
        name: of the setting.
        seed: of the checkpoint.
    """
    c = module(name).get_sft_config(seed)
    train_as(c)
    output = pathlib.Path(c.workdir) / "evaluation.json"
    flags = (f"--config=configs/study/{name}.py", f"--output={output}")
    evaluate.main(["evaluate", *flags, f"--model={c.workdir}"])
    found = json.loads(output.read_text())
    kept = {name: found[name] for name in ("avg@8", "pass@8", "greedy", "length")}
    return {"seed": seed, "cpu": cpu()} | kept


def train_as(c: ml_collections.ConfigDict) -> None:
    """What `python -m klear_jax.train` does after its flags."""
    task, parsed = train.parse(c.to_dict())
    train.TASKS[task][1](parsed)


def round_(value: float | None) -> float | None:
    return value if value is None else float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--variants", help="names with ; between")
    parser.add_argument("--seeds", help="numbers with commas")
    parser.add_argument("--check", help="VARIANT;SEED: is it the same again?")
    flags = parser.parse_args()
    study = load(flags.study)
    file = RESULTS / f"{study.name}.jsonl"
    known = recorded(study)
    variants = flags.variants.split(";") if flags.variants else list(study.variants)
    seeds = list(map(int, flags.seeds.split(","))) if flags.seeds else study.seeds
    cells = [
        (variant, seed)
        for seed, variant in itertools.product(seeds, variants)
        if (variant, seed) not in known
    ]
    if flags.check:
        variant, _, seed = flags.check.rpartition(";")
        cells, variants, seeds = [(variant, int(seed))], [variant], [int(seed)]
        if cells[0] not in known:
            sys.exit(f"error: {flags.check} of {study.name} is not recorded")
    for name, asked, there_are in (
        ("variants", variants, study.variants),
        ("seeds", seeds, study.seeds),
    ):
        if wrong := [one for one in asked if one not in there_are]:
            sys.exit(f"error: {name} {wrong}: the study has {list(there_are)}")
    make_problems = ("klear_jax.prepare_data", *module(study.setting).DATA_FLAGS)
    subprocess.run([sys.executable, "-m", *make_problems], check=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    check_setting(study.setting)
    os.environ |= MALLOC
    with begin_workers(flags.workers) as pool:
        needed = sorted({sft_seed(seed) for _, seed in cells})
        begun = list(pool.map(make_sft, itertools.repeat(study.setting), needed))
    if flags.check:
        check(study, cells[0], known[cells[0]])
    record_starts(study.setting, begun)
    record(study, cells, file, flags.workers)


def check(study: setting.Study, cell: tuple[str, int], before: dict) -> NoReturn:
    """Runs it again, and ends with 1 if it is not the same."""
    (again,) = rows_of(study, [cell], 1)
    # All that was recorded then; a later row may hold more.
    now = {name: again["metrics"].get(name) for name in before["metrics"]}
    counted = [name for name in before if name.startswith("clipped")]
    same = now == before["metrics"] and all(
        again[name] == before[name] for name in counted
    )
    verdict = "the same" if same else "ANOTHER"
    print(f"{verdict}, on {again['cpu']}; then {before['cpu']}")
    sys.exit(not same)


def record(
    study: setting.Study, cells: list, file: pathlib.Path, num_workers: int
) -> None:
    """Runs them all, a line of the file each as it ends."""
    size = RUNS_A_WORKER * num_workers
    cut_tail(file)
    with file.open("a") as out:
        for start in range(0, len(cells), size):
            some = cells[start : start + size]
            for n, row in enumerate(rows_of(study, some, num_workers), start + 1):
                out.write(json.dumps(row) + "\n")
                out.flush()
                os.fsync(out.fileno())
                found = row["metrics"]["eval/avg@8"][-1]
                print(
                    f"{n} of {len(cells)}: {row['variant']}, seed {row['seed']}: "
                    f"{found:.3f} in {row['seconds']:.0f} s",
                    flush=True,
                )


def rows_of(study: setting.Study, cells: list, num_workers: int) -> Iterator[dict]:
    """What is recorded of each run, as they end."""
    with begin_workers(num_workers) as pool:
        waiting = [pool.submit(run, study, *cell) for cell in cells]
        for done in concurrent.futures.as_completed(waiting):
            yield done.result()


def begin_workers(count: int) -> concurrent.futures.ProcessPoolExecutor:
    spawn = multiprocessing.get_context("spawn")
    cores = spawn.Queue()
    for core in itertools.islice(itertools.cycle(os.sched_getaffinity(0)), count):
        cores.put(core)
    return concurrent.futures.ProcessPoolExecutor(count, spawn, begin_one_of, (cores,))


def module(name: str) -> types.ModuleType:
    return importlib.import_module(f"configs.study.{name}")


def load(name: str) -> setting.Study:
    return module(name).get_study()


def record_starts(name: str, found: list[dict]) -> None:
    rows = starts(name) | {row["seed"]: row for row in found}
    text = json.dumps([rows[seed] for seed in sorted(rows)], indent=1)
    (RESULTS / f"{name}_starts.json").write_text(text + "\n")


def starts(name: str) -> dict[int, dict]:
    """What is recorded of each SFT checkpoint of a setting, by its seed."""
    file = RESULTS / f"{name}_starts.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    return {row["seed"]: row for row in rows}


def check_setting(name: str) -> None:
    """All that is recorded of a setting has the same configs, which are recorded, too."""
    file = RESULTS / f"{name}.json"
    now = json.loads(module(name).get_config().to_json_best_effort())
    if not file.exists():
        file.write_text(json.dumps(now, indent=1) + "\n")
    then = json.loads(file.read_text())
    if other := [
        key for key in now.keys() | then.keys() if now.get(key) != then.get(key)
    ]:
        sys.exit(
            f"error: {sorted(other)} of the config are others than in {file}, of which all "
            "recorded runs are; for another setting, move its folder away"
        )


def recorded(study: setting.Study) -> dict[tuple[str, int], dict]:
    """Its runs, by variant and seed, whichever study they were run for."""
    found = {}
    for file in sorted(RESULTS.glob("*.jsonl")):
        other = load(file.stem)
        for (variant, seed), row in read(file).items():
            if other.setting == study.setting:
                found[what_differs(other, variant), seed] = row
    return {
        (variant, seed): found[what_differs(study, variant), seed]
        for variant in study.variants
        for seed in study.seeds
        if (what_differs(study, variant), seed) in found
    }


def what_differs(study: setting.Study, variant: str) -> frozenset:
    """From the setting: the same for what is the same run."""
    values, base = study.variants[variant], module(study.setting).get_config()

    def of_setting(key: str) -> Any:
        return functools.reduce(operator.getitem, key.split("."), base)

    return frozenset((k, v) for k, v in values.items() if v != of_setting(k))


def read(file: pathlib.Path) -> dict[tuple[str, int], dict]:
    """The recorded runs, by variant and seed, without a line that is not whole yet."""
    text = file.read_text()
    rows = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return {(row["variant"], row["seed"]): row for row in rows}


def cut_tail(file: pathlib.Path) -> None:
    """A line that a kill cut off."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)


if __name__ == "__main__":
    main()

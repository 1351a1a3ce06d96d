"""Raw files -> a TFDS data set, at the size of the paper's.

    files -> parts -> workers: rows -> samples, a file a part
          -> judged -> chosen, looking at all of them -> workers: shards

What is left out is counted, by source and reason. The file of a part or a shard is there
whole or not at all, so a run that was killed goes on, and ends with the same bytes. Memory
does not grow with the text, only by some 100 bytes a sample.
"""

import contextlib
import dataclasses
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any

import numpy as np
import pyarrow.parquet
import tqdm
from etils import epath

from klear_jax import config as config_lib
from klear_jax.data import cleaning, files, report, rows, samples, shards
from klear_jax.data.choosing import Choice, ChooseConfig, Table, choose
from klear_jax.data.samples import CleanConfig, PartReport
from klear_jax.errors import InputError
from klear_jax.rewards import pool, routing
from klear_jax.rewards.routing import RewardConfig

# Of the files between the stages: those of another number begin anew.
FORMAT = 1
# Rows of each source that are looked at before any work, and how many of them may be bad.
PREVIEW_ROWS, PREVIEW_SHARE = 1_000, 0.5

# Runs function(*job) for each job, and yields what it returns as they end.
Run = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Files of one origin and shape."""

    path: str
    shape: str
    fields: Mapping[str, str]
    weight: float

    def __post_init__(self):
        if not 0 < self.weight < math.inf:
            raise InputError(f"weight must be positive, not {self.weight}")
        if self.shape not in rows.SHAPES:
            raise InputError(
                f"shape must be one of {sorted(rows.SHAPES)}, not {self.shape!r}"
            )
        known = {field.name for field in dataclasses.fields(rows.Fields)} - {"replace"}
        if unknown := sorted(set(self.fields) - known):
            raise InputError(f"fields may name {sorted(known)}, not {unknown}")

    def mapping(self) -> rows.Fields:
        fields: dict[str, Any] = {**self.fields}
        return dataclasses.replace(rows.SHAPES[self.shape], **fields)


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """One data set. Every key is explained where it is set, in configs/data/."""

    output: str
    name: str
    version: str
    kind: str
    tokenizer: str
    sources: Mapping[str, SourceConfig]
    limit: int
    clean: CleanConfig
    choose: ChooseConfig
    rewards: RewardConfig
    num_workers: int
    part_mb: int
    shard_mb: int

    def __post_init__(self):
        if "://" in self.output:
            raise InputError(f"output={self.output!r} must be a folder on a disk")
        if self.kind not in shards.FEATURES:
            raise InputError(f"kind must be 'sft' or 'rl', not {self.kind!r}")
        if not re.fullmatch("[a-z][a-z0-9_]*", self.name):
            raise InputError(f"name must be of a-z, 0-9 and _, not {self.name!r}")
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.version):
            raise InputError(f"version must be such as '1.0.0', not {self.version!r}")
        if not self.sources:
            raise InputError("sources names no source")
        for key in ("limit", "num_workers"):
            if getattr(self, key) < 0:
                raise InputError(f"{key} must not be negative; 0: all")
        if self.part_mb < 1 or self.shard_mb < 1:
            raise InputError("part_mb and shard_mb must be at least 1")
        if self.kind == "rl" and self.choose.judge:
            raise InputError(
                "choose.judge is for responses; for RL data name choose.pass_rates"
            )

    @property
    def workers(self) -> int:
        return self.num_workers or len(os.sched_getaffinity(0))

    @property
    def needed_rewards(self) -> RewardConfig | None:
        """What answers must suit: those of RL, and those that responses are judged by."""
        return self.rewards if self.kind == "rl" or self.choose.judge else None


def prepare(config: PrepareConfig) -> pathlib.Path:
    """Makes the data set, or goes on with one that was begun.

    Returns:
      Its folder, <output>/<name>/<version>: a TFDS data set, with report.json and report.md.

    Raises:
      InputError: bad settings or files; too many bad rows; nothing left; a data set in the
        folder that was made with other settings.
    """
    paths = {
        name: files.find(f"sources.{name}.path", source.path)
        for name, source in config.sources.items()
    }
    settings = _settings(config, paths)
    folder = pathlib.Path(config.output).expanduser() / config.name / config.version
    with _alone(folder):
        if not folder.exists():
            _make(config, paths, settings, folder)
        shards.check_made_with(folder, settings)
        _sweep(folder)
    return folder


def _make(
    config: PrepareConfig,
    paths: Mapping[str, list[str]],
    settings: Mapping[str, Any],
    folder: pathlib.Path,
) -> None:
    clean = config.clean
    samples.load_benchmarks(clean.benchmarks, clean.ngram, clean.allowed)
    rates = read_pass_rates(config.choose.pass_rates)
    _preview(config, paths)
    work = folder.with_name(f"{config.version}.unfinished")
    _begin(work, settings, paths)
    with _workers(config.workers) as run:
        parts = _clean(config, paths, work / "parts", run)
        _check_bad_rows(config, parts)
        if config.choose.judge:
            _judge(config, list(parts))
        table = _read_table(config, parts)
        choice = choose(table, config.choose, rates, rl=config.kind == "rl")
        summary = report.summarise(parts, table, choice, list(config.sources))
        if not summary["splits"]:
            raise InputError(f"no sample is left: {report.reasons(summary)}")
        _write(config, settings, list(parts), table, choice, work, run)
        report.write(work, summary)
    os.replace(work, folder)


def _settings(config: PrepareConfig, paths: Mapping[str, list[str]]) -> dict[str, Any]:
    """All that decides on the bytes of the data set, as JSON values."""
    values = dataclasses.asdict(config)
    for key in ("output", "num_workers", "rewards"):
        del values[key]
    del values["clean"]["max_bad_share"]
    if config.needed_rewards:
        rewards = dataclasses.asdict(config.needed_rewards)
        for key in ("kinds", "sources", "kind", "full_credit", "task_timeout_s"):
            values[f"rewards.{key}"] = rewards[key]
    named = [path for found in paths.values() for path in found]
    for pattern in config.clean.benchmarks:
        named += files.find("clean.benchmarks", pattern)
    for pattern in config.choose.pass_rates:
        named += files.find("choose.pass_rates", pattern)
    values |= {
        "format": FORMAT,
        "order": list(config.sources),
        "files": {path: files.fingerprint(path) for path in named},
        "tokenizer": samples.load_tokenizer(config.tokenizer).fingerprint,
    }
    return json.loads(json.dumps(values))


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Nobody else makes this data set meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another process is making {folder}") from None
        yield


def _begin(
    work: pathlib.Path, settings: Mapping[str, Any], paths: Mapping[str, list[str]]
) -> None:
    """The folder of unfinished work, begun with these settings and files."""
    times = {
        path: epath.Path(path).stat().mtime
        for found in paths.values()
        for path in found
    }
    settings = {**settings, "changed": times}
    kept = work / "settings.json"
    if kept.exists():
        begun_with = json.loads(kept.read_text())
        if changed := config_lib.differences(begun_with, settings):
            raise InputError(
                f"{work} was begun with other settings: {changed[0]}; delete it to begin anew"
            )
    (work / "parts").mkdir(parents=True, exist_ok=True)
    text = json.dumps(settings)
    samples.put(kept, lambda path: path.write_text(text))


def _sweep(folder: pathlib.Path) -> None:
    """Removes what only unfinished work needs; a kill may have come before."""
    shutil.rmtree(folder / "parts", ignore_errors=True)
    (folder / "settings.json").unlink(missing_ok=True)


def read_pass_rates(patterns: tuple[str, ...]) -> dict[int, float]:
    """prompt_hash -> share of right samples, from files that `evaluate --samples` writes.

    Greedy ones, and those that could not be scored (reward null), are not counted.

    Raises:
      InputError: a row without a prompt, or with a `correct` that is no truth value.
    """
    right, total = Counter[int](), Counter[int]()
    for path in (
        path
        for pattern in patterns
        for path in files.find("choose.pass_rates", pattern)
    ):
        for origin, row, messages in samples.read_prompts(path):
            if not isinstance(row.get("correct"), bool):
                raise InputError(f"{origin}: correct must be true or false")
            if row.get("reward", 0.0) is not None and not row.get("greedy"):
                prompt = cleaning.prompt_hash(messages)
                total[prompt] += 1
                right[prompt] += row["correct"]
    return {prompt: right[prompt] / total[prompt] for prompt in total}


def _preview(config: PrepareConfig, paths: Mapping[str, list[str]]) -> None:
    """Looks at the first rows of each source, and tries their rewards out: a wrong shape, or
    a reward that cannot work, is found in a second."""
    good = []
    for name, found in paths.items():
        fields = config.sources[name].mapping()
        read = (
            row
            for path in found
            for part in files.parts(path, 1 << 20, fields.columns())
            for row in part.rows()
        )
        faults, count = [], 0
        for origin, number, row in itertools.islice(read, PREVIEW_ROWS):
            count += 1
            try:
                example = rows.to_example(row, fields, origin=origin, prompt_id=number)
                samples.check_example(example, config.kind, config.needed_rewards)
                good.append(example)
            except rows.BadRow as error:
                faults.append(f"{origin}: {str(error)[: samples.EXCERPT]}")
        if not count:
            raise InputError(
                f"source {name}: {config.sources[name].path} holds no rows"
            )
        if len(faults) > PREVIEW_SHARE * count:
            raise InputError(
                f"source {name}: {len(faults)} of its first {count} rows are bad (is its "
                f"shape {config.sources[name].shape!r}?), such as {faults[0]}"
            )
    if config.choose.judge:
        answered = [example for example in good if example.answer is not None]
        routing.check(config.rewards, answered)
        with routing.make_pool(config.rewards) as scorers:
            routing.try_out(scorers, config.rewards, answered)


def _clean(
    config: PrepareConfig,
    paths: Mapping[str, list[str]],
    folder: pathlib.Path,
    run: Run,
) -> dict[pathlib.Path, PartReport]:
    """File of clean samples -> report of each part, in order; what is there is kept."""
    outputs: list[pathlib.Path] = []
    size = sum(files.file_size(path) for found in paths.values() for path in found)
    bar = tqdm.tqdm(total=size, desc="cleaning", unit="B", unit_scale=True, delay=1)

    def jobs() -> Iterator[tuple[Any, ...]]:
        for number, (source, found) in enumerate(paths.items()):
            columns = config.sources[source].mapping().columns()
            for name, part in _numbered(found, columns, config):
                bar.update(part.num_read)
                output = folder / f"{number:03}-{name}"
                outputs.append(output)
                if not output.with_suffix(".json").exists():
                    yield config, part, output, source

    with bar:
        for _ in run(_clean_part, jobs()):
            pass
    return {
        output.with_suffix(".parquet"): PartReport(
            **json.loads(output.with_suffix(".json").read_text())
        )
        for output in outputs
    }


def _numbered(
    found: list[str], columns: set[str], config: PrepareConfig
) -> Iterator[tuple[str, files.Part]]:
    """A name and the rows of each part of a source's files, up to the limit."""
    left = config.limit or None
    for f, path in enumerate(found):
        for p, part in enumerate(files.parts(path, config.part_mb << 20, columns)):
            part = part.head(left)
            yield f"{f:05}-{p:06}", part
            if left:
                left -= len(part)
                if not left:
                    return


def _clean_part(
    config: PrepareConfig, part: files.Part, output: pathlib.Path, source: str
) -> None:
    samples.clean_part(
        part,
        output,
        kind=config.kind,
        source=source,
        fields=config.sources[source].mapping(),
        config=config.clean,
        tokenizer=config.tokenizer,
        rewards=config.needed_rewards,
    )


def _check_bad_rows(
    config: PrepareConfig, parts: Mapping[pathlib.Path, PartReport]
) -> None:
    for source in config.sources:
        mine = [one for one in parts.values() if one.source == source]
        count = sum(one.rows for one in mine)
        bad = sum((Counter(one.bad) for one in mine), Counter())
        if bad.total() > config.clean.max_bad_share * count:
            named = [line for one in mine for line in one.named][: samples.NAMED]
            reasons = ", ".join(f"{reason} ({n})" for reason, n in bad.most_common())
            raise InputError(
                f"source {source}: {bad.total()} of {count} rows are bad, more than "
                f"clean.max_bad_share={config.clean.max_bad_share}: {reasons}; "
                f"{'; '.join(named)}"
            )


def _judge(config: PrepareConfig, parts: list[pathlib.Path]) -> None:
    """Scores each response that has an answer; a file of 1, 0 or -1 (not judged) a part."""
    with routing.make_pool(config.rewards) as scorers:
        for part in tqdm.tqdm(parts, desc="judging", unit="part", delay=1):
            output = part.with_suffix(".npy")
            if output.exists():
                continue
            columns = ["response", "answer", "answer_is_json", "data_source"]
            read = pyarrow.parquet.read_table(part, columns=columns).to_pylist()
            scores = [_submit(scorers, config.rewards, row) for row in read]
            right = np.full(len(read), -1, np.int8)
            for i, future in enumerate(scores):
                if future and np.isfinite(score := future.result().score):
                    right[i] = score == config.rewards.full_credit
            samples.put(output, functools.partial(_save, array=right))


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    with path.open("wb") as file:  # np.save by name would add an ending.
        np.save(file, array)


def _submit(
    scorers: pool.Pool, rewards: RewardConfig, row: Mapping[str, Any]
) -> futures.Future[Any] | None:
    if not row["answer"]:
        return None
    answer = json.loads(row["answer"]) if row["answer_is_json"] else row["answer"]
    source = row["data_source"]
    kind = rewards.kinds[rewards.kind_of(source)]
    answer = routing.ground_truth(rewards, source, answer, seed="")
    return scorers.submit(kind.function, row["response"], answer, **kind.resolved())


def _read_table(
    config: PrepareConfig, parts: Mapping[pathlib.Path, PartReport]
) -> Table:
    names = ["prompt_hash", "sample_hash", "answer_hash", "num_tokens", "num_bytes"]
    columns: dict[str, list[np.ndarray]] = {}
    sources = list(config.sources)
    for number, (path, one) in enumerate(parts.items()):
        read = pyarrow.parquet.read_table(path, columns=names)
        size = len(read)
        values = {name: read.column(name).to_numpy() for name in names}
        values["part"] = np.full(size, number, np.int32)
        values["row"] = np.arange(size, dtype=np.int32)
        values["source"] = np.full(size, sources.index(one.source), np.int32)
        judged = path.with_suffix(".npy")
        values["right"] = (
            np.load(judged) if judged.exists() else np.full(size, -1, np.int8)
        )
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return Table(**{name: np.concatenate(value) for name, value in columns.items()})


def _write(
    config: PrepareConfig,
    settings: Mapping[str, Any],
    parts: list[pathlib.Path],
    table: Table,
    choice: Choice,
    work: pathlib.Path,
    run: Run,
) -> None:
    """The shards, and what makes a data set of them."""
    planned = shards.plan(table, choice, config.shard_mb << 20)
    prompt_id = np.cumsum(choice.reason == 0) - 1
    sources = np.array(list(config.sources))

    def jobs() -> Iterator[tuple[Any, ...]]:
        for shard in planned:
            mine = shard.samples
            pieces = [
                (parts[part], table.row[mine[table.part[mine] == part]])
                for part in np.unique(table.part[mine])
            ]
            columns = {
                "source": sources[table.source[mine]],
                "pass_rate": choice.pass_rate[mine],
                "right": table.right[mine].astype(np.int32),
                "prompt_id": prompt_id[mine].astype(np.int32),
            }
            columns = {
                k: v for k, v in columns.items() if k in shards.FEATURES[config.kind]
            }
            yield shard.path(work, config.name), pieces, columns, config.kind

    bar = tqdm.tqdm(total=len(planned), desc="writing", unit="shard", delay=1)
    with bar:
        for _ in run(shards.write_shard, jobs()):
            bar.update()
    metadata = {
        "made_with": settings,
        "tokenizer": settings["tokenizer"],
        "max_tokens": int(table.num_tokens[choice.reason == 0].max()),
        "sources": _ranges(config, table, choice),
    }
    shards.write_metadata(
        work,
        planned,
        name=config.name,
        version=config.version,
        kind=config.kind,
        metadata=metadata,
    )


def _ranges(
    config: PrepareConfig, table: Table, choice: Choice
) -> dict[str, list[dict[str, Any]]]:
    """Of each split, its sources: name, weight, and how many samples and tokens they have.

    A split holds its sources one after the other, in this order.
    """
    ranges = {}
    for number, split in enumerate(choice.splits):
        here = (choice.reason == 0) & (choice.split == number)
        if not here.any():
            continue
        ranges[split] = [
            {
                "name": name,
                "weight": source.weight,
                "samples": int((here & (table.source == s)).sum()),
                "tokens": int(table.num_tokens[here & (table.source == s)].sum()),
            }
            for s, (name, source) in enumerate(config.sources.items())
        ]
    return ranges


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Run]:
    """So many processes, to run jobs in; one is this one."""
    if count == 1:
        yield lambda function, jobs: (function(*job) for job in jobs)
        return
    # Not forked: other threads may hold locks.
    spawn = multiprocessing.get_context("spawn")
    executor = futures.ProcessPoolExecutor(count, spawn, _begin_worker, (os.getpid(),))
    try:
        yield functools.partial(_as_they_end, executor, 2 * count)
    except futures.process.BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, of too little memory perhaps: the same command goes on, "
            "if need be with fewer num_workers or a smaller part_mb"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _begin_worker(parent: int) -> None:
    pool.die_with_parent()
    if os.getppid() != parent:  # It was dead already.
        os._exit(1)


def _as_they_end(
    executor: futures.Executor,
    ahead: int,
    function: Callable[..., Any],
    jobs: Iterable[tuple[Any, ...]],
) -> Iterator[Any]:
    """With at most so many jobs begun or waiting: they hold the rows they are about."""
    open_jobs: set[futures.Future[Any]] = set()
    for job in jobs:
        open_jobs.add(executor.submit(function, *job))
        if len(open_jobs) == ahead:
            ended, open_jobs = futures.wait(
                open_jobs, return_when=futures.FIRST_COMPLETED
            )
            yield from (future.result() for future in ended)
    yield from (future.result() for future in futures.as_completed(open_jobs))

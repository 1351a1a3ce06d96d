"""Chosen samples <-> a TFDS data set in array_record, which others read with
`tfds.builder_from_directory(folder).as_data_source(split)`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from klear_jax import config as config_lib
from klear_jax.data.choosing import Choice, Table
from klear_jax.data.samples import put
from klear_jax.errors import InputError, let_pass

SHARED = {
    "messages": tfds.features.Text(
        doc="the prompt before the chat template: JSON of a list of {role, content}"
    ),
    "answer": tfds.features.Text(doc="what a response must reach; '' for none"),
    "answer_is_json": tfds.features.Scalar(
        np.bool_, doc="answer is JSON, of a list of texts or of tests; else plain text"
    ),
    "data_source": tfds.features.Text(doc="what the row said of its origin"),
    "source": tfds.features.Text(
        doc="the source it was read from, as the config names it"
    ),
    "prompt_hash": tfds.features.Scalar(
        np.int64, doc="63 bits of the messages; decides on train or validation"
    ),
    "pass_rate": tfds.features.Scalar(
        np.float32, doc="share of right responses to the prompt; nan: unknown"
    ),
}
FEATURES = {
    "sft": SHARED
    | {
        "response": tfds.features.Text(
            doc="the demonstration, with <think>...</think>"
        ),
        "right": tfds.features.Scalar(
            np.int32, doc="whether the response is: 1, 0, or -1: not judged"
        ),
        "tokens": tfds.features.Tensor(
            shape=(None,),
            dtype=np.int32,
            doc="ids of the prompt in the chat template, of the response and of its end",
        ),
        "prompt_tokens": tfds.features.Scalar(
            np.int32, doc="how many of the tokens are the prompt: these are not learnt"
        ),
    },
    "rl": SHARED
    | {
        "prompt_id": tfds.features.Scalar(np.int32, doc="number in the data set"),
    },
}
DESCRIPTIONS = {
    "sft": "Demonstrations to learn from, tokenised.",
    "rl": "Prompts with what their responses must reach.",
}


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one file holds.

    Attributes:
      split, index, count: the index-th of the count files of a split.
      samples: indices into the Table.
    """

    split: str
    index: int
    count: int
    samples: np.ndarray

    def path(self, folder: pathlib.Path, name: str) -> pathlib.Path:
        template = _template(folder, name, self.split)
        return pathlib.Path(
            template.sharded_filepath(shard_index=self.index, num_shards=self.count)
        )


def plan(table: Table, choice: Choice, shard_bytes: int) -> list[Shard]:
    """The taken samples of each split, in order, cut at about shard_bytes."""
    planned = []
    for number, split in enumerate(choice.splits):
        [taken] = np.nonzero((choice.reason == 0) & (choice.split == number))
        if not len(taken):
            continue
        before = np.cumsum(table.num_bytes[taken]) - table.num_bytes[taken]
        shard = before // shard_bytes
        pieces = np.split(taken, np.nonzero(np.diff(shard))[0] + 1)
        planned += [Shard(split, i, len(pieces), one) for i, one in enumerate(pieces)]
    return planned


def write_shard(
    path: pathlib.Path,
    parts: Sequence[tuple[pathlib.Path, np.ndarray]],
    columns: Mapping[str, np.ndarray],
    kind: str,
) -> None:
    """Writes a shard, unless it is there.

    Args:
      path: of the file.
      parts: in order, files of clean samples and the rows taken from each.
      columns: of the other features, a value for each sample.
      kind: a key of FEATURES.
    """
    if path.exists():
        return
    features = tfds.features.FeaturesDict(FEATURES[kind])
    serializer = ExampleSerializer(features.get_serialized_info())
    wanted = [name for name in FEATURES[kind] if name not in columns]

    def write(unfinished: pathlib.Path) -> None:
        writer = ArrayRecordWriter(os.fspath(unfinished), "group_size:1")
        number = 0
        for part, rows in parts:
            table = pyarrow.parquet.read_table(part, columns=wanted).take(rows)
            for batch in table.to_batches(max_chunksize=256):
                tokens = batch.column("tokens") if "tokens" in wanted else []
                for i, row in enumerate(_without_tokens(batch).to_pylist()):
                    if "tokens" in wanted:
                        row["tokens"] = tokens[i].values.to_numpy()
                    row |= {name: column[number] for name, column in columns.items()}
                    example = serializer.get_tf_example(features.encode_example(row))
                    # TFDS leaves the order of the features open.
                    writer.write(example.SerializeToString(deterministic=True))
                    number += 1
        writer.close()

    put(path, write)


def _without_tokens(batch: Any) -> Any:
    """Token ids become Python's integers one by one otherwise, which takes long."""
    return batch.select([name for name in batch.schema.names if name != "tokens"])


def write_metadata(
    folder: pathlib.Path,
    planned: Sequence[Shard],
    *,
    name: str,
    version: str,
    kind: str,
    metadata: Mapping[str, Any],
) -> None:
    """Makes a TFDS data set of the shards in the folder.

    Args:
      folder: with a file for each of the shards.
      planned: the shards.
      name, version: of the data set.
      kind: a key of FEATURES.
      metadata: JSON values that `read_metadata` gives back.
    """
    splits = []
    for split in dict.fromkeys(shard.split for shard in planned):
        mine = [shard for shard in planned if shard.split == split]
        splits.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.samples) for shard in mine],
                num_bytes=sum(
                    shard.path(folder, name).stat().st_size for shard in mine
                ),
                filename_template=_template(folder, name, split),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=FEATURES[kind],
        split_infos=splits,
        version=version,
        check_data=False,  # It would read by TensorFlow.
        description=DESCRIPTIONS[kind],
        metadata=tfds.core.MetadataDict(
            {key: json.dumps(value) for key, value in metadata.items()}
        ),
    )


def _known_feature(name: str) -> type:
    """The feature that a features.json names. TFDS would import the module of any other: a
    file beside the data."""
    known = tfds.features.FeatureConnector._registered_features
    if name not in known:
        raise ValueError(f"features.json names {name!r}, which is no feature of TFDS")
    return known[name]


tfds.features.FeatureConnector.cls_from_name = staticmethod(_known_feature)


def read_metadata(folder: epath.PathLike) -> dict[str, Any] | None:
    """What `write_metadata` was given; None for a data set that is not from here."""
    info = read_builder(folder).info
    if not info.metadata or "made_with" not in info.metadata:
        return None
    try:
        return {key: json.loads(value) for key, value in info.metadata.items()}
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{folder}: metadata.json is broken: {error}") from None


def read_builder(folder: epath.PathLike) -> tfds.core.DatasetBuilder:
    """The data set in a folder, or an InputError."""
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # TFDS and protobuf raise a class each.
        let_pass(error)
        raise InputError(f"{folder} is a broken data set: {error}") from error


def read_source(folder: epath.PathLike, split: str) -> Sequence[dict[str, Any]]:
    """The samples of a split by index, read and decoded when asked for; or an InputError."""
    try:
        return read_builder(folder).as_data_source(split)
    except Exception as error:
        let_pass(error)
        raise InputError(
            f"{folder}, split {split!r}, cannot be read: {error}"
        ) from error


def check_made_with(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Raises an InputError unless the data set was made with these settings."""
    metadata = read_metadata(folder)
    if metadata is None:
        raise InputError(f"{folder} is another data set: choose another output or name")
    if changed := config_lib.differences(metadata["made_with"], settings):
        raise InputError(
            f"{folder} was made with other settings: {changed[0]}; choose another version"
        )


def _template(
    folder: pathlib.Path, name: str, split: str
) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(folder),
        dataset_name=name,
        split=split,
        filetype_suffix="array_record",
    )

"""TFDS builders, written and read as array_record, without TensorFlow."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from klear_jax.data import arithmetic, programs


class Arithmetic(tfds.core.GeneratorBasedBuilder):
    """Arithmetic prompts, answers and responses; splits sft, rl and test."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "Problems split by a hash."}
    MAKE_PROBLEMS = staticmethod(arithmetic.make_problems)

    def __init__(self, *, settings: Mapping[str, Any], **kwargs: Any):
        """Settings are the arguments of MAKE_PROBLEMS."""
        self._settings = settings
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "prompt_id": tfds.features.Scalar(
                np.int32, doc="hash of the problem, unique over all splits"
            ),
            "task": tfds.features.Text(doc="what kind of problem it is"),
            "problem": tfds.features.Text(doc="what the user says: the whole prompt"),
            "response": tfds.features.Text(doc="a demonstration, ends with the answer"),
            "answer": tfds.features.Text(doc="what the response must reach"),
        }
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(settings=json.dumps(self._settings)),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        problems = self.MAKE_PROBLEMS(**self._settings)
        self.info.metadata["dropped"] = json.dumps(problems.dropped)
        return {
            split: self._generate_examples(rows)
            for split, rows in problems.splits.items()
        }

    def _generate_examples(
        self, rows: list[arithmetic.Problem]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for row in rows:
            yield row.prompt_id, dataclasses.asdict(row)


class Programs(Arithmetic):
    """Programming prompts, tests and responses; splits sft, rl and test."""

    MAKE_PROBLEMS = staticmethod(programs.make_problems)

"""Word problems of reasoning-gym's gsm_symbolic with worked-out answers, as raw files.

    python launch/gsm_symbolic.py OUTPUT

writes OUTPUT/train.jsonl (prompt, response, answer), of most templates, and two sets to test
on: OUTPUT/seen.jsonl, other instances of these templates, and OUTPUT/unseen.jsonl, of the
templates that are left. Some of the worked-out answers are wrong: `prepare_data` judges them.
"""

import json
import pathlib

import reasoning_gym

from klear_jax.config import run_main
from klear_jax.data.arithmetic import hash_of
from klear_jax.errors import InputError

NUM_PROBLEMS = 6_000  # Drawn; of 85 templates.
UNSEEN_PERCENT = 20  # Of the templates.
TEST_PERCENT = 10  # Of the instances of the others.
NUM_TEST = 256  # Of each test set, the first ones.


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise InputError("usage: python launch/gsm_symbolic.py OUTPUT")
    output = pathlib.Path(argv[1])
    drawn = reasoning_gym.create_dataset("gsm_symbolic", seed=0, size=NUM_PROBLEMS)
    rows: dict[str, dict[str, str]] = {"train": {}, "seen": {}, "unseen": {}}
    for problem, template in zip(drawn, drawn.task_indices, strict=True):
        question = problem["question"]
        if hash_of("template", str(template)) % 100 < UNSEEN_PERCENT:
            split = "unseen"
        elif hash_of("split", question) % 100 < TEST_PERCENT:
            split = "seen"
        else:
            split = "train"
        row = {
            "prompt": question,
            "response": problem["metadata"]["answer_cot"],
            "answer": problem["answer"],
            "template": template,
        }
        rows[split][question] = json.dumps(row)  # A question once.
    output.mkdir(parents=True, exist_ok=True)
    for split, found in rows.items():
        lines = list(found.values())[: None if split == "train" else NUM_TEST]
        (output / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        templates = {json.loads(line)["template"] for line in lines}
        print(f"{split}: {len(lines)} problems of {len(templates)} templates")


if __name__ == "__main__":
    run_main(main)

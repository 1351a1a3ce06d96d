"""Greedy answers of `klear_jax.evaluate`, token for token against those of transformers.

    python -m tests.bench.greedy --model=FOLDER --hf=PYTHON --output=FOLDER \
        --data=HumanEval.jsonl.gz,gsm8k.jsonl [--tokens=256]

PYTHON is the interpreter of an environment with torch and transformers, which asks the same
questions through the model's chat template. float32 on both sides. Prints the share of equal
answers of each data set, and where the others part.
"""

import argparse
import json
import pathlib
import subprocess
import sys

BATCH = 8  # Questions that transformers answers at once.


def ours(flags: argparse.Namespace) -> list[dict]:
    """The rows of an evaluation, greedy alone."""
    samples = flags.output / "samples.jsonl"
    subprocess.run(
        [
            *(sys.executable, "-m", "klear_jax.evaluate"),
            *("--config=configs/evaluate.py", f"--model={flags.model}"),
            f"--config.evaluation.data={flags.data}",
            *("--config.evaluation.num_samples=0", "--config.evaluation.greedy"),
            f"--config.evaluation.max_new_tokens={flags.tokens}",
            *(f"--output={flags.output}/evaluation.json", f"--samples={samples}"),
        ],
        check=True,
    )
    return [json.loads(line) for line in samples.read_text().splitlines()]


def theirs(model: str, samples: pathlib.Path, tokens: int) -> None:
    """Prints, of each row, their answer's text and tokens, as JSON lines."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    net = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    order = sorted(range(len(rows)), key=lambda i: len(str(rows[i]["prompt"])))
    for start in range(0, len(rows), BATCH):
        some = order[start : start + BATCH]
        inputs = tokenizer.apply_chat_template(
            [rows[i]["prompt"] for i in some],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.inference_mode():
            out = net.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        ends = {*_list(net.generation_config.eos_token_id), tokenizer.eos_token_id}
        for i, ids in zip(some, out[:, inputs["input_ids"].shape[1] :], strict=True):
            ids = ids.tolist()
            end = next((n for n, one in enumerate(ids) if one in ends), None)
            ids = ids if end is None else ids[: end + 1]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            print(json.dumps({"row": i, "text": text, "tokens": len(ids)}), flush=True)


def _list(value):
    return value if isinstance(value, list) else [value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("--hf")
    parser.add_argument("--data")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    samples = flags.output / "samples.jsonl"
    if flags.theirs:
        theirs(flags.model, samples, flags.tokens)
        return
    flags.output.mkdir(parents=True, exist_ok=True)
    rows = ours(flags)
    command = [flags.hf, __file__, f"--model={flags.model}", f"--output={flags.output}"]
    done = subprocess.run(
        [*command, f"--tokens={flags.tokens}", "--theirs"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    answers = {one["row"]: one for one in map(json.loads, done.stdout.splitlines())}
    for name in dict.fromkeys(row["data"] for row in rows):
        mine = [i for i, row in enumerate(rows) if row["data"] == name]
        apart = []
        for i in mine:
            text, other = rows[i]["response"], answers[i]["text"]
            if (text, rows[i]["num_tokens"]) != (other, answers[i]["tokens"]):
                pairs = enumerate(zip(text, other, strict=False))
                at = next(
                    (n for n, (a, b) in pairs if a != b), min(len(text), len(other))
                )
                apart.append(
                    f"{rows[i]['prompt_id']}: from character {at} of {len(text)}"
                )
        print(f"{name}: {len(mine) - len(apart)} of {len(mine)} equal; apart: {apart}")


if __name__ == "__main__":
    main()

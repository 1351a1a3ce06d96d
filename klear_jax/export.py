"""Writes the newest checkpoint of a run as a Hugging Face folder, with its model card.

python -m klear_jax.export --workdir=runs/gppo_tiny --output=DIR [--dtype=bfloat16]

The card says what the model is, how it was trained and what it reached when this checkpoint
was saved; the config of the run goes with it, with the paths that stand in it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from klear_jax import checkpoint, config, hf_weights, qwen3, tokens
from klear_jax.errors import InputError

# Of the last step, where the run has them.
TRAINING_METRICS = """
    loss policy_loss positive_loss likely validation/loss epoch reward/mean reward/correct
    samples/length samples/truncated entropy kl_old clip/low clip/high clip/dual grad_norm
    logprob_gap/mean
""".split()
FILTERS = {
    "reward": " whose rewards differ",
    "accuracy": " of which some samples are right and some are not",
    "none": "",
}


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "workdir": "The run to export.",
        "output": "A new folder: config.json, safetensors, tokenizer, README.md.",
        "dtype": "float32 (default) or bfloat16.",
    }
    flags = config.parse_flags(argv, __doc__, texts, with_config=False)
    if not flags.workdir or not flags.output:
        raise InputError("both are needed: --workdir=DIR and --output=DIR")
    if flags.dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"--dtype must be float32 or bfloat16, not {flags.dtype!r}")
    config.stay_on_cpu()
    export(flags.workdir, flags.output, jnp.dtype(flags.dtype or "float32"))


def export(workdir: str, output: str, dtype: jnp.dtype) -> None:
    """Parameters of the newest checkpoint in `dtype`, architecture, tokenizer and card."""
    output = epath.Path(output)
    if (output / "config.json").exists():
        raise InputError(f"{output} already holds a model; name a new folder")
    tokenizer = tokens.load(checkpoint.model_folder(workdir))
    found = checkpoint.resolve(workdir)  # A run may go on while its model is exported.
    about = checkpoint.read_about(found)
    if about is None:
        raise InputError(f"{workdir} is no run, whose model could be exported")
    params, model = checkpoint.load_model(found)
    hf_weights.save(output, params, model, dtype=dtype)
    tokenizer.export(output)
    (output / "klear_config.json").write_text(json.dumps(about, indent=2) + "\n")
    num_params = sum(x.size for x in jax.tree.leaves(params))
    (output / "README.md").write_text(
        card(output.name, model, num_params, dtype, about, found.parent.parent)
    )


def card(
    name: str,
    model: qwen3.Config,
    num_params: int,
    dtype: jnp.dtype,
    about: Mapping[str, Any],
    workdir: epath.Path,
) -> str:
    """The model card, Markdown with the fields that the Hugging Face hub knows.

    Args:
        about: the checkpoint, see `checkpoint.read_about`.
        workdir: of its run, whose metrics and evaluation up to there are told.
    """
    c, steps_done = about["config"], about["steps_done"]
    method = "gppo" if "rollout" in c else "sft"
    base = base_model(c["init_from"])
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    kind = "Qwen3" if model.qk_norm else "Llama"
    parts = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"base_model: {base}"] if base else []),
        "tags:",
        *(f"- {tag}" for tag in ("klear_jax", method, "reasoning")),
        "---",
        "",
        f"# {name or 'model'}",
        "",
        f"A model of the {kind} architecture with {num_params:,} parameters ({dtype.name}): "
        f"{model.num_layers} layers of width {model.width}, {model.max_positions:,} "
        "positions.",
        "",
        "## Use",
        "",
        "FOLDER is this one, or its name on the hub.",
        "",
        *use(c["evaluation"]),
        "",
        "## Training",
        "",
        gppo_in_words(c, steps_done)
        if method == "gppo"
        else sft_in_words(c, steps_done),
        optimizer_in_words(c["optim"]),
        "",
        "All settings are in `klear_config.json`. It was trained with klear_jax: Klear-Reasoner "
        f"([arXiv 2508.07629](https://arxiv.org/abs/2508.07629)) in pure JAX; {versions}.",
        *results(workdir, about),
    ]
    return "\n".join(parts) + "\n"


def base_model(init_from: str) -> str:
    """The hub's name of the model that a chain of runs began with, where a path tells it:
    Hugging Face's cache has .../models--ORG--NAME/snapshots/VERSION. Else ''."""
    while init_from and checkpoint.is_workdir(init_from):
        init_from = hf_weights.read_json(epath.Path(init_from) / "config.json")[
            "init_from"
        ]
    found = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/", init_from)
    return f"{found[1]}/{found[2]}" if found else ""


def use(evaluation: Mapping[str, Any]) -> list[str]:
    """How to load it and to ask it something, as it was evaluated."""
    sampling = f"temperature={evaluation['temperature']}, top_p={evaluation['top_p']}"
    return [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto")',
        'messages = [{"role": "user", "content": "..."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "output = model.generate(",
        f"    **inputs, max_new_tokens={evaluation['max_new_tokens']}, do_sample=True, "
        f"{sampling}",
        ")",
        'answer = output[0, inputs["input_ids"].shape[1] :]',
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
        "```",
        "",
        "or, with klear_jax:",
        "",
        '    python -m klear_jax.generate --model=FOLDER --prompt="..."',
    ]


def _start_in_words(c: Mapping[str, Any]) -> str:
    return f"of `{c['init_from']}`" if c["init_from"] else "from random parameters"


def _data_in_words(data: Mapping[str, Any]) -> str:
    path = data.get("path", data.get("data"))
    return f"`{path}`" + (f" (split `{data['split']}`)" if data["split"] else "")


def sft_in_words(c: Mapping[str, Any], steps_done: int) -> str:
    """How a model was trained, by the config of its run."""
    of = f" of {c['num_steps']:,}" if c["num_steps"] else ""
    return (
        f"Supervised fine-tuning {_start_in_words(c)} on {_data_in_words(c['data'])}, "
        f"{steps_done:,}{of} steps. A step is an update on {c['batch_rows']:,} rows of up to "
        f"{c['data']['row_tokens']:,} tokens"
        f"{', several samples a row' if c['data']['pack'] else ''}; the loss is the mean "
        "negative log-likelihood of the tokens of the responses."
    )


def gppo_in_words(c: Mapping[str, Any], steps_done: int) -> str:
    """How a model was trained, by the config of its run."""
    r, loss = c["rollout"], c["loss"]
    advantages = ", over its standard deviation" if r["normalize_std"] else ""
    positives = ""
    if loss["positive_coef"]:
        positives = (
            f" {loss['positive_coef']:g} times the mean negative log-likelihood of right "
            "samples is added."
        )
    return (
        f"Reinforcement learning {_start_in_words(c)} on {_data_in_words(c['data'])}, "
        f"{steps_done:,} of {c['num_steps']:,} steps. A step draws "
        f"{r['samples_per_prompt']} samples of up to {r['max_new_tokens']:,} tokens to each "
        f"of {r['prompts']:,} prompts, at temperature {r['temperature']:g}, and learns from "
        f"at most {r['max_groups']:,} groups{FILTERS[r['filter']]}, "
        f"{c['minibatch_prompts']:,} of them an update. An advantage is a reward less the "
        f"mean of its group{advantages}. {clip_in_words(loss)} Tokens are weighed by "
        f"`{loss['aggregation']}`.{positives}"
    )


def clip_in_words(loss: Mapping[str, Any]) -> str:
    """What the policy loss does with ratios beyond the clip, see `losses.policy_loss`."""
    low, high = (f"{x:.6g}" for x in (1 - loss["clip_low"], 1 + loss["clip_high"]))
    bounds = f"the ratio of new to old probability is clipped to [{low}, {high}]"
    below, above = loss["beta_low"], loss["beta_high"]
    betas = (
        "" if below == above == 1 else f", times {below:g} below and {above:g} above"
    )
    what = {
        "gppo": f"The loss is GPPO's: {bounds}, and a token beyond keeps the gradient that it "
        f"has at the bound{betas}.",
        "gppo_only_high": f"The loss is GPPO's on the high side alone: {bounds}; a token above "
        "keeps the gradient that it has at the bound, one below has none.",
        "clip_higher": f"The loss is clip-higher's: {bounds}, and a token beyond has no "
        "gradient.",
        "cispo": f"The loss is CISPO's: {bounds}, and weighs the gradient of the log-prob.",
    }[loss["kind"]]
    if loss["dual_clip"] is None:
        return what
    kept = loss["beta_dual"]
    return (
        f"{what} Where the advantage is negative, a ratio counts {loss['dual_clip']:g} at most, "
        f"{f'with {kept:g} times its gradient' if kept else 'without a gradient'} beyond."
    )


def optimizer_in_words(optim: Mapping[str, Any]) -> str:
    return (
        f"AdamW: learning rate {optim['peak_lr']:g} after {optim['warmup_steps']:,} steps of "
        f"warm-up, {optim['end_lr']:g} at the end, betas {optim['b1']:g} and {optim['b2']:g}, "
        f"weight decay {optim['weight_decay']:g}, gradient norm at most "
        f"{optim['clip_norm']:g}."
    )


def results(workdir: epath.Path, about: Mapping[str, Any]) -> list[str]:
    """Tables of what this checkpoint, and not a later or earlier one or another run's, has
    reached; but for an evaluation during training, which may be some steps older and says so."""
    c, steps_done = about["config"], about["steps_done"]
    parts: list[str] = []
    file = workdir / "evaluation.json"
    if file.exists():
        found = hf_weights.read_json(file)
        of = (found.get("run"), found.get("steps_done"))
        if of == (about["config_sha256"], steps_done):
            parts += _evaluation(found, found["evaluation"], "")
    lines = read_metrics(workdir, steps_done)
    if evaluated := [line for line in lines if "eval/accuracy" in line]:
        last = evaluated[-1]
        values = {k.removeprefix("eval/"): v for k, v in last.items() if "eval/" in k}
        when = f" During training, after {last['step'] + 1:,} steps:"
        parts += _evaluation(values, c["evaluation"], when)
    if lines and lines[-1]["step"] == steps_done - 1:
        rows = [
            (f"`{name}`", f"{lines[-1][name]:.4g}")
            for name in TRAINING_METRICS
            if lines[-1].get(name) is not None
        ]
        parts += [
            "",
            "The last step of training:",
            "",
            *_table(("metric", "value"), rows),
        ]
    return ["", "## Results", *parts] if parts else []


def read_metrics(workdir: epath.Path, steps_done: int) -> list[dict[str, Any]]:
    """The metrics of the steps that a checkpoint holds, which a run that went on has more of."""
    file = workdir / "metrics.jsonl"
    text = file.read_text() if file.exists() else ""
    whole = text[: text.rfind("\n") + 1]  # A run under way may be writing.
    lines = [json.loads(line) for line in whole.splitlines()]
    return [line for line in lines if line["step"] < steps_done]


def _evaluation(
    metrics: Mapping[str, Any], evaluation: Mapping[str, Any], when: str
) -> list[str]:
    """What an evaluation found, and on what."""
    rows = []
    for name, value in metrics.items():
        if not re.fullmatch(r"(avg|pass|maj)@\d+|greedy|truncated|length", name):
            continue
        interval = ""
        if f"{name}_low" in metrics:
            low, high = metrics[f"{name}_low"], metrics[f"{name}_high"]
            interval = f"{low:.1%} to {high:.1%}"
        shown = f"{value:.1f} tokens" if name == "length" else f"{value:.1%}"
        rows.append((name, shown, interval))
    return [
        "",
        f"On {metrics['problems']:.0f} problems of {_data_in_words(evaluation)}, at "
        f"temperature {evaluation['temperature']:g} and top-p {evaluation['top_p']:g}, in up "
        f"to {evaluation['max_new_tokens']:,} tokens.{when}",
        "",
        *_table(("metric", "value", "95% interval"), rows),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(row)} |" for row in cells]


if __name__ == "__main__":
    config.run_main(main)

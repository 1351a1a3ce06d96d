"""Writes the newest checkpoint of a run as a Hugging Face folder.

python -m klear_jax.export --workdir=runs/gppo_tiny --output=DIR [--dtype=bfloat16]
"""

import jax.numpy as jnp
from etils import epath

from klear_jax import checkpoint, config, hf_weights, tokens
from klear_jax.errors import InputError


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "workdir": "The run to export.",
        "output": "A new folder: config.json, safetensors, tokenizer.",
        "dtype": "float32 (default) or bfloat16.",
    }
    flags = config.parse_flags(argv, __doc__, texts, with_config=False)
    if not flags.workdir or not flags.output:
        raise InputError("both are needed: --workdir=DIR and --output=DIR")
    if flags.dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"--dtype must be float32 or bfloat16, not {flags.dtype!r}")
    export(flags.workdir, flags.output, jnp.dtype(flags.dtype or "float32"))


def export(workdir: str, output: str, dtype: jnp.dtype) -> None:
    """Parameters of the newest checkpoint in `dtype`, architecture and tokenizer."""
    output = epath.Path(output)
    if (output / "config.json").exists():
        raise InputError(f"{output} already holds a model; name a new folder")
    tokenizer = tokens.load(checkpoint.model_folder(workdir))
    params, model = checkpoint.load_model(workdir)
    hf_weights.save(output, params, model, dtype=dtype)
    tokenizer.save(output)


if __name__ == "__main__":
    config.run_main(main)

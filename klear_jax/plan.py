r"""What a run will need, found out before the chips are rented.

    python -m klear_jax.plan --config=configs/gppo_8b.py --topology=v5p:4x4x4 \
        [--num_slices=2] [--json=FILE] [--config.KEY=VALUE ...]

Compiles every program of the run with the compiler of the real chips, which need not be
there; nothing runs. Prints the arithmetic of a step, what lies on a chip in each phase and
what the largest of it is, what the chips tell each other, and the least time that a step can
take. Exits with 1 if a phase leaves less than a tenth of a chip's memory free.
--topology=cpu:8 plans for 8 devices of this CPU.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from klear_jax import (
    aot,
    config,
    decoding,
    gppo,
    optim,
    qwen3,
    roofline,
    sampler,
    sft,
    steps,
)
from klear_jax.errors import InputError
from klear_jax.roofline import CHIPS, Chip
from klear_jax.sampling import Sampling
from klear_jax.sharding import Layout, make_mesh
from klear_jax.train import parse

GIB = 2**30
HEADROOM = 0.1  # Of a chip's memory, for what the runtime and other programs hold.
PROMPT_TOKENS = 256  # Of a prompt in the mean, for the time of a step alone.


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program: bytes on a chip, and what the chips tell each other."""

    memory: aot.Memory
    buffers: list[aot.Buffer]  # Alive at the peak.
    collectives: list[aot.Collective]
    compile_seconds: float

    @property
    def sent_bytes(self) -> float:
        return sum(one.sent_bytes for one in self.collectives)


def main(argv: list[str]) -> None:
    """The command, see above."""
    texts = {
        "topology": "A TPU slice, such as v5p:4x4x4, v6e:8x8, v5e:16x16; or cpu:8.",
        "num_slices": "So many of them; mesh.data lies over the network between them.",
        "json": "A file to write the plan to, too.",
    }
    flags = config.parse_flags(argv, __doc__, texts)
    if not flags.topology:
        raise InputError("name the chips to plan for: --topology=v5p:4x4x4")
    slices = flags.num_slices or "1"
    if not slices.isdecimal() or int(slices) < 1:
        raise InputError(f"--num_slices={slices} must be a number from 1")
    task, c = parse(flags.config.to_dict())
    if flags.json:  # Not after minutes of compiling.
        epath.Path(flags.json).parent.mkdir(parents=True, exist_ok=True)
    config.stay_on_cpu()
    # Programs for chips that are not there cannot be read back.
    jax.config.update("jax_enable_compilation_cache", False)
    devices = find_devices(flags.topology, int(slices))
    layout = Layout(make_mesh(c.mesh, devices), c.mesh.rules)
    steps.check_micro_rows(c.micro_rows, layout)
    print("\n".join(["In a step:", *(f"  {line}" for line in arithmetic(task, c))]))
    programs = {}
    print(f"\nGiB a chip of {flags.topology}, mesh {dict(layout.mesh.shape)}:")
    print(f"  {'':18} arguments   temp    peak  sent  compiled in")
    for name, traced in trace(task, c, layout).items():
        programs[name] = one = compile_program(traced)
        print(
            f"  {name:18} {one.memory.arguments / GIB:9.2f} {one.memory.temp / GIB:6.2f} "
            f"{one.memory.peak / GIB:7.2f} {one.sent_bytes / GIB:6.2f} "
            f"{one.compile_seconds:8.0f} s",
            flush=True,
        )
    plan = make_plan(task, c, layout, programs, CHIPS.get(flags.topology.split(":")[0]))
    print("\n".join(tell(plan)))
    if flags.json:
        epath.Path(flags.json).write_text(json.dumps(plan, indent=1) + "\n")
    if plan["does_not_fit"]:
        print(f"error: {plan['does_not_fit']}", file=sys.stderr)
        sys.exit(1)


def find_devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
    """The chips of a topology, or so many devices of this CPU."""
    kind, _, count = topology.partition(":")
    if kind != "cpu":
        if kind not in CHIPS:
            raise InputError(
                f"--topology={topology}: no chip is called {kind!r}; there are "
                f"{', '.join(CHIPS)}, and cpu"
            )
        return aot.devices(topology, num_slices)
    if num_slices > 1:
        raise InputError("--num_slices is of TPU slices; a CPU is one")
    if not count.isdigit() or int(count) < 1:
        raise InputError(f"--topology={topology}: say cpu:8 for 8 devices of this CPU")
    if len(jax.devices("cpu")) < int(count):
        raise InputError(
            f"--topology={topology}, but this process has {len(jax.devices('cpu'))} CPU "
            f"devices: set JAX_NUM_CPU_DEVICES={count}"
        )
    return jax.devices("cpu")[: int(count)]


def arithmetic(task: str, c: Any) -> list[str]:
    """A step of the loop in words."""
    if task == "sft":
        return [
            f"{c.batch_rows} rows x {c.data.row_tokens:,} tokens = "
            f"{c.batch_rows * c.data.row_tokens:,} tokens, one update of "
            f"{c.batch_rows // c.micro_rows} micro-batches of {c.micro_rows} rows"
        ]
    r = c.rollout
    drawn, used = (n * r.samples_per_prompt for n in (r.prompts, r.max_groups))
    groups = c.minibatch_prompts * r.samples_per_prompt
    return [
        f"{r.prompts} prompts x {r.samples_per_prompt} samples = {drawn:,} samples of up to "
        f"{r.max_new_tokens:,} tokens, in {c.sampler.num_slots:,} slots",
        f"at most {r.max_groups} groups = {used:,} samples are used: "
        f"{-(-r.max_groups // c.minibatch_prompts)} updates of up to {groups} samples",
        f"an update has at most {gppo.num_micro(c, c.minibatch_prompts)} micro-batches of "
        f"{c.micro_rows} rows of {r.row_tokens:,} tokens; several samples share a row",
    ]


def trace(task: str, c: Any, layout: Layout) -> dict[str, jax.stages.Traced]:
    """All programs of a run, from shapes alone: of training, and of each way to sample."""
    module = {"sft": sft, "gppo": gppo}[task]
    tx = optim.optimizer(c.optim)
    params = jax.tree.map(
        lambda param: jax.ShapeDtypeStruct(param.shape, jnp.float32),
        qwen3.param_table(c.model),
    )
    state = jax.eval_shape(lambda params: steps.init_state(params, tx), params)
    at = steps.state_shardings(state, qwen3.params_shardings(c.model, layout), layout)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    if task == "sft":
        batch = abstract_batch(
            (c.batch_rows // c.micro_rows, c.micro_rows, c.data.row_tokens), ["weight"]
        )
    else:
        rows = c.micro_rows, c.rollout.row_tokens
        floats = ["old_logp", "advantage", "weight", "positive_weight"]
        micro = gppo.num_micro(c, c.minibatch_prompts)
        batch = abstract_batch((micro, *rows), floats)
    update = steps.compile_train_step(module.train_step(c, layout), layout, at)
    programs = {"update": update.trace(state, batch, number, rate)}
    if task == "sft" and c.validation.split:
        validate = steps.compile_score_step(sft.loss_step(c, layout), layout, at.params)
        programs["validate"] = validate.trace(state.params, batch, number)
    if task == "gppo":
        score = steps.compile_score_step(gppo.score_step(c, layout), layout, at.params)
        to_score = abstract_batch((gppo.num_micro(c, c.rollout.max_groups), *rows))
        programs["score"] = score.trace(state.params, to_score, number)
    platform = layout.mesh.devices.flat[0].platform
    kernel = decoding.kernel_for(c.model, platform)
    for i, (how, row_tokens) in enumerate(sampler_uses(c)):
        shape = sampler.program_shape(c.sampler, layout, row_tokens, kernel=kernel)
        found = decoding.trace_programs(
            shape,
            how,
            config=c.model,
            layout=layout,
            dtype=jnp.dtype(c.dtype),
            kernel=kernel,
            platform=platform,
        )
        if i:  # What only another row or way to sample changes.
            found = {name: found[name] for name in ("prefill", "decode")}
        suffix = f" {i + 1}" if i else ""
        programs |= {name + suffix: traced for name, traced in found.items()}
    return programs


def abstract_batch(
    shape: tuple[int, int, int], floats: Sequence[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """[M, B, T] of each array that a step reads; `floats` beside what every model reads."""
    names = ("tokens", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
    return batch | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in floats}


def compile_program(traced: jax.stages.Traced) -> Program:
    """Compiles it for the devices of its mesh, and reads what the compiler says of it."""
    start = time.perf_counter()
    compiled, buffers = aot.compile_and_look(traced.lower())
    memory = aot.memory(compiled)
    if not buffers:  # The compiler of CPUs leaves temporary arrays out of its peak.
        together = memory.arguments + memory.outputs - memory.aliased + memory.temp
        memory = dataclasses.replace(memory, peak=together)
    return Program(
        memory,
        buffers,
        aot.collectives(compiled.as_text() or ""),
        time.perf_counter() - start,
    )


def make_plan(
    task: str, c: Any, layout: Layout, programs: dict[str, Program], chip: Chip | None
) -> dict[str, Any]:
    """The plan as it is written to JSON: bytes are of each chip."""
    params = sum(
        4 * math.prod(at.shard_shape(param.shape))
        for param, at in zip(
            jax.tree.leaves(qwen3.param_table(c.model)),
            jax.tree.leaves(qwen3.params_shardings(c.model, layout)),
            strict=True,
        )
    )
    state = 3 * params  # With AdamW's two moments.
    phases = {}
    for name, one in programs.items():
        # What is alive beside a program's own arguments.
        beside = {"update": 0} | dict.fromkeys(
            ("score", "validate", "reshard"), state - params
        )
        phases[name] = one.memory.peak + beside.get(name, state)
    plan = {
        "task": task,
        "mesh": dict(layout.mesh.shape),
        "train_state_bytes": state,
        "programs": {
            name: dataclasses.asdict(one.memory)
            | {
                "compile_seconds": round(one.compile_seconds, 1),
                "sent_bytes": one.sent_bytes,
                "collectives": summary(one.collectives),
                "buffers": [dataclasses.asdict(buffer) for buffer in one.buffers[:20]],
            }
            for name, one in programs.items()
        },
        "needed_bytes": phases,
        "update": micro_batch(task, c, layout, programs["update"], chip),
        "does_not_fit": "",
    }
    if chip:
        plan["step_seconds"] = {
            name: work.seconds(chip)
            for name, work in step_work(task, c, layout).items()
        }
        room = chip.hbm_gib * GIB * (1 - HEADROOM)
        plan["hbm_bytes"] = chip.hbm_gib * GIB
        if "decode" in programs:
            plan["sampler"] = cache_that_fits(c, layout, programs, state, room)
        worst = max(phases, key=phases.__getitem__)
        if phases[worst] > room:
            plan["does_not_fit"] = (
                f"{worst} needs {phases[worst] / GIB:.1f} GiB a chip, and {room / GIB:.1f} of "
                f"{chip.hbm_gib} may be used: {advice(worst)}"
            )
    return plan


def advice(program: str) -> str:
    """What would help where this program is the one that does not fit."""
    if program in ("update", "score", "validate"):
        return (
            "raise mesh.fsdp or mesh.tensor, lower micro_rows, or set remat to 'full' or "
            "'offload'"
        )
    return "lower sampler.pool_tokens, or raise mesh.tensor"


def summary(collectives: list[aot.Collective]) -> list[dict[str, Any]]:
    """Sums of those that are alike, the largest first."""
    total: dict[tuple[str, str, int], tuple[float, float]] = {}
    for one in collectives:
        key = one.kind, one.dtype, one.devices
        count, sent = total.get(key, (0, 0.0))
        total[key] = count + one.times, sent + one.sent_bytes
    rows = [
        {"kind": kind, "dtype": dtype, "devices": n, "times": count, "sent_bytes": sent}
        for (kind, dtype, n), (count, sent) in total.items()
    ]
    return sorted(rows, key=lambda row: -row["sent_bytes"])


def micro_batch(
    task: str, c: Any, layout: Layout, update: Program, chip: Chip | None
) -> dict[str, float]:
    """A micro-batch of full rows in the update: operations, bytes that must be sent, and
    that are, and least seconds."""
    row_tokens = c.data.row_tokens if task == "sft" else c.rollout.row_tokens
    rows = c.micro_rows / layout.shards("batch")
    work = roofline.model_of(c, layout).train(rows, row_tokens, row_tokens)
    found = {
        "micro_batch_tokens": c.micro_rows * row_tokens,
        "flops": work.flops,
        "must_send_bytes": work.sent_bytes + work.slice_bytes,
        "sends_bytes": update.sent_bytes,
    }
    if chip:
        found["compute_seconds"] = work.seconds(chip)["compute"]
        found["send_seconds"] = work.seconds(chip)["send"]
    return found


def step_work(task: str, c: Any, layout: Layout) -> dict[str, roofline.Work]:
    """The phases of a step, of a chip; responses have half of their limit."""
    model = roofline.model_of(c, layout)
    if task == "sft":
        T = c.data.row_tokens
        micro = model.train(c.micro_rows / layout.shards("batch"), T, T / 2)
        return {"update": micro * (c.batch_rows / c.micro_rows)}
    r = c.rollout
    return roofline.gppo_step(
        model,
        c.sampler,
        drawn=r.prompts * r.samples_per_prompt,
        used=min(r.max_groups, r.prompts) * r.samples_per_prompt,
        prompt_tokens=PROMPT_TOKENS,
        response_tokens=r.max_new_tokens / 2,
        micro_rows=c.micro_rows,
        row_tokens=r.row_tokens,
    )


def cache_that_fits(
    c: Any, layout: Layout, programs: dict[str, Program], state: int, room: float
) -> dict[str, float]:
    """How large the sampler's cache could be, beside train state and sampling copy."""
    token = roofline.model_of(c, layout).cache_token_bytes
    replicas = layout.shards("batch")
    row = max(row for _, row in sampler_uses(c))
    set_tokens = c.sampler.pool_tokens or c.sampler.num_slots * row
    decode = max(one.memory.peak for n, one in programs.items() if "decode" in n)
    free = room - state - (decode - set_tokens / replicas * token)
    fits = max(int(free / token), 0) * replicas
    return {
        "cache_tokens": set_tokens,
        "cache_tokens_that_fit": fits,
        "full_rows_that_fit": fits // row,
        "row_tokens": row,
        "cache_bytes_a_token": token * layout.shards("kv_heads"),
    }


def sampler_uses(c: Any) -> list[tuple[Sampling, int]]:
    """How a run samples, and up to how many tokens a row; SFT samples to evaluate."""
    if isinstance(c, gppo.GppoConfig):
        return gppo.sampler_uses(c)
    return [(how, c.evaluation.row_tokens) for how in c.evaluation.samplings()]


def tell(plan: dict[str, Any]) -> list[str]:
    """The plan in words."""
    lines = ["", "Needed of a chip, with all that is alive beside the program, GiB:"]
    for name, size in plan["needed_bytes"].items():
        lines.append(f"  {name:18} {size / GIB:7.2f}")
    if "hbm_bytes" in plan:
        lines.append(
            f"  there are {plan['hbm_bytes'] / GIB:.0f}, of which a tenth stays free"
        )
    if found := plan.get("sampler"):
        lines.append(
            f"\nThe sampler's cache holds {found['cache_tokens']:,} tokens; "
            f"{found['cache_tokens_that_fit']:,} would fit: {found['full_rows_that_fit']:,} "
            f"of the longest rows ({found['row_tokens']:,} tokens) at once"
        )
    update = plan["update"]
    lines += [
        f"\nA micro-batch of the update, {update['micro_batch_tokens']:,.0f} tokens, a chip:",
        f"  {update['flops'] / 1e12:,.1f} TFLOP; sends {update['sends_bytes'] / GIB:.2f} GiB, "
        f"must send {update['must_send_bytes'] / GIB:.2f}",
    ]
    if "compute_seconds" in update:
        lines.append(
            f"  at least {update['compute_seconds']:.2f} s to compute, "
            f"{update['send_seconds']:.2f} s to send"
        )
    for row in plan["programs"]["update"]["collectives"][:8]:
        lines.append(
            f"  {row['sent_bytes'] / GIB:8.3f} GiB  {row['times']:5} x {row['kind']} "
            f"{row['dtype']} over {row['devices']}"
        )
    for name, one in plan["programs"].items():
        if name in ("update", "decode") and one["buffers"]:
            lines.append(f"\nThe largest in memory at the peak of {name}, GiB:")
            lines += [
                f"  {row['bytes'] / GIB:7.3f}  {row['array']:28} {row['name']}"
                for row in one["buffers"][:8]
            ]
    if "step_seconds" not in plan:
        lines.append(
            "\nNothing is said of time, nor whether it fits: that is known of TPUs alone "
            "(--topology=v5p:4x4x4)"
        )
    else:
        lines.append("\nA step, with responses of half the limit, takes at least:")
        for name, seconds in plan["step_seconds"].items():
            parts = ", ".join(f"{what} {s:,.1f}" for what, s in seconds.items())
            lines.append(f"  {name:7} {max(seconds.values()):8,.1f} s  ({parts})")
    return lines


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    config.run_main(main)

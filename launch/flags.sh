# shellcheck shell=bash
# The one place for the flags of XLA and libtpu, sourced on the machines that train.
#
# jax 0.10.2 with libtpu 0.0.42, and 0.12.0 with 0.0.50, know all of them. Both end a process
# that is given a flag they do not know, so compile something with a new one before it goes in
# here. Flags that the caller has set come last, and win.

# Not here, because libtpu does it by itself (said explicitly, it compiles the same program):
# the latency hiding scheduler, async collective fusion and its overlap with compute, and,
# between several slices, the overlap of the all-reduces of data parallelism.
tpu_flags() {
  local flags=(
    # The weights of the next matmul are gathered while this one computes. Each flag alone
    # changes nothing; together they make async-collective fusions of the all-gathers.
    --xla_enable_async_all_gather=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
  )
  export LIBTPU_INIT_ARGS="${flags[*]} ${LIBTPU_INIT_ARGS:-}"
}

gpu_flags() {
  local flags=(
    # Collectives run beside compute; off by default on GPUs.
    --xla_gpu_enable_latency_hiding_scheduler=true
  )
  export XLA_FLAGS="${flags[*]} ${XLA_FLAGS:-}"
  # Of a GPU's memory, taken at the start; 0.75 by default. The rest is for NCCL and CUDA.
  # The old name of the variable is an error beside the new one.
  export XLA_CLIENT_MEM_FRACTION=${XLA_CLIENT_MEM_FRACTION:-${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}}
  unset XLA_PYTHON_CLIENT_MEM_FRACTION
}

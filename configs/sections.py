"""Sections that several configs share; each key's unit, choices and source stand here.

Sources: [P] the paper, arXiv 2508.07629; [R] the authors' recipe, in their repository
Kwai-Klear/KlearReasoner recipe/dapo/perf_run_dapo_ours_math.sh and what it calls; [ours].
"""

import dataclasses

import ml_collections
from ml_collections import config_dict

from klear_jax import qwen3


def model(config: qwen3.Config) -> ml_collections.ConfigDict:
    """The section `model`: an architecture, whose fields `qwen3.Config` explains."""
    c = ml_collections.ConfigDict(dataclasses.asdict(config))
    c.yarn = config_dict.placeholder(ml_collections.ConfigDict)  # None, or qwen3.Yarn.
    return c


def mesh(data: int, fsdp: int, tensor: int) -> ml_collections.ConfigDict:
    """The section `mesh`: how many devices each mesh axis has, and what lies on which.

    Args:
        data: replicas of the train state; on several slices, the slices.
        fsdp: shards of the batch and of the train state.
        tensor: shards of heads, MLP and vocabulary; must divide the KV heads.
            One of the three may be -1: all devices that are left.
    """
    c = ml_collections.ConfigDict()
    c.data, c.fsdp, c.tensor = data, fsdp, tensor
    c.rules = ml_collections.ConfigDict()  # Logical axis -> mesh axes; (): not split.
    # Activations.
    c.rules.batch = ("data", "fsdp")
    c.rules.seq = ()
    c.rules.residual = ("tensor",)  # The stream kept between layers for the backward.
    # Weights; heads, kv_heads and mlp also of activations.
    c.rules.layers = ()  # The axis that the scan over layers walks.
    c.rules.embed = ("fsdp",)
    c.rules.vocab = ("tensor",)
    c.rules.heads = ("tensor",)
    c.rules.kv_heads = ("tensor",)
    c.rules.mlp = ("tensor",)
    c.rules.head_dim = ()
    c.rules.norm = ()
    return c


def sampler(
    num_slots: int, page_tokens: int, pool_tokens: int | None, prefill_tokens: int
) -> ml_collections.ConfigDict:
    """The section `sampler`: memory and speed; what is drawn does not depend on it.

    Args:
        num_slots: samples decoded at once, over all devices: a multiple of data x fsdp.
        page_tokens: tokens of a page of the cache of keys and values.
        pool_tokens: of the whole cache, over all devices; a token is 2 x layers x KV heads
            x head_dim numbers. None: num_slots of the longest rows. With less, the
            youngest samples wait when it is full, and start again; metrics count them.
        prefill_tokens: of prompts, computed between two calls of decoding, on each of
            data x fsdp replicas.
    """
    c = ml_collections.ConfigDict()
    c.num_slots = num_slots
    c.page_tokens = page_tokens
    c.pool_tokens = ml_collections.FieldReference(pool_tokens, field_type=int)
    c.prefill_tokens = prefill_tokens
    # Between two words with the host: a sample that meets a stop token keeps its slot for
    # 1 to 2 times as many.
    c.decode_steps = 8  # [ours]
    return c


def rewards(num_workers: int) -> ml_collections.ConfigDict:
    """The section `rewards`, with the authors' values.

    Args:
        num_workers: processes that score, of each process of the run: a host of TPUs, or
            under Slurm a GPU, whose CPUS should then be as many.
    """
    c = ml_collections.ConfigDict()
    # Kinds of reward: a function ('math', 'math_judge' (no tags asked for), 'last_number',
    # 'code', or 'module:function' for one of your own) and its keyword arguments.
    c.kinds = ml_collections.ConfigDict()
    for kind in ("math", "code"):
        c.kinds[kind] = ml_collections.ConfigDict()
        c.kinds[kind].function = kind
        c.kinds[kind].options = ml_collections.ConfigDict()
        c.kinds[kind].options.correct = 1.0  # [R] [P]
        # For code, the reward is as far from here to correct as the share of tests that
        # pass [R]; with 0 it is that share, as [P] says.
        c.kinds[kind].options.wrong = -1.0  # [R]
        c.kinds[kind].options.no_think_end = -0.5  # [R] No </think>: it was cut off.
        c.kinds[kind].options.no_think_start = -2.0  # [R] </think>, but no <think>.
    code = c.kinds.code.options
    code.soft = True  # [P] [R] False: all tests must pass.
    code.max_tests = 16  # [R] Run of those that a problem has; 0: all.
    code.memory_mb = 1024  # [R] MiB, of all processes of a program.
    # What keeps programs away from the host: 'auto' is the best there is, see
    # klear_jax/rewards/sandbox.py.
    code.isolation = "auto"  # [ours]
    # What a row's data_source contains -> its kind.
    c.sources = ml_collections.ConfigDict()
    c.sources.math_longcot_math_verify = "math"  # [R]
    c.sources.coder1_longcot = "code"  # [R]
    c.sources.livecodebench = (
        "code"  # [ours] `klear_jax.data.benchmarks` names them so.
    )
    c.sources.humaneval = "code"  # [ours]
    c.kind = "math"  # Of rows without a data_source.
    c.full_credit = 1.0  # [R] The reward that is right, and positive for the LM loss.
    c.num_workers = num_workers
    # For a response. Above math-verify's own three times 5 s, and 16 tests of up to 35 s.
    c.task_timeout_s = 600.0  # [ours] [R] 500, which 16 hanging tests exceed.
    # For all that is left when decoding ends; what comes later is not trained on.
    c.step_timeout_s = 1800.0  # [ours]
    c.memory_mb = 4096  # [ours] Address space of a worker, MiB.
    return c


def benchmark_kinds() -> ml_collections.ConfigDict:
    """The kinds of reward of an evaluation, which go before those of training: an answer
    wherever it stands, and programs that pass all of their tests; no tags are asked for."""
    c = ml_collections.ConfigDict()
    c.math = ml_collections.ConfigDict()
    c.math.function = "math_judge"  # [R] The whole text.
    c.math.options = ml_collections.ConfigDict()
    c.math.options.correct = 1.0  # [R]
    c.math.options.wrong = -1.0  # [R]
    c.code = rewards(num_workers=1).kinds.code  # [R] As in training, but for:
    c.code.function = "code_judge"  # [ours] The last program behind the thinking.
    del c.code.options.no_think_end, c.code.options.no_think_start
    c.code.options.soft = False  # [P] pass@1.
    c.code.options.max_tests = 0  # [P] All that a problem has.
    return c


def gppo_loss() -> ml_collections.ConfigDict:
    """The section `loss`: GPPO (Eq. 11) and the LM loss on positive samples (Eq. 14)."""
    c = ml_collections.ConfigDict()
    c.kind = "gppo"  # 'gppo', 'gppo_only_high', 'clip_higher' or 'cispo'.
    c.clip_low = 0.2  # [R] epsilon_l: the ratio is clipped at 0.8,
    c.clip_high = 0.28  # [P] [R] epsilon_h: and at 1.28.
    # What is kept of the gradient beyond each bound; (0.25, 1) is CE-GPPO.
    c.beta_low, c.beta_high = 1.0, 1.0  # [P] Eq. 11; Eq. 17 names them.
    # The most a ratio counts where A < 0; a float from 1, or None: off, as [P].
    c.dual_clip = ml_collections.FieldReference(10.0)  # [R] Metrics count such tokens.
    # What is kept of the gradient beyond it: 0 none, 1 that at the bound, as GPPO elsewhere.
    c.beta_dual = 0.0  # [R]
    # 'token_mean' is over the whole mini-batch, where Eq. 11 averages per prompt, as does
    # 'group_mean_token_mean', and [R] per micro-batch. Others: 'seq_mean_token_mean', close
    # to what [R] does in effect, 'seq_mean_token_sum', 'seq_mean_token_sum_norm'.
    c.aggregation = "token_mean"  # [ours] What DAPO and the name in [R] mean.
    # Old log-probs from the 'trainer', which takes a pass over all samples, or as the
    # 'sampler' had them; the gap between the two is measured with the former.
    c.old_logp = "trainer"  # [R]
    c.positive_coef = 0.1  # [P] [R] alpha of Eq. 14, best in Table 6; 0: off.
    return c


def checkpoint(every: int, keep: int) -> ml_collections.ConfigDict:
    """The section `checkpoint`: of 12 bytes a parameter each, in the workdir.

    Args:
        every: steps of the loop between two; the last step is always saved.
        keep: the newest ones kept. With 2, there is one before the newest if that is damaged.
    """
    c = ml_collections.ConfigDict()
    c.every = every
    c.keep = keep
    # A metric, such as 'eval/accuracy': the checkpoint where it was highest is kept as well.
    c.keep_best = ""  # [ours] '': none.
    # A preempted run (SIGTERM, or Ctrl-C) saves within so many seconds, in the middle of a
    # step, too, or ends without. A spot TPU goes 30 s after it is told.
    c.grace_s = 25.0  # [ours]
    return c


def sft_guards() -> ml_collections.ConfigDict:
    """The section `guards`: what is watched in the metrics of each step."""
    c = ml_collections.ConfigDict()
    # An update whose loss or gradient is no number: 'stop' the run, or 'skip' it; either way
    # it changes nothing, and the first such batch is saved.
    c.not_finite = "stop"  # [ours]
    # Beyond them the run warns; what is not named is not watched.
    c.limits = ml_collections.ConfigDict()
    c.limits.grad_norm = 100.0  # [ours] Before it is clipped.
    # Names of limits that end the run, with exit code 3.
    c.stop = ()  # [ours] A warning is no reason to lose a night.
    return c


def gppo_guards() -> ml_collections.ConfigDict:
    """The section `guards`, with those of sampling; `klear_jax/guards.py` has the metrics,
    and what to look at."""
    c = sft_guards()
    # Mean |trainer's - sampler's log-prob|, nats. bfloat16 gives a few thousandths.
    c.limits.logprob_gap = 0.03  # [ours]
    # |log-ratio| of all but 1% at each end, in the first mini-batch of a step that has no tokens
    # of an earlier policy.
    c.limits.first_ratio = 0.05  # [ours]
    c.limits.entropy = 0.01  # [ours] Nats a token; less is a collapse.
    c.limits.equal_rewards = 0.95  # [ours] Share of groups, before the filter.
    c.limits.truncated = 0.5  # [ours] Share of samples.
    return c


def source(path: str, shape: str) -> ml_collections.ConfigDict:
    """A source of `configs/data/`: files of one origin.

    Args:
        path: of a file, or a pattern of several; several with commas. JSON lines, plain,
            .gz or .zst, or .parquet.
        shape: of its rows, a key of `klear_jax.data.rows.SHAPES`: 'any', 'prompt_response',
            'messages', 'sharegpt', 'openthoughts', 'openthoughts_metadata', 'klear_rl' or
            'benchmark'.
    """
    c = ml_collections.ConfigDict()
    c.path = path
    c.shape = shape
    # What stands elsewhere than the shape says: prompt, response, thinking, answer,
    # data_source, system -> a key such as 'meta.answer', or several with | between.
    c.fields = ml_collections.ConfigDict()
    c.weight = 1.0  # [ours] How often an epoch of SFT goes through it.
    return c


# [ours] How AIME asks for a number.
STOCK_PHRASES = (
    "where m and n are relatively prime positive integers",
    "m and n are relatively prime positive integers find m n",
    "where p and q are relatively prime",
    "can be written as frac m n",
    "can be expressed as frac m n",
    "is frac m n",
    "is tfrac m n",
    "is not divisible by the square of any prime",
    "find the remainder when n is divided by 1000",
)


def clean() -> ml_collections.ConfigDict:
    """The section `clean` of `configs/data/`: what a row must be, by itself."""
    c = ml_collections.ConfigDict()
    # 'required': one <think>...</think> before an answer; 'any': as it is.
    c.think = "required"  # [ours]
    c.max_prompt_tokens = 0  # [R] Drops no prompt; 0: any number.
    c.max_tokens = 0  # [ours] Of prompt and response; 0: any number.
    c.min_tests = 0  # [ours] Of a code problem; 0: any number.
    # Files of benchmark problems; prompts that share ngram words in a row are dropped.
    c.benchmarks = (
        "raw/aime24.qs.jsonl",
        "raw/aime25.qs.jsonl",
        "raw/HMMT-202502.jsonl",
    )  # [P]
    c.ngram = 9  # [P] Words: letters and digits, case and punctuation aside.
    # Phrases that many problems share: cut out before looking. The report shows what is hit;
    # STOCK_PHRASES are those of AIME, for which a third of its own problems hit each other.
    c.allowed = ()  # [P] None are mentioned.
    c.max_bad_share = (
        0.01  # [ours] Of a source's rows; more that cannot be read: an error.
    )
    return c


def choose() -> ml_collections.ConfigDict:
    """The section `choose` of `configs/data/`: what is taken of the clean rows, looking at
    all. Exact duplicates never are."""
    c = ml_collections.ConfigDict()
    # Score responses that have an answer, as `rewards` says.
    c.judge = False  # [P] No correctness filter.
    c.only_right = False  # [P] Only responses that are right.
    # Files of `evaluate --samples`: the share of right samples of each prompt. Otherwise
    # it is that of the judged responses.
    c.pass_rates = ()
    c.pass_rate_above = config_dict.placeholder(float)  # None: any.
    c.pass_rate_below = config_dict.placeholder(float)  # None: any.
    # A pass rate above makes a prompt easy: splits train_easy, train_hard. None: one split.
    c.easy_above = config_dict.placeholder(float)
    c.responses_per_prompt = 0  # [ours] The first ones of each prompt; 0: all.
    c.validation_percent = (
        0.0  # [ours] Of the prompts, by a hash; they go into `validation`.
    )
    return c

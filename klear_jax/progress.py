"""What a run shows while it runs: how far it is, what it does and waits for; where the time
goes; and a profile of given steps."""

import contextlib
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

import jax
import tqdm
from etils import epath

from klear_jax import hosts
from klear_jax.errors import InputError

LINE_S = 60  # Between two lines, where standard error is no terminal.
REFRESH_S = 0.2  # Between two changes of the bar.


class Progress:
    """The steps of a run: a context manager whose `steps` are walked through.

    On a terminal there is a bar with the time left and what is under way; in a log, a line of
    the same every LINE_S, and at the end. Of several processes, the first shows it.
    """

    def __init__(
        self,
        name: str,
        first: int,
        total: int,
        trace: "Trace | None" = None,
        *,
        unit: str = "step",
    ):
        """
        Args:
            first: the first step to do; those before it are done.
            total: the steps of the whole run.
            unit: what is counted.
        """
        self._name, self._first, self._total, self._unit = name, first, total, unit
        self._trace = trace or Trace("", None)
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            desc=name,
            initial=first,
            total=total,
            unit=unit,
            disable=not (hosts.first() and self._terminal),
            dynamic_ncols=True,
        )
        self._start, self._shown = time.monotonic(), -math.inf
        self._lap = time.perf_counter()
        self._done, self._result, self._doing = first, "", ""
        self._seconds: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._trace.close()
        if hosts.first() and not self._terminal:
            self._show()
        self._bar.close()

    def steps(self) -> Iterator[int]:
        for step in range(self._first, self._total):
            self._trace.begin(step)
            with jax.profiler.StepTraceAnnotation(self._name, step_num=step):
                yield step
            self.advance()

    def advance(self) -> None:
        self._done += 1
        self._bar.update()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of a step, whose seconds count."""
        self.tell(name)
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(name):
            yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def tell(self, doing: str) -> None:
        """What is under way now, and what it waits for."""
        self._doing = doing
        wait_s = REFRESH_S if self._terminal else LINE_S
        if hosts.first() and time.monotonic() - self._shown >= wait_s:
            self._shown = time.monotonic()
            self._show()

    def result(self, **values: float) -> None:
        """What the last step was like."""
        self._result = ", ".join(f"{name} {x:.3g}" for name, x in values.items())

    def lap(self) -> dict[str, float]:
        """{'seconds/PHASE': ..., 'seconds/step': all since the last lap}."""
        now = time.perf_counter()
        seconds = {f"seconds/{name}": s for name, s in self._seconds.items()}
        seconds["seconds/step"] = now - self._lap
        self._lap, self._seconds = now, {}
        return seconds

    def _show(self) -> None:
        text = " | ".join(part for part in (self._result, self._doing) if part)
        if self._terminal:
            self._bar.set_postfix_str(text)
            return
        meter = tqdm.tqdm.format_meter(
            self._done,
            self._total,
            time.monotonic() - self._start,
            initial=self._first,
            prefix=self._name,
            unit=self._unit,
            postfix=text,
            bar_format="{desc}: {n} of {total}, {remaining} left, {rate_fmt}{postfix}",
        )
        print(meter, file=sys.stderr, flush=True)


class Trace:
    """JAX's profile of some steps, in `profile/` of the workdir, for XProf or TensorBoard."""

    def __init__(self, workdir: str | epath.Path, steps: tuple[int, int] | None):
        """
        Args:
            steps: the first and the last; None: none.
        """
        self._steps = steps if hosts.first() else None
        self._target = epath.Path(workdir) / "profile"
        self._folder: str | None = None  # Where it is written, while it is.

    def begin(self, step: int) -> None:
        """Before each step."""
        if self._steps is None:
            return
        first, last = self._steps
        if step > last:
            self.close()
        elif step >= first and self._folder is None:
            self._folder = tempfile.mkdtemp()
            jax.profiler.start_trace(self._folder)

    def close(self) -> None:
        if self._folder is None:
            return
        jax.profiler.stop_trace()
        for root, _, names in os.walk(self._folder):
            inside = self._target / os.path.relpath(root, self._folder)
            for name in names:
                inside.mkdir(parents=True, exist_ok=True)
                epath.Path(root, name).copy(inside / name, overwrite=True)
        shutil.rmtree(self._folder)
        self._folder = None


def parse_steps(text: str | None) -> tuple[int, int] | None:
    """'12' or '12-14' -> (first, last); None stays."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if last < first:
        raise InputError(
            f"--profile={text} must be a step or the first and last of some, such as 10 or 10-12"
        )
    return first, last

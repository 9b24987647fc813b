"""The programs of a run: the step, compiled for each set of losses that are awake together.

Short runs raise some losses late (`weight` as a ramp from zero). Until then their passes would take
time and change nothing, so the step is compiled without them as well.
"""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable

import jax

from tips_jax.runtime import compile_cache, memory
from tips_jax.train import lowering, summary
from tips_jax.train.method import Method, awake, only
from tips_jax.train.step import Step

Names = tuple[str, ...]  # of the losses that are awake


@dataclasses.dataclass(frozen=True)
class Program:
  """The compiled step of a method, and its FLOPs per image (summary.flops)."""

  step: Step
  flops: float


@dataclasses.dataclass(frozen=True)
class Programs:
  """Which program makes which step."""

  method: Method
  programs: dict[Names, Program]
  compile_seconds: float

  def at(self, step: int) -> Program:
    """The program that makes the update after `step` of them."""
    return self.programs[awake(self.method, step)]


def compile_all(
  method: Method, mesh: jax.sharding.Mesh, first: int, say: Callable[[str], None]
) -> Programs:
  """Compiles what a run needs from step `first` on, and tells how long it took. All before the
  first step: what does not fit or cannot be compiled is known then.
  """
  hits = compile_cache.hits()
  begin = time.monotonic()
  steps = range(first, method.config.schedule.total_steps)
  found = dict.fromkeys(awake(method, step) for step in steps)
  lowered = {names: lowering.lower(method, mesh, names) for names in found}
  traced_s = time.monotonic() - begin
  # In threads, so that a signal is heard meanwhile. Their pool is never shut down: leaving the
  # process must not wait for the compiler.
  pool = concurrent.futures.ThreadPoolExecutor(len(found), 'compile')
  futures = {names: pool.submit(lowering.compiled, low) for names, low in lowered.items()}
  while not all(future.done() for future in futures.values()):
    concurrent.futures.wait(futures.values(), timeout=0.2)
  seconds = time.monotonic() - begin
  how = 'compiled'
  if compile_cache.hits() > hits:
    how = 'read from the cache'
  say(f'compiled in {seconds:.1f} s: traced in {traced_s:.1f} s, then {how}')
  programs = {}
  for names, future in futures.items():
    flops = sum(summary.flops(only(method, names)).values())
    programs[names] = Program(memory.checked(future.result()), flops)
  return Programs(method, programs, seconds)

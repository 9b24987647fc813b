"""How fast a run is: images/s, the share of time spent waiting for data, model FLOP utilization,
and goodput: the share of all its time, over all its starts, that went into steps that count.
"""

import time
from typing import Any, Callable

import jax

from tips_jax.core import chips


class Clock:
  """Rates since the last time they were asked for, and goodput since the first start of the run."""

  def __init__(self, mesh: jax.sharding.Mesh):
    peak = chips.peak(jax.devices()[0].device_kind)
    # None for a chip whose peak is unknown.
    self._peak = peak and peak * mesh.size
    # Of time.time(), which other starts know too.
    self._first_start = time.time()
    self._trained = 0.0
    self.restart()

  def resume(self, lines: list[dict], step: int) -> None:
    """Goes on at `step` with the times in `lines` of metrics.jsonl, those of later steps too.

    Steps since the last line up to `step` count as long as those before took in the mean. A first
    start that ended before its first line is not known: its time does not count as lost.
    """
    for line in lines:
      if 'goodput' not in line:
        continue
      self._first_start = line['time'] - line['run_seconds']
      if line['step'] <= step:
        self._trained = line['goodput'] * line['run_seconds'] * step / line['step']

  def restart(self) -> None:
    """Leaves out what was before: an evaluation, a save."""
    self._read = time.monotonic()
    self._open()

  def _open(self):
    """Begins to measure rates."""
    self._begin = time.monotonic()
    self._waited = 0.0
    self._steps = 0
    self._flops = 0.0

  def waiting(self, next_batch: Callable[[], Any]) -> Any:
    """Calls a function for which the step has to wait."""
    begin = time.monotonic()
    result = next_batch()
    self._waited += time.monotonic() - begin
    return result

  def finished(self, flops: float) -> None:
    """Counts a step whose outcome is read, of so many FLOPs an image: others may be under way when
    rates are asked for.
    """
    self._steps += 1
    self._flops += flops
    now = time.monotonic()
    self._trained += now - self._read
    self._read = now

  def rates(self, batch_size: int) -> dict[str, float]:
    """images_per_s, the share of time that data made the step wait, and model FLOP utilization
    where the chip's peak is known.
    """
    passed = max(time.monotonic() - self._begin, 1e-9)
    rates = {
      'images_per_s': self._steps * batch_size / passed,
      'data_wait': self._waited / passed,
    }
    if self._peak:
      rates['model_flop_utilization'] = self._flops * batch_size / passed / self._peak
    self._open()
    return rates

  def goodput(self) -> dict[str, float]:
    """goodput: the share of `run_seconds`, the time since the first start, in which steps were made
    that count. The rest: opening and compiling, evaluations, waiting for saves, the time between
    two starts, and steps made again. time: now, in seconds since 1970.
    """
    now = time.time()
    passed = max(now - self._first_start, 1e-9)
    return {'goodput': self._trained / passed, 'run_seconds': passed, 'time': now}

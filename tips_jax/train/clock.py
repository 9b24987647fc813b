"""How fast a run is: images/s, the share of time spent waiting for data, model FLOP utilization."""

import time
from typing import Any, Callable

import jax

from tips_jax.core import chips


class Clock:
  """Rates since the last time they were asked for."""

  def __init__(self, mesh: jax.sharding.Mesh):
    peak = chips.peak(jax.devices()[0].device_kind)
    # None for a chip whose peak is unknown.
    self._peak = peak and peak * mesh.size
    self.restart()

  def restart(self) -> None:
    """Leaves out what was before, such as an evaluation."""
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
    self.restart()
    return rates

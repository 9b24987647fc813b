"""Pictures of the examples of a Result, for TaskSpec.draw: PNG bytes, or None without examples."""

from tips_jax.evals.tasks.spec import Result


def classified(result: Result) -> bytes | None:
  return _plotting().classified(result)


def depths(result: Result) -> bytes | None:
  return _plotting().depths(result)


def normals(result: Result) -> bytes | None:
  return _plotting().normals(result)


def retrieved(result: Result) -> bytes | None:
  return _plotting().retrieved(result)


def segmented(result: Result) -> bytes | None:
  return _plotting().segmented(result)


def overlaid(result: Result) -> bytes | None:
  return _plotting().segmented(result, overlay=True)


def _plotting():
  # Only now: matplotlib is slow to import, and a training run draws once, at its end.
  from tips_jax.evals.report import plotting

  return plotting

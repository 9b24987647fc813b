"""Tasks through Apache Beam: on Dataflow, Flink or Spark, or by its local runners."""

import re
from collections.abc import Callable, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.tasks import Tasks

_OURS = re.compile(r'InputError: ([^\n]*)')


def do(
  open_work: Callable[[], Tasks], numbers: Sequence[int], *, runner: str, options: Sequence[str]
) -> None:
  """Does the tasks `numbers`. Where they run this package is installed, and the input and the
  folder of the store have the same paths.

  runner: its name, as DirectRunner; options: those of Beam, as 'project=P'. Raises InputError for
  one of a task, and where Beam is not installed.
  """
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise InputError(
      f"--runner: Apache Beam is not installed ({error}); expected pip install 'tips_jax[beam]'"
    ) from error

  class Do(beam.DoFn):
    """Each process opens the work once."""

    def setup(self):
      self._work = open_work()
      self._images = beam.metrics.Metrics.counter('tasks', 'images')

    def process(self, number):
      self._work.do(number, lambda images, size: self._images.inc(images))

  flags = [f'--runner={runner}', *(f'--{option}' for option in options)]
  try:
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
      pipeline | beam.Create(numbers) | beam.Reshuffle() | beam.ParDo(Do())
  except Exception as error:  # of any kind and with the text of the first one inside
    found = _OURS.search(str(error))
    if found:
      raise InputError(found[1]) from error
    raise

"""Tasks, each a range of an input, which any process does once; a folder holds what is done.

The tasks follow from the input and the settings alone, and so does every byte that they write:
whoever does them, in which order, and how often they are killed, the result is the same. A task is
done when its result is there, which is written last.
"""

import hashlib
import json
import os
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence

import tips_jax
from tips_jax.core import files
from tips_jax.core.errors import InputError
from tips_jax.data.ingest.reader import Piece, Reader

FOLDER = 'tasks'
# Bytes of the input that a task reads: what a kill costs, and what a shard of the store holds.
_TASKS = 64  # of a data set between the two bounds
_LEAST = 32 * 2**20
_MOST = 2**30

# Called with the images and the bytes of the input that were read since the last call.
Tell = Callable[[int, float], None]


class Task(typing.NamedTuple):
  """Consecutive pieces of a split's input."""

  split: str
  pieces: tuple[Piece, ...]

  @property
  def size(self) -> int:
    """Bytes of the input, about."""
    return sum(piece.size for piece in self.pieces)


class Tasks:
  """The tasks of a program, and what is done of them in a folder."""

  def __init__(self, tasks: Sequence[Task], folder: pathlib.Path, prefix: str = ''):
    """prefix: of the names of its files, where a folder has several kinds of tasks."""
    self.tasks = tasks
    self.folder = folder
    self._prefix = prefix

  def do(self, number: int, tell: Tell, *, threads: int = 1) -> None:
    """Does a task. threads: that decode images."""
    raise NotImplementedError

  def images_read(self, number: int) -> int:
    """How many images a task that is done has read."""
    raise NotImplementedError

  def settings_of_input(self) -> Mapping[str, typing.Any]:
    """On what the tasks depend, beside their pieces and the version; JSON-able."""
    raise NotImplementedError

  def begin(self) -> None:
    """Begins in an empty folder, or goes on in that of the same input and settings; InputError for
    another's.
    """
    (self.folder / FOLDER).mkdir(parents=True, exist_ok=True)
    path = self.folder / FOLDER / f'{self._prefix}plan.json'
    plan = json.loads(json.dumps(self._plan()))
    try:
      files.write(path, json.dumps(plan, indent=1), replace=False)
    except FileExistsError:
      begun = json.loads(path.read_text())
      for name, value in plan.items():
        if begun.get(name) != value:
          raise InputError(
            f'{str(self.folder)!r} was begun with {name} {begun.get(name)!r}; got {value!r}; '
            f'expected the same command, or remove the folder to begin anew'
          ) from None

  def _plan(self):
    pieces = hashlib.sha256()
    for task in self.tasks:
      for piece in task.pieces:
        piece = piece._replace(file=os.path.basename(piece.file))
        pieces.update(repr((task.split, *piece)).encode())
    settings = self.settings_of_input()
    return {'version': tips_jax.__version__, **settings, 'files': pieces.hexdigest()}

  def missing(self) -> list[int]:
    """The numbers of the tasks that are not done."""
    done = set(os.listdir(self.folder / FOLDER))
    return [i for i in range(len(self.tasks)) if os.path.basename(self.result_path(i)) not in done]

  def path(self, number: int, name: str) -> str:
    """Where a file of a task is."""
    return str(self.folder / FOLDER / f'{self._prefix}{number:06d}.{name}')

  def result_path(self, number: int) -> str:
    return self.path(number, 'json')

  def write_result(self, number: int, content: typing.Any) -> None:
    """Writes that a task is done: when all else of it is there."""
    files.write(self.result_path(number), json.dumps(content))

  def load_result(self, number: int) -> typing.Any:
    """What `write_result` was given."""
    return json.loads(pathlib.Path(self.result_path(number)).read_text())


def cut(readers: Mapping[str, Reader], size: int, limit: int = 0) -> list[Task]:
  """The tasks of an input. size: bytes of a task; 0: by that of the input. limit: images of each
  split; 0: all.
  """
  if not size:
    total = sum(reader.size for reader in readers.values())
    size = min(max(total // _TASKS, _LEAST), _MOST)
  tasks = []
  for split, reader in readers.items():
    pieces = []
    taken = 0
    for piece in reader.pieces(size):
      # What is read of a limited input is known only while it is read: one task.
      if pieces and taken + piece.size / 2 > size and not limit:
        tasks.append(Task(split, tuple(pieces)))
        pieces = []
        taken = 0
      pieces.append(piece)
      taken += piece.size
    if pieces:
      tasks.append(Task(split, tuple(pieces)))
  return tasks

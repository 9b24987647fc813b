"""What the readers of public benchmarks have in common: samples by number, files that can be
counted before a run.

A reader lists its split from the official files alone (fast, no image is opened) and reads a sample
when it is asked for one. A sample whose image or annotation is not there has no image, and its
`problem` names the file.
"""

import abc
import io
import json
import os
import pathlib
import tempfile

import numpy as np
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data.ingest.reader import Options, Reader, Sample

VOID = 255  # in a mask: a pixel without class
PAGE = 'docs/datasets.md'


class Benchmark(Reader, abc.ABC):
  """One split of a benchmark: iterate it, or read `reader[i]`; `len` is the number of samples it
  names.

  `name`: of the data set; `folders`: where it may lie in the data folder, most usual first;
  `official`: the split names of the house -> what the data set calls them; `mask_classes`: names of
  the mask's class ids.
  """

  name = ''
  folders = ()
  official = {}
  mask_classes = ()

  def __init__(self, data_dir, split):
    if split not in self.official:
      raise unknown(f'{self.name}: split', split, self.official)
    super().__init__(Options(split=split))
    self.kind = f'benchmark {self.name}'
    self.split = split
    self.root = self._root(pathlib.Path(data_dir).expanduser())
    self.items = self._list(self.official[split])
    if not self.items:
      raise InputError(
        f'{self.name}: missing split {split!r}: {self.root} names no sample of it; see {PAGE}'
      )
    self.total = len(self.items)

  def _root(self, data_dir):
    for folder in self.folders:
      if (data_dir / folder).is_dir():
        return data_dir / folder
    raise InputError(
      f'{self.name}: missing data set: {data_dir} has no folder {self.folders[0]!r}; see {PAGE}'
    )

  @abc.abstractmethod
  def _list(self, split):
    """The light-weight items of a split, by its official name; InputError where the split is not
    there.
    """

  @abc.abstractmethod
  def _files(self, item):
    """Paths of the files that make an item."""

  @abc.abstractmethod
  def _sample(self, item):
    """The Sample of an item."""

  def __len__(self):
    return len(self.items)

  def __getitem__(self, index):
    item = self.items[index]
    try:
      return self._sample(item)
    except FileNotFoundError as error:
      return Sample(self._key(item), None, '', [], {}, f'no such file: {error.filename}')
    except (OSError, ValueError, KeyError) as error:
      return Sample(self._key(item), None, '', [], {}, f'{type(error).__name__}: {error}')

  def __iter__(self):
    return (self[i] for i in range(len(self)))

  def _key(self, item):
    return os.path.basename(str(self._files(item)[0]))

  def captions_of(self, item):
    """The captions of an item without opening its image; None where the data set has none."""
    return None

  def missing(self):
    """Files that items name and that are not there. Lists folders rather than asking for file after
    file.
    """
    names, gone = {}, []
    for item in self.items:
      for path in map(str, self._files(item)):
        folder, name = os.path.split(path)
        if folder not in names:
          names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in names[folder]:
          gone.append(path)
    return gone

  @property
  def annotations_file(self):
    """An annotations.json with the classes of the mask, as `convert` copies it; '' without a mask."""
    if not self.mask_classes:
      return ''
    if not hasattr(self, '_annotations_json'):
      self._annotations_json = tempfile.NamedTemporaryFile(
        'w', suffix='.json'
      )  # lives as long as the reader
      json.dump({'mask_classes': list(self.mask_classes)}, self._annotations_json)
      self._annotations_json.flush()
    return self._annotations_json.name

  def _lines(self, path):
    """The lines of a file that lists a split, without empty ones."""
    return [line.strip() for line in self._text(path).splitlines() if line.strip()]

  def _json(self, path):
    return self._parsed(path, self._text(path))

  def _json_lines(self, path):
    return [self._parsed(path, line) for line in self._lines(path)]

  def _parsed(self, path, text):
    try:
      return json.loads(text)
    except ValueError as error:
      raise InputError(f'{self.name}: {path} is not JSON ({error}); copy it again') from error

  def _text(self, path):
    try:
      return path.read_text(encoding='utf-8-sig')
    except FileNotFoundError as error:
      raise InputError(
        f'{self.name}: missing split {self.split!r}: no file {path}; see {PAGE}'
      ) from error
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(
        f'{self.name}: split {self.split!r}: cannot read {path} ({error}); copy it again'
      ) from error


def names_in(folder, *suffixes):
  """Sorted file names of a folder with one of the suffixes (any case); [] where there is no such
  folder.
  """
  if not folder.is_dir():
    return []
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.name.lower().endswith(suffixes))


def class_ids(data, table=None):
  """A PNG of uint8 class ids from an encoded mask (gray or palette), through `table` (uint8 [256])
  where given.

  Raises ValueError for a mask in colors or of 16 bits: its values are no class ids.
  """
  mask = Image.open(io.BytesIO(data))
  if mask.mode not in ('L', 'P'):
    raise ValueError(f'mask: got mode {mask.mode}; expected class ids in a gray or palette PNG')
  if mask.mode == 'L' and mask.format == 'PNG' and table is None:
    return data
  ids = np.asarray(mask)
  return png(ids if table is None else table[ids])


def png(array):
  """An encoded PNG of uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W]."""
  out = io.BytesIO()
  Image.fromarray(array).save(out, 'png', compress_level=1)
  return out.getvalue()


def millimeters(meters):
  """Depth in meters [H, W] as uint16 millimeters; 0 stays 'missing', and so does what is not finite
  or too far.
  """
  depth = np.asarray(meters, np.float64) * 1000
  depth = np.where(np.isfinite(depth) & (depth > 0) & (depth < 65_535), depth, 0)
  return np.round(depth).astype(np.uint16)


def encode_normals(normals, valid):
  """Unit normals [H, W, 3] as uint8 n * 127.5 + 127.5; (0, 0, 0) where not valid [H, W]."""
  code = np.round(np.asarray(normals, np.float64) * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
  return np.where(np.asarray(valid)[..., None], code, np.uint8(0))


def normals_from_depth(depth, focal, *, center=(0.0, 0.0), step=1, jump=None, missing=None):
  """Normals [H, W, 3] and where they are valid [H, W], from depth [H, W] (any unit; 0 is missing).

  Cross product of the central differences over `step` pixels to each side of the back-projected
  pixels; `focal` and `center` (x, y) in pixels. A pixel that touches a hole is invalid, and with
  `jump` so is one whose neighbor's depth differs by more than that share for each pixel of
  distance. With `missing`, holes count as that far away and only
  their own pixels are invalid: Probe3D's `compute_normal`. House axes: x right, y up, z toward the
  viewer.
  """
  known = np.asarray(depth) > 0
  z = np.where(known, depth, 0 if missing is None else missing).astype(np.float64)
  rows, columns = np.mgrid[: z.shape[0], : z.shape[1]] + 0.5
  points = np.stack([(columns - center[0]) * z / focal, (rows - center[1]) * z / focal, z], -1)
  normals, valid = np.zeros(points.shape), np.zeros(z.shape, bool)
  here = slice(step, -step)
  right, left = np.s_[here, 2 * step :], np.s_[here, : -2 * step]
  below, above = np.s_[2 * step :, here], np.s_[: -2 * step, here]
  away = np.cross(
    points[right] - points[left], points[below] - points[above]
  )  # camera axes: x right, y down, z ahead
  length = np.linalg.norm(away, axis=-1)
  good = (length > 1e-12) & known[here, here]
  for side in (right, left, below, above):
    if missing is None:
      good &= known[side]
    if jump is not None:
      good &= np.abs(z[side] - z[here, here]) <= jump * step * z[here, here]
  normals[here, here] = away / np.maximum(length, 1e-12)[..., None] * (-1, 1, 1)
  valid[here, here] = good
  return normals, valid

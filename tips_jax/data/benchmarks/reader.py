"""The base class of benchmark readers, and what they share: masks, depth and normals.

A reader lists its split from the official index files alone (fast: no image is opened) and reads a
sample on demand. A sample with a missing image or annotation has no image, and its `problem` names
the file.
"""

import abc
import functools
import json
import os
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.data.ingest.checks import open_mask
from tips_jax.data.ingest.checks import png as encode_png
from tips_jax.data.ingest.reader import Options, Piece, Reader, Sample, parse_json, ranges

PAGE = 'docs/datasets.md'
_BYTES = 2**16  # of an item, where no file is opened to know it


class Benchmark(Reader, abc.ABC):
  """One split of a benchmark: iterate it, or read `reader[i]`; `len` is its number of samples.

  What an item is (a path, a row of a table) is the business of the subclass.
  """

  name = ''  # of the data set
  folders: tuple[str, ...] = ()  # below the data folder, where it may be; the usual one first
  official: Mapping[str, typing.Any] = {}  # our split names -> what the data set calls them
  mask_classes: tuple[str, ...] = ()  # names of the mask's class ids

  def __init__(self, data_dir: str | pathlib.Path, split: str):
    if split not in self.official:
      raise unknown(f'{self.name}: split', split, self.official)
    super().__init__(Options(split=split))
    self.kind = f'benchmark {self.name}'
    self.split = split
    self.root = self._root(pathlib.Path(data_dir).expanduser())
    try:
      self.items = self._list(self.official[split])
    except InputError:
      raise
    except Exception as error:  # an index file that is not as it was published: of other types
      raise InputError(
        f'{self.name}: split {split!r}: an index file in {self.root} is damaged or another than '
        f'the published one ({type(error).__name__}: {error}); copy it again; see {PAGE}'
      ) from error
    if not self.items:
      raise self._missing_split(f'{self.root} names no sample of it')
    self.total = len(self.items)
    self.size = self.total * _BYTES

  def __getstate__(self):
    """Without cached properties: they hold open files, which a worker process must open anew."""
    cached = functools.cached_property
    return {
      name: value
      for name, value in vars(self).items()
      if not isinstance(getattr(type(self), name, None), cached)
    }

  def _root(self, data_dir: pathlib.Path) -> pathlib.Path:
    for folder in self.folders:
      if (data_dir / folder).is_dir():
        return data_dir / folder
    raise InputError(
      f'{self.name}: missing data set: {data_dir} has no folder {self.folders[0]!r}; see {PAGE}'
    )

  def _missing_split(self, why: str) -> InputError:
    return InputError(f'{self.name}: missing split {self.split!r}: {why}; see {PAGE}')

  @abc.abstractmethod
  def _list(self, split: typing.Any) -> Sequence:
    """The light-weight items of a split, by its official name; InputError if it is missing."""

  @abc.abstractmethod
  def files_of(self, item: typing.Any) -> Sequence[pathlib.Path | str]:
    """Paths of the files that make an item, the image first."""

  def _sample(self, item):
    captions = [text for text in self.captions_of(item) or () if text]
    return Sample(self.key_of(item), self._image(item), '', captions, self._extra(item))

  def _image(self, item):
    return self.files_of(item)[0].read_bytes()

  def _extra(self, item):
    """The annotations of an item."""
    return {}

  def __len__(self) -> int:
    return len(self.items)

  def __getitem__(self, index: int) -> Sample:
    item = self.items[index]
    try:
      return self._sample(item)
    # No sample can be read: a package is missing, or the file of all of them, or memory ran out.
    except (InputError, MemoryError):
      raise
    except FileNotFoundError as error:
      problem = f'no such file: {error.filename}'
    # One bad sample is counted and left out; decoders and archives raise a dozen kinds.
    except Exception as error:
      problem = f'{type(error).__name__}: {error}'
    return Sample(self.key_of(item), None, '', [], {}, problem)

  def pieces(self, size: int) -> Sequence[Piece]:
    return ranges(len(self), size, self.size)

  def read(self, piece: Piece) -> Iterator[Sample]:
    for i in range(piece.first, piece.stop):
      yield self[i]

  def key_of(self, item: typing.Any) -> str:
    """The key of an item's sample."""
    return pathlib.Path(self.files_of(item)[0]).name

  def captions_of(self, item: typing.Any) -> list[str] | None:
    """The captions of an item without opening its image; None where the data set has none."""
    return None

  def missing(self) -> list[str]:
    """The files that items name and that do not exist."""
    # A listing per folder: on network file systems far faster than one stat per file.
    listed = {}
    missing = []
    for item in self.items:
      for path in map(str, self.files_of(item)):
        folder, name = os.path.split(path)
        if folder not in listed:
          listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
          missing.append(path)
    return missing

  @property
  def annotations_json(self) -> bytes:
    """The classes of the mask, as `convert` writes them; b'' without a mask."""
    if not self.mask_classes:
      return b''
    return json.dumps({'mask_classes': list(self.mask_classes)}).encode()

  def _lines(self, path):
    """The lines of a file that lists a split, without empty ones."""
    return [line.strip() for line in self._text(path).splitlines() if line.strip()]

  def _json(self, path):
    return parse_json(self._text(path), f'{self.name}: {path}')

  def _json_lines(self, path):
    return [parse_json(line, f'{self.name}: {path}') for line in self._lines(path)]

  def _text(self, path):
    try:
      return path.read_text(encoding='utf-8-sig')
    except FileNotFoundError as error:
      raise self._missing_split(f'no file {path}') from error
    except (OSError, UnicodeDecodeError) as error:
      raise InputError(
        f'{self.name}: split {self.split!r}: cannot read {path} ({error}); copy it again'
      ) from error


def first_existing(*paths: pathlib.Path) -> pathlib.Path:
  """The first path that exists; the first of all if none does, to be named in an error."""
  for path in paths:
    if os.path.exists(path):  # False too for what can be no name; Path.exists raises
      return path
  return paths[0]


def names_in(folder: pathlib.Path, *suffixes: str) -> list[str]:
  """Sorted file names of a folder with one of the suffixes (any case); [] for a missing folder."""
  if not folder.is_dir():
    return []
  return sorted(name for name in os.listdir(folder) if name.lower().endswith(suffixes))


def class_ids(data: bytes, table: np.ndarray | None = None) -> bytes:
  """A PNG of uint8 class ids from an encoded mask (gray or palette).

  `table`, uint8 [256], maps the data set's ids to ours. Raises ValueError for a mask in colors or
  of 16 bits: its values are no class ids.
  """
  mask = open_mask(data)
  if table is not None:
    return png(table[np.asarray(mask)])
  if mask.mode == 'L' and mask.format == 'PNG':
    return data
  return png(np.asarray(mask))


def png(array: np.ndarray) -> bytes:
  """An encoded PNG of uint8 [H, W], uint8 [H, W, 3] or uint16 [H, W]."""
  return encode_png(Image.fromarray(array), compress_level=1)


def millimeters(meters: np.ndarray) -> np.ndarray:
  """Depth in meters [H, W] as uint16 millimeters; 0, 'missing', where not finite or too far."""
  depth = np.asarray(meters, np.float64) * 1000
  depth = np.where(np.isfinite(depth) & (depth > 0) & (depth < 65_535), depth, 0)
  return np.round(depth).astype(np.uint16)


def encode_normals(normals: np.ndarray, valid: np.ndarray) -> np.ndarray:
  """Unit normals [H, W, 3] as uint8 n * 127.5 + 127.5; (0, 0, 0) where not valid [H, W]."""
  code = np.round(np.asarray(normals, np.float64) * 127.5 + 127.5).clip(0, 255).astype(np.uint8)
  return np.where(np.asarray(valid)[..., None], code, np.uint8(0))


def normals_from_depth(
  depth: np.ndarray,
  focal: float,
  *,
  center: tuple[float, float] = (0.0, 0.0),
  step: int = 1,
  jump: float | None = None,
  missing: float | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Normals [H, W, 3] and where they are valid [H, W], from depth [H, W] (any unit; 0 is missing).

  Cross product of the central differences over `step` pixels to each side of the back-projected
  pixels; `focal` and `center` (x, y) in pixels. A pixel next to a hole is invalid, and with `jump`
  so is one whose neighbor's depth differs by more than that share for each pixel of distance. With
  `missing`, holes count as that far away and only their own pixels are invalid: Probe3D's
  `compute_normal`. Axes of the result: x right, y up, z toward the viewer.
  """
  known = np.asarray(depth) > 0
  z = np.where(known, depth, 0 if missing is None else missing).astype(np.float64)
  rows, columns = np.mgrid[: z.shape[0], : z.shape[1]] + 0.5
  points = np.stack([(columns - center[0]) * z / focal, (rows - center[1]) * z / focal, z], -1)
  normals = np.zeros(points.shape)
  valid = np.zeros(z.shape, bool)
  inner = slice(step, -step)
  right, left = np.s_[inner, 2 * step :], np.s_[inner, : -2 * step]
  below, above = np.s_[2 * step :, inner], np.s_[: -2 * step, inner]
  # In camera axes (x right, y down, z ahead) this cross product points away from the viewer.
  away = np.cross(points[right] - points[left], points[below] - points[above])
  length = np.linalg.norm(away, axis=-1)
  good = (length > 1e-12) & known[inner, inner]
  for side in (right, left, below, above):
    if missing is None:
      good &= known[side]
    if jump is not None:
      good &= np.abs(z[side] - z[inner, inner]) <= jump * step * z[inner, inner]
  # Negated to face the viewer; y up and z toward the viewer then negate those two back.
  normals[inner, inner] = away / np.maximum(length, 1e-12)[..., None] * (-1, 1, 1)
  valid[inner, inner] = good
  return normals, valid

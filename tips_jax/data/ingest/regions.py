"""Boxes of an image with texts of their own, as tables and JSON write them.

COCO's annotations, Visual Genome's region descriptions and lists of objects in a file for each
image come as the cells of one column. The keys that are known are guesses after these: nobody says
how the files of UMG-41M are laid out.
"""

import json
import math
import typing
from collections.abc import Mapping, Sequence

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.cells import as_texts, brief
from tips_jax.data.ingest.columns import NONE, Columns

# Of the four numbers of a box: x and y from the left and the top, width and height.
FORMS = ('xywh', 'xyxy', 'yxyx')
UNITS = ('pixels', 'shares')  # of the image
ANNOTATIONS = (
  'boxes',
  'region_captions',
  'region_captions_boxes',
  'region_tags',
  'region_tags_boxes',
)
_BOX_KEYS = ('bbox', 'box', 'bounding_box')
_CORNERS = {  # the keys of four numbers, and their form
  ('x', 'y', 'w', 'h'): 'xywh',
  ('x', 'y', 'width', 'height'): 'xywh',
  ('xmin', 'ymin', 'xmax', 'ymax'): 'xyxy',
  ('x1', 'y1', 'x2', 'y2'): 'xyxy',
}
_CAPTION_KEYS = ('captions', 'caption', 'phrase', 'description', 'text')
_TAG_KEYS = ('tags', 'tag', 'category', 'categories', 'labels', 'label', 'names', 'name')
_ROUNDING = 1.0  # pixels that a box may be out of its image before that is said

Problem = tuple[str, str]  # a kind of report.NOTED, and what is said of it


class Region(typing.NamedTuple):
  """A box as it is written, with its texts."""

  box: object  # four numbers, if it is well formed
  form: str  # of FORMS; '': as the flag says
  captions: list[str]
  tags: list[str]


def check(form: str, unit: str) -> None:
  """InputError for a form or a unit of boxes that does not exist."""
  for flag, got, known in (('box_format', form, FORMS), ('box_unit', unit, UNITS)):
    if got not in known:
      raise InputError(f'--{flag}: got {got!r}; expected one of {list(known)}')


def of_rows(rows: Sequence[Mapping], columns: Columns) -> tuple[list[Region], list[Problem]]:
  """The regions of one image from its rows, and what of their texts is left out."""
  found = []
  notes = []
  for row in rows:
    regions = [_region(item) for item in _items(row.get(columns.regions))]
    for role in ('captions', 'tags'):
      name = getattr(columns, f'region_{role}')
      if name in ('', NONE) or row.get(name) is None:
        continue
      cell = _parsed(row[name])
      if len(regions) == 1:
        cell = [cell]
      if not isinstance(cell, list) or len(cell) != len(regions):
        count = len(cell) if isinstance(cell, list) else 1
        detail = f'{name!r} has {count} texts for {len(regions)} boxes'
        notes.append(('bad_region_text', detail))
        continue
      for region, texts in zip(regions, cell):
        getattr(region, role).extend(filter(None, as_texts(texts)))
    found += regions
  return found, notes


def tags_of(rows: Sequence[Mapping], name: str) -> list[str]:
  """The distinct tags of one image."""
  tags = []
  for row in rows:
    tags += as_texts(_parsed(row.get(name)))
  return list(dict.fromkeys(filter(None, tags)))


def placed(
  regions: Sequence[Region], size: tuple[int, int], form: str, unit: str
) -> tuple[dict[str, list], list[Problem]]:
  """The annotations of a store from the regions of an image of `size` (width, height).

  Boxes that are malformed, empty or out of the image are left out, and noted; others are cut at its
  edges, which is noted where it is more than a pixel.
  """
  values = {name: [] for name in ANNOTATIONS}
  notes = []
  for region in regions:
    corners, problem = _corners(region.box, region.form or form, unit, size)
    kind = 'bad_box' if corners is None else 'cut_box'
    if problem:
      notes.append((kind, f'{brief(region.box)}: {problem}'))
    if corners is None:
      continue
    number = len(values['boxes'])
    values['boxes'].append(corners)
    for name, texts in (('region_captions', region.captions), ('region_tags', region.tags)):
      values[name] += texts
      values[f'{name}_boxes'] += [number] * len(texts)
  return values, notes


def _corners(box, form, unit, size):
  """((ymin, xmin, ymax, xmax) in [0, 1] or None, problem)."""
  if not _is_box(box):
    return None, 'expected four numbers'
  one, two, three, four = map(float, box)
  if not all(map(math.isfinite, (one, two, three, four))):
    return None, 'expected finite numbers'
  if form == 'xywh':
    corners = [two, one, two + four, one + three]
  elif form == 'xyxy':
    corners = [two, one, four, three]
  else:
    corners = [one, two, three, four]
  width, height = size
  if unit == 'shares':
    width = height = 1
  ymin, xmin, ymax, xmax = corners
  if ymin >= ymax or xmin >= xmax:
    return None, 'empty'
  inside = [max(ymin, 0), max(xmin, 0), min(ymax, height), min(xmax, width)]
  if inside[0] >= inside[2] or inside[1] >= inside[3]:
    return None, f'out of an image of {size[0]}x{size[1]}'
  out = [abs(a - b) for a, b in zip(corners, inside)]
  if unit == 'shares':
    out = [part * side for part, side in zip(out, (size[1], size[0]) * 2)]
  problem = f'cut at an image of {size[0]}x{size[1]}' if max(out) > _ROUNDING else ''
  return [x / side for x, side in zip(inside, (height, width) * 2)], problem


# --- cells --------------------------------------------------------------------------------------


def _parsed(cell):
  """The value of a cell, of which JSON in a text is one."""
  if isinstance(cell, str) and cell.strip()[:1] in ('[', '{'):
    try:
      return json.loads(cell)
    except (ValueError, RecursionError):
      pass
  return cell


def _items(cell):
  """The regions that a cell holds, unread."""
  cell = _parsed(cell)
  if cell is None or isinstance(cell, str) and not cell.strip():
    return []
  # A list of numbers, or of what should be some, is one box.
  if isinstance(cell, list) and (not cell or any(isinstance(x, (list, Mapping)) for x in cell)):
    return cell
  return [cell]


def _is_box(value):
  return (
    isinstance(value, (list, tuple))
    and len(value) == 4
    and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value)
  )


def _region(item):
  if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str):
    return Region(item[1], '', [], as_texts(item[0]))  # a name and its box
  if not isinstance(item, Mapping):
    return Region(item, '', [], [])
  box, form = _box_of(item)
  return Region(box, form, _texts(item, _CAPTION_KEYS), _texts(item, _TAG_KEYS))


def _box_of(item):
  for key in _BOX_KEYS:
    box = item.get(key)
    if isinstance(box, Mapping):
      return _box_of(box)
    if box is not None:
      return box, ''
  for keys, form in _CORNERS.items():
    if all(key in item for key in keys):
      return [item[key] for key in keys], form
  return item, ''


def _texts(item, keys):
  """The texts of the first key that is there."""
  for key in keys:
    if item.get(key) is not None:
      return list(filter(None, as_texts(item[key])))
  return []

"""What `prepare` counts and lists: of each task, of the whole, and as a text for people."""

import collections
import typing
from collections.abc import Mapping, Sequence

from tips_jax.data.ingest.cells import utf8

# Problems, by their names in the report.
REFUSED = {
  'missing': 'left out: images that are missing',
  'unreadable': 'left out: images that cannot be decoded',
  'tiny': 'left out: images with a side under min_side',
  'giant': 'left out: images of more than max_pixels',
  'bad_row': 'left out: rows that do not fit the table',
  'other_split': 'left out: rows or files of other splits',
  'other_file': 'left out: files that belong to no sample',
}
NOTED = {
  'duplicate': 'kept: images equal to an earlier one, byte for byte',
  'no_text': 'kept: images without any text',
  'no_alt_text': 'kept: images with captions but no alt text',
  'no_captions': 'kept: images with alt text but no captions',
  'empty_caption': 'kept: images with an empty caption among theirs (left out)',
  'bad_metadata': 'kept: samples whose metadata cannot be read',
  'caption_empty': 'dropped: new captions without text',
  'caption_repeated': 'dropped: new captions equal to another text of their image',
  'caption_runaway': 'dropped: new captions that have no end, or turn in circles',
  'caption_failed': 'kept: images that the captioner could not read, or does not know',
  'box_unsure': 'dropped: boxes of low confidence',
  'box_small': 'dropped: boxes with a side under least_side',
  'box_overlap': 'dropped: boxes that overlap a surer one',
  'box_many': 'dropped: boxes after the most_boxes surest of their image',
  'box_unstable': 'dropped: boxes whose mask changes where they move a little',
  'annotation_failed': 'kept: images that the annotators could not read',
  'bad_mask': 'kept: images without a usable mask (all pixels ignored)',
  'bad_box': 'dropped: boxes that are malformed, empty or out of their image',
  'cut_box': 'kept: boxes that reach out of their image (cut at its edges)',
  'bad_region_text': 'kept: images with another number of region texts than boxes (left out)',
  'turned': 'kept: images that EXIF turns, whose annotations are taken as upright',
  'short_row': 'kept: rows with fewer fields than the header',
  'other_image': 'kept: samples with several images (the first is taken)',
  'other_field': 'kept: samples with texts in other fields than the first samples have (left out)',
  'no_label': 'kept: images whose label is unknown (-1)',
  'other_label': 'kept: images with several labels (the first is taken)',
  'label_spaces': 'kept: images whose label has spaces or line breaks (written as one space)',
}
REPORT_FILE = 'report.json'
MAX_LISTED = 10_000  # rows of one kind in report.json; the counts are always whole


class Report:
  """Counts by split and kind, and the first rows of each kind."""

  def __init__(self):
    self.splits = collections.defaultdict(collections.Counter)
    self.rows = collections.defaultdict(list)

  def count(self, kind: str, split: str, count: int = 1) -> None:
    self.splits[split][kind] += count

  def note(self, kind: str, split: str, key: str, detail: str = '', count: int = 1) -> None:
    """Counts a kind of REFUSED or NOTED, and lists the sample, row or file that it is about."""
    self.count(kind, split, count)
    row = {'split': split, 'id': utf8(key)}
    if detail:
      row['detail'] = detail
    self.list(kind, [row])

  def list(self, kind: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Lists rows, as long as there are not MAX_LISTED of their kind."""
    self.rows[kind] += rows[: MAX_LISTED - len(self.rows[kind])]

  def add(self, splits: Mapping[str, Mapping[str, int]]) -> bool:
    """Adds the counts of what comes next; returns whether some of its rows have to be listed."""
    wanted = False
    for split, counts in splits.items():
      for kind, count in counts.items():
        self.count(kind, split, count)
        wanted |= kind in (*REFUSED, *NOTED) and len(self.rows[kind]) < MAX_LISTED
    return wanted

  def content(self) -> dict[str, typing.Any]:
    """The report as a dict that JSON can hold."""
    listed = {kind: self.rows[kind] for kind in (*REFUSED, *NOTED) if self.rows.get(kind)}
    return {
      'splits': {split: dict(counts) for split, counts in self.splits.items()},
      'rows': listed,
    }


def summary(report: Mapping[str, typing.Any], *, worst: int = 3) -> str:
  """The report as text: a table of counts by split, and the `worst` first rows of each problem."""
  splits = report['splits']
  texts = {
    'read': 'samples read',
    'written': 'images written',
    'alt_texts': 'with alt text',
    'captions': 'captions written',
    'boxes': 'boxes written',
    'region_captions': 'captions of regions written',
    'region_tags': 'tags of regions written',
    'tags': 'tags written',
    **REFUSED,
    **NOTED,
  }
  counts = {}  # by split, of what occurs at all
  for kind in texts:
    of_kind = [split.get(kind, 0) for split in splits.values()]
    if any(of_kind):
      counts[kind] = of_kind
  width = max(len(texts[kind]) for kind in counts)
  lines = [' ' * width + ''.join(f'{split:>12}' for split in splits)]
  for kind, of_kind in counts.items():
    lines.append(f'{texts[kind]:<{width}}' + ''.join(f'{count:>12,}' for count in of_kind))
  for kind, listed in report['rows'].items():
    total = sum(counts[kind])
    if kind in ('no_text', 'no_alt_text', 'no_captions') and total == sum(counts['read']):
      continue  # a property of the data set, not of rows
    lines.append(f'{kind}:')
    for row in listed[:worst]:
      lines.append(f'  {row["split"]}: {row["id"]}  {row.get("detail", "")}'.rstrip())
    if total > worst:
      lines.append(f'  ... {total - worst:,} more in {REPORT_FILE}')
  made = report['tokenizer']
  if made:
    size = made['vocab_size']
    asked = made['wanted'] or 0  # None: a copied tokenizer
    short = f' (asked for {asked:,}; the texts give no more)' if asked > size else ''
    lines.append(f'tokenizer: {size:,} pieces{short}, sha256 {made["sha256"][:12]}')
  return '\n'.join(lines)

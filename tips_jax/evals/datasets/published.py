"""What TIPS and TIPSv2 scored, as printed: shown beside ours.

Segmentation, accuracy and recall in percent; depth RMSE in meters; normals RMSE in degrees. Trust:
as in protocols.py. The weights that were released score a little less on dense tasks than the
paper's: compare a loaded checkpoint with the rows 'released'.
"""

import collections
import dataclasses


@dataclasses.dataclass(frozen=True)
class Figure:
  model: str
  value: float
  trust: str
  source: str


_VOC, _ADE = 'voc/segmentation/miou', 'ade20k/segmentation/miou'
_NYU, _NAVI = 'nyu/depth/rmse', 'navi/dpt_depth/rmse'
_NYU_N, _NAVI_N = 'nyu_normals/dpt_normals/angular_rmse', 'navi/dpt_normals/angular_rmse'
_UNED, _KNN, _LIN = (
  'uned/instance_retrieval/r1',
  'imagenet/knn/accuracy',
  'imagenet/linear/accuracy',
)
_IN0 = 'imagenet/zeroshot/accuracy'
_I2T = {name: f'{name}/retrieval/i2t_r1' for name in ('coco', 'flickr30k', 'docci')}
_T2I = {name: f'{name}/retrieval/t2i_r1' for name in ('coco', 'flickr30k', 'docci')}
_PC59 = 'context/zeroshot_segmentation_context59/miou'
_PC60 = 'context/zeroshot_segmentation_context60/miou'
_VOC21 = 'voc/zeroshot_segmentation_voc21/miou'
_ADE150 = 'ade20k/zeroshot_segmentation_ade150/miou'

_IMAGES = (_VOC, _ADE, _NYU, _NAVI, _NYU_N, _NAVI_N, _UNED, _KNN, _LIN)  # columns of Table 2
_TEXTS = (*_I2T.values(), *_T2I.values(), _IN0)  # columns of Table 3
_README = (_VOC, _NYU, _KNN, _UNED, _I2T['flickr30k'], _T2I['flickr30k'])
_README2 = (_VOC, _NYU, _KNN, _I2T['flickr30k'], _T2I['flickr30k'], _ADE150)
_OPEN = (_PC59, _PC60, _VOC21, _ADE150)
_TABLE8 = (_ADE, _IN0, _I2T['coco'], _T2I['coco'])

_TABLES = (  # source, trust, columns, rows
  (
    'TIPS Table 2',
    'V',
    _IMAGES,
    {
      'TIPS g/14 LR (paper)': (82.9, 47.8, 0.377, 0.061, 23.0, 24.5, 71.4, 83.6, 86.4),
      'TIPS g/14 HR (paper)': (83.6, 49.9, 0.353, 0.058, 21.9, 24.2, 68.2, 83.3, 86.2),
      'TIPS g/14 LR (released)': (82.0, 47.4, 0.390, 0.063, 23.5, 24.7, 71.5, 83.6, 86.3),
      'TIPS g/14 HR (released)': (83.1, 49.4, 0.363, 0.059, 22.3, 24.3, 68.4, 83.2, 86.1),
    },
  ),
  (
    'TIPS Table 3',
    'V',
    _TEXTS,
    {
      'TIPS g/14 LR (paper)': (73.7, 93.0, 56.4, 58.3, 83.2, 58.9, 79.7),
      'TIPS g/14 HR (paper)': (74.0, 93.0, 57.2, 59.4, 84.5, 58.8, 79.9),
      'TIPS g/14 LR (released)': (73.3, 93.4, 55.6, 58.1, 82.1, 57.0, 79.6),
      'TIPS g/14 HR (released)': (74.0, 93.8, 57.0, 59.2, 83.8, 59.4, 79.7),
    },
  ),
  (
    'TIPS README',
    'V',
    _README,
    {  # its g rows repeat the released ones above
      'TIPS So400m/14 HR (released)': (83.7, 0.362, 83.0, 68.6, 94.2, 83.8),
      'TIPS L/14 HR (released)': (83.9, 0.372, 82.5, 67.8, 93.6, 83.5),
      'TIPS B/14 HR (released)': (82.9, 0.379, 80.0, 62.7, 91.3, 79.4),
      'TIPS S/14 HR (released)': (80.6, 0.425, 75.1, 57.7, 86.3, 74.7),
    },
  ),
  (
    'TIPSv2 README',
    'V',
    _README2,
    {
      'TIPSv2 g/14': (85.1, 0.334, 83.7, 95.1, 85.9, 17.8),
      'TIPSv2 So400m/14': (85.2, 0.339, 82.8, 94.8, 84.0, 23.3),
      'TIPSv2 L/14': (85.1, 0.339, 82.5, 95.4, 83.3, 24.7),
      'TIPSv2 B/14': (84.0, 0.374, 79.8, 92.6, 80.0, 17.4),
    },
  ),
  (
    'TIPSv2 Table 7',
    'T2',
    (_ADE, _NAVI, _NYU_N, _NAVI_N, _UNED, _LIN),
    {'TIPSv2 g/14': (51.6, 0.059, 21.7, 24.1, 67.0, 86.8)},
  ),
  (
    'TIPSv2 Table 6',
    'T2',
    (_I2T['coco'], _I2T['docci'], _T2I['coco'], _T2I['docci'], _IN0),
    {'TIPSv2 g/14': (75.7, 68.9, 60.7, 72.8, 80.7)},
  ),
  ('TIPSv2 Table 8', 'T2', _TABLE8, {'TIPSv2 L/14': (51.4, 79.7, 73.5, 57.4)}),
  (
    'TIPSv2 Tables 1 and 5',
    'T2',
    _OPEN,
    {
      'TIPS L/14 (in TIPSv2)': (33.5, 30.4, 30.5, 20.8),
      'TIPS g/14 (in TIPSv2)': (11.4, 10.8, 19.7, 2.6),
    },
  ),
  ('TIPSv2 Table 5', 'T2', _OPEN[:3], {'TIPSv2 L/14': (37.1, 33.9, 44.4)}),
)


def _collect():
  by_column = collections.defaultdict(list)
  for source, trust, columns, rows in _TABLES:
    for model, values in rows.items():
      # Strict: a number that was left out would move all behind it.
      for column, value in zip(columns, values, strict=True):
        by_column[column].append(Figure(model, value, trust, source))
  return {column: tuple(figures) for column, figures in by_column.items()}


# 'data set/task/metric' -> figures; 'uned' is the average over its eight domains.
PUBLISHED = _collect()

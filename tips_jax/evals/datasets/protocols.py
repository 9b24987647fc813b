"""The protocol of every public benchmark as data: splits and counts, classes, constants, and what
was published.

Each number carries how far it can be trusted: 'V' primary source (official code, model config, the
data set's own page, a table of the project's page), 'T' second-hand, 'T2' two second-hand sources
agree, 'M' from memory, 'I' inferred, '?' unknown: our choice. TIPS: arXiv 2410.16512;
TIPSv2: arXiv 2604.12012.
"""

import dataclasses
from typing import Any

import numpy as np

from tips_jax.core.strict import unknown
from tips_jax.data.benchmarks import class_names
from tips_jax.data.benchmarks import table as benchmarks
from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.datasets.published import PUBLISHED, Figure

# unit: (factor, decimals, as printed)
UNITS = {'%': (100, 1, '%'), 'm': (1, 3, 'm'), 'deg': (1, 1, '°')}


@dataclasses.dataclass(frozen=True)
class Constant:
  """A number of the protocol."""

  value: Any
  # How far it can be trusted: see above.
  trust: str
  # What it is, or where it is from.
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Split:
  # Images that it must have; None where no source says.
  count: int | None
  # Its name in the data set.
  official: str
  trust: str = 'V'
  # Other counts that are in use: some copies lack a few images.
  also: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One measurement."""

  # Name of its TaskSpec.
  kind: str
  # Tells tasks of one kind on one data set apart.
  variant: str = ''
  splits: tuple[str, ...] = ('train', 'test')
  # Those that papers print.
  metrics: tuple[str, ...] = ()
  constants: dict[str, Constant] = dataclasses.field(default_factory=dict)
  # Names of the classes that it counts; empty: those of the data set.
  classes: tuple[str, ...] = ()
  # A class id of the mask that is void here: the background of VOC20 and PC59.
  without: int | None = None

  @property
  def name(self) -> str:
    return f'{self.kind}_{self.variant}' if self.variant else self.kind

  def options(self) -> dict[str, Any]:
    """The constants as keyword arguments."""
    return {name: constant.value for name, constant in self.constants.items()}

  def mask_ids(self, mask: np.ndarray) -> np.ndarray:
    """Ids of the stored mask (uint8) -> ids into `classes`: the class that does not count becomes
    void.
    """
    if self.without is None:
      return mask
    # The ids behind it move up, as they count the names in `classes`.
    moved = np.where((mask > self.without) & (mask != VOID), mask - 1, mask)
    return np.where(mask == self.without, VOID, moved).astype(mask.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """One data set."""

  name: str
  title: str
  source: str
  splits: dict[str, Split]
  tasks: tuple[Task, ...]
  mask_classes: tuple[str, ...] = ()
  # Number of classes of 'label', if fixed.
  labels: int | None = None
  captions: bool = False
  # Millimeters between which the median of a depth image is: other units are found by it.
  depth_mm: tuple[int, int] = (1, 20_000)
  # Data sets whose average is published.
  group: str = ''
  note: str = ''

  def task(self, name: str) -> Task:
    for task in self.tasks:
      if task.name == name:
        return task
    raise unknown(f'task of {self.name!r}', name, [task.name for task in self.tasks])

  def published(self, task: str, metric: str) -> tuple[Figure, ...]:
    """What TIPS and TIPSv2 reached, in the printed unit; of a grouped data set the average over its
    group.
    """
    return PUBLISHED.get(f'{self.group or self.name}/{task}/{metric}', ())


# --- constants of the protocols -----------------------------------------------------------------

_C = Constant
# DINOv2's linear protocol (arXiv 2304.07193).
SEGMENTATION = {
  'layers': _C(
    'last', 'V', 'linear probe on the last layer: BatchNorm and 1x1 convolution, as DINOv2 BNHead'
  ),
  'mode': _C(
    'slide',
    'T',
    "windows over the image at its own aspect ratio; 'square': squeezed, as `quick` does",
  ),
  'crop': _C(512, 'T', 'short side and window, in configs derived from DINOv2'),
  'stride': _C(341, 'T', 'of the windows; another size of them scales it'),
  'patches': _C(
    1_000_000,
    '?',
    'that the probe learns from; DINOv2: all, in 40,000 steps of 16 crops. Of more, as '
    'many of each window; fewer where half of the memory does not hold them thrice',
  ),
}
# The linear head of TIPS's official DepthDecoder.
LINEAR_DEPTH = {
  'bins': _C(
    256, 'V', 'uniform; ReLU, then linear normalization, then expectation (official DepthDecoder)'
  ),
  'min_depth': _C(0.001, 'V', 'meters'),
  'max_depth': _C(10.0, 'V', 'meters'),
  'features': _C('patch+cls', 'V', 'every patch token beside the global embedding'),
  'crop': _C(
    (45, 471, 41, 601), 'M', 'Eigen crop of 480x640 for scoring: top, bottom, left, right'
  ),
}
# Probe3D (arXiv 2404.08636), whose decoders TIPSv2 trains.
DPT = {
  'size': _C(512, 'V', 'Probe3D, square'),
  'channels': _C(512, 'V'),
  'learning_rate': _C(5e-4, 'V', 'AdamW'),
  'epochs': _C(10, 'V'),
  'warmup_epochs': _C(1.5, 'V', 'then cosine'),
  'batch': _C(8, 'V'),
}
DPT_DEPTH = DPT | {
  'bins': _C(256, '?', 'number of bins'),
  'min_depth': _C(0.001, 'V', 'meters'),
  'max_depth': _C(10.0, 'V', 'meters'),
  'sig_weight': _C(10.0, 'V', 'weight'),
  'gradient_weight': _C(0.5, 'V', 'weight'),
}
NORMALS = DPT | {'loss': _C('uncertainty-aware angular', 'V')}
# Tasks on whole images need one shape of all of them.
RESIZE = {
  'resize': _C(
    'square',
    'V',
    "both sides to one size, as TIPS's own code and its Hugging Face processor; 'cut': the "
    "central square, 'center': 7/8 of it (224 of 256), as DINOv2. What the paper's numbers have: ?",
  ),
}
# Caron et al. 2021 (arXiv 2104.14294, appendix F).
KNN = RESIZE | {
  'k': _C((10, 20, 100, 200), 'V', 'DINOv2; which TIPS printed: ?'),
  'temperature': _C(0.07, 'V', 'DINOv2'),
}
# One optimum in place of a grid of rates: the best of a grid is chosen on the test split.
LINEAR = RESIZE | {
  'features': _C(
    'cls',
    '?',
    'DINOv2: the best on the test split of {1, 4} last blocks, with and without pooled '
    'patches (V); which TIPS took is not published',
  ),
  'solver': _C(
    'optimum',
    '?',
    'L-BFGS, L2 chosen on held-out training images; DINOv2: the best of 13 rates of SGD',
  ),
}
# Texts as in training: lower case, 64 tokens.
RETRIEVAL = RESIZE | {
  'k': _C((1, 5, 10), 'V', 'TIPS prints R@1'),
  'text_length': _C(64, 'V'),
  'lower': _C(True, 'V'),
  'cls': _C('web', '?', 'which CLS token serves it is not published; both are reported here'),
}
# CLIP (arXiv 2103.00020, section 3.1).
ZEROSHOT = RESIZE | {
  'templates': _C('clip80', 'T', 'CLIP prompts; all 80 or the 7 best: ?'),
  'cls': _C('web', '?'),
}
# TIPSv2's notebook; the windows and templates are TCL's (arXiv 2212.00785).
ZEROSHOT_SEGMENTATION = {
  'templates': _C('tcl9', 'V'),
  'size': _C(448, 'V', 'short side, bicubic'),
  'window': _C(448, 'V'),
  'stride': _C(336, 'V'),
  'mode': _C('whole', 'T', 'slide (TCL) only in the comparison with DINOv3'),
  'value_attention': _C(True, 'V', 'MaskCLIP values in the last block'),
  'lower': _C(False, 'V', 'the official notebook does not lower-case'),
}
# UMG-CLIP (arXiv 2401.06397) names no protocol. Boxes are those of the annotation.
REGION_RETRIEVAL = {
  'pooling': _C('roi_align', 'V', 'its equation 1; points a side: of the head, else 14: ?'),
  'equal_texts': _C('one', '?', 'a text of several regions belongs to all of them'),
}
TAGGING = {
  'templates': _C('clip80', '?'),
  'classes': _C('those that occur', '?', 'in the split; what has none is left out'),
}
REGION_CLASSIFICATION = TAGGING | {'pooling': REGION_RETRIEVAL['pooling']}


def _segmentation(classes, **others):
  return Task(
    kind='segmentation', metrics=('miou',), classes=classes, constants=SEGMENTATION | others
  )


def _zeroshot_segmentation(variant, classes, without=None):
  return Task(
    kind='zeroshot_segmentation',
    variant=variant,
    splits=('test',),
    metrics=('miou',),
    classes=tuple(map(class_names.prompt, classes)),
    without=without,
    constants=ZEROSHOT_SEGMENTATION,
  )


def _texts(**others):
  return Task(
    kind='retrieval', splits=('test',), metrics=('i2t_r1', 't2i_r1'), constants=RETRIEVAL | others
  )


def _uned(domain, title, query, index=None):
  splits = {'test': Split(query, 'test')}
  # Where a domain has no index, its queries are searched among each other.
  searched = 'test'
  if index:
    searched = 'index'
    splits['index'] = Split(index, 'index')
  index_set = _C(searched, 'V', 'test: without the query itself')
  merged = _C(
    8,
    '?',
    "index sets searched as one: UnED's protocol (V); its code has each domain's own, too (V). "
    'Which '
    'of both TIPS averaged is not known: both are measured',
  )
  task = Task(
    kind='instance_retrieval',
    splits=tuple(splits),
    metrics=('r1',),
    constants=RESIZE | {'k': _C((1,), 'V'), 'index': index_set, 'merged': merged},
  )
  return Protocol(
    name=f'uned_{domain}',
    title=f'UnED {title}',
    source='https://cmp.felk.cvut.cz/univ_emb/',
    splits=splits,
    tasks=(task,),
    group='uned',
  )


_PROTOCOLS = (
  Protocol(
    name='voc',
    title='PASCAL VOC 2012',
    source='http://host.robots.ox.ac.uk/pascal/VOC/voc2012/',
    splits={'train': Split(1464, 'train', 'T'), 'test': Split(1449, 'val')},
    mask_classes=class_names.VOC,
    tasks=(
      _segmentation(class_names.VOC),
      _zeroshot_segmentation('voc21', class_names.VOC),
      _zeroshot_segmentation('voc20', class_names.VOC[1:], without=0),
    ),
    note='Whether TIPS learned from train (1,464) or trainaug (10,582) is not published; configs '
    'derived from '
    'DINOv2 have train. How it scores the background of VOC21 (name or threshold) is not '
    'published.',
  ),
  Protocol(
    name='ade20k',
    title='ADE20K SceneParsing 2016',
    source='http://sceneparsing.csail.mit.edu/',
    splits={'train': Split(20_210, 'training'), 'test': Split(2000, 'validation')},
    mask_classes=class_names.ADE20K,
    tasks=(_segmentation(class_names.ADE20K), _zeroshot_segmentation('ade150', class_names.ADE20K)),
  ),
  Protocol(
    name='context',
    title='PASCAL Context',
    source='https://cs.stanford.edu/~roozbeh/pascal-context/',
    splits={'test': Split(5105, 'val', also=(5104,))},
    mask_classes=class_names.CONTEXT,
    tasks=(
      _zeroshot_segmentation('context60', class_names.CONTEXT),
      _zeroshot_segmentation('context59', class_names.CONTEXT[1:], without=0),
    ),
  ),
  Protocol(
    name='nyu',
    title='NYUv2 depth',
    source='https://github.com/cleinc/bts',
    splits={
      'train': Split(24_231, 'nyu_train.txt', also=(24_225,)),
      'test': Split(654, 'nyu_test.txt'),
    },
    tasks=(Task(kind='depth', metrics=('rmse',), constants=LINEAR_DEPTH),),
    depth_mm=(500, 10_000),
  ),
  Protocol(
    name='nyu_normals',
    title='NYUv2 normals',
    source='https://github.com/mbanani/probe3d (data_processing)',
    splits={'train': Split(None, 'nyu_geonet', '?'), 'test': Split(654, 'test_SN40')},
    depth_mm=(500, 10_000),
    tasks=(
      Task(
        kind='dpt_normals',
        metrics=('angular_rmse',),
        constants=NORMALS | {'size': _C(480, 'V', 'center crop of 480x640')},
      ),
    ),
    note='GeoNet training files, two of which Probe3D leaves out by their number in the listing.',
  ),
  Protocol(
    name='navi',
    title='NAVI v1',
    source='https://github.com/google/navi',
    depth_mm=(50, 10_000),
    splits={'train': Split(None, 'multiview', '?'), 'test': Split(2298, 'wild_set', 'T')},
    tasks=(
      Task(kind='dpt_depth', metrics=('rmse',), constants=DPT_DEPTH),
      Task(kind='dpt_normals', metrics=('angular_rmse',), constants=NORMALS),
    ),
    note="Probe3D's public code keeps every fourth image, in the order of os.listdir; here all are "
    'used.',
  ),
  Protocol(
    name='imagenet',
    title='ImageNet-1k',
    source='https://image-net.org/challenges/LSVRC/2012/',
    labels=1000,
    splits={'train': Split(1_281_167, 'train'), 'test': Split(50_000, 'val')},
    tasks=(
      Task(kind='knn', metrics=('accuracy',), constants=KNN),
      Task(kind='linear', metrics=('accuracy',), constants=LINEAR),
      Task(
        kind='zeroshot',
        splits=('test',),
        metrics=('accuracy',),
        classes=class_names.IMAGENET,
        constants=ZEROSHOT,
      ),
    ),
  ),
  _uned('food2k', 'Food2k', 9979),
  _uned('cars', 'CARS196', 8131),
  _uned('sop', 'SOP', 60_502),
  _uned('inshop', 'InShop', 14_218, 12_612),
  _uned('inat', 'iNat', 136_093),
  _uned('met', 'Met', 1003, 397_121),
  _uned('gldv2', 'GLDv2', 1129, 761_757),
  _uned('rp2k', 'Rp2k', 10_931),
  Protocol(
    name='flickr30k',
    title='Flickr30k (Karpathy test)',
    captions=True,
    tasks=(_texts(),),
    source='https://shannon.cs.illinois.edu/DenotationGraph/',
    splits={'test': Split(1000, 'test')},
  ),
  Protocol(
    name='coco',
    title='COCO (Karpathy test)',
    source='https://cocodataset.org/',
    captions=True,
    tasks=(_texts(),),
    splits={'test': Split(5000, 'test')},
    note='The 5,000 images of the Karpathy test split, all from val2014; that TIPS used it is [I].',
  ),
  Protocol(
    name='docci',
    title='DOCCI',
    source='https://google.github.io/docci/',
    captions=True,
    tasks=(_texts(),),
    splits={'test': Split(5000, 'test')},
    note='136 words on average: the text tower reads the first 64 tokens.',
  ),
  Protocol(
    name='camvid',
    title='CamVid (pack)',
    source='docs/datasets.md',
    splits={'train': Split(305, 'train'), 'test': Split(62, '0001TP')},
    tasks=(
      _segmentation(()),
      _zeroshot_segmentation('', ()),
    ),
    note='Held out: the sequence 0001TP. Most frequent class at each position: mIoU 0.150. '
    'Classes: the reader.',
  ),
  Protocol(
    name='rgbd',
    title='7-Scenes kitchen (pack)',
    source='docs/datasets.md',
    depth_mm=(500, 5000),
    splits={'train': Split(320, 'first four fifths'), 'test': Split(80, 'last fifth')},
    tasks=(
      Task(kind='depth', metrics=('rmse',), constants=LINEAR_DEPTH | {'crop': _C(None, '?')}),
      Task(kind='dpt_depth', metrics=('rmse',), constants=DPT_DEPTH),
      Task(kind='dpt_normals', metrics=('angular_rmse',), constants=NORMALS),
    ),
    note='One room: memory, not generalization. Mean of train: RMSE 0.51 m; mean depth image: 0.47 '
    'm.',
  ),
  Protocol(
    name='cifar10',
    title='CIFAR-10 (pack)',
    source='docs/datasets.md',
    labels=10,
    splits={'train': Split(50_000, 'train'), 'test': Split(10_000, 'test')},
    tasks=(
      Task(kind='knn', metrics=('accuracy',), constants=KNN),
      Task(kind='linear', metrics=('accuracy',), constants=LINEAR),
      Task(kind='zeroshot', splits=('test',), metrics=('accuracy',), constants=ZEROSHOT),
    ),
  ),
  Protocol(
    name='flickr8k',
    title='Flickr8k (pack)',
    source='docs/datasets.md',
    captions=True,
    tasks=(_texts(),),
    splits={'test': Split(1000, 'dev')},
  ),
  Protocol(
    name='coco_mini',
    title='COCO photos (pack)',
    source='docs/datasets.md',
    splits={'test': Split(100, 'with a mask')},
    tasks=(
      _zeroshot_segmentation('', ()),
      Task(
        kind='region_classification',
        splits=('test',),
        metrics=('accuracy', 'class_accuracy'),
        constants=REGION_CLASSIFICATION,
      ),
      Task(kind='tagging', splits=('test',), metrics=('map',), constants=TAGGING),
    ),
    note='Classes: the reader; 120 of 129 occur. The split captions (80 images) is too small for '
    'retrieval.',
  ),
)
PROTOCOLS = {protocol.name: protocol for protocol in _PROTOCOLS}
SUITES = {
  # Every task of the papers; the packs are small stand-ins that anyone can download.
  'tips': tuple(name for name in PROTOCOLS if name not in benchmarks.PACKS),
  'uned': tuple(name for name in PROTOCOLS if name.startswith('uned_')),
  'packs': benchmarks.PACKS,
}


def get(name: str) -> Protocol:
  """The protocol of a data set by name; InputError with the nearest name."""
  if name not in PROTOCOLS:
    raise unknown('data set', name, [*PROTOCOLS, *SUITES])
  return PROTOCOLS[name]


def names(suite: str) -> tuple[str, ...]:
  """Data sets of a suite, or of a list 'NAME,NAME' of data sets and suites, each once and in
  order.
  """
  names = []
  for part in suite.split(','):
    part = part.strip()
    names += SUITES.get(part, (part,))
  return tuple(get(name).name for name in dict.fromkeys(names))

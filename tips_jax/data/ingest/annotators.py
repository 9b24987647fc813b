"""Boxes, tags and texts of regions by models of transformers, as UMG-CLIP's data was made (arXiv
2401.06397, section 3): detectors whose boxes are filtered by confidence and by each other, a
segmenter that tells stable boxes from others, a tagger, and a captioner of what is in the boxes.
"""

import dataclasses
import io
import typing
from collections.abc import Sequence

import numpy as np
from PIL import Image

from tips_jax.core.errors import InputError
from tips_jax.data.ingest import pretrained
from tips_jax.data.ingest.archives import reason
from tips_jax.data.ingest.captioners import Answer, Captioner
from tips_jax.data.ingest.cells import one_line
from tips_jax.data.ingest.reader import Sample
from tips_jax.data.ingest.samples import in_threads
from tips_jax.data.pixels import boxes as boxes_lib
from tips_jax.data.pixels import images

# How far a box is moved along its diagonal to see whether its mask stays, as shares of `shift`.
# The paper says neither how far nor how often.
_MOVES = (-1.0, -0.5, 0.5, 1.0)
_ROUNDING = 1e-2  # pixels
_PROMPTS = 64  # boxes of an image that a segmenter sees at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """What is asked of the annotators; those without a name are not there."""

  detectors: tuple[str, ...] = ()
  classes: tuple[str, ...] = ()  # what a zero-shot detector looks for
  confidence: float = 0.3  # least of a box; UMG-CLIP's
  overlap: float = 0.7  # intersection over union with a surer box, at most
  least_side: int = 16  # pixels of the shorter side of a box
  most: int = 32  # boxes of an image
  segmenter: str = ''
  shift: float = 0.1  # of a box along its diagonal, at most, as a share of its sides
  stability: float = 0.7  # least mean intersection over union of the masks
  tagger: str = ''
  tags: tuple[str, ...] = ()  # from which a zero-shot tagger chooses
  tag_confidence: float = 0.2  # least of a tag
  most_tags: int = 8  # of an image


class Annotation(typing.NamedTuple):
  """What is said of an image; JSON can hold it."""

  kept: list[int]  # numbers of the boxes before that stay
  boxes: list[list[float]]  # new ones
  labels: list[str]  # of the new boxes
  captions: list[Answer]  # of the boxes that stay and of the new ones
  tags: list[str]
  dropped: dict[str, int]  # counts by kind of report.NOTED
  problem: str = ''


class Annotators:
  """All that are asked for, one after the other."""

  threads = 1

  def __init__(self, ask: Ask, captioner: Captioner | None, *, batch: int):
    """captioner: of regions. batch: images that a tagger or a captioner sees at once."""
    self.batch = batch
    self._ask = ask
    self._captioner = captioner
    self._detectors = [Detector(name, ask.classes) for name in ask.detectors]
    if ask.classes and not any(detector.zero_shot for detector in self._detectors):
      raise InputError(
        f'--classes: got {list(ask.classes)[:3]} ... for {list(ask.detectors)}, which find classes '
        f'of their own; expected none, or a zero-shot detector such as OWL-ViT'
      )
    self._segmenter = Segmenter(ask.segmenter) if ask.segmenter else None
    self._tagger = Tagger(ask.tagger, ask.tags, batch) if ask.tagger else None

  def begin(self) -> None:
    if self._captioner:
      self._captioner.begin()

  def stop(self) -> None:
    if self._captioner:
      self._captioner.stop()

  def answers(self, samples: Sequence[Sample]) -> list[Annotation]:
    found = [Annotation([], [], [], [], [], {}, 'no image')] * len(samples)
    pixels = {}
    for number, sample in enumerate(samples):
      try:
        pixels[number] = images.decode(sample.image)
      except ValueError as error:
        found[number] = found[number]._replace(problem=reason(error))
    pictures = [Image.fromarray(each) for each in pixels.values()]
    if not pictures:
      return found
    # [by detector][by image]
    seen = [detector.find(pictures) for detector in self._detectors]
    tags = [[]] * len(pictures)
    if self._tagger:
      tags = self._tagger.choose(pictures, self._ask)
    for i, number in enumerate(pixels):
      of_image = [box for detector in seen for box in detector[i]]
      found[number] = self._annotation(samples[number], pictures[i], of_image, tags[i])
    return found

  def _annotation(self, sample, picture, found, tags):
    size = (picture.height, picture.width)
    new, dropped = usable(found, size, self._ask)
    before = np.asarray(sample.extra.get('boxes', ()), np.float32).reshape(-1, 4)
    boxes = np.concatenate([before, np.array([box.box for box in new], np.float32).reshape(-1, 4)])
    stays = np.arange(len(boxes))
    if self._segmenter and len(boxes):
      stability = self._segmenter.stability(picture, boxes, self._ask.shift)
      stays = np.flatnonzero(stability >= self._ask.stability)
      dropped['box_unstable'] = len(boxes) - len(stays)
    captions = []
    if self._captioner:
      captions = self._captions([_crop(sample, picture, box) for box in boxes[stays]])
    kept = [number for number in stays.tolist() if number < len(before)]
    new = [new[number - len(before)] for number in stays.tolist() if number >= len(before)]
    return Annotation(
      kept,
      [box.box for box in new],
      [box.label for box in new],
      captions,
      tags,
      {kind: count for kind, count in dropped.items() if count},
    )

  def _captions(self, crops):
    captioner = self._captioner
    if captioner.threads > 1:
      answered = in_threads(lambda crop: captioner.answers([crop]), crops, captioner.threads)
      return [answer for _, [answer] in answered]
    found = []
    for first in range(0, len(crops), captioner.batch):
      found += captioner.answers(crops[first : first + captioner.batch])
    return found


def _crop(sample, picture, box):
  """What is in a box, as an image of its own."""
  corners = boxes_lib.pixels(box, picture.height, picture.width)
  out = io.BytesIO()
  picture.crop(corners).save(out, 'png', compress_level=1)
  return sample._replace(image=out.getvalue())


# --- boxes --------------------------------------------------------------------------------------


class Box(typing.NamedTuple):
  """A box that a detector found."""

  box: list[float]  # ymin, xmin, ymax, xmax, in [0, 1]
  label: str
  confidence: float


def usable(
  found: Sequence[Box], size: tuple[int, int], ask: Ask
) -> tuple[list[Box], dict[str, int]]:
  """(the boxes of an image of `size` (height, width) that stay, the surest first; how many do not,
  by kind).
  """
  dropped = {}
  sure = [box for box in found if box.confidence >= ask.confidence]
  dropped['box_unsure'] = len(found) - len(sure)
  # Of equally sure ones by place: two detectors may be asked in any order.
  sure.sort(key=lambda box: (-box.confidence, box.box, box.label))
  corners = np.array([box.box for box in sure], np.float64).reshape(-1, 4)
  sides = (corners[:, 2:] - corners[:, :2]) * size
  large = sides.min(axis=1, initial=np.inf) >= ask.least_side - _ROUNDING
  dropped['box_small'] = int(np.sum(~large))
  corners = corners[large]
  sure = [box for box, stays in zip(sure, large.tolist()) if stays]
  apart = boxes_lib.suppress(corners, ask.overlap)
  dropped['box_overlap'] = len(sure) - len(apart)
  dropped['box_many'] = max(len(apart) - ask.most, 0)
  return [sure[number] for number in apart[: ask.most]], dropped


# --- models -------------------------------------------------------------------------------------


def _pipeline(where, task, name, what, auto):
  """A pipeline of transformers around a model whose weights are all there."""
  transformers = pretrained.library(where)
  model = pretrained.load(where, name, what, auto)
  parts = {'image_processor': pretrained.processor(where, name, what, 'AutoImageProcessor')}
  if task.startswith('zero-shot'):
    parts['tokenizer'] = pretrained.processor(where, name, what, 'AutoTokenizer')
  return transformers.pipeline(task, model=model, device=pretrained.device(), **parts)


class Detector:
  """A pipeline that finds objects: of classes of its own, or of those that it is told."""

  def __init__(self, name: str, classes: Sequence[str]):
    where = '--detector'
    zero_shot = pretrained.library(where).MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING
    config = pretrained.processor(where, name, 'an object detector', 'AutoConfig')
    self.zero_shot = type(config) in zero_shot
    # What is dropped is counted. Images of several sizes do not go into one batch of a pipeline.
    self._more = {'threshold': 0.0, 'batch_size': 1}
    task = 'object-detection'
    auto = 'AutoModelForObjectDetection'
    if self.zero_shot:
      task = 'zero-shot-object-detection'
      auto = 'AutoModelForZeroShotObjectDetection'
      self._more['candidate_labels'] = list(classes)
    self._pipeline = _pipeline(where, task, name, 'an object detector', auto)
    if self.zero_shot and not classes:
      raise InputError(
        f'--detector: {name!r} finds what it is told; expected --classes=cat,dog or '
        f'--classes=FILE with a name on each line'
      )

  def find(self, pictures: Sequence[Image.Image]) -> list[list[Box]]:
    """The boxes of each image, cut at its edges."""
    found = []
    for picture, objects in zip(pictures, self._pipeline(list(pictures), **self._more)):
      found.append([_box(each, picture.height, picture.width) for each in objects])
    return found


def _box(found, height, width):
  pixels = found['box']
  corners = np.array([pixels[name] for name in ('ymin', 'xmin', 'ymax', 'xmax')], np.float64)
  # Those of a store; what is out of the image has no side left.
  corners = (corners / ([height, width] * 2)).clip(0, 1).astype(np.float32)
  return Box(corners.tolist(), one_line(found['label']), float(found['score']))


class Tagger:
  """A pipeline that classifies images: by classes of its own, or by names that it is told."""

  def __init__(self, name: str, tags: Sequence[str], batch: int):
    task = 'image-classification'
    what = 'an image classifier (a dual encoder needs --tags)'
    auto = 'AutoModelForImageClassification'
    self._more = {'batch_size': batch, 'top_k': None}
    if tags:
      task = 'zero-shot-image-classification'
      what = 'a dual encoder'
      auto = 'AutoModelForZeroShotImageClassification'
      self._more = {'batch_size': batch, 'candidate_labels': list(tags)}
      self._more['tokenizer_kwargs'] = {'truncation': True}
    self._pipeline = _pipeline('--tagger', task, name, what, auto)

  def choose(self, pictures: Sequence[Image.Image], ask: Ask) -> list[list[str]]:
    """The tags of each image, the surest first."""
    tags = []
    for found in self._pipeline(list(pictures), **self._more):
      sure = [each for each in found if each['score'] >= ask.tag_confidence]
      sure.sort(key=lambda each: (-each['score'], each['label']))
      tags.append([one_line(each['label']) for each in sure[: ask.most_tags]])
    return tags


class Segmenter:
  """SAM: a mask for each box."""

  def __init__(self, name: str):
    self._processor = pretrained.processor('--segmenter', name, 'a SAM')
    self._model = pretrained.load('--segmenter', name, 'a SAM', 'AutoModelForMaskGeneration')

  def stability(self, picture: Image.Image, boxes_R4: np.ndarray, shift: float) -> np.ndarray:
    """[R] mean intersection over union of the mask of each box with those of the same box moved
    along its diagonal by up to `shift` of its sides, to both ends.
    """
    moves = np.array([0.0, *_MOVES])[:, None, None] * shift
    sides = boxes_R4[:, 2:] - boxes_R4[:, :2]
    moved = boxes_R4 + moves * np.tile(sides, 2)  # [moves, R, 4]
    masks = self._masks(picture, moved.reshape(-1, 4)).reshape(*moved.shape[:2], -1)
    both = np.logical_and(masks[0], masks[1:]).sum(-1)
    one = np.logical_or(masks[0], masks[1:]).sum(-1)
    # Where there is no mask nothing is stable.
    return np.divide(both, one, out=np.zeros(both.shape), where=one > 0).mean(0)

  def _masks(self, picture, boxes):
    """bool [n, h, w] at the size of the model's masks, of the part that the image takes."""
    sides = np.array([picture.height, picture.width] * 2)
    corners = (boxes * sides)[:, [1, 0, 3, 2]].tolist()
    inputs = self._processor(images=picture, input_boxes=[corners], return_tensors='pt')
    inputs = inputs.to(self._model.device)
    seen = self._model.get_image_embeddings(inputs['pixel_values'])
    masks = []
    for first in range(0, len(corners), _PROMPTS):
      out = self._model(
        image_embeddings=seen,
        input_boxes=inputs['input_boxes'][:, first : first + _PROMPTS],
        multimask_output=False,
      )
      masks.append(out.pred_masks[0, :, 0].float().cpu().numpy() > 0)
    masks = np.concatenate(masks)
    # The image is padded to a square below and at the right.
    share = masks.shape[-1] / inputs['pixel_values'].shape[-1]
    height, width = np.ceil(inputs['reshaped_input_sizes'][0].cpu().numpy() * share).astype(int)
    return masks[:, :height, :width]

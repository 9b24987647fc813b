"""TIPS as data: which tower sees which view, and which losses follow.

The numbers come from the page of a scale (configs/vitg.py).

v1: TIPS, arXiv 2410.16512, section 3. v2: TIPSv2, arXiv 2604.12012, section 3. distilled: TIPSv2,
section 3.1. Three flat functions rather than one with switches, so that each reads as its figure.
"""

from configs.parts.recipe import Recipe, merge

# An image without alt text trains both branches on its caption (TIPS, Mapillary).
WEB = dict(field='alt_text', fallback='captions')


def v1(
  *,
  image: Recipe,
  text: Recipe,
  head: Recipe,
  views: Recipe,
  mask_ratio: float,
  temperature: float,
  weights: Recipe,
  dino: Recipe,
  momentum: Recipe,
) -> Recipe:
  """One EMA teacher of the image tower and the head; the patch loss sees masked patches only."""
  masked = 'masks.random.masked_indices'
  return dict(
    towers=dict(
      image=dict(kind='vit', cls=('web', 'synthetic'), mask_token=True) | image,
      text=dict(kind='text') | text,
      logit=dict(kind='logit', temperature=temperature),
      head=dict(kind='dino_head') | head,
    ),
    masks=dict(random=dict(kind='random', view='global', ratio=mask_ratio)),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      masked=dict(tower='image', inputs=dict(images='batch.global', mask='masks.random.mask')),
      local=dict(tower='image', inputs=dict(images='batch.local')),
      teacher=dict(by='ema', tower='image', inputs=dict(images='batch.global')),
      web_text=dict(tower='text', inputs=dict(ids='batch.web')),
      synthetic_text=dict(tower='text', inputs=dict(ids='batch.synthetic')),
      student_cls=dict(tower='head', inputs=dict(tokens='local.web')),
      student_patch=dict(tower='head', inputs=dict(tokens='masked.patch', masked_indices=masked)),
      teacher_cls=dict(by='ema', tower='head', inputs=dict(tokens='teacher.web')),
      teacher_patch=dict(
        by='ema', tower='head', inputs=dict(tokens='teacher.patch', masked_indices=masked)
      ),
    ),
    losses=_losses(weights, dino, teacher_head='ema.head', valid='masks.random.masked_valid'),
    teachers=dict(ema=dict(kind='ema', towers=('image', 'head'), momentum=momentum)),
    data=dict(views=views, texts=dict(web=WEB, synthetic=dict(field='captions', pick='first'))),
  )


def v2(
  *,
  image: Recipe,
  text: Recipe,
  head: Recipe,
  views: Recipe,
  mask_ratio: float,
  temperature: float,
  weights: Recipe,
  dino: Recipe,
  momentum: Recipe,
) -> Recipe:
  """iBOT++ (the patch loss sees all patches), EMA of the head alone, one of several captions.

  The clean pass of the student is the teacher's too: no second forward of the image tower.
  """
  return dict(
    towers=dict(
      image=dict(kind='vit', cls=('web', 'synthetic'), mask_token=True) | image,
      text=dict(kind='text') | text,
      logit=dict(kind='logit', temperature=temperature),
      head=dict(kind='dino_head') | head,
    ),
    masks=dict(random=dict(kind='random', view='global', ratio=mask_ratio)),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      masked=dict(tower='image', inputs=dict(images='batch.global', mask='masks.random.mask')),
      local=dict(tower='image', inputs=dict(images='batch.local')),
      web_text=dict(tower='text', inputs=dict(ids='batch.web')),
      synthetic_text=dict(tower='text', inputs=dict(ids='batch.synthetic')),
      student_cls=dict(tower='head', inputs=dict(tokens='local.web')),
      student_patch=dict(tower='head', inputs=dict(tokens='masked.patch')),
      teacher_cls=dict(by='ema', tower='head', inputs=dict(tokens='clean.web')),
      teacher_patch=dict(by='ema', tower='head', inputs=dict(tokens='clean.patch')),
    ),
    losses=_losses(weights, dino, teacher_head='ema.head'),
    teachers=dict(ema=dict(kind='ema', towers=('head',), momentum=momentum)),
    data=dict(views=views, texts=dict(web=WEB, synthetic=dict(field='captions', pick='random'))),
  )


def distilled(
  *,
  image: Recipe,
  text: Recipe,
  head: Recipe,
  teacher_image: Recipe,
  teacher_head: Recipe,
  views: Recipe,
  temperature: float,
  weights: Recipe,
  dino: Recipe,
) -> Recipe:
  """A frozen larger model instead of the EMA, no masking, the patch loss over all patches.

  The teacher is trained: it is as sharp as in the end of its training from the first step on.
  """
  return dict(
    towers=dict(
      image=dict(kind='vit', cls=('web', 'synthetic'), mask_token=True) | image,
      text=dict(kind='text') | text,
      logit=dict(kind='logit', temperature=temperature),
      head=dict(kind='dino_head') | head,
      large_image=dict(kind='vit', cls=('web', 'synthetic'), mask_token=True) | teacher_image,
      large_head=dict(kind='dino_head') | teacher_head,
    ),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      local=dict(tower='image', inputs=dict(images='batch.local')),
      teacher=dict(by='large', tower='large_image', inputs=dict(images='batch.global')),
      web_text=dict(tower='text', inputs=dict(ids='batch.web')),
      synthetic_text=dict(tower='text', inputs=dict(ids='batch.synthetic')),
      student_cls=dict(tower='head', inputs=dict(tokens='local.web')),
      student_patch=dict(tower='head', inputs=dict(tokens='clean.patch')),
      teacher_cls=dict(by='large', tower='large_head', inputs=dict(tokens='teacher.web')),
      teacher_patch=dict(by='large', tower='large_head', inputs=dict(tokens='teacher.patch')),
    ),
    losses=_losses(weights, held(dino), teacher_head='large.large_head'),
    teachers=dict(
      large=dict(
        kind='frozen',
        towers=('large_image', 'large_head'),
        rename=dict(large_image='image', large_head='head'),
      )
    ),
    data=dict(views=views, texts=dict(web=WEB, synthetic=dict(field='captions', pick='random'))),
  )


def _losses(weights: Recipe, dino: Recipe, *, teacher_head: str, valid: str = '') -> Recipe:
  """The four losses of TIPS, and a monitor of collapse that weighs nothing.

  valid: path that says which patches the patch loss counts; '': all.
  """
  prototypes = dict(
    student_prototypes='student.head.prototypes', teacher_prototypes=f'{teacher_head}.prototypes'
  )
  log_temperature = 'student.logit.log_temperature'
  contrastive = dict(label_smoothing=0.0)  # ours, as the two below (docs/method.md)
  counted = {}
  if valid:
    counted['valid'] = valid
  dino = dict(sinkhorn_iterations=3, reduction='mean') | dino
  return dict(
    contrastive_web=dict(
      kind='softmax_contrastive',
      inputs=dict(
        images='clean.web',
        texts='web_text.text',
        log_temperature=log_temperature,
        valid='batch.web_valid',
      ),
      weight=weights['contrastive'],
      args=contrastive,
    ),
    contrastive_synthetic=dict(
      kind='softmax_contrastive',
      inputs=dict(
        images='clean.synthetic',
        texts='synthetic_text.text',
        log_temperature=log_temperature,
        valid='batch.synthetic_valid',
      ),
      weight=weights['contrastive'],
      args=contrastive,
    ),
    distill=dict(
      kind='dino',
      inputs=dict(student='student_cls.z', teacher='teacher_cls.z') | prototypes,
      weight=weights['distill'],
      args=dino | dict(pairing='all'),  # every local crop against the one global crop
    ),
    masked=dict(
      kind='dino',
      inputs=dict(student='student_patch.z', teacher='teacher_patch.z') | prototypes | counted,
      weight=weights['masked'],
      args=dino | dict(pairing='same'),
    ),
    spread=dict(kind='spread', inputs=dict(features='clean.web'), weight=0.0),
  )


def separate_heads(recipe: Recipe) -> Recipe:
  """The patch loss has a head of its own. A frozen teacher must have been trained so too."""
  [teacher] = recipe['teachers']
  shared = recipe['passes']['teacher_patch']['tower']  # 'head' or 'large_head'
  own = shared.replace('head', 'patch_head')
  prototypes = dict(
    student_prototypes='student.patch_head.prototypes',
    teacher_prototypes=f'{teacher}.{own}.prototypes',
  )
  covered = dict(towers=(*recipe['teachers'][teacher]['towers'], own))
  if own != 'patch_head':
    covered['rename'] = {own: 'patch_head'}
  return merge(
    recipe,
    dict(
      towers={'patch_head': recipe['towers']['head'], own: recipe['towers'][shared]},
      passes=dict(student_patch=dict(tower='patch_head'), teacher_patch=dict(tower=own)),
      losses=dict(masked=dict(inputs=prototypes)),
      teachers={teacher: covered},
    ),
  )


def high_resolution(recipe: Recipe, **changes: Recipe) -> Recipe:
  """The stage after pretraining: all state but the step comes from the run `init_from`, and what
  moved in that run is held where it ended: sharpening and momentum do not start anew.

  The position table keeps its grid and is resized inside the model.
  """
  start = dict(
    name=f'{recipe["name"]}_hr',
    init_required=True,
    init_parts=('params', 'teachers', 'loss_state', 'optimizer'),
  )
  losses = {}
  for name, loss in recipe['losses'].items():
    if loss['kind'] == 'dino':
      losses[name] = dict(args=held(loss['args']))
  teachers = {name: held(teacher) for name, teacher in recipe['teachers'].items()}
  return merge(recipe, start, dict(losses=losses, teachers=teachers), changes)


def held(numbers: Recipe) -> Recipe:
  """The numbers of a loss or a teacher, those that move at their last value."""
  result = dict(numbers)
  for name, value in numbers.items():
    if isinstance(value, dict) and 'end' in value:
      result[name] = value['end']
  return result


def student_ema(recipe: Recipe) -> Recipe:
  """An average of the student, which nothing reads: for export (--weights=average). DINOv2 keeps
  one in its distillation (arXiv 2304.07193, section 5).
  """
  average = dict(
    kind='ema',
    towers=('image', 'text', 'logit'),
    momentum=0.999,  # ours: over about a thousand steps, a hundredth of the run
  )
  return merge(recipe, dict(teachers=dict(average=average)))


# Options that change any recipe of a page: --config=configs/vitb.py:v2,separate_heads.
CHANGES = {'separate_heads': separate_heads, 'student_ema': student_ema}

"""Pretraining methods as data: which tower sees which view, and which losses follow.

Every function returns the method's part of a config (towers, masks, passes, losses, teachers, views
and texts); the files beside this one add a scale, an optimizer and a schedule. Sources and
defaults: arXiv numbers below; BUILD.md tells how to add a method.
"""

from configs import scales

GLOBAL = dict(size=224, count=1, scale=(0.4, 1.0), flip=0.5)
LOCAL = dict(size=98, count=6, scale=(0.05, 0.4), flip=0.0)
WEB = dict(
  field='alt_text', fallback='captions'
)  # an image without alt text trains both branches on its caption
CLIP_TEXT = dict(field='alt_text', fallback='captions')
TEACHER_TEMPERATURE = dict(start=0.04, end=0.07, until=0.1)
SPREAD = lambda features: dict(kind='spread', inputs=dict(features=features), weight=0.0)


def head(scale, prototypes=32768):
  return dict(kind='dino_head', width=scales.width(scale), prototypes=prototypes)


def contrast(kind, images, texts, *, valid, weight=1.0, **args):
  inputs = dict(
    images=images, texts=texts, log_temperature='student.logit.log_temperature', valid=valid
  )
  if kind == 'sigmoid_contrastive':
    inputs['bias'] = 'student.logit.bias'
  return dict(kind=kind, inputs=inputs, weight=weight, args=args)


def distill(
  student, teacher, *, head='head', teacher_head='ema.head', weight=1.0, pairing='same', **args
):
  inputs = dict(
    student=f'{student}.z',
    teacher=f'{teacher}.z',
    student_prototypes=f'student.{head}.prototypes',
    teacher_prototypes=f'{teacher_head}.prototypes',
  )
  return dict(
    kind='dino',
    inputs=inputs,
    weight=weight,
    args=dict(pairing=pairing, teacher_temperature=TEACHER_TEMPERATURE, **args),
  )


def tips(scale, version='v1', *, teacher_scale='', separate_heads=False):
  """TIPS (arXiv 2410.16512, section 3) and TIPSv2 (arXiv 2604.12012, section 3); tips.md, sections
  2, 6 and 10.

  v2: iBOT++ (loss over all patches), head-only EMA (the clean student pass serves as the
  teacher's), a random one of several synthetic captions, a 32 x 32 position table. teacher_scale:
  distillation from a frozen larger model, without masking (TIPSv2, section 3.1).
  """
  v2, frozen = version == 'v2', bool(teacher_scale)
  grid, patch_head = 32 if v2 else 16, 'patch_head' if separate_heads else 'head'
  heads = {h: head(scale) for h in dict.fromkeys(['head', patch_head])}
  towers = dict(
    image=scales.image(scale, grid=grid, mask_token=True),
    text=scales.text(scale),
    logit=dict(kind='logit'),
    **heads,
  )
  by = 'large' if frozen else 'ema'
  tower = {'image': 'image', **{h: h for h in heads}}
  if frozen:
    tower = {name: f'large_{name}' for name in tower}
    towers |= {tower['image']: scales.image(teacher_scale, grid=grid, mask_token=True)}
    towers |= {tower[h]: head(teacher_scale) for h in heads}
  passes = dict(
    clean=dict(tower='image', inputs=dict(images='batch.global')),
    local=dict(tower='image', inputs=dict(images='batch.local')),
    web_text=dict(tower='text', inputs=dict(ids='batch.web')),
    synthetic_text=dict(tower='text', inputs=dict(ids='batch.synthetic')),
    student_cls=dict(tower='head', inputs=dict(tokens='local.web')),
  )
  target = 'clean'
  if frozen or not v2:
    target = 'teacher'
    passes |= dict(teacher=dict(by=by, tower=tower['image'], inputs=dict(images='batch.global')))
  masked_indices = {} if frozen or v2 else dict(masked_indices='masks.random.masked_indices')
  source = 'clean' if frozen else 'masked'
  if not frozen:
    passes |= dict(
      masked=dict(tower='image', inputs=dict(images='batch.global', mask='masks.random.mask'))
    )
  passes |= dict(
    student_patch=dict(tower=patch_head, inputs=dict(tokens=f'{source}.patch', **masked_indices)),
    teacher_cls=dict(by=by, tower=tower['head'], inputs=dict(tokens=f'{target}.web')),
    teacher_patch=dict(
      by=by, tower=tower[patch_head], inputs=dict(tokens=f'{target}.patch', **masked_indices)
    ),
  )
  losses = dict(
    contrastive_web=contrast(
      'softmax_contrastive', 'clean.web', 'web_text.text', valid='batch.web_valid', weight=0.5
    ),
    contrastive_synthetic=contrast(
      'softmax_contrastive',
      'clean.synthetic',
      'synthetic_text.text',
      valid='batch.synthetic_valid',
      weight=0.5,
    ),
    distill=distill(
      'student_cls', 'teacher_cls', teacher_head=f'{by}.{tower["head"]}', pairing='all'
    ),
    masked=distill(
      'student_patch',
      'teacher_patch',
      head=patch_head,
      teacher_head=f'{by}.{tower[patch_head]}',
      weight=2.0,
    ),
    spread=SPREAD('clean.web'),
  )
  if frozen:
    teacher = dict(
      kind='frozen',
      towers=tuple(tower.values()),
      rename={there: here for here, there in tower.items()},
    )
  else:
    covered = tuple(heads) if v2 else ('image', *heads)
    teacher = dict(kind='ema', towers=covered, momentum=dict(start=0.994, end=1.0, shape='cosine'))
  captions = dict(field='captions', pick='random' if v2 else 'first')
  return dict(
    towers=towers,
    masks={} if frozen else dict(random=dict(view='global', ratio=0.75)),
    passes=passes,
    losses=losses,
    teachers={by: teacher},
    data=dict(views={'global': GLOBAL, 'local': LOCAL}, texts=dict(web=WEB, synthetic=captions)),
    optimizer=dict(freeze_rules=(('.*/prototypes', 0.01), ('.*', 0.0))),
  )


def _two_towers(scale, logit, width):
  """Towers and passes that CLIP, SigLIP and SILC share."""
  project = dict(kind='projection', width=scales.width(scale), output=width)
  return dict(
    towers=dict(
      image=scales.image(scale, cls=('cls',)),
      text=scales.text(scale),
      logit=logit,
      image_projection=project,
      text_projection=project,
    ),
    passes=dict(
      clean=dict(tower='image', inputs=dict(images='batch.global')),
      text=dict(tower='text', inputs=dict(ids='batch.text')),
      image_embedding=dict(tower='image_projection', inputs=dict(x='clean.cls')),
      text_embedding=dict(tower='text_projection', inputs=dict(x='text.text')),
    ),
    losses=dict(spread=SPREAD('clean.cls')),
    data=dict(views={'global': GLOBAL}, texts=dict(text=CLIP_TEXT)),
    evals=dict(
      image_head='image_projection', text_head='text_projection', cls='cls', retrieval_cls='cls'
    ),
  )


_PAIR = ('image_embedding.embedding', 'text_embedding.embedding')


def clip(scale):
  """CLIP (arXiv 2103.00020): InfoNCE, one caption, logit scale at most 100."""
  c = _two_towers(scale, dict(kind='logit', temperature=0.07), 512)
  c['losses'] |= dict(
    contrastive=contrast('softmax_contrastive', *_PAIR, valid='batch.text_valid', max_scale=100.0)
  )
  return c


def siglip(scale):
  """SigLIP (arXiv 2303.15343): sigmoid loss, temperature 0.1 and bias -10 at the start."""
  c = _two_towers(scale, dict(kind='logit', temperature=0.1, bias=-10.0), 768)
  c['losses'] |= dict(contrastive=contrast('sigmoid_contrastive', *_PAIR, valid='batch.text_valid'))
  return c


def silc(scale):
  """SILC (arXiv 2310.13355): CLIP on two global views, and DINO from eight local ones; constant EMA
  momentum.
  """
  c = clip(scale)
  c['towers'] |= dict(head=head(scale, 65536))
  c['data']['views'] = {'global': GLOBAL | dict(count=2), 'local': LOCAL | dict(count=8, flip=0.5)}
  c['passes'] |= dict(
    local=dict(tower='image', inputs=dict(images='batch.local')),
    teacher=dict(by='ema', tower='image', inputs=dict(images='batch.global')),
    student_cls=dict(tower='head', inputs=dict(tokens='local.cls')),
    teacher_cls=dict(by='ema', tower='head', inputs=dict(tokens='teacher.cls')),
  )
  c['losses'] |= dict(distill=distill('student_cls', 'teacher_cls', pairing='all'))
  c['teachers'] = dict(ema=dict(kind='ema', towers=('image', 'head'), momentum=0.996))
  return c


def dino_ibot(scale):
  """DINO (arXiv 2104.14294) with iBOT (arXiv 2111.07832), as DINOv2 (arXiv 2304.07193) trains them:
  no text.

  2 global and 8 local crops; the 18 pairs of views weigh the same; Sinkhorn targets. Two choices
  differ from DINOv2: masks are random at one ratio rather than blocks at many, and there is no
  KoLeo term.
  """
  loss = dict(centering='sinkhorn')
  return dict(
    towers=dict(
      image=scales.image(scale, cls=('cls',), mask_token=True),
      head=head(scale, 65536),
      patch_head=head(scale, 65536),
    ),
    masks=dict(random=dict(view='global', ratio=0.3)),
    passes=dict(
      masked=dict(tower='image', inputs=dict(images='batch.global', mask='masks.random.mask')),
      local=dict(tower='image', inputs=dict(images='batch.local')),
      teacher=dict(by='ema', tower='image', inputs=dict(images='batch.global')),
      student_global=dict(tower='head', inputs=dict(tokens='masked.cls')),
      student_local=dict(tower='head', inputs=dict(tokens='local.cls')),
      student_patch=dict(
        tower='patch_head',
        inputs=dict(tokens='masked.patch', masked_indices='masks.random.masked_indices'),
      ),
      teacher_cls=dict(by='ema', tower='head', inputs=dict(tokens='teacher.cls')),
      teacher_patch=dict(
        by='ema',
        tower='patch_head',
        inputs=dict(tokens='teacher.patch', masked_indices='masks.random.masked_indices'),
      ),
    ),
    losses=dict(
      distill_global=distill(
        'student_global', 'teacher_cls', weight=2 / 18, pairing='other', **loss
      ),
      distill_local=distill('student_local', 'teacher_cls', weight=16 / 18, pairing='all', **loss),
      masked=distill(
        'student_patch', 'teacher_patch', head='patch_head', teacher_head='ema.patch_head', **loss
      ),
      spread=SPREAD('masked.cls'),
    ),
    teachers=dict(
      ema=dict(
        kind='ema',
        towers=('image', 'head', 'patch_head'),
        momentum=dict(start=0.992, end=1.0, shape='cosine'),
      )
    ),
    data=dict(
      views={
        'global': GLOBAL | dict(count=2, scale=(0.32, 1.0)),
        'local': LOCAL | dict(count=8, scale=(0.05, 0.32), flip=0.5),
      }
    ),
    optimizer=dict(freeze_rules=(('.*/prototypes', 0.01), ('.*', 0.0))),
    evals=dict(cls='cls', encoder='ema'),
  )


def mae(scale):
  """MAE (arXiv 2111.06377): the encoder sees a quarter of the patches, a small decoder paints the
  rest.
  """
  return dict(
    towers=dict(
      image=scales.image(scale, cls=('cls',)),
      decoder=dict(kind='pixel_decoder', width=scales.width(scale)),
    ),
    masks=dict(random=dict(view='global', ratio=0.75)),
    passes=dict(
      visible=dict(
        tower='image', inputs=dict(images='batch.global', visible='masks.random.visible')
      ),
      painted=dict(
        tower='decoder',
        inputs=dict(
          patch='visible.patch', visible='masks.random.visible', mask='masks.random.mask'
        ),
      ),
    ),
    losses=dict(
      pixels=dict(
        kind='pixels',
        inputs=dict(prediction='painted.pixels', images='batch.global', mask='masks.random.mask'),
        args=dict(patch=14),
      ),
      spread=SPREAD('visible.cls'),
    ),
    data=dict(views={'global': GLOBAL | dict(scale=(0.2, 1.0))}),
    evals=dict(cls='cls'),
  )

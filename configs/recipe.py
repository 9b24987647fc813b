"""Puts a config together: method + scale + schedule, the stages after pretraining, and `runlocal`."""

import ml_collections

from configs import scales
from tips_jax.core import schema, strict


def merge(*parts):
  """Nested dicts, later ones win."""
  result = {}
  for part in parts:
    for key, value in part.items():
      both = isinstance(value, dict) and isinstance(result.get(key), dict)
      result[key] = merge(result[key], value) if both else value
  return result


def finish(config, arg=''):
  """An ml_collections config with every field of the schema; `arg` 'runlocal' shrinks it to seconds
  on a CPU.
  """
  options = [o for o in arg.split(',') if o]
  _known(options, ('runlocal',))
  config = runlocal(config) if options else config
  return ml_collections.ConfigDict(strict.plain(strict.build(schema.Config, config)))


def _known(options, known):
  for option in options:
    if option not in known:
      raise strict.unknown('--config argument', option, known)


def version(arg):
  """('v1' or 'v2', rest) of a config argument such as 'v2,runlocal'."""
  options = [o for o in arg.split(',') if o]
  _known(options, ('runlocal', 'v1', 'v2'))
  return 'v2' if 'v2' in options else 'v1', ','.join(o for o in options if o not in ('v1', 'v2'))


def pretrain(name, method, scale, *, steps, batch=16384, **more):
  """Adafactor, linear warm-up over 2 % (at least 2,000 steps) and linear decay (tips.md, section
  9).
  """
  return merge(
    dict(
      name=name,
      compute=scales.compute(scale),
      mesh=scales.mesh(scale),
      optimizer=dict(kind='adafactor', learning_rate=5e-4),
      schedule=dict(
        total_steps=steps, batch_size=batch, warmup_steps=max(2000, steps // 50), decay='linear'
      ),
    ),
    method,
    more,
  )


def high_resolution(config, *, steps, batch=4096):
  """The 448 / 140 pixel stage: a tenth of the rate, all state but the step from the run named by
  `init_from`.
  """
  rate = config['optimizer']['learning_rate'] / 10
  return merge(
    config,
    dict(
      name=config['name'] + '_hr',
      init_parts=('params', 'teachers', 'loss_state', 'optimizer'),
      data=dict(views={'global': dict(size=448), 'local': dict(size=140)}),
      evals=dict(size=448),
      optimizer=dict(learning_rate=rate, freeze_rules=(('.*', 0.0),)),
      schedule=dict(total_steps=steps, batch_size=batch, warmup_steps=steps // 10),
    ),
  )


def late(method, *names, share=1.0, begin=0.1, until=0.3):
  """The method with these losses' weights, times `share`, raised from zero: a short run needs
  features to distil.
  """
  for name in names:
    weight = method['losses'][name]['weight'] * share
    method['losses'][name]['weight'] = dict(start=0.0, end=weight, begin=begin, until=until)
  return method


def runlocal(config):
  """The same program on generated scenes with tiny towers: seconds on a laptop."""
  config = merge(
    config,
    dict(
      compute=dict(dtype='float32', remat='none'),
      mesh=dict(data=-1, fsdp=1),
      data=dict(
        store='', extra_stores=(), tokenizer='', scenes=dict(train=96, test=32, size=64), threads=2
      ),
      schedule=dict(total_steps=8, batch_size=8, warmup_steps=2),
      init_from='',
      checkpoint=dict(every_steps=4),
      log=dict(every_steps=1),
      evals=dict(size=56, batch_size=16, limit=64),
    ),
  )
  for name, tower in config['towers'].items():
    kind, width = tower['kind'], scales.width('tiny')
    small = dict(width=width)
    if kind == 'vit':
      tiny = scales.image('tiny', cls=tower['cls'], grid=4, mask_token=tower['mask_token'])
      small = tiny | dict(ffn=tower['ffn'])
    elif kind == 'text':
      small = scales.text('tiny', vocab=1024)
    elif kind == 'dino_head':
      small |= dict(hidden=32, bottleneck=16, prototypes=64)
    elif kind == 'projection':
      small |= dict(output=16)
    elif kind == 'pixel_decoder':
      small |= dict(decoder_width=16, depth=1, heads=2, mlp=32, grid=4)
    elif kind == 'logit':
      small = {}
    config['towers'][name] = tower | small
  for name, view in config['data']['views'].items():
    config['data']['views'][name] = view | dict(
      size=28 if name == 'local' else 56, count=min(view.get('count', 1), 2)
    )
  return config

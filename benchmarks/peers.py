"""Our work beside that of others on the same machine: seconds, the ratio and the peak memory.

  pip install open_clip_torch
  git clone https://github.com/facebookresearch/dinov2
  python benchmarks/peers.py [siglip] [dino_ibot] [encode] [--dinov2=FOLDER] [--rounds=5]

siglip: a training step with the sigmoid loss, ViT of width 384 and patches of 16, 224 pixels, 64
words, against open_clip. dino_ibot: a training step of ViT-S/14, two crops of 224 and eight of 98
pixels, two heads of 65,536 prototypes, targets by Sinkhorn, against the modules of dinov2 (its
models, heads and losses; arranged here, as its own step asks for a GPU). encode:
`benchmarks/encode.py`, tips_jax.load against transformers. Without a name: all three.

Random weights and pixels, AdamW, float32, all cores that the process may use. Each side is a
process of its own that stays; the two take turns, and each turn is a step. The ratio is that of a
round's two times: above 1, ours is faster. Where other programs want the cores, the time of the
processors is to be trusted, not the clock's.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import time

import numpy as np

from tips_jax.core.processes import cores

ROOT = pathlib.Path(__file__).resolve().parent.parent
PEERS = {'siglip': 'open_clip', 'dino_ibot': 'dinov2'}
BATCH = {'siglip': 16, 'dino_ibot': 4}
WIDTH, DEPTH, HEADS = 384, 12, 6
WORDS, VOCABULARY = 64, 32_000
CROPS = {'global': (2, 224), 'local': (8, 98)}
HEAD = dict(hidden=2048, bottleneck=256, layers=3, prototypes=65_536)
# Of DINOv2: half of the crops are masked, a tenth to a half of their patches.
RATIO, MASKED = (0.1, 0.5), 0.5
RATE = 1e-4
KINDS = ('clock', 'processors')


def ours(work):
  """A function that does a step and gives its loss, as `open_clip` and `dinov2` do."""
  sys.path.insert(0, str(ROOT))
  import jax

  from configs.methods import dino_ibot, siglip
  from tips_jax.core import schema, strict
  from tips_jax.data.reading.batch import layout
  from tips_jax.train import lowering, sharding, state
  from tips_jax.train import method as method_lib

  config = {'siglip': siglip, 'dino_ibot': dino_ibot}[work].get_config()
  size = dict(width=WIDTH, depth=DEPTH, heads=HEADS, mlp=4 * WIDTH)
  config.towers.image.update(size | dict(ffn='gelu', patch=14, grid=16))
  if work == 'siglip':
    config.towers.image.update(dict(patch=16, grid=14))
    config.towers.text.update(size | dict(vocab=VOCABULARY))
    for projection in ('image_projection', 'text_projection'):
      config.towers[projection].update(dict(width=WIDTH, output=WIDTH))
    config.data.text_length = WORDS
  else:
    config.towers.image.drop_path = 0.0
    for head in ('head', 'patch_head'):
      config.towers[head].update(HEAD | dict(width=WIDTH))
  config.optimizer.update(dict(kind='adamw', learning_rate=RATE, b2=0.999))
  for of_adafactor in ('b2_cap', 'decay_times'):
    if of_adafactor in config.optimizer:
      del config.optimizer[of_adafactor]
  config.schedule.update(dict(batch_size=BATCH[work], warmup_steps=0, total_steps=1000))
  config.compute.update(dict(dtype='float32', remat='none'))
  method = method_lib.build(strict.build(schema.Config, config))
  rng = np.random.default_rng(0)
  batch = {}
  for name, entry in layout(method.config.data).items():
    high = {np.uint8: 256, np.int32: 300, np.bool_: 2}[entry.dtype]
    batch[name] = rng.integers(0, high, (BATCH[work], *entry.shape)).astype(entry.dtype)
  mesh = sharding.make_mesh(method.config.mesh, BATCH[work])
  with jax.set_mesh(mesh):
    now = jax.jit(lambda: state.init(method))()
    batch = jax.device_put(batch, sharding.batch(mesh))
    compiled = lowering.compiled(lowering.lower(method, mesh))

  def step():
    nonlocal now
    now, metrics = compiled(now, batch)
    return float(metrics['loss'])

  return step


def open_clip(work):
  import torch
  from open_clip import loss as losses
  from open_clip import model as models

  del work
  tanh = {'approximate': 'tanh'}  # as ours
  model = models.CLIP(
    embed_dim=WIDTH,
    vision_cfg=models.CLIPVisionCfg(
      layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, patch_size=16, act_kwargs=tanh
    ),
    text_cfg=models.CLIPTextCfg(
      context_length=WORDS,
      vocab_size=VOCABULARY,
      width=WIDTH,
      heads=HEADS,
      layers=DEPTH,
      no_causal_mask=True,
      act_kwargs=tanh,
    ),
    init_logit_scale=np.log(10),
    init_logit_bias=-10,
  )
  criterion = losses.SigLipLoss()
  optimizer = torch.optim.AdamW(model.parameters(), RATE)
  images = torch.rand(BATCH['siglip'], 3, 224, 224)
  texts = torch.randint(1, 300, (BATCH['siglip'], WORDS))

  def step():
    optimizer.zero_grad()
    features = model(images, texts)
    loss = criterion(*features)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())

  return step


def dinov2(work, folder):
  """A step of its own train/ssl_meta_arch.py, with its modules, without xFormers and a GPU."""
  del work
  os.environ['XFORMERS_DISABLED'] = '1'
  sys.path.insert(0, folder)
  import torch
  from dinov2.layers import DINOHead
  from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
  from dinov2.models import vision_transformer

  # Its loss of patches sums their number over processes.
  torch.distributed.init_process_group(
    'gloo', store=torch.distributed.HashStore(), rank=0, world_size=1
  )

  def network():
    head = dict(
      in_dim=WIDTH,
      out_dim=HEAD['prototypes'],
      hidden_dim=HEAD['hidden'],
      bottleneck_dim=HEAD['bottleneck'],
      nlayers=HEAD['layers'],
    )
    return torch.nn.ModuleDict(
      dict(
        backbone=vision_transformer.vit_small(
          patch_size=14, img_size=224, init_values=1e-5, block_chunks=0
        ),
        head=DINOHead(**head),
        patch_head=DINOHead(**head),
      )
    )

  student = network()
  teacher = network().requires_grad_(False)
  teacher.load_state_dict(student.state_dict())
  cls_loss = DINOLoss(HEAD['prototypes'])
  patch_loss = iBOTPatchLoss(HEAD['prototypes'])
  koleo_loss = KoLeoLoss()
  optimizer = torch.optim.AdamW(student.parameters(), RATE, betas=(0.9, 0.999))
  images = BATCH['dino_ibot']
  crops = {}
  for name, (count, pixels) in CROPS.items():
    crops[name] = torch.rand(count * images, 3, pixels, pixels)
  masks = _masks(2 * images)
  indices = torch.from_numpy(np.flatnonzero(masks))
  weights = np.broadcast_to(1 / np.maximum(masks.sum(1, keepdims=True), 1), masks.shape)[masks]
  weights = torch.from_numpy(weights.astype(np.float32))
  masks = torch.from_numpy(masks)
  locals_, globals_ = CROPS['local'][0], 2
  pairs = globals_ * (globals_ - 1) + globals_ * locals_

  @torch.no_grad()
  def targets():
    seen = teacher.backbone(crops['global'], is_training=True)
    first, second = seen['x_norm_clstoken'].chunk(2)
    cls = teacher.head(torch.cat((second, first)))  # the target of a crop is the other one
    patches = teacher.patch_head(seen['x_norm_patchtokens'].flatten(0, 1)[indices])
    of_cls = cls_loss.sinkhorn_knopp_teacher(cls, 0.07)
    count = torch.tensor(len(indices))
    return of_cls, patch_loss.sinkhorn_knopp_teacher(patches, 0.07, count)

  def step():
    optimizer.zero_grad()
    of_cls, of_patches = targets()
    seen = student.backbone(crops['global'], masks=masks, is_training=True)
    near = student.backbone(crops['local'], is_training=True)['x_norm_clstoken']
    far = seen['x_norm_clstoken']
    patches = student.patch_head(seen['x_norm_patchtokens'].flatten(0, 1)[indices])
    both = student.head(torch.cat((near, far)))
    of_near, of_far = both.split((len(near), len(far)))
    loss = cls_loss(of_near.chunk(locals_), list(of_cls.chunk(2))) / pairs
    loss = loss + cls_loss([of_far], [of_cls]) * globals_ / pairs
    loss = loss + patch_loss.forward_masked(patches, of_patches, masks, len(indices), weights)
    loss = loss + 0.1 * sum(koleo_loss(x) for x in far.chunk(2))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 3.0)
    optimizer.step()
    with torch.no_grad():
      for mine, theirs in zip(teacher.parameters(), student.parameters()):
        mine.lerp_(theirs, 0.006)
    return float(loss.detach())

  return step


def _masks(count):
  """[count, 256] bool: of every second crop a part of the patches, in equal steps of its size."""
  rng = np.random.default_rng(0)
  masks = np.zeros((count, 256), bool)
  masked = round(MASKED * count)
  for row, ratio in zip(masks, np.linspace(*RATIO, masked)):
    row[rng.permutation(256)[: round(ratio * 256)]] = True
  return masks


def serve(work, side, folder):
  """One step for each line that is read; a line of JSON after each, and one when it is ready."""
  if side == 'ours':
    step = ours(work)
  else:
    import torch

    torch.set_num_threads(cores())
    arguments = {'open_clip': (), 'dinov2': (folder,)}[side]
    step = {'open_clip': open_clip, 'dinov2': dinov2}[side](work, *arguments)
  step()
  answer({})
  for _ in sys.stdin:
    begin = time.perf_counter(), time.process_time()
    loss = step()
    seconds = time.perf_counter() - begin[0], time.process_time() - begin[1]
    answer(dict(seconds=seconds, loss=loss))


def answer(values):
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  print(json.dumps(values | dict(peak=peak)), flush=True)


class Side:
  """A process that does steps of one side."""

  def __init__(self, work, name, folder):
    self.name = name
    # For both what our programs set for themselves (tips_jax/runtime/huge_pages.py).
    environment = {'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=1'} | os.environ
    self._process = subprocess.Popen(
      [sys.executable, __file__, '--serve', work, name, folder or ''],
      text=True,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environment,
    )
    self.peak = self._read()['peak']

  def step(self):
    """(Seconds, seconds of processors) of one step."""
    self._process.stdin.write('\n')
    self._process.stdin.flush()
    values = self._read()
    self.peak = values['peak']
    if not np.isfinite(values['loss']):
      raise SystemExit(f'{self.name}: the loss is {values["loss"]}')
    return values['seconds']

  def _read(self):
    for line in self._process.stdout:
      if line.startswith('{'):
        return json.loads(line)
    raise SystemExit(f'{self.name} ended; what it said is above')

  def close(self):
    self._process.stdin.close()
    self._process.wait()


def compare(work, folder, rounds):
  """Two rows of the table, by the clock and by the processors."""
  peer = PEERS[work]
  sides = [Side(work, name, folder) for name in ('ours', peer)]
  times = {side.name: [] for side in sides}
  for i in range(rounds):
    for side in sides[:: 1 if i % 2 else -1]:
      times[side.name].append(side.step())
  peaks = [side.peak for side in sides]
  for side in sides:
    side.close()
  for kind, ours_of, peers_of in zip(KINDS, zip(*times['ours']), zip(*times[peer])):
    ratios = sorted(b / a for a, b in zip(ours_of, peers_of))
    print(
      f'{work:10} {peer:10} {kind:10} {statistics.median(ours_of):8.2f} '
      f'{statistics.median(peers_of):8.2f}  '
      f'{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})     '
      f'{peaks[0]:6.2f} {peaks[1]:6.2f}',
      flush=True,
    )


def missing(work, folder):
  """What keeps a comparison from being made, or ''."""
  if work == 'siglip' and not importlib.util.find_spec('open_clip'):
    return 'open_clip is not installed; expected `pip install open_clip_torch`'
  if work == 'dino_ibot' and not pathlib.Path(folder, 'dinov2', 'loss').is_dir():
    return f'--dinov2: got {folder!r}; expected a clone of github.com/facebookresearch/dinov2'
  if not importlib.util.find_spec('torch'):
    return "torch is not installed; expected `pip install -e '.[cpu,test]'`"
  if work == 'encode' and not importlib.util.find_spec('transformers'):
    return "transformers is not installed; expected `pip install -e '.[cpu,test]'`"
  return ''


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  works = (*PEERS, 'encode')
  parser.add_argument('works', nargs='*', metavar='work', help=', '.join(works))
  parser.add_argument('--dinov2', default='', help='a clone of its repository')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  for work in args.works:
    if work not in works:
      parser.error(f'got {work!r}; expected {", ".join(works)}')
  works = args.works or works
  for work in works:
    reason = missing(work, args.dinov2)
    if reason:
      parser.error(f'{work}: {reason}')
  print(f'{cores()} cores; medians of {args.rounds} rounds; seconds a step; GB at most')
  print(
    f'{"work":10} {"peer":10} {"time":10} {"ours":>8} {"peer":>8}  ratio (range)        ours   peer'
  )
  for work in works:
    if work in PEERS:
      compare(work, args.dinov2, args.rounds)
  if 'encode' in works:
    program = [sys.executable, str(ROOT / 'benchmarks' / 'encode.py'), '--sizes=S']
    subprocess.run([*program, f'--rounds={args.rounds}'], check=True)


if __name__ == '__main__':
  match sys.argv[1:]:
    case ['--serve', work, side, folder]:
      serve(work, side, folder)
    case _:
      main()

"""The training step of TIPS v2 in plain torch: a twin of ours, which torch_step.py measures.

The same towers, crops, heads, losses, EMA and Adafactor, from the same config; parameters have our
names and shapes, so that both can start from the same numbers (tests/test_torch_twin.py compares
parameters, FLOPs, the loss and what a step changes). As a practitioner would write it: autocast to
bfloat16 over float32 weights, torch's fused attention, one product for q, k and v, clean and masked
crops as one batch, `torch.compile` of each part (a block once for all layers), logits of the
prototypes in chunks that the backward pass forms again. Left out: our monitors of collapse, and the
check that nothing is infinite or NaN.
"""

import contextlib
import functools
import math

import torch
import torch.nn.functional as F

from tips_jax.core import tree
from tips_jax.core.errors import InputError
from tips_jax.core.strict import unknown
from tips_jax.train import method as method_lib
from tips_jax.train import optim
from tips_jax.train import state as state_lib

CHUNK = 8192  # tokens whose logits are held at once


def unit(x, dim=-1):
  x = x.float()
  return x * torch.rsqrt((x * x).sum(dim, keepdim=True).clamp_min(1e-12))


def norm(x, p, name):
  y = F.layer_norm(x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], 1e-6)
  return y.to(x.dtype)


def linear(x, p, name):
  return F.linear(x, p[f'{name}/kernel'].T, p[f'{name}/bias'])


def block(x, p, heads: int, ffn: str, keep=None):
  """Tokens [N, T, D] through a pre-norm block; keep [N, T] bool: the tokens that are read."""
  n, t, d = x.shape
  names = ('query', 'key', 'value')
  kernel = torch.cat([p[f'attention/{name}/kernel'] for name in names], 1)
  bias = torch.cat([p[f'attention/{name}/bias'] for name in names])
  qkv = F.linear(norm(x, p, 'norm1'), kernel.T, bias)
  q, k, v = qkv.view(n, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
  mask = None if keep is None else keep[:, None, None, :]
  y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
  x = x + linear(y.transpose(1, 2).reshape(n, t, d), p, 'attention/out')
  h = norm(x, p, 'norm2')
  up = linear(h, p, 'mlp/up')
  if ffn == 'swiglu':
    hidden = F.silu(linear(h, p, 'mlp/gate')) * up
  elif ffn == 'gelu':
    hidden = F.gelu(up, approximate='tanh')
  else:
    hidden = F.relu(up)
  y = linear(hidden, p, 'mlp/down')
  if keep is not None:
    y = y * keep[..., None].to(y.dtype)
  return x + y


def head(tokens, p, layers: int):
  """Bottlenecks on the unit sphere, float32."""
  x = linear(tokens, p, 'layer0')
  for i in range(1, layers):
    x = linear(F.gelu(x, approximate='tanh'), p, f'layer{i}')
  return unit(x)


def cross_entropy(s, t, ws, wt, offset, tau_s, tau_t):
  """Sum over the student's tokens s [B, V, P, D], of the teacher's t [B, 1, P, D]."""
  teacher = (t.to(wt.dtype) @ wt).float() / tau_t - offset
  student = (s.to(ws.dtype) @ ws).float() / tau_s
  return -(teacher.softmax(-1) * student.log_softmax(-1)).sum()


def contrastive(images, texts, log_temperature, valid):
  """Symmetric InfoNCE of [B, D] and [B, D] over the pairs that are `valid`."""
  logits = unit(images) @ unit(texts).T * torch.exp(-log_temperature)
  weights = valid.float()
  total = 0.0
  for of in (logits, logits.T):
    own = of.diagonal()
    rest = of.masked_fill(~valid, -math.inf).logsumexp(1)
    total = total + (torch.where(valid, rest - own, 0.0) * weights).sum()
  return 0.5 * total / weights.sum().clamp_min(1)


def adafactor(p, g, state, decay, b1: float, rate, shrink):
  """The new p, in place, by g, the gradient; state: factored second moment, first in bfloat16."""
  square = g * g + 1e-30
  if 'row' in state:
    state['row'].lerp_(square.mean(-1), 1 - decay)
    state['column'].lerp_(square.mean(-2), 1 - decay)
    row = state['row'] / state['row'].mean(-1, keepdim=True)
    direction = g * row.rsqrt()[..., None] * state['column'].rsqrt()[..., None, :]
  else:
    state['square'].lerp_(square, 1 - decay)
    direction = g * state['square'].rsqrt()
  first = b1 * state['first'].float() + (1 - b1) * direction
  state['first'].copy_(first)
  p.sub_(rate * first + shrink * p)


def moments(p):
  """The state of `adafactor`; factored as optax does, over the two last dimensions where they are
  the largest and of at least 48 (train/optim.py).
  """
  state = {'first': torch.zeros_like(p, dtype=torch.bfloat16)}
  if p.ndim < 2 or sorted(p.shape)[-2] < 48:
    return state | {'square': torch.zeros_like(p)}
  return state | {
    'row': p.new_zeros(p.shape[:-1]),
    'column': p.new_zeros((*p.shape[:-2], p.shape[-1])),
  }


class Twin:
  """Parameters {name: tensor} and what a step changes."""

  def __init__(self, config, *, device, mode='none', checkpoint=False):
    self.config = c = config
    self.device = device
    self.checkpoint = checkpoint
    self.method = method_lib.build(c)
    check(c)
    self.fn = {
      f.__name__: f if mode == 'none' else torch.compile(f, mode=mode, dynamic=False)
      for f in (norm, block, head, cross_entropy, adafactor)
    }
    # A program for each shape; beyond its limit torch would stop compiling without an error.
    torch._dynamo.config.recompile_limit = 64
    shapes = shapes_of(self.method)
    self.params = {name: initial(name, shape, c, device) for name, shape in shapes.items()}
    self.teacher = {
      name.removeprefix('head/'): p.clone()
      for name, p in self.params.items()
      if name.startswith('head/')
    }
    for p in self.params.values():
      p.requires_grad_()
    self.moments = {name: moments(p.detach()) for name, p in self.params.items()}
    size = c.towers['head'].prototypes
    self.centers = {loss: torch.zeros(size, device=device) for loss in ('distill', 'masked')}
    self.steps = 0

  def of(self, tower):
    """{name within the tower: parameter}"""
    start = f'{tower}/'
    return {k.removeprefix(start): p for k, p in self.params.items() if k.startswith(start)}

  def blocks(self, tower, ffn, p, x, keep=None):
    prefix = 'encoder/blocks/'
    stacks = {k.removeprefix(prefix): v.unbind(0) for k, v in p.items() if k.startswith(prefix)}
    run = functools.partial(self.fn['block'], heads=tower.heads, ffn=ffn, keep=keep)
    for layer in range(tower.depth):
      weights = {k: v[layer] for k, v in stacks.items()}
      if self.checkpoint:
        x = torch.utils.checkpoint.checkpoint(run, x, weights, use_reentrant=False)
      else:
        x = run(x, weights)
    return self.fn['norm'](x, {k: p[k] for k in ('norm/scale', 'norm/bias')}, 'norm')

  def image_tokens(self, images, p):
    """Patches [N, h, w, D] of images [N, H, W, 3] uint8, and their positions [1, h, w, D]."""
    size = self.config.towers['image'].patch
    n, height, width, _ = images.shape
    h, w = height // size, width // size
    x = images.view(n, h, size, w, size, 3).transpose(2, 3).reshape(n, h, w, -1)
    kernel = p['embedding/kernel'].flatten(0, 2)
    x = x.to(self.dtype) @ kernel
    x = x / 255 + p['embedding/bias'].to(x.dtype)
    table = p['posembed'].permute(0, 3, 1, 2)
    if table.shape[2:] != (h, w):
      table = F.interpolate(table, (h, w), mode='bilinear', antialias=True)
    return x, table.permute(0, 2, 3, 1).to(x.dtype)

  def image(self, tokens, p):
    """(CLS tokens {name: [N, D]}, patches [N, P, D]) of patches [N, h, w, D] with positions."""
    tower = self.config.towers['image']
    cls = p['cls'].to(tokens.dtype).expand(len(tokens), -1, -1)
    x = torch.cat([cls, tokens.flatten(1, 2)], 1)
    x = self.blocks(tower, tower.ffn, p, x)
    # Their gradients are joined once; that of a slice would be as large as x.
    *first, patches = x.split([1] * len(tower.cls) + [x.shape[1] - len(tower.cls)], 1)
    return {name: token[:, 0] for name, token in zip(tower.cls, first)}, patches

  def text(self, ids):
    """[N, D] of ids [N, T], 0 is padding."""
    tower = self.config.towers['text']
    p = self.of('text')
    keep = ids != 0
    read = keep | ~keep.any(1, keepdim=True)
    x = F.embedding(ids, p['embedding']) * math.sqrt(tower.width)
    x = (x + sines(ids.shape[1], tower.width, x.device)).to(self.dtype)
    x = self.blocks(tower, 'relu', p, x, read).float()
    weights = keep[..., None].float()
    return (x * weights).sum(1) / weights.sum(1).clamp_min(1)

  def scalar(self, value):
    """A number on the device, for which nothing waits, and no value of which compiles anew."""
    return torch.full((), float(value), device=self.device)

  @property
  def dtype(self):
    return getattr(torch, self.config.compute.dtype)

  def dino(self, name, s, t, progress):
    """A loss over prototypes, and the new center; s [B, V, P, D], t [B, 1, P, D]."""
    args = self.config.losses[name].args
    of = lambda key, default: float(optim.ramp(args.get(key, default), progress))
    tau_s, tau_t = of('student_temperature', 0.1), of('teacher_temperature', 0.07)
    dtype = getattr(torch, args.get('logits', 'float32'))
    ws = unit(self.params['head/prototypes'], 0)
    wt = unit(self.teacher['prototypes'], 0)
    center = self.centers[name]
    images = max(1, CHUNK // (s.shape[1] * s.shape[2]))
    taus = [self.scalar(tau) for tau in (tau_s, tau_t)]
    total = 0.0
    for part_s, part_t in zip(s.split(images), t.split(images)):
      inputs = part_s, part_t, ws.to(dtype), wt.to(dtype), center / tau_t, *taus
      total = total + torch.utils.checkpoint.checkpoint(
        self.fn['cross_entropy'], *inputs, use_reentrant=False
      )
    momentum = of('center_momentum', 0.9)
    new = momentum * center + (1 - momentum) * (t.mean((0, 1, 2)) @ wt)
    return total / math.prod(s.shape[:3]), new

  def loss(self, batch, mask):
    """(the sum of all losses, new centers); batch as ours, mask [B, P] bool: patches hidden."""
    c = self.config
    progress = self.steps / c.schedule.total_steps
    b = len(mask)
    lower = contextlib.nullcontext()
    if self.dtype != torch.float32:
      lower = torch.autocast(self.device, self.dtype)
    with lower:
      p = self.of('image')
      x, places = self.image_tokens(batch['global'][:, 0], p)
      hidden = torch.where(mask.view(*x.shape[:3], 1), p['mask_token'].to(x.dtype), x)
      cls, patches = self.image(torch.cat([x + places, hidden + places]), p)
      clean_cls = {name: token[:b] for name, token in cls.items()}
      clean, masked = patches.split(b)
      x, places = self.image_tokens(batch['local'].flatten(0, 1), p)
      local, _ = self.image(x + places, p)
      texts = self.text(torch.cat([batch['web'], batch['synthetic']])).split(b)
      layers = c.towers['head'].layers
      run = functools.partial(self.fn['head'], layers=layers)
      student = run(local['web'], self.of('head')), run(masked, self.of('head'))
      with torch.no_grad():
        teacher = run(clean_cls['web'], self.teacher), run(clean, self.teacher)
    total = 0.0
    for name, of_text in zip(('web', 'synthetic'), texts):
      value = contrastive(
        clean_cls[name],
        of_text,
        self.params['logit/log_temperature'],
        batch[f'{name}_valid'],
      )
      total = total + c.losses[f'contrastive_{name}'].weight * value
    shapes = dict(distill=(b, -1, 1), masked=(b, 1, clean.shape[1]))
    centers = {}
    for (name, shape), s, t in zip(shapes.items(), student, teacher):
      value, centers[name] = self.dino(
        name, s.view(*shape, s.shape[-1]), t.view(b, 1, shape[2], -1), progress
      )
      total = total + c.losses[name].weight * value
    return total, centers

  def step(self, batch, mask):
    """One step; the loss, still on the device."""
    loss, centers = self.loss(batch, mask)
    gradients = torch.autograd.grad(loss, list(self.params.values()))
    self.update(gradients)
    self.centers = centers
    return loss.detach()

  @torch.no_grad()
  def update(self, gradients):
    """Adafactor, then the teacher's head."""
    c, o = self.config, self.config.optimizer
    size = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (o.clip_norm / size).clamp_max(1))
    rate = float(optim.learning_rate(c)(self.steps))
    decay = self.scalar(min(1 - (self.steps + 1.0) ** -0.8, o.b2_cap))
    for (name, p), g in zip(self.params.items(), gradients):
      moved = rate * optim.moves(c, name, self.steps)
      shrink = moved * o.weight_decay * tree.match(o.decay_rules, name, 'optimizer.decay_rules')
      inputs = p.detach(), g, self.moments[name], decay, o.b1, self.scalar(moved)
      self.fn['adafactor'](*inputs, self.scalar(shrink))
    progress = self.steps / c.schedule.total_steps
    momentum = float(optim.ramp(c.teachers['ema'].momentum, progress))
    new = [self.params[f'head/{name}'].detach() for name in self.teacher]
    torch._foreach_lerp_(list(self.teacher.values()), new, 1 - momentum)
    self.steps += 1


def sines(length, width, device):
  """Positions of words: sines, then cosines."""
  scales = width // 2
  rate = torch.exp(-torch.arange(scales, device=device) * (math.log(1e4) / max(scales - 1, 1)))
  angle = torch.arange(length, device=device)[:, None] * rate
  return torch.cat([angle.sin(), angle.cos()], 1)


def shapes_of(method):
  """{name: shape} of our parameters."""
  import jax

  student = jax.eval_shape(lambda: state_lib.parameters(method)[0])
  return {name: x.shape for name, x in tree.named_leaves(student)}


def initial(name, shape, config, device):
  """A start of the right size; the losses of a timing need no more."""
  if name.endswith('/log_temperature'):
    return torch.full((), math.log(config.towers['logit'].temperature), device=device)
  if name.endswith('/scale'):
    return torch.ones(shape, device=device)
  return torch.randn(shape, device=device) * 0.02


def check(config):
  """InputError for what is not TIPS v2 as configs/parts/tips.py builds it."""
  c = config
  passes = {name: (p.tower, p.by) for name, p in c.passes.items()}
  expected = {'teacher_patch': ('head', 'ema'), 'masked': ('image', 'student')}
  same = all(passes.get(name) == value for name, value in expected.items())
  [*teachers] = c.teachers
  if not same or teachers != ['ema'] or c.teachers['ema'].towers != ('head',):
    raise InputError(f'--config: got {c.name!r}; expected a recipe of TIPS v2: configs/vitl.py:v2')
  if c.optimizer.kind != 'adafactor':
    raise unknown('optimizer.kind of the twin', c.optimizer.kind, ['adafactor'])

"""The image towers of four stages as functions of torch, for ONNX."""

import types
from collections.abc import Callable
from typing import Any

from tips_jax.core import schema
from tips_jax.core.errors import InputError
from tips_jax.models import convolution, swin

EPS = 1e-5  # of batch norms


def program(
  torch: types.ModuleType, tower: schema.ImageTower, size: tuple[int, int] | None
) -> Callable[[dict[str, Any], Any], tuple[Any, Any]]:
  """(tensors by name, images [B, 3, H, W], padded) -> (`pooled` [B, 1, D], patches [B, h, w, D]).

  size: of the images; None: any. InputError for a tower that needs one.
  """
  match tower:
    case schema.ResNet():
      return lambda p, x: _resnet(torch, p, x, tower, size)
    case schema.MobileNetV2():
      return lambda p, x: _mobilenet(torch, p, x, tower)
    case schema.Swin():
      if size is None:
        raise InputError(
          "--resolution: got 'dynamic' with an image tower of kind 'swin', whose windows are laid "
          "out for one size; expected 'native', or pixels as in 224"
        )
      return lambda p, x: _swin(torch, p, x, tower)


def positions(torch: types.ModuleType, table_1GGD: Any, h: Any, w: Any) -> Any:
  """[h, w, D]: jax.image.resize(..., 'bilinear'), antialiased, as one product for each axis."""

  def resize(full, size):
    ratio = full / size
    at = (torch.arange(size, dtype=torch.float32) + 0.5) * ratio - 0.5
    near = (1 - (at[:, None] - torch.arange(full)).abs() / torch.sym_max(ratio, 1.0)).clamp(min=0)
    return near / near.sum(dim=1, keepdim=True)

  _, gh, gw, d = table_1GGD.shape
  x = (resize(gh, h) @ table_1GGD.reshape(gh, gw * d)).reshape(h, gw, d)
  return resize(gw, w) @ x


def _conv(torch, p, name, x, stride=1, groups=1):
  """A convolution and its batch norm."""
  kernel = p[f'{name}/conv/kernel'].permute(3, 2, 0, 1)
  f = torch.nn.functional
  x = f.conv2d(x, kernel, None, stride, kernel.shape[-1] // 2, 1, groups)
  mean, var, scale, bias = (p[f'{name}/norm/{leaf}'] for leaf in ('mean', 'var', 'scale', 'bias'))
  return f.batch_norm(x, mean, var, scale, bias, False, 0.0, EPS)


def _resnet(torch, p, x, tower, size):
  f = torch.nn.functional
  x = f.max_pool2d(f.relu(_conv(torch, p, 'stem', x, 2)), 3, 2, 1)
  for i, depth in enumerate(tower.depths):
    for j in range(depth):
      name = f'stage{i + 1}_{j}'
      stride = 2 if i and not j else 1
      y = f.relu(_conv(torch, p, f'{name}/conv1', x, stride))
      y = _conv(torch, p, f'{name}/conv2', y)
      if f'{name}/shortcut/conv/kernel' in p:
        x = _conv(torch, p, f'{name}/shortcut', x, stride)
      x = f.relu(x + y)
  x = x.permute(0, 2, 3, 1)
  if tower.pool == 'mean':
    return _mean(x), x
  return _attention_pool(torch, p, x, size), x


def _attention_pool(torch, p, x, size):
  n, h, w, d = x.shape
  heads = max(1, d // 64)

  def dense(y, name):
    y = y @ p[f'attention/{name}/kernel'] + p[f'attention/{name}/bias']
    return y.reshape(n, -1, heads, d // heads).transpose(1, 2)

  table = p['attention/posembed']
  table = table[0] if size else positions(torch, table, h, w)
  mean = _mean(x) + p['attention/position']
  tokens = torch.cat([mean, (x + table).reshape(n, h * w, d)], dim=1)
  y = torch.nn.functional.scaled_dot_product_attention(
    dense(mean, 'query'), dense(tokens, 'key'), dense(tokens, 'value')
  )
  y = y.transpose(1, 2).reshape(n, 1, d)
  return y @ p['attention/out/kernel'] + p['attention/out/bias']


def _mean(x_NHWD):
  return x_NHWD.mean(dim=(1, 2))[:, None]


def _mobilenet(torch, p, x, tower):
  relu6 = torch.nn.functional.relu6
  x = relu6(_conv(torch, p, 'stem', x, 2))
  for i, (before, hidden, width, stride, _) in enumerate(convolution.inverted_blocks(tower)):
    name = f'block{i}'
    y = x
    if hidden != before:
      y = relu6(_conv(torch, p, f'{name}/widen', y))
    y = relu6(_conv(torch, p, f'{name}/depthwise', y, stride, hidden))
    y = _conv(torch, p, f'{name}/narrow', y)
    x = x + y if stride == 1 and before == width else y
  x = relu6(_conv(torch, p, 'head', x)).permute(0, 2, 3, 1)
  return _mean(x), x


def _swin(torch, p, x, tower):
  x = _tiles(x.permute(0, 2, 3, 1), swin.PATCH)
  x = x @ p['embedding/kernel'] + p['embedding/bias']
  x = _norm(torch, p, 'embedded', x)
  for i, depth in enumerate(tower.depths):
    if i:
      n, h, w, d = x.shape
      x = x.reshape(n, h // 2, 2, w // 2, 2, d).permute(0, 1, 3, 4, 2, 5)
      x = _norm(torch, p, f'merge{i}/norm', x.reshape(n, h // 2, w // 2, 4 * d))
      x = x @ p[f'merge{i}/kernel']
    for j in range(depth):
      shift = tower.window // 2 * (j % 2)
      x = _swin_block(torch, p, f'stage{i + 1}_{j}', x, tower, shift)
  x = _norm(torch, p, 'norm', x)
  return _mean(x), x


def _swin_block(torch, p, name, x, tower, shift):
  f = torch.nn.functional
  n, h, w, d = x.shape
  side = tower.window
  heads = d // tower.head_width

  def dense(y, layer):
    return y @ p[f'{name}/{layer}/kernel'] + p[f'{name}/{layer}/bias']

  def by_head(y):
    return y.reshape(-1, side**2, heads, d // heads).transpose(1, 2)

  y = f.pad(_norm(torch, p, f'{name}/norm1', x), (0, 0, 0, -w % side, 0, -h % side))
  size = tuple(y.shape[1:3])
  shifts = [shift if length > side else 0 for length in size]
  if any(shifts):
    y = torch.roll(y, [-s for s in shifts], (1, 2))
  rows, columns = (length // side for length in size)
  y = _tiles(y, side).reshape(-1, side**2, d)
  index = torch.from_numpy(swin.relative_index(side))
  bias = p[f'{name}/relative'][:, index][None]
  if any(shifts):
    mask = torch.from_numpy(swin.shifted_mask(size, side, shifts))
    bias = (bias + mask[:, None]).repeat(n, 1, 1, 1)
  q, k, v = (by_head(dense(y, layer)) for layer in ('query', 'key', 'value'))
  logits = q @ k.transpose(2, 3) * (d // heads) ** -0.5 + bias
  y = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(-1, side**2, d)
  y = dense(y, 'out').reshape(n, rows, columns, side, side, d).transpose(2, 3)
  y = y.reshape(n, *size, d)
  if any(shifts):
    y = torch.roll(y, shifts, (1, 2))
  x = x + y[:, :h, :w]
  up = f.gelu(dense(_norm(torch, p, f'{name}/norm2', x), 'up'))
  return x + dense(up, 'down')


def _tiles(x_NHWD, side):
  n, h, w, d = x_NHWD.shape
  x = x_NHWD.reshape(n, h // side, side, w // side, side, d).transpose(2, 3)
  return x.reshape(n, h // side, w // side, side * side * d)


def _norm(torch, p, name, x):
  return torch.nn.functional.layer_norm(
    x, x.shape[-1:], p[f'{name}/scale'], p[f'{name}/bias'], 1e-6
  )

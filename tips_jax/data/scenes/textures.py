"""The textures of the scenes: patterns of objects and of surroundings."""

import functools

import numpy as np

# --- textures: how much of the second color, in [0, 1], at surface point (u, v) ------------------


@functools.cache
def _cloud(octaves):
  """A periodic [256, 256] field of smooth noise, uniform in [0, 1]; the same in every process."""
  rng = np.random.default_rng(7)
  total = 0
  for octave in range(octaves):
    wave = np.fft.rfft2(rng.standard_normal((256, 256)))
    f = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)) * 256 / (4 * 2**octave)
    layer = np.fft.irfft2(wave * np.exp(-(f**2)))
    total = total + layer / layer.std() / 1.7**octave
  ranks = np.argsort(np.argsort(total, axis=None))  # makes it uniform
  return (ranks / total.size).reshape(256, 256).astype(np.float32)


def noise(u: np.ndarray, v: np.ndarray, octaves: int) -> np.ndarray:
  """Smooth noise in [0, 1] of period 1 at the points (u, v)."""
  return _cloud(octaves)[(v * 256).astype(np.int32) & 255, (u * 256).astype(np.int32) & 255]


def _step(wave, sharp):
  """A step at wave = 0; `sharp` makes it as wide as a pixel."""
  return np.clip(0.5 + wave * sharp, 0, 1)


def _inset(x):
  """The distance of x to the nearest whole number."""
  return 0.5 - abs(x - np.floor(x) - 0.5)


def _saw(x):
  return 2 * abs(x - np.floor(x) - 0.5)


# Of (u, v, sharp). The first eight are textures of objects, the others of surroundings.
PATTERNS = {
  'plain': lambda u, v, s: np.zeros_like(u),
  'striped': lambda u, v, s: _step(_saw(u) - 0.5, s),
  'dotted': lambda u, v, s: _step(0.32 - np.hypot(_saw(u * 0.8) - 0.5, _saw(v * 0.8) - 0.5), s),
  'checked': lambda u, v, s: _step((_saw(u * 0.5) - 0.5) * (_saw(v * 0.5) - 0.5) * 4, 2 * s),
  'gradient': lambda u, v, s: np.clip(0.5 + 0.3 * v, 0, 1),
  'speckled': lambda u, v, s: _step((noise(u * 0.15, v * 0.15, 4) - 0.62) * 5, s),
  'zigzag': lambda u, v, s: _step(_saw(v + 0.6 * _saw(u * 0.8)) - 0.5, s),
  'ringed': lambda u, v, s: _step(_saw(np.hypot(u, v)) - 0.5, s),
  'bricks': lambda u, v, s: (
    1 - _step(np.minimum(_inset(v), 1.6 * _inset(u / 2 + np.floor(v) % 2 / 2)) - 0.07, 3 * s)
  ),
  'tiles': lambda u, v, s: 1 - _step(np.minimum(_inset(u), _inset(v)) - 0.05, 3 * s),
  'planks': lambda u, v, s: (
    0.6 * (1 - _step(_inset(u) - 0.04, 3 * s))
    + 0.55 * noise(np.floor(u) * 0.37 + 0.02, v * 0.03 + np.floor(u) * 0.61, 4)
  ),
  'grass': lambda u, v, s: 0.75 * noise(u * 0.11, v * 0.11, 5),
  'sand': lambda u, v, s: noise(u * 0.3, v * 0.3, 5),
  'rock': lambda u, v, s: np.abs(2 * noise(u * 0.06, v * 0.12, 5) - 1),
  'waves': lambda u, v, s: np.clip(1.5 * noise(u * 0.06, v * 0.22, 3) - 0.45, 0, 1),
  'clouds': lambda u, v, s: np.clip(2.2 * noise(u * 0.06, v * 0.16, 4) - 1.1, 0, 1),
}
TEXTURES = tuple(PATTERNS)[:8]

"""An encoder and a judge as users write them: colors, and the words for them."""

import numpy as np

COLORS = {'red': (200, 30, 30), 'green': (30, 200, 30), 'blue': (30, 30, 200)}
calls = []  # images of each call


class Colors:
  """Images and texts by their colors."""

  identity = 'colors'

  def images(self, images):
    calls.append(len(images))
    return np.array([image.mean((0, 1)) - 87 for image in images])

  def texts(self, texts):
    found = []
    for text in texts:
      named = [color for name, color in COLORS.items() if name in text.lower().split()]
      found.append(np.mean(named or [(1, 0, 0)], axis=0) - 87)
    return np.array(found)


def encoder():
  return Colors()


def no_blue(records):
  """A judge."""
  reasons = []
  for record in records:
    mean = record['pixels'].mean((0, 1))
    reasons.append('blue' if mean.argmax() == 2 else '')
  return reasons


def too_few(records):
  return []

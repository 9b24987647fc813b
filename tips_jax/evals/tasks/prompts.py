"""Prompt templates of zero-shot tasks.

Sources. clip80: openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb; clip7: seven of them,
chosen there by forward selection. cifar18: openai/CLIP, data/prompts.md. tcl9: khanrc/tcl,
datasets/templates.py (`custom`), which the zero-shot notebook of google-deepmind/tips has too.
photo: CLIP's paper (arXiv 2103.00020, section 3.1.4).
"""

from tips_jax.core import strict
from tips_jax.core.errors import InputError


def _split(text: str) -> tuple[str, ...]:
  return tuple(' '.join(part.split()) for part in text.split('|'))


TEMPLATES = {
  'clip80': _split("""
    a bad photo of a {}. | a photo of many {}. | a sculpture of a {}. |
    a photo of the hard to see {}. | a low resolution photo of the {}. | a rendering of a {}. |
    graffiti of a {}. | a bad photo of the {}. | a cropped photo of the {}. | a tattoo of a {}. |
    the embroidered {}. | a photo of a hard to see {}. | a bright photo of a {}. |
    a photo of a clean {}. | a photo of a dirty {}. | a dark photo of the {}. | a drawing of a {}. |
    a photo of my {}. | the plastic {}. | a photo of the cool {}. | a close-up photo of a {}. |
    a black and white photo of the {}. | a painting of the {}. | a painting of a {}. |
    a pixelated photo of the {}. | a sculpture of the {}. | a bright photo of the {}. |
    a cropped photo of a {}. | a plastic {}. | a photo of the dirty {}. |
    a jpeg corrupted photo of a {}. | a blurry photo of the {}. | a photo of the {}. |
    a good photo of the {}. | a rendering of the {}. | a {} in a video game. | a photo of one {}. |
    a doodle of a {}. | a close-up photo of the {}. | a photo of a {}. | the origami {}. |
    the {} in a video game. | a sketch of a {}. | a doodle of the {}. | a origami {}. |
    a low resolution photo of a {}. | the toy {}. | a rendition of the {}. |
    a photo of the clean {}. | a photo of a large {}. | a rendition of a {}. |
    a photo of a nice {}. | a photo of a weird {}. | a blurry photo of a {}. | a cartoon {}. |
    art of a {}. | a sketch of the {}. | a embroidered {}. | a pixelated photo of a {}. |
    itap of the {}. | a jpeg corrupted photo of the {}. | a good photo of a {}. | a plushie {}. |
    a photo of the nice {}. | a photo of the small {}. | a photo of the weird {}. |
    the cartoon {}. | art of the {}. | a drawing of the {}. | a photo of the large {}. |
    a black and white photo of a {}. | the plushie {}. | a dark photo of a {}. | itap of a {}. |
    graffiti of the {}. | a toy {}. | itap of my {}. | a photo of a cool {}. |
    a photo of a small {}. | a tattoo of the {}.
    """),
  'clip7': _split("""
    itap of a {}. | a bad photo of the {}. | a origami {}. | a photo of the large {}. |
    a {} in a video game. | art of the {}. | a photo of the small {}.
    """),
  'cifar18': _split("""
    a photo of a {}. | a blurry photo of a {}. | a black and white photo of a {}. |
    a low contrast photo of a {}. | a high contrast photo of a {}. | a bad photo of a {}. |
    a good photo of a {}. | a photo of a small {}. | a photo of a big {}. | a photo of the {}. |
    a blurry photo of the {}. | a black and white photo of the {}. |
    a low contrast photo of the {}. | a high contrast photo of the {}. | a bad photo of the {}. |
    a good photo of the {}. | a photo of the small {}. | a photo of the big {}.
    """),
  'tcl9': _split("""
    itap of a {}. | a bad photo of a {}. | a origami {}. | a photo of the large {}. |
    a {} in a video game. | art of the {}. | a photo of the small {}. | a photo of many {}. |
    a photo of {}s.
    """),
  'photo': ('a photo of a {}.',),
}


def templates(name: str | tuple[str, ...]) -> tuple[str, ...]:
  """The templates of a name of TEMPLATES, or those given as a tuple; each has one place, {}, for
  the class.
  """
  if isinstance(name, str):
    if name not in TEMPLATES:
      raise strict.unknown('templates', name, TEMPLATES)
    return TEMPLATES[name]
  for template in name:
    if template.count('{}') != 1:
      raise InputError(
        f'templates: got {template!r}; expected one place {{}} for the name of the class'
      )
  return tuple(name)

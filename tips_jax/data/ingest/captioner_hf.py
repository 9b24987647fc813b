"""Image-text-to-text models of transformers as captioners: PaliGemma, BLIP, Florence, Qwen-VL and
their like, by their names or from folders.
"""

import functools
from collections.abc import Sequence

from PIL import Image

from tips_jax.data.ingest import pretrained
from tips_jax.data.ingest.archives import reason
from tips_jax.data.ingest.captioners import Answer, Ask, Caption, Captioner
from tips_jax.data.ingest.reader import Sample
from tips_jax.data.pixels import images


class Model(Captioner):
  """A model on one accelerator, or on the CPU where there is none."""

  def __init__(self, name: str, ask: Ask, *, batch: int):
    self.batch = batch
    self._ask = ask
    what = 'an image-text-to-text model'
    self._processor = pretrained.processor('--captioner', name, what)
    self._model = pretrained.load(
      '--captioner', name, what, 'AutoModelForImageTextToText', dtype='auto'
    )
    pretrained.library('--captioner').set_seed(ask.seed)
    self._tokenizer = self._processor.tokenizer
    self._tokenizer.padding_side = 'left'  # what is generated follows the prompt

  def answers(self, samples: Sequence[Sample]) -> list[Answer]:
    pictures = {}
    found = [Answer([], 'no image')] * len(samples)
    for number, sample in enumerate(samples):
      try:
        pictures[number] = Image.fromarray(images.decode(sample.image))
        found[number] = Answer([])
      except ValueError as error:
        found[number] = Answer([], reason(error))
    prompts = [self._ask.prompts_of(samples[number]) for number in pictures]
    for of_images in zip(*prompts):
      captions = self._generate(list(pictures.values()), list(map(self._prompt, of_images)))
      for number, more in zip(pictures, captions):
        found[number] = Answer([*found[number].captions, *more])
    return found

  def _prompt(self, text):
    """The prompt as the model wants it: in a chat, or with the token that stands for the image."""
    if getattr(self._processor, 'chat_template', None):
      content = [{'type': 'image'}, {'type': 'text', 'text': text}]
      return self._processor.apply_chat_template(
        [{'role': 'user', 'content': content}], add_generation_prompt=True, tokenize=False
      )
    token = getattr(self._processor, 'image_token', None) or ''
    return str(token) + text

  def _generate(self, pictures, prompts):
    """The captions of each picture."""
    texts = {'text': prompts, 'padding': True} if any(prompts) else {}
    inputs = self._processor(images=pictures, return_tensors='pt', **texts)
    inputs.pop('labels', None)
    inputs = inputs.to(self._model.device, self._model.dtype)
    # Of what is sampled only where it is asked for: models bring their own settings.
    sampling = {'do_sample': False, 'num_beams': 1}
    if self._ask.temperature:
      sampling = {
        'do_sample': True,
        'num_beams': 1,
        'temperature': self._ask.temperature,
        'top_p': self._ask.top_p,
        'num_return_sequences': self._ask.captions,
      }
    ids = self._model.generate(**inputs, max_new_tokens=self._ask.max_tokens, **sampling)
    each = len(ids) // len(pictures)
    new = self._without_prompt(ids, inputs.get('input_ids'), each)
    texts = self._processor.batch_decode(new, skip_special_tokens=True)
    captions = list(map(Caption, texts, map(self._ends, new.tolist())))
    return [captions[start : start + each] for start in range(0, len(captions), each)]

  def _without_prompt(self, ids, prompts, each):
    """The new tokens. Models of language alone repeat the prompt before them, BLIP without its last
    token.
    """
    if prompts is None:
      return ids
    for length in (prompts.shape[1], prompts.shape[1] - 1):
      repeated = prompts[:, 1:length].repeat_interleave(each, 0)
      if 1 < length <= ids.shape[1] and bool((ids[:, 1:length] == repeated).all()):
        return ids[:, length:]
    return ids

  def _ends(self, tokens):
    """Whether a caption ends by itself."""
    return len(tokens) < self._ask.max_tokens or tokens[-1] in self._last

  @functools.cached_property
  def _last(self):
    """Tokens behind the end of a caption."""
    ends = self._model.generation_config.eos_token_id
    ends = {*ends} if isinstance(ends, list) else {ends}
    for name in ('eos_token_id', 'sep_token_id', 'pad_token_id'):
      ends.add(getattr(self._tokenizer, name, None))
    return ends - {None}

"""Captioners: a model of transformers, a server that speaks OpenAI's protocol, a table.

Each answers for several images at once, and is opened in every process that captions.
"""

import base64
import dataclasses
import functools
import io
import os
import random
import threading
import typing
from collections.abc import Sequence

import requests
from PIL import Image

from tips_jax.core.errors import InputError, PassingError
from tips_jax.data.ingest.archives import reason
from tips_jax.data.ingest.columns import Columns, guess, plain, texts_of
from tips_jax.data.ingest.reader import Sample
from tips_jax.data.ingest.rows import parse_table
from tips_jax.data.ingest.tables import read_table
from tips_jax.data.pixels import images

ALT_TEXT = '{alt_text}'  # in a prompt: that of the image
# Kinds of images that servers read.
_KNOWN = {'JPEG': 'jpeg', 'PNG': 'png', 'WEBP': 'webp', 'GIF': 'gif'}
_QUALITY = 95


class Caption(typing.NamedTuple):
  """What a captioner says."""

  text: str
  complete: bool = True  # False: it was cut at max_tokens


class Answer(typing.NamedTuple):
  """All captions of an image, or why there are none."""

  captions: Sequence[Caption]
  problem: str = ''


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
  """What is asked of a captioner."""

  captioner: str  # 'openai:URL#MODEL' and the like
  prompts: tuple[str, ...] = ('',)
  captions: int = 1  # for each prompt
  temperature: float = 0.0
  top_p: float = 1.0
  max_tokens: int = 64
  seed: int = 0

  def prompts_of(self, sample: Sample) -> list[str]:
    return [prompt.replace(ALT_TEXT, sample.alt_text) for prompt in self.prompts]


class Captioner:
  """Base class."""

  batch = 1  # images that are asked for together
  threads = 1  # that ask at the same time

  def answers(self, samples: Sequence[Sample]) -> list[Answer]:
    """One for each sample, whose image is there. Raises InputError or PassingError where it cannot
    go on.
    """
    raise NotImplementedError

  def begin(self) -> None:
    """Called before the first samples, and after `stop`."""

  def stop(self) -> None:
    """Makes what waits in other threads end soon."""


# --- a table ------------------------------------------------------------------------------------


class Table(Captioner):
  """Captions that somebody has, by the id of the image: CSV, TSV, JSON or JSONL."""

  batch = 64
  _PROBE = 100  # images without any row, after which the ids must be others

  def __init__(self, path: str):
    data, problem = read_table(os.path.expanduser(path))
    if data is None:
      raise InputError(f'--captioner: cannot read the table {path!r} ({problem})')
    rows, _ = parse_table(data, path)
    names = list(dict.fromkeys(name for row in rows for name in row))
    key = next((name for name in names if plain(name) in ('id', 'key')), '')
    columns = guess(Columns(image=key), names)
    self._path = path
    self._rows = {}
    for row in rows:
      self._rows.setdefault(str(row.get(columns.image)), []).append(row)
    self._columns = dataclasses.replace(columns, label='', mask='')
    self._unknown = 0
    self._known = 0

  def answers(self, samples: Sequence[Sample]) -> list[Answer]:
    found = []
    for sample in samples:
      rows = self._rows.get(sample.key)
      if rows is None:
        self._unknown += 1
        found.append(Answer([], 'no row of the table has its id'))
        continue
      self._known += 1
      alt_text, captions = texts_of(rows, self._columns)
      found.append(Answer(list(map(Caption, [alt_text] * bool(alt_text) + captions))))
    if self._unknown >= self._PROBE and not self._known:
      raise InputError(
        f'--captioner: none of the first {self._unknown} images has a row in {self._path!r}, as '
        f'{samples[-1].key!r}; expected ids of the store, got {next(iter(self._rows))!r}'
      )
    return found


# --- a server -----------------------------------------------------------------------------------

# The server is busy, restarts, or another one between is.
_PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
# It cannot take this image.
_REFUSING = (400, 413, 415, 422)
_MAX_REFUSED = 20  # without any answer
_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 60.0
_KEY = 'OPENAI_API_KEY'


class Server(Captioner):
  """A server with OpenAI's chat completions: vLLM, SGLang, or one on the web.

  What fails for a reason that passes is asked again, after a wait that doubles, or as long as the
  server says (Retry-After). The key is that of $OPENAI_API_KEY, where there is one.
  """

  def __init__(self, url: str, model: str, ask: Ask, *, threads: int, tries: int, timeout_s: float):
    if not url.startswith(('http://', 'https://')):
      raise InputError(f'--captioner: got the address {url!r}; expected http://HOST:PORT/v1')
    self.threads = threads
    self._url = url.rstrip('/') + '/chat/completions'
    self._model = model
    self._ask = ask
    self._tries = tries
    self._timeout_s = timeout_s
    self._stopped = threading.Event()
    self._answered = False
    self._refused = 0

  @functools.cached_property
  def _session(self):
    session = requests.Session()
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=self.threads)
    session.mount('http://', adapter)
    session.mount('https://', adapter)
    if os.environ.get(_KEY):
      session.headers['Authorization'] = f'Bearer {os.environ[_KEY]}'
    return session

  def begin(self) -> None:
    self._stopped.clear()

  def stop(self) -> None:
    self._stopped.set()

  def answers(self, samples: Sequence[Sample]) -> list[Answer]:
    return list(map(self._answer, samples))

  def _answer(self, sample):
    try:
      image = {'type': 'image_url', 'image_url': {'url': _data_url(sample.image)}}
    except ValueError as error:  # it cannot be decoded
      return Answer([], reason(error))
    captions = []
    for prompt in self._ask.prompts_of(sample):
      content = [image, *([{'type': 'text', 'text': prompt}] if prompt else [])]
      wanted = len(captions) + self._ask.captions
      try:
        # Some servers give one choice, however many are asked for.
        while len(captions) < wanted:
          seed = self._ask.seed + len(captions)
          captions += self._choices(content, wanted - len(captions), seed)
      except _Refused as error:
        return Answer([], str(error))
    return Answer(captions)

  def _choices(self, content, count, seed):
    """Some captions, `count` at most; _Refused for an image that the server cannot take."""
    body = {
      'model': self._model,
      'messages': [{'role': 'user', 'content': content}],
      'max_tokens': self._ask.max_tokens,
      'temperature': self._ask.temperature,
      'top_p': self._ask.top_p,
      'seed': seed,
      'n': count,
    }
    why = ''
    for attempt in range(self._tries):
      after = 0.0
      try:
        reply = self._session.post(self._url, json=body, timeout=self._timeout_s)
        if reply.ok:
          choices = _choices_of(reply.json())[:count]
          self._answered = True
          return choices
      # Not reached, cut, too slow, or an answer that is none.
      except (requests.RequestException, ValueError, KeyError, TypeError, IndexError) as error:
        why = reason(error)
      else:
        why = f'{reply.status_code} {reply.text[:200]}'
        after = _seconds(reply.headers.get('Retry-After'))
        self._check(reply.status_code, why)
      # Not all at once again.
      wait = min(_FIRST_WAIT_S * 2**attempt, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
      if attempt + 1 < self._tries and self._stopped.wait(max(wait, after)):
        break
    raise PassingError(
      f'--captioner: {self._url} gave no answer in {self._tries} tries ({why}); run the same '
      f'command again to go on'
    )

  def _check(self, status, why):
    """Raises what another try would not mend."""
    if status in _PASSING:
      return
    self._refused += status in _REFUSING
    # Before any answer it is rather the model or a parameter that the server cannot take.
    if status in _REFUSING and (self._answered or self._refused < _MAX_REFUSED):
      raise _Refused(why)
    raise InputError(f'--captioner: {self._url} answers {why}; expected a model and a key of it')


class _Refused(Exception):
  """An image that the server cannot take."""


def _choices_of(content):
  found = []
  for choice in content['choices']:
    text = choice['message']['content'] or ''
    if not isinstance(text, str):
      raise TypeError('a caption that is no text')
    found.append(Caption(text, choice.get('finish_reason') != 'length'))
  if not found:
    raise ValueError('no choices')
  return found


def _seconds(text):
  """Retry-After in seconds; 0 for none, and for a date, which few write."""
  try:
    return min(max(float(text or 0), 0.0), 3600.0)
  except ValueError:
    return 0.0


def _data_url(data):
  """The image as it is, or as a JPEG where servers do not read it, or not upright."""
  image = images.open_image(data)
  kind = _KNOWN.get(image.format)
  if kind is None or images.orientation(image) != 1:
    out = io.BytesIO()
    Image.fromarray(images.decode(data)).save(out, 'jpeg', quality=_QUALITY)
    data = out.getvalue()
    kind = 'jpeg'
  return f'data:image/{kind};base64,{base64.b64encode(data).decode()}'

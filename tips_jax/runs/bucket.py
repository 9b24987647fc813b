"""A work folder in a bucket. A process works in a folder on this machine, and what it writes there
goes up: small files (metrics, TensorBoard, tables, pictures) while the run lives, checkpoints as
they are saved.

A checkpoint counts when its digests are in the bucket; they go up last, and say which objects are
its. Orbax writes it here, and not to the bucket itself: it knows gs:// alone, and says by a rename,
or by a file that nobody else looks for, that a checkpoint is whole. Hosts have no disk in common,
so each of several processes saves what its own devices hold as files of its own, and sends those
that no process before it has; the first one gathers the digests of all.

A start empties the folder, but for scenes, and takes from the bucket what it needs: a machine that
was never used is as good as the last one.
"""

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator

from tips_jax.core import buckets
from tips_jax.core.errors import InputError, PassingError
from tips_jax.runs import digests
from tips_jax.runs.folder import FOLDER, in_bucket, numbered

LOCK = '.lock'
_WHAT = 'workdir'
_HERE = ('scenes', 'evaluation')  # made here again, or by another program
_EVERY_S = 20  # between two looks for small files that have changed
_SHARE = 10  # at most one in so many seconds is spent on sending them
_POLL_S = 1
_WORDS = '.words'  # what the processes tell each other
_PATIENCE_S = 3600  # for the files of another process, which ends the run where it is lost


class Bucket:
  """The work folder `url` as one of `count` processes sees it."""

  def __init__(self, url: str, *, index: int = 0, count: int = 1, token: str = ''):
    """token: the same for all processes of this start, and for no other start."""
    self.url = url.rstrip('/')
    self.count = count
    self.folder = buckets.mirror(url, 'runs')
    if index:  # several processes may be on one machine
      self.folder = self.folder.with_name(f'{self.folder.name}-{index}')
    self._index = index
    self._lead = index == 0
    self._token = token
    self._path = buckets.join(self.url, FOLDER)
    self._lock = threading.Lock()
    self._sent = {}  # small file -> what it was when it last went up

  # --- small files ---

  @contextlib.contextmanager
  def mirrored(self) -> Iterator[None]:
    """Within it the folder here is that of the run, and its small files go up."""
    self._open()
    ended = threading.Event()
    thread = threading.Thread(target=self._keep_sending, args=(ended,), name='bucket', daemon=True)
    thread.start()
    try:
      yield
    except BaseException:
      with contextlib.suppress(InputError):  # why it ends matters more
        self._close(ended, thread)
      raise
    self._close(ended, thread)

  def _close(self, ended, thread):
    ended.set()
    thread.join()
    self.send()
    if self._lead:
      self._forget_words()
    # The next start takes them from the bucket.
    shutil.rmtree(self.folder / FOLDER, ignore_errors=True)

  def _open(self):
    self.folder.mkdir(parents=True, exist_ok=True)
    for path in self.folder.iterdir():
      if path.is_dir() and path.name not in _HERE:
        shutil.rmtree(path)
      elif path.is_file() and path.name != LOCK:
        path.unlink()
    for name in buckets.fetch(self.url, self.folder, _WHAT, wanted=_is_small):
      self._sent[name] = _state(self.folder / name)

  def _keep_sending(self, ended):
    pause = _EVERY_S
    failed = ''
    while not ended.wait(pause):
      begin = time.monotonic()
      try:
        self.send()
        failed = ''
      except InputError as error:  # the bucket may be away for a while
        if str(error) != failed:
          print(f'{error}: it will be sent later', file=sys.stderr, flush=True)
        failed = str(error)
      pause = max(_EVERY_S, _SHARE * (time.monotonic() - begin))

  def send(self) -> None:
    """Sends the small files that have changed."""
    with self._lock:
      for name in buckets.files_below(self.folder):
        if not _is_small(name):
          continue
        # A file may be gone by now. One that grows is sent as it is at one moment.
        with contextlib.suppress(FileNotFoundError):
          state = _state(self.folder / name)
          if state != self._sent.get(name):
            content = (self.folder / name).read_bytes()
            buckets.write(buckets.join(self.url, name), content, _WHAT)
            self._sent[name] = state

  # --- the lock of runtime/lock.py ---

  def read_sign(self) -> str:
    """Who is at work in the bucket, and when that last gave a sign of life; ''."""
    content = buckets.read(buckets.join(self.url, LOCK), _WHAT) or b''
    return content.decode(errors='replace')

  def write_sign(self, text: str) -> None:
    buckets.write(buckets.join(self.url, LOCK), text.encode(), _WHAT)

  # --- checkpoints ---

  def settle(self, say: Callable[[str], None]) -> None:
    """Takes the newest whole checkpoint from the bucket, and what there is to know of the others.

    The first process sets damaged ones aside, as `folder.settle` does; the others come after it.
    """
    steps = in_bucket(self.url, _WHAT)
    damaged = {}
    whole = None
    for step in reversed(steps):
      reason = self._take(step)
      if not reason:
        whole = step
        break
      damaged[step] = reason
    if damaged and (whole is None or not self._lead):
      reasons = '; '.join(f'{step}: {reason}' for step, reason in damaged.items())
      raise InputError(
        f'checkpoint: got only damaged ones in {self._path!r} ({reasons}); expected a whole one; '
        'another --workdir starts anew'
      )
    for step, reason in damaged.items():
      aside = self._set_aside(step)
      say(f'checkpoint {step} is damaged: {reason}; it is now {aside}')
    if damaged:
      say(f'going on from the one before, step {whole}')
    # Of the others what says that they are there, for the rules which are kept: no arrays.
    for step in steps:
      if step not in damaged and step != whole:
        buckets.fetch(self._at(step), self._here(step), _WHAT, wanted=_is_on_top)

  def _take(self, step):
    """Copies a checkpoint here; returns what is wrong with it, '' where nothing is."""
    wanted = {digests.FILE, *self._listed(step)}
    buckets.fetch(self._at(step), self._here(step), _WHAT, wanted=wanted.__contains__)
    return digests.problem(self._here(step))

  def _listed(self, step):
    """The names of a checkpoint's objects; none where they cannot be read."""
    content = buckets.read(buckets.join(self._at(step), digests.FILE), _WHAT)
    try:
      return list(json.loads(content)['files'])
    except (ValueError, KeyError, TypeError):  # `digests.problem` says what it is
      return []

  def _set_aside(self, step):
    aside = f'damaged-{step}'
    while buckets.exists(buckets.join(self._path, aside), _WHAT):
      aside += '-again'
    buckets.move(self._at(step), buckets.join(self._path, aside), _WHAT)
    shutil.rmtree(self._here(step))
    return aside

  def send_checkpoint(self, step: int) -> None:
    """Sends a checkpoint that is whole here, after the lines of metrics before it; of several
    processes each sends its part. Then removes from the bucket what is not kept here.
    """
    self.send()
    here = self._here(step)
    there = self._at(step)
    if self._lead:
      # Should it be there from an earlier try: what follows may change any of its objects.
      buckets.remove(buckets.join(there, digests.FILE), _WHAT, last='')
      self._forget_words(but=step)
    parts = self._gather(step, 'files', digests.compute(here))
    own = parts[self._index].keys() - set().union(*parts[: self._index])
    buckets.upload(here, there, _WHAT, only=sorted(own))
    self._gather(step, 'sent', True)
    if self._lead:
      union = {}
      for part in reversed(parts):  # where several have a file, the first one has sent it
        union |= part
      digests.write(here, union)
      buckets.upload(here, there, _WHAT, only=[digests.FILE])
      self._tidy(step, union)
    for path in numbered(self.folder / FOLDER):
      if path != here:
        _reduce(path)

  def _tidy(self, step, union):
    """Removes what a save that was cut off has left of this step, and checkpoints that are not
    kept.
    """
    there = self._at(step)
    for name in buckets.names(there, _WHAT).keys() - {digests.FILE, *union}:
      buckets.remove(buckets.join(there, name), _WHAT, last='')
    kept = {int(path.name) for path in numbered(self.folder / FOLDER)}
    if step not in kept:  # somebody has removed the folder here
      return
    for other in set(in_bucket(self.url, _WHAT)) - kept:
      buckets.remove(self._at(other), _WHAT, last=digests.FILE)

  def _at(self, step):
    return buckets.join(self._path, str(step))

  def _here(self, step):
    return self.folder / FOLDER / str(step)

  # --- words between the processes ---

  def _gather(self, step, name, value):
    """[value of each process] (what JSON can hold); every process calls it with the same name.

    Through the bucket, as it is called from a thread while the main one talks of other things.
    """
    if self.count == 1:
      return [value]
    path = buckets.join(self.url, f'{_WORDS}/{self._token}/{step}/{name}')
    content = json.dumps(value).encode()
    buckets.write(buckets.join(path, str(self._index)), content, _WHAT)
    end = time.monotonic() + _PATIENCE_S
    while len(buckets.names(path, _WHAT)) < self.count:
      if time.monotonic() > end:
        raise PassingError(f'{_WHAT}: not all processes have saved step {step} to {self.url!r}')
      time.sleep(_POLL_S)
    values = []
    for index in range(self.count):
      values.append(json.loads(buckets.read(buckets.join(path, str(index)), _WHAT)))
    return values

  def _forget_words(self, but=None):
    """Removes what was said of other steps: all processes have heard it, since all save the next
    one.
    """
    if self.count == 1:
      return
    path = buckets.join(self.url, _WORDS)
    for name in buckets.names(path, _WHAT):
      if not name.startswith(f'{self._token}/{but}/'):
        buckets.remove(buckets.join(path, name), _WHAT, last='')


def _is_small(name):
  """Whether a name is of a file that goes up by itself: no checkpoint, and nothing hidden."""
  parts = name.split('/')
  return parts[0] not in (FOLDER, *_HERE) and not any(part.startswith('.') for part in parts)


def _is_on_top(name):
  return '/' not in name


def _state(path):
  stat = path.stat()
  return stat.st_mtime_ns, stat.st_size


def _reduce(path):
  """Removes the arrays of a checkpoint that is in the bucket; the rules which are kept need only
  know that it is there.
  """
  for part in path.iterdir():
    if part.is_dir():
      shutil.rmtree(part)

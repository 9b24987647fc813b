"""The work folder of a run, and the generated scenes in it."""

import dataclasses
import os
import pathlib
import socket
import time
import uuid

from tips_jax.core import buckets, files, log, processes
from tips_jax.core.errors import InputError
from tips_jax.data.scenes import dataset as scenes
from tips_jax.runs.bucket import Bucket
from tips_jax.runtime.peers import Peers
from tips_jax.train.method import Method

# A network file system may show a new file late.
_VISIBLE_S = 30


def in_bucket(path: str, flag: str, peers: Peers) -> Bucket | None:
  """The work folder in a bucket, known to be writable and the same one for all processes; None for
  one on a disk. path: the value of the flag that errors name.
  """
  if not buckets.is_bucket(path or ''):
    return None
  files.require_writable(path, flag)
  peers.agree('bucket', {flag: path})
  token = peers.share('start', uuid.uuid4().hex[:12])
  bucket = Bucket(path, index=peers.index, count=peers.count, token=token)
  _require_readable(bucket.folder, flag)
  bucket.folder.mkdir(parents=True, exist_ok=True)
  return bucket


def open_workdir(path: str, flag: str, peers: Peers) -> pathlib.Path:
  """The work folder, made, known to be writable, and the same one for all processes.

  path: the value of the flag that errors name.
  """
  if not path:
    raise InputError(f'{flag}: missing; expected a folder for the run')
  buckets.require_local(path, flag)
  files.require_writable(path, flag)
  workdir = pathlib.Path(path)
  _require_readable(workdir.absolute(), flag)
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f'.writable-{socket.gethostname()}-{os.getpid()}'
    probe.write_text('')
    # Every process looks for the file of process 0: it sees it only where the folder is shared.
    of_first = workdir / peers.share('workdir', probe.name)
    end = time.monotonic() + _VISIBLE_S
    while not of_first.exists() and time.monotonic() < end:
      time.sleep(0.1)
    if not of_first.exists():
      raise InputError(
        f'{flag}: got {path!r}, in which process {peers.index} does not see what process 0 wrote; '
        'expected a folder that all hosts share'
      )
    peers.barrier('workdir-seen')
    probe.unlink()
  except OSError as error:
    raise InputError(
      f'{flag}: got {path!r}; expected a writable folder ({error.strerror})'
    ) from None
  return workdir


def _require_readable(workdir, flag):
  """Orbax reads a checkpoint with its path as a glob, and takes 'gs:' for the start of a URL."""
  text = str(workdir)
  wrong = sorted(set('*?[]\\') & set(text))
  if wrong:
    got = f'which has {wrong[0]!r} in its path'
  elif any(part.endswith(':') for part in workdir.parts):
    got = "which has ':' at the end of a name in its path"
  elif text != text.encode('utf-8', 'ignore').decode():
    got = 'whose path is not UTF-8'
  else:
    return
  raise InputError(
    f'{flag}: got {ascii(text)}, {got}; expected another name: no checkpoint could be read back'
  )


def with_scenes(
  method: Method, workdir: pathlib.Path, peers: Peers, *, shared: bool = True
) -> Method:
  """The method on the store it names, or on generated scenes inside the work folder. shared:
  whether that is one folder for all processes.
  """
  data = method.config.data
  if data.store:
    return method
  if not data.scenes.train:
    raise InputError(
      "data.store: got ''; expected a folder written by `python -m tips_jax.prepare`, or any TFDS "
      'folder'
    )
  path = None
  if peers.lead or not shared:
    with files.writing(f'data.scenes: cannot write {str(workdir / "scenes")!r}'):
      path = _build(workdir / 'scenes', data.scenes, method.config.seed)
  if shared:
    path = peers.share('scenes', path)
  data = dataclasses.replace(data, store=path)
  return dataclasses.replace(method, config=dataclasses.replace(method.config, data=data))


def _build(path, spec, seed):
  progress = log.Progress(spec.train + spec.test, label='scene')
  path = scenes.build(
    str(path),
    train=spec.train,
    test=spec.test,
    size=spec.size,
    objects=spec.objects,
    typical=spec.typical,
    seed=seed,
    processes=processes.cores(),
    progress=lambda done, total: progress.update(done),
  )
  progress.close()
  return path

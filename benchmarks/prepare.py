"""Speed of `prepare`, and whether kills, parts and Beam change the store that it writes.

  python benchmarks/prepare.py --images=20000 --workers=1,2
  python benchmarks/prepare.py --images=200000 --size=48x64 --quality=70 --kills=10 --parts=8 --beam

Makes webdataset tars of photo-like JPEGs (about 42 kB by default), with copies, broken images and
missing texts among them, and prints one JSON line per run: images/s, by wall time and by the time
of the processors (trust it where others use the machine; starting takes a few seconds of it), and
the largest memory of all its processes together. `same` is whether the store equals that of the
first run in every byte. The run with kills has two processes, and SIGKILLs at random moments end
the first of them.
"""

import argparse
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Sequence

import cv2
import numpy as np
import simplejpeg

ROOT = pathlib.Path(__file__).resolve().parents[1]
PHOTOS = 64
OF_TAR = 10_000
PAGE_MIB = os.sysconf('SC_PAGE_SIZE') / 2**20


def photo(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
  """A 1/f image, about as compressible as a photograph."""
  image = np.zeros((height, width, 3), np.float32)
  for octave in range(6):
    step = 2**octave
    noise = rng.normal(size=(height // step + 2, width // step + 2, 3)).astype(np.float32)
    image += step**0.9 * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
  image = (image - image.mean()) / image.std() * 50 + 128
  return np.clip(image, 0, 255).astype(np.uint8)


def commented(jpeg: bytes, text: bytes) -> bytes:
  """The same picture in other bytes: with a comment."""
  return jpeg[:2] + b'\xff\xfe' + (len(text) + 2).to_bytes(2, 'big') + text + jpeg[2:]


def write_tars(folder: pathlib.Path, images: int, size: Sequence[int], quality: int) -> int:
  """Writes the input; returns the mean bytes of an image."""
  rng = np.random.default_rng(0)
  photos = []
  for _ in range(PHOTOS):
    photos.append(simplejpeg.encode_jpeg(photo(rng, *size), quality, colorsubsampling='420'))
  for first in range(0, images, OF_TAR):
    with tarfile.open(folder / f'{first // OF_TAR:05d}.tar', 'w') as tar:
      for i in range(first, min(first + OF_TAR, images)):
        same_as = i - 37 if i % 50 == 49 else i
        data = commented(photos[same_as % PHOTOS], b'%012d' % same_as)
        if i % 1000 == 500:
          data = data[: len(data) // 2]
        files = {'jpg': data}
        if i % 40:
          files['txt'] = f'a photo with the number {i} of {words(i)}'.encode()
        for end, content in files.items():
          info = tarfile.TarInfo(f'{i:09d}.{end}')
          info.size = len(content)
          tar.addfile(info, io.BytesIO(content))
  return round(np.mean(list(map(len, photos))))


def words(i: int) -> str:
  """Some words that differ."""
  return ' '.join(f'w{(i * k) % 997}' for k in (7, 31, 101))


def contents(folder: pathlib.Path) -> dict[str, str]:
  """Hashes of the bytes of all files, by name."""
  found = {}
  for path in sorted(folder.rglob('*')):
    if path.is_file():
      with open(path, 'rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      found[str(path.relative_to(folder))] = digest
  return found


class Run:
  """A run of a program in a session of its own."""

  def __init__(self, program: str, *flags: str):
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    self._process = subprocess.Popen(
      [sys.executable, '-m', program, *flags],
      env=environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    self.memory = 0.0  # MiB, the most so far, of all its processes together
    self._thread = threading.Thread(target=self._watch, daemon=True)
    self._thread.start()

  def _watch(self):
    while self._process.poll() is None:
      self.memory = max(self.memory, resident(self._process.pid))
      time.sleep(0.5)

  def kill(self, after_s: float) -> bool:
    """Kills the first process after a while; False where it was done before."""
    try:
      self._process.communicate(timeout=after_s)
      return False
    except subprocess.TimeoutExpired:
      self._process.send_signal(signal.SIGKILL)
      self._process.communicate()
      return True

  def wait(self) -> None:
    _, printed = self._process.communicate()
    if self._process.returncode:
      raise SystemExit(printed)


def cpu() -> float:
  """Seconds of the processes that have ended, but for those that a kill left behind."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


def resident(session: int) -> float:
  """MiB of the processes of a session; what they share is counted for each."""
  pages = 0
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      # The name, in brackets, may hold spaces.
      fields = (path / 'stat').read_text().rpartition(')')[2].split()
      if int(fields[3]) == session:
        pages += int((path / 'statm').read_text().split()[1])
    except (OSError, IndexError, ValueError):  # it has ended
      pass
  return pages * PAGE_MIB


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--images', type=int, default=20_000)
  parser.add_argument('--size', default='340x450', help='height x width of an image in pixels')
  parser.add_argument('--quality', type=int, default=90)
  parser.add_argument('--workers', default='2', help='runs with so many processes: 1,2,4')
  parser.add_argument('--task_mib', default='0', help='that of prepare')
  parser.add_argument('--kills', type=int, default=0, help='a run that is killed so often')
  parser.add_argument('--parts', type=int, default=0, help='a run in so many parts, then --merge')
  parser.add_argument('--beam', action='store_true', help='a run through the local runner of Beam')
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--folder', default=None, help='where the files go; default: a temporary one')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(dir=args.folder) as name:
    folder = pathlib.Path(name)
    source = folder / 'source'
    source.mkdir()
    size = list(map(int, args.size.split('x')))
    mean = write_tars(source, args.images, size, args.quality)
    about = {'images': args.images, 'bytes': mean}
    expected = None

    def measure(what: str, run) -> float:
      nonlocal expected
      start = time.monotonic()
      cpu_s = cpu()
      memory, notes = run()
      cpu_s = cpu() - cpu_s
      seconds = time.monotonic() - start
      found = contents(folder / 'store')
      shutil.rmtree(folder / 'store')
      expected = expected or found
      row = {'run': what, **about, 'seconds': round(seconds, 1), **notes}
      row |= {'images_per_s': round(args.images / seconds), 'memory_mib': round(memory)}
      row |= {'images_per_cpu_s': round(args.images / cpu_s)}
      row['same'] = found == expected
      if found != expected:
        row['differ'] = sorted({name for name, _ in found.items() ^ expected.items()})
      print(json.dumps(row), flush=True)
      return seconds

    def start(*flags):
      return Run(
        'tips_jax.prepare',
        f'--input={source}',
        f'--output={folder / "store"}',
        '--test_fraction=0.05',
        f'--task_mib={args.task_mib}',
        *flags,
      )

    def undisturbed(*flags):
      run = start(*flags)
      run.wait()
      return run.memory, {}

    for count in args.workers.split(','):
      alone = measure(f'{count} workers', lambda: undisturbed(f'--workers={count}'))  # noqa: B023

    def killed():
      rng = random.Random(args.seed)
      memory = 0.0
      kills = 0
      while True:
        run = start('--workers=2')
        # What comes after the last kill takes its time too.
        if kills == args.kills or not run.kill(rng.uniform(0.02, 0.3) * alone):
          break
        memory = max(memory, run.memory)
        kills += 1
      run.wait()
      return max(memory, run.memory), {'kills': kills}

    def parts():
      memory = 0.0
      for index in range(args.parts):
        run = start(f'--part={index}/{args.parts}', '--workers=1')
        run.wait()
        memory = max(memory, run.memory)
      run = start('--merge')
      run.wait()
      return max(memory, run.memory), {}

    if args.kills:
      measure('killed', killed)
    if args.parts:
      measure(f'{args.parts} parts', parts)
    if args.beam:
      measure('Beam', lambda: undisturbed('--runner=DirectRunner'))


if __name__ == '__main__':
  main()

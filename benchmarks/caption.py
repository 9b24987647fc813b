"""Captions images against a server that fails, stalls and limits on purpose, while it is killed.

  python benchmarks/caption.py --images=2000 --kills=5

Prints one JSON line. `right` images of the new store have the one caption that is theirs; `wrong`
ones lack it, or have more. `asked_again` counts images that the server answered more than once:
those whose answers were on their way when a kill came.
"""

import argparse
import base64
import collections
import hashlib
import http.server
import io
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
from PIL import Image

from tips_jax.data import store

ROOT = pathlib.Path(__file__).resolve().parents[1]


def caption_of(image: bytes) -> str:
  """What the server says of an image."""
  return f'a picture with the number {hashlib.sha256(image).hexdigest()[:12]}'


class Server:
  """A server with OpenAI's chat completions, of which some requests fail; a context manager.

  `failing` is the share of requests that fail, each in one of several ways. `answered` counts the
  answers by caption, `failed` the failures by kind.
  """

  def __init__(self, *, failing: float = 0.0, latency_s: float = 0.0, stall_s: float = 3.0):
    self.answered = collections.Counter()
    self.failed = collections.Counter()
    self.requests = []  # bodies without their images
    self.refuse = 0  # a status for all requests
    self.text = None  # for all images, in place of their own
    self.finish = 'stop'
    self.choices = 100  # at most
    self._failing = failing
    self._latency_s = latency_s
    self._stall_s = stall_s
    self._rng = random.Random(0)
    self._lock = threading.Lock()
    outer = self

    class Handler(http.server.BaseHTTPRequestHandler):
      protocol_version = 'HTTP/1.1'

      def do_POST(self):  # noqa: N802
        body = self.rfile.read(int(self.headers['Content-Length']))
        outer._answer(self, body)

      def log_message(self, *args):
        pass

    class Quiet(http.server.ThreadingHTTPServer):
      daemon_threads = True

      def handle_error(self, *args):  # a client that was killed
        pass

    self._server = Quiet(('127.0.0.1', 0), Handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}/v1'

  def __enter__(self) -> 'Server':
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *error: object) -> None:
    self._server.shutdown()
    self._server.server_close()

  def _answer(self, handler, body):
    request = json.loads(body)
    content = request['messages'][0]['content']
    image = base64.b64decode(content[0]['image_url']['url'].partition(',')[2])
    content[0] = 'image'
    time.sleep(self._latency_s)
    with self._lock:
      self.requests.append(request)
      kinds = ('limited', 'unavailable', 'error', 'closed', 'broken', 'cut', 'stalled')
      kind = ''
      if self._rng.random() < self._failing:
        kind = self._rng.choice(kinds)
        self.failed[kind] += 1
    text = self.text if self.text is not None else caption_of(image)
    choice = {'message': {'content': text}, 'finish_reason': self.finish}
    reply = json.dumps({'choices': [choice] * min(request['n'], self.choices)}).encode()
    if self.refuse:
      return self._send(handler, self.refuse, b'{"error": "as told"}')
    if kind == 'limited':
      return self._send(handler, 429, b'slow down', {'Retry-After': '0.2'})
    if kind == 'unavailable':
      return self._send(handler, 503, b'', {'Retry-After': 'Fri, 27 Nov 2026 10:00:00 GMT'})
    if kind == 'error':
      return self._send(handler, 500, b'oops')
    if kind == 'closed':
      return handler.connection.close()
    if kind == 'broken':
      return self._send(handler, 200, b'{"choices": []}')
    if kind == 'cut':
      return self._send(handler, 200, reply[:-20], {'Content-Length': str(len(reply))})
    if kind == 'stalled':
      time.sleep(self._stall_s)
    with self._lock:
      self.answered[text] += kind == ''
    return self._send(handler, 200, reply)

  def _send(self, handler, status, content, headers=None):
    headers = {'Content-Length': str(len(content)), **(headers or {})}
    try:
      handler.send_response(status)
      for name, value in headers.items():
        handler.send_header(name, value)
      handler.end_headers()
      handler.wfile.write(content)
      if headers['Content-Length'] != str(len(content)):
        handler.close_connection = True
    except OSError:  # the client has gone
      handler.close_connection = True


def write_store(path: pathlib.Path, images: int) -> str:
  """A store of small distinct JPEGs with alt texts, in two splits."""
  folder = store.temporary_folder(path)
  writer = store.Writer(folder, store.features())
  for i in range(images):
    pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'jpeg')
    example = {'image': out.getvalue(), 'id': f'{i}', 'alt_text': f'alt {i}', 'captions': []}
    writer.add('test' if i % 10 == 9 else 'train', example)
  writer.close()
  return store.finish(folder, path, {})


def command(source: str, output: pathlib.Path, url: str, *flags: str) -> list[str]:
  """The command line of a run."""
  names = [f'--store={source}', f'--output={output}', f'--captioner=openai:{url}#fake']
  return [sys.executable, '-m', 'tips_jax.caption', *names, *flags]


def judge(path: pathlib.Path) -> collections.Counter:
  """How many images have exactly their caption."""
  found = collections.Counter()
  opened = store.open_store(path)
  ids = set()
  for split in opened.splits:
    for record in opened.source(split):
      right = list(record['captions']) == [caption_of(record['image']).encode()]
      found['right' if right else 'wrong'] += 1
      ids.add(record['id'])
  found['images'] = len(ids)
  return found


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--images', type=int, default=2000)
  parser.add_argument('--kills', type=int, default=5)
  parser.add_argument('--failing', type=float, default=0.2, help='share of requests that fail')
  parser.add_argument('--latency_s', type=float, default=0.05)
  parser.add_argument('--requests', type=int, default=8)
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  rng = random.Random(args.seed)
  start = time.monotonic()
  with (
    tempfile.TemporaryDirectory() as name,
    Server(failing=args.failing, latency_s=args.latency_s) as server,
  ):
    folder = pathlib.Path(name)
    source = write_store(folder / 'in', args.images)
    flags = ['--timeout_s=2', '--tries=10', f'--requests={args.requests}']
    line = command(source, folder / 'out', server.url, *flags)
    environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
    kills = 0
    while True:
      process = subprocess.Popen(
        line,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
      )
      # After some more answers, wherever that falls.
      more = rng.randrange(args.images // (2 * args.kills + 1)) if args.kills else 0
      until = len(server.answered) + more
      while process.poll() is None and (kills == args.kills or len(server.answered) < until):
        time.sleep(0.01)
      if process.poll() is not None:
        break
      process.send_signal(signal.SIGKILL)
      process.communicate()
      kills += 1
    _, printed = process.communicate()
    if process.returncode:
      raise SystemExit(printed)
    asked_again = sum(count > 1 for count in server.answered.values())
    row = {
      'kills': kills,
      **judge(folder / 'out'),
      'failed_requests': sum(server.failed.values()),
      'kinds': dict(server.failed),
      'asked_again': asked_again,
      'seconds': round(time.monotonic() - start, 1),
    }
    print(json.dumps(row), flush=True)


if __name__ == '__main__':
  main()

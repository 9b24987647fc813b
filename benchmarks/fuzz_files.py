"""Small valid files and folders for benchmarks/fuzz.py."""

import io
import json
import pathlib
import zipfile

import numpy as np
from PIL import Image

Folder = pathlib.Path
WIDTH, HEIGHT = 24, 20


def put(folder: Folder, files: dict[str, bytes | str]) -> None:
  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def encoded(kind: str = 'jpeg', channels: int = 3, seed: int = 0, **options) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 9, (HEIGHT, WIDTH, channels), np.uint8)
  out = io.BytesIO()
  Image.fromarray(pixels.squeeze()).save(out, kind, **options)
  return out.getvalue()


def lines(*rows: object) -> str:
  return '\n'.join(map(json.dumps, rows))


def zipped(files: dict[str, bytes | str], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w', compression) as archive:
    for name, data in files.items():
      archive.writestr(name, data)
  return out.getvalue()


def depth_map() -> bytes:
  out = io.BytesIO()
  Image.fromarray(np.full((HEIGHT, WIDTH), 1500, np.uint16)).save(out, 'png')
  return out.getvalue()


JPEG, OTHER, MASK, DEPTH = encoded(), encoded(seed=1), encoded('png', 1), depth_map()

"""What `curate` finds of what was planted, and how it ranks texts that fit and texts that do not.

  python benchmarks/curate.py --data=../shared/data/openclipart [--sheets=FOLDER]
  python benchmarks/curate.py --checkpoint=PATH [--scenes=2000 --wrong=0.5]

Prints one JSON line for each measurement:
- families: of the two families of near-duplicates that openclipart has, how many are left after
  configs/curation/web.py, and after the near-duplicates step alone;
- decontamination: recall on copies of evaluation images that were resized, recompressed and
  cropped
  by 10 %, and images that were dropped and are no copies;
- similarity: AUC of the cosine of image and text on scenes, of which a share has the text of
  another
  one.
--sheets writes contact sheets: 50 dropped images, each beside its reason, and 50 kept ones.
"""

import argparse
import io
import json
import pathlib
import sys
import tempfile
import textwrap
import zipfile

import cv2
import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tips_jax.core import strict
from tips_jax.curation import curating, encoders, schema
from tips_jax.data import store
from tips_jax.data.pixels import images
from tips_jax.data.scenes import dataset

FAMILIES = {'gramastar': 'gramastar', 'flat icons': 'Part of the Flat Icon Collection'}
SHOWN = 50
CROP = 0.9  # of the sides of a planted copy, or of its area
SIZE = 96  # pixels of a scene


def record(key: str, image: bytes, alt_text: str) -> dict:
  """A record of a store without captions."""
  return {'image': image, 'id': key, 'alt_text': alt_text, 'captions': []}


def write_store(path: pathlib.Path, splits: dict[str, list[dict]]) -> pathlib.Path:
  """Writes records by split."""
  temporary = store.temporary_folder(path)
  writer = store.Writer(temporary, store.features())
  for split, records in splits.items():
    for one in records:
      writer.add(split, one)
  writer.close()
  store.finish(temporary, path, {})
  return path


def curated(source: pathlib.Path, output: pathlib.Path, steps: list[dict]) -> list[dict]:
  """Curates; returns the lines of dropped.jsonl."""
  curation = strict.build(schema.Curation, {'steps': steps})
  opened = curating.open_input(str(source), curation)
  curating.curate(opened, curation, output, curating.How())
  lines = (output / curating.DROPPED_FILE).read_text().splitlines()
  return list(map(json.loads, lines))


def openclipart(folder: pathlib.Path) -> list[dict]:
  """The records of the pack."""
  archive = zipfile.ZipFile(folder / 'images.zip')
  rows = map(json.loads, (folder / 'train.jsonl').read_text(encoding='utf-8').splitlines())
  return [record(row['image'], archive.read(row['image']), row['alt_text']) for row in rows]


# --- families -----------------------------------------------------------------------------------


def web_steps() -> list[dict]:
  """The steps of configs/curation/web.py without an encoder."""
  from configs.curation import web

  return [step.to_dict() if hasattr(step, 'to_dict') else step for step in web.get_config().steps]


def families(records: list[dict], folder: pathlib.Path) -> tuple[list[dict], list[dict]]:
  """How many of each family are left; returns (dropped, kept) of the whole config."""
  source = write_store(folder / 'source', {'train': records})
  result = {'measured': 'families'}
  for name, steps in (('web.py', web_steps()), ('near', [{'kind': 'near_duplicates'}])):
    dropped = curated(source, folder / name, steps)
    gone = {line['id'] for line in dropped}
    for family, start in FAMILIES.items():
      members = [one['id'] for one in records if one['alt_text'].startswith(start)]
      result[f'{family}, {name}'] = f'{len(members)} -> {sum(key not in gone for key in members)}'
    result[f'kept, {name}'] = len(records) - len(gone)
    if name == 'web.py':
      kept = [{'id': one['id'], 'why': ''} for one in records if one['id'] not in gone]
      shown = (dropped, kept)
  print(json.dumps(result))
  return shown


def sheet(path: pathlib.Path, lines: list[dict], by_id: dict[str, dict]) -> None:
  """50 of some records, spread evenly: the image, the one it is like, the text, the reason."""
  chosen = [lines[i] for i in np.linspace(0, len(lines) - 1, SHOWN).astype(int)]
  wide, high, columns = 232, 168, 10
  page = Image.new('RGB', (columns * wide, -(-len(chosen) // columns) * high), 'white')
  draw = ImageDraw.Draw(page)
  for number, line in enumerate(chosen):
    x = number % columns * wide
    y = number // columns * high
    for place, key in enumerate(filter(None, (line['id'], line.get('like')))):
      picture = Image.fromarray(images.decode(by_id[key]['image']))
      picture.thumbnail((100, 100))
      page.paste(picture, (x + 4 + 108 * place, y + 4))
    text = f'{number}: {by_id[line["id"]]["alt_text"]!r} {line.get("step", "")}: {line["why"]}'
    lines_of_text = textwrap.wrap(text.encode('ascii', 'replace').decode(), 38)[:4]
    draw.text((x + 4, y + 108), '\n'.join(lines_of_text), fill='black')
  page.save(path)


# --- decontamination ----------------------------------------------------------------------------


def copy_of(image: bytes, rng: np.random.Generator, crop: bool) -> bytes:
  """The same picture resized to half to one and a half, and recompressed; and cropped."""
  pixels = images.decode(image)
  if crop:
    side = CROP if rng.random() < 0.5 else CROP**0.5
    height, width = pixels.shape[:2]
    h, w = round(height * side), round(width * side)
    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
    pixels = pixels[y : y + h, x : x + w]
  scale = rng.uniform(0.5, 1.5)
  size = [max(round(side * scale), 16) for side in (pixels.shape[1], pixels.shape[0])]
  out = io.BytesIO()
  resized = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
  Image.fromarray(resized).save(out, 'jpeg', quality=int(rng.integers(40, 90)))
  return out.getvalue()


def decontamination(
  records: list[dict], folder: pathlib.Path, *, name: str, count: int = 100
) -> None:
  """Plants copies of `count` evaluation images among the other records."""
  rng = np.random.default_rng(1)
  order = rng.permutation(len(records))
  evaluation = [records[i] for i in order[:count]]
  others = [records[i] for i in order[count:]]
  planted = []
  for one in evaluation:
    for crop in (False, True):
      key = f'{"crop" if crop else "copy"}:{one["id"]}'
      planted.append(record(key, copy_of(one['image'], rng, crop), one['alt_text']))
  mixed = [*others, *planted]
  splits = {'train': [mixed[i] for i in rng.permutation(len(mixed))], 'test': evaluation}
  source = write_store(folder / f'{name} planted', splits)
  step = {'kind': 'decontaminate', 'evaluations': (f'{source}@test',)}
  dropped = curated(source, folder / f'{name} clean', [step])
  gone = {line['id']: line['why'] for line in dropped}
  right = sum(key.partition(':')[2] in gone[key] for key in gone if ':' in key)
  result = {'measured': 'decontamination', 'data': name, 'evaluation': count}
  for kind in ('copy', 'crop'):
    found = sum(f'{kind}:{one["id"]}' in gone for one in evaluation)
    result[f'recall of {kind}'] = found / count
  result['named right'] = right / (2 * count)
  false = [f'{key} {why}' for key, why in gone.items() if ':' not in key]
  result |= {'others': len(others), 'others dropped': len(false), 'which': false}
  print(json.dumps(result))


# --- similarity ---------------------------------------------------------------------------------


def auc(right: np.ndarray, wrong: np.ndarray) -> float:
  """The probability that a right pair has more similarity than a wrong one."""
  order = np.sort(wrong)
  below = np.searchsorted(order, right, side='left')
  not_above = np.searchsorted(order, right, side='right')
  return float((below + not_above).mean() / 2 / len(wrong))


def text_of(record: dict, field: str) -> str:
  """The alt text, or the first caption, if there is one."""
  if field == 'alt_text':
    return record[field].decode()
  return b''.join(record[field][:1]).decode()


def similarity(checkpoint: str, folder: pathlib.Path, count: int, share: float) -> None:
  """On scenes that no run has seen: those of the split test."""
  source = dataset.build(folder / 'scenes', train=1, test=count, size=SIZE)
  records = list(store.open_store(source).source('test'))
  pixels = [encoders.prepare(checkpoint, images.decode(one['image'])) for one in records]
  seen = encoders.image_features(checkpoint, pixels)
  rng = np.random.default_rng(0)
  wrong = rng.random(len(records)) < share
  for field in ('alt_text', 'captions'):
    texts = [text_of(one, field) for one in records]
    shown = np.array(texts, object)
    places = np.flatnonzero(wrong & (shown != ''))
    shown[places] = shown[np.roll(places, 1)]  # the text of another scene
    there = np.flatnonzero(shown != '')
    differs = (shown != np.array(texts, object))[there]
    found = encoders.text_features(checkpoint, shown[there].tolist())
    cosines = np.sum(seen[there] * found, axis=1)
    best = np.argsort(-cosines)[: round((1 - share) * len(cosines))]
    result = {'measured': 'similarity', 'text': field, 'scenes': len(there)}
    result['wrong'] = int(differs.sum())
    result['auc'] = auc(cosines[~differs], cosines[differs])
    result[f'wrong in the best {100 * (1 - share):.0f} %'] = float(differs[best].mean())
    print(json.dumps(result))


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', type=pathlib.Path, help='folder of the pack openclipart')
  parser.add_argument('--sheets', type=pathlib.Path)
  parser.add_argument('--checkpoint', help='whatever the encoder of a step may be')
  parser.add_argument('--scenes', type=int, default=2000)
  parser.add_argument('--wrong', type=float, default=0.5)
  flags = parser.parse_args(argv)
  if not (flags.data or flags.checkpoint):
    parser.error('got neither --data nor --checkpoint')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    if flags.data:
      records = openclipart(flags.data)
      shown = families(records, folder)
      if flags.sheets:
        flags.sheets.mkdir(parents=True, exist_ok=True)
        by_id = {one['id']: one for one in records}
        for name, lines in zip(('dropped', 'kept'), shown):
          sheet(flags.sheets / f'{name}.png', lines, by_id)
      single = [one for one in records if not one['alt_text'].startswith(tuple(FAMILIES.values()))]
      decontamination(single, folder, name='openclipart without the families')
      decontamination(records, folder, name='openclipart')
    if flags.checkpoint:
      similarity(flags.checkpoint, folder, flags.scenes, flags.wrong)


if __name__ == '__main__':
  main()

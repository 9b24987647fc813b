"""What `curate` finds of what was planted, and how it ranks texts that fit and texts that do not.

  python benchmarks/curate.py --data=../shared/data/openclipart [--sheets=FOLDER]
  python benchmarks/curate.py --checkpoint=PATH [--scenes=2000 --wrong=0.5]
  python benchmarks/curate.py --images=20000 --kills=10

Prints one JSON line for each measurement:
- families (of openclipart): how many are left of its two families after configs/curation/web.py,
  and after the near-duplicates step alone;
- decontamination: recall on copies of evaluation images that were resized and recompressed, and
  cropped by 10 %; and the others that were dropped;
- similarity: AUC of the cosine of image and text on scenes, of which a share has the text of
  another scene;
- kills: images/s, by wall time and by the time of the processors, and the largest memory of all
  processes together, with configs/curation/web.py and two workers on photo-like images of 48 x 64
  pixels; whether a run that is killed at random moments ends with the same bytes in every file.
--sheets writes contact sheets: 50 dropped images, each beside its reason, and 50 kept ones.
"""

import argparse
import io
import json
import pathlib
import random
import shutil
import sys
import tempfile
import textwrap
import time
import zipfile

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from benchmarks import prepare
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


def pack(folder: pathlib.Path, limit: int) -> list[dict]:
  """The first records of openclipart, or of another pack of its layout."""
  images_zip = folder / 'images.zip'
  if not images_zip.exists():
    images_zip = folder / 'train.zip'
  archive = zipfile.ZipFile(images_zip)
  found = []
  for line in (folder / 'train.jsonl').read_text(encoding='utf-8').splitlines()[:limit]:
    row = json.loads(line)
    text = row.get('alt_text', ''.join(row.get('captions', [])[:1]))
    found.append(record(row['image'], archive.read(row['image']), text))
  return found


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


# --- kills --------------------------------------------------------------------------------------


def random_records(rng: np.random.Generator, count: int) -> list[dict]:
  """Parts of photo-like images with texts; of some there are copies."""
  photos = [prepare.photo(rng, 256, 256) for _ in range(16)]
  syllables = [a + b for a in 'bdfgklmnprst' for b in 'aeiou']
  found = []
  for number in range(count):
    y, x = rng.integers(208), rng.integers(192)
    pixels = photos[rng.integers(16)][y : y + 48, x : x + 64]
    image = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 80)
    if found and number % 20 == 0:
      image = copy_of(found[rng.integers(len(found))]['image'], rng, False)
    words = [''.join(rng.choice(syllables, 3)) for _ in range(4)]
    found.append(record(f'{number:09d}', image, 'a photo of ' + ' and the '.join(words)))
  return found


def kills(folder: pathlib.Path, count: int, most: int) -> None:
  """A run without kills, and one with."""
  rng = np.random.default_rng(0)
  write_store(folder / 'raw', {'train': random_records(rng, count)})
  expected = None
  seconds = 0.0
  for allowed in dict.fromkeys((0, most)):
    start = time.monotonic()
    cpu_s = prepare.cpu()
    killed = 0
    memory = 0.0
    rng = random.Random(0)
    while True:
      run = prepare.Run(
        'tips_jax.curate',
        f'--store={folder / "raw"}',
        f'--output={folder / "curated"}',
        f'--config={prepare.ROOT}/configs/curation/web.py',
        '--workers=2',
        '--task_mib=2',
      )
      if killed == allowed or not run.kill(rng.uniform(0.1, 0.6) * seconds):
        run.wait()
        break
      killed += 1
      memory = max(memory, run.memory)
    took = time.monotonic() - start
    seconds = seconds or took
    found = prepare.contents(folder / 'curated')
    expected = expected or found
    result = {'measured': 'kills', 'images': count, 'kills': killed, 'seconds': round(took, 1)}
    result['images_per_cpu_s'] = round(count / (prepare.cpu() - cpu_s))
    result |= {'images_per_s': round(count / took), 'memory_mib': round(max(memory, run.memory))}
    report = json.loads((folder / 'curated' / 'curation.json').read_text())
    result |= {'kept': report['stay'], 'same': found == expected}
    print(json.dumps(result), flush=True)
    shutil.rmtree(folder / 'curated')


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--data', type=pathlib.Path, help='folder of openclipart, or of photographs')
  parser.add_argument('--limit', type=int, default=3000, help='records of it')
  parser.add_argument('--sheets', type=pathlib.Path)
  parser.add_argument('--checkpoint', help='whatever the encoder of a step may be')
  parser.add_argument('--scenes', type=int, default=2000)
  parser.add_argument('--wrong', type=float, default=0.5)
  parser.add_argument('--images', type=int, default=0)
  parser.add_argument('--kills', type=int, default=5)
  flags = parser.parse_args(argv)
  if not (flags.data or flags.checkpoint or flags.images):
    parser.error('got none of --data, --checkpoint and --images')
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    if flags.data:
      records = pack(flags.data, flags.limit)
      single = [one for one in records if not one['alt_text'].startswith(tuple(FAMILIES.values()))]
      if len(single) < len(records):
        shown = families(records, folder)
        if flags.sheets:
          flags.sheets.mkdir(parents=True, exist_ok=True)
          by_id = {one['id']: one for one in records}
          for name, lines in zip(('dropped', 'kept'), shown):
            sheet(flags.sheets / f'{name}.png', lines, by_id)
        decontamination(records, folder, name='with the families')
      decontamination(single, folder, name=f'{flags.data.name}, {len(single)} images')
    if flags.checkpoint:
      similarity(flags.checkpoint, folder, flags.scenes, flags.wrong)
    if flags.images:
      kills(folder, flags.images, flags.kills)


if __name__ == '__main__':
  main()

"""From raw files to a measured model, step by step: does a run on the curated half learn more?

  python benchmarks/end_to_end.py --folder=F --images=6000 --steps=450 --seeds=2

Scenes as image files with a table of alt texts, and captions in a table of their own; a share of
the images has both texts of another scene. prepare -> caption -> train on everything -> curate by
the similarity of image and caption, by the encoder that has just been trained -> train on what
stays, for as many steps -> evaluate both on a test split whose texts are right. `--right` trains a
third run, on the images whose texts are right: what a curation without fault would give.

Prints one JSON line for each run: recalls by the CLS token of captions and by the first, in %, and
the class by nearest neighbors. What a folder has is not made again; --row is of
configs/ablation.py.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tips_jax.data import store
from tips_jax.data.scenes import dataset

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZE = 96  # pixels of a scene, as in configs/ablation.py
METRICS = {
  'retrieval': ('synthetic/t2i_r1', 'synthetic/i2t_r1', 't2i_r1', 'i2t_r1'),
  'knn': ('accuracy',),
}
CURATION = """\
from ml_collections import config_dict


def get_config():
  step = dict(kind='similarity', encoder={encoder!r}, field='captions', best={best})
  return config_dict.ConfigDict(dict(steps=[step]))
"""


def write_raw(folder: pathlib.Path, source: str, images: int, wrong: float) -> None:
  """The first scenes as files with tables: alt texts in SPLIT.jsonl, captions in captions.jsonl,
  the ids of those with the texts of another scene in wrong.json.
  """
  opened = store.open_store(source)
  names = dataset.LABELS
  captions = []
  for split in ('train', 'test'):
    (folder / split).mkdir(parents=True)
    scenes = opened.source(split)
    count = min(images, len(scenes))
    rng = np.random.default_rng(0)
    replaced = np.zeros(0, np.int64)
    if split == 'train':
      replaced = np.sort(rng.choice(count, round(wrong * count), replace=False))
    text_of = np.arange(count)
    text_of[replaced] = np.roll(replaced, 1)
    rows = []
    ids = []
    for number in range(count):
      scene = scenes[number]
      other = scenes[int(text_of[number])]
      name = f'{split}/{number:06d}.jpg'
      (folder / name).write_bytes(scene['image'])
      alt_text = other['alt_text'].decode()
      rows.append({'image': name, 'alt_text': alt_text, 'kind': names[scene['label']]})
      ids.append(name)
      for text in other['captions']:
        captions.append({'id': name, 'caption': text.decode()})
    _write_lines(folder / f'{split}.jsonl', rows)
    if split == 'train':
      (folder / 'wrong.json').write_text(json.dumps([ids[number] for number in replaced]))
  _write_lines(folder / 'captions.jsonl', captions)


def _write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def run(program: str, *flags: str) -> None:
  """A program of ours, in a process; SystemExit with what it said where it fails."""
  environment = {**os.environ, 'PYTHONPATH': str(ROOT)}
  command = [sys.executable, '-m', f'tips_jax.{program}', *flags]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  if done.returncode:
    raise SystemExit(f'{" ".join(command)}\n{done.stdout}\n{done.stderr}')


class Pipeline:
  """The commands of one folder; what is there is not made again."""

  def __init__(self, folder: pathlib.Path, options: argparse.Namespace):
    self.folder = folder.absolute()
    self.options = options
    self.captioned = self.folder / 'captioned'

  def data(self) -> None:
    """raw -> prepare -> caption."""
    raw = self.folder / 'raw'
    if not raw.exists():
      scene = dict(size=SIZE, objects=1, typical=0.8)
      source = self.options.scenes or self.folder / 'scenes'
      if not self.options.scenes:
        dataset.build(source, train=self.options.images, test=self.options.test, **scene)
      part = raw.with_name('raw.part')
      write_raw(part, os.fspath(source), self.options.images, self.options.wrong)
      part.rename(raw)
    prepared = self.folder / 'prepared'
    if not prepared.exists():
      run(
        'prepare',
        f'--input={raw / "train.jsonl"}',
        f'--test_input={raw / "test.jsonl"}',
        f'--output={prepared}',
        '--label_column=kind',
        '--workers=1',
      )
    if not self.captioned.exists():
      table = f'--captioner=table:{raw / "captions.jsonl"}'
      tokenizer = ['--tokenizer=train', '--vocab_size=1024']
      run('caption', f'--store={prepared}', f'--output={self.captioned}', table, *tokenizer)

  def curated(self, seed: int) -> tuple[pathlib.Path, dict[str, float]]:
    """(the store that a run's encoder keeps, what it kept)."""
    output = self.folder / f'curated-{seed}'
    if not output.exists():
      config = self.folder / f'curation_{seed}.py'
      encoder = f'{self.folder}/run-all-{seed}#synthetic'
      config.write_text(CURATION.format(encoder=encoder, best=1 - self.options.wrong))
      run('curate', f'--store={self.captioned}', f'--output={output}', f'--config={config}')
    wrong = set(json.loads((self.folder / 'raw/wrong.json').read_text()))
    kept = [record['id'].decode() for record in store.open_store(output).source('train')]
    return output, {'images': len(kept), 'wrong': sum(key in wrong for key in kept) / len(kept)}

  def right(self) -> pathlib.Path:
    """The store of the images whose texts are right, with the tokenizer of the others."""
    output = self.folder / 'right'
    if not output.exists():
      config = self.folder / 'right.py'
      path = self.folder / 'raw/wrong.json'
      config.write_text(
        'import json\n\nfrom ml_collections import config_dict\n\n\n'
        f'WRONG = set(json.load(open({os.fspath(path)!r})))\n\n\n'
        "def judge(records):\n  return ['wrong' * (each['id'] in WRONG) for each in records]\n\n\n"
        "def get_config():\n  step = dict(kind='filter', function='right:judge')\n"
        '  return config_dict.ConfigDict(dict(steps=[step]))\n'
      )
      os.environ['PYTHONPATH'] = str(self.folder)
      run('curate', f'--store={self.captioned}', f'--output={output}', f'--config={config}')
    return output

  def trained(self, name: str, seed: int, data: pathlib.Path) -> dict[str, float]:
    """Trains a run on a store, and measures it on the test split."""
    workdir = self.folder / f'run-{name}-{seed}'
    measured = workdir / 'measured'
    if not (measured / 'results.json').exists():
      steps = self.options.steps
      run(
        'main',
        f'--config=configs/ablation.py:{self.options.row},scenes',
        f'--workdir={workdir}',
        f'--config.data.store={data}',
        '--config.data.scenes.train=0',
        f'--config.schedule.total_steps={steps}',
        f'--config.seed={seed}',
        f'--config.checkpoint.every_steps={steps}',
        '--config.evals.tasks=()',
      )
      run(
        'evaluate',
        f'--checkpoint={workdir}',
        f'--store={self.captioned}',
        '--task=retrieval,knn',
        '--size=64',
        f'--output={measured}',
        '--recipe=short',
      )
    found = {}
    for entry in json.loads((measured / 'results.json').read_text())['results']:
      for metric in METRICS[entry['task']]:
        found[f'{entry["task"]}/{metric}'] = round(entry['metrics'][metric]['value'], 2)
    return found


def main(argv: list[str] | None = None) -> list[dict]:
  """Prints the lines, and returns them."""
  parser = argparse.ArgumentParser()
  parser.add_argument('--folder', type=pathlib.Path, required=True)
  parser.add_argument('--images', type=int, default=6000)
  parser.add_argument('--test', type=int, default=500)
  parser.add_argument('--wrong', type=float, default=0.5, help='share of images with other texts')
  parser.add_argument('--steps', type=int, default=450)
  parser.add_argument('--seeds', type=int, default=2)
  parser.add_argument('--row', default='both')
  parser.add_argument('--right', action='store_true', help='a run on the right texts alone')
  parser.add_argument('--scenes', help='store of drawn scenes; else they are drawn')
  options = parser.parse_args(argv)
  options.folder.mkdir(parents=True, exist_ok=True)
  pipeline = Pipeline(options.folder, options)
  pipeline.data()
  lines = []
  for seed in range(options.seeds):
    runs = [
      ('all', lambda: (pipeline.captioned, {'images': options.images, 'wrong': options.wrong}))
    ]
    runs.append(('curated', lambda: pipeline.curated(seed)))  # noqa: B023
    if options.right:
      runs.append(('right', lambda: (pipeline.right(), {'wrong': 0.0})))
    for name, data in runs:
      path, about = data()
      found = pipeline.trained(name, seed, path)
      line = {'run': name, 'seed': seed, 'steps': options.steps, **about, **found}
      print(json.dumps(line), flush=True)
      lines.append(line)
  return lines


if __name__ == '__main__':
  main()

"""benchmarks/gpu.sh: which batches are tried, what a page says, and whose time a profile counts."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import consumers, gpu, gpu_page
from configs import vits
from tips_jax.core import schema, strict
from tips_jax.train import method as method_lib

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = 'configs/vitl.py:v2'


def session(folder, *flags):
  return gpu.Session(gpu.parse([f'--output={folder}', *flags]))


@pytest.fixture
def programs(monkeypatch):
  """Commands that were started; more than 100 images do not fit."""
  started = []

  def run(self, part, command, *, config='', environment=None):
    started.append(command)
    size = int(next(flag for flag in command if flag.startswith('--batch=')).split('=')[1])
    name = dict(part=part, config=config)
    if size > 100:
      return name | dict(error='error: the step does not fit into the memory of a NVIDIA H100')
    return name | dict(batch_size=size, images_per_s=130.0 if part == 'ours' else 100.0)

  monkeypatch.setattr(gpu.Session, 'run', run)
  return started


def test_the_largest_batch_that_fits_and_the_twin_begins_with_it(tmp_path, programs):
  s = session(tmp_path, '--', '--config.compute.scan=False')
  s.lines = [dict(part='check', device='NVIDIA H100 80GB HBM3', usable_gb=76.9)]
  gpu.ours(s, CONFIG)
  gpu.twin(s, CONFIG)
  sizes = [flag for command in programs for flag in command if flag.startswith('--batch=')]
  assert sizes == ['--batch=144', '--batch=128', '--batch=96', '--batch=96']
  assert all('--config.compute.scan=False' in command for command in programs)
  again = session(tmp_path)
  assert again.found('ours', CONFIG)['batch_size'] == 96
  assert '| **ours / twin, images/s** | 1.30 |' in (tmp_path / 'gpu.md').read_text()


def test_more_memory_more_images(tmp_path):
  s = session(tmp_path, '--chip=h200')
  assert gpu.batches(s, CONFIG)[0] == 256
  s.lines = [dict(part='check', device='NVIDIA H100 80GB HBM3', usable_gb=76.9)]
  assert gpu.batches(s, CONFIG)[0] == 144


def test_a_program_that_fails_or_takes_too_long_is_a_line(tmp_path, monkeypatch):
  monkeypatch.setattr(gpu, 'RESERVE', gpu.LEAST)
  s = session(tmp_path)
  failed = s.run('peak', [sys.executable, '-c', 'raise ValueError("no")'])
  assert failed['error'] == 'ValueError: no'
  assert s.run('peak', [sys.executable, '-c', 'print(1); print(\'{"jax": 2}\')'])['jax'] == 2
  s.end = s.end - 570 + 31
  s.add(s.run('peak', [sys.executable, '-c', 'import time; time.sleep(60)']))
  assert 'stopped after' in (tmp_path / 'gpu.md').read_text() and not s.complete
  s.end -= 30
  assert s.run('peak', [])['error'] == 'no time was left'


def test_a_page_says_what_was_not_measured():
  lines = [
    dict(part='peak', jax={'8192': 700.0}, torch={'8192': 750.0}),
    dict(part='ours', config=CONFIG, seconds_per_step=0.5, gflops=300e3, images_per_s=288.0),
    dict(part='torch', config=CONFIG, error='torch is not installed'),
    dict(part='plan', config=CONFIG, time=dict(step=0.4, peak_share=0.5), memory=dict(total=6e10)),
  ]
  page = gpu_page.text(lines)
  assert '| **ours: share of the measured peak** | 40.0% |' in page
  assert '| measured / plan, ms | 1.25 |' in page
  assert f'- torch {CONFIG}: torch is not installed' in page


def test_kernels_are_counted_for_the_parts_of_the_method(monkeypatch):
  config = strict.build(schema.Config, vits.get_config('v2,runlocal'))
  program = (
    '  %fusion.1 = f32[2] fusion(), metadata={op_name="jit(step)/jvp(clean)/ViT/mlp/up/add"}\n'
    '  ROOT %gemm.2 = f32[2] custom-call(), '
    'metadata={op_name="jit(step)/transpose(jvp(loss_masked))/dot_general"}\n'
  )
  # The first is named after its instruction, the second says it, the third is nobody's.
  events = [('fusion_1', '', 0, 4e6), ('nvjet', 'gemm.2', 2e6, 8e6), ('memcpy', '', 9e6, 10e6)]
  monkeypatch.setattr(consumers, '_events', lambda folder: events)
  found = consumers.read('', program, method_lib.build(config), steps=2)
  assert (found['busy_ms'], found['span_ms'], found['unknown_share']) == (4.5, 5.0, 0.0909)
  assert [(p['part'], p['direction'], p['layer'], p['ms']) for p in found['parts']] == [
    ('loss masked', 'backward', 'loss', 3.0),
    ('clean', 'forward', 'mlp', 2.0),
    ('unknown', '', '', 0.5),
  ]


def test_the_script():
  tool = pathlib.Path(sys.executable).parent / 'shellcheck'
  subprocess.run([tool, 'benchmarks/gpu.sh'], cwd=ROOT, check=True)
  env = {'PATH': f'{tool.parent}:/usr/bin:/bin', 'PYTHON': sys.executable}
  done = subprocess.run(
    ['benchmarks/gpu.sh', 'peek'], cwd=ROOT, capture_output=True, text=True, env=env
  )
  assert done.returncode == 2 and "got the part 'peek'; expected some of check" in done.stderr


def test_lines_that_are_cut_short_are_left_out(tmp_path):
  file = tmp_path / 'gpu.jsonl'
  file.write_text(json.dumps(dict(part='check')) + '\n{"part": "ou')
  assert gpu_page.read(file) == [dict(part='check')]

"""What goes wrong with encoders, judges and sets of images is said, and stops no report."""

import os

import numpy as np
import pytest

from tests.curation import plug
from tests.test_curate import PLUG, plain, png, record, run, write
from tips_jax.core.errors import InputError
from tips_jax.curation.records import Pictures
from tips_jax.data import store

NAMES = ('red', 'green', 'blue')


@pytest.fixture
def source(tmp_path):
  rows = [record(f'{i}', plain(name, i), f'a {name} one') for i, name in enumerate(NAMES)]
  return write(tmp_path / 'in', train=rows)


@pytest.mark.parametrize('method', ['images', 'texts'])
def test_an_encoder_that_gives_nan_keeps_nothing_silently(source, tmp_path, monkeypatch, method):
  original = getattr(plug.Colors, method)
  monkeypatch.setattr(plug.Colors, method, lambda self, x: original(self, x) * np.nan)
  with pytest.raises(InputError, match=f'9 of 9 numbers that are not finite for 3 {method}'):
    run(source, tmp_path / 'out', dict(kind='similarity', encoder=PLUG, least=0.0))


def test_thresholds_are_inclusive(source, tmp_path, monkeypatch):
  """A similarity of just 0.5 stays; of equal ones the first are the best share."""
  monkeypatch.setattr(plug.Colors, 'images', lambda self, images: np.eye(4)[[0] * len(images)])
  monkeypatch.setattr(plug.Colors, 'texts', lambda self, texts: np.full((len(texts), 4), 0.5))
  kept, _ = run(source, tmp_path / 'a', dict(kind='similarity', encoder=PLUG, least=0.5))
  assert kept == ['0', '1', '2']
  kept, gone = run(source, tmp_path / 'b', dict(kind='similarity', encoder=PLUG, best=0.34))
  assert kept == ['0'] and [*gone] == ['1', '2']


def test_names_that_are_not_utf8_reach_the_report(source, tmp_path):
  folder = tmp_path / 'evaluation'
  folder.mkdir()
  path = os.fsencode(folder) + b'/caf\xe9.png'
  with open(path, 'wb') as file:
    file.write(png(plain('red', 0)))
  step = dict(kind='decontaminate', evaluations=(str(folder),))
  kept, gone = run(source, tmp_path / 'out', step)
  assert kept == ['1', '2'] and 'evaluation: caf?.png' in gone['0']['why']
  assert 'caf?.png' in (tmp_path / 'out/curation.html').read_text()


def test_reasons_of_judges_may_be_any_text(source, tmp_path, monkeypatch):
  monkeypatch.setattr(plug, 'no_blue', lambda records: ['\udce9'] + [''] * (len(records) - 1))
  kept, gone = run(
    source, tmp_path / 'out', dict(kind='filter', function='tests.curation.plug:no_blue')
  )
  assert kept == ['1', '2'] and gone['0']['why'] == '?'


def test_a_set_without_a_readable_image_is_an_error(source, tmp_path):
  (tmp_path / 'queries').mkdir()
  (tmp_path / 'queries/a.png').write_bytes(b'none')
  step = dict(kind='retrieve', encoder=PLUG, queries=(str(tmp_path / 'queries'),), nearest=1)
  with pytest.raises(InputError, match='queries: none of 1 images can be read'):
    run(source, tmp_path / 'out', step)


def test_sets_are_told_apart_by_what_they_hold(source, tmp_path):
  (tmp_path / 'set').mkdir()
  (tmp_path / 'set/a.png').write_bytes(png(plain('red')))
  before = Pictures(str(tmp_path / 'set'), 'x').identity
  (tmp_path / 'set/b.png').write_bytes(png(plain('blue')))
  assert Pictures(str(tmp_path / 'set'), 'x').identity != before
  assert Pictures(str(source), 'x').identity != Pictures(f'{source}@train', 'x').identity
  step = dict(kind='decontaminate', evaluations=(str(tmp_path / 'set'),), alike=1.0)
  run(source, tmp_path / 'out', step, dict(kind='image_size'))
  [made] = store.open_store(tmp_path / 'out').info['curation']
  assert [*made['sets']] == [str(tmp_path / 'set')]

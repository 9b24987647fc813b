"""README.md, BUILD.md and docs/ are true: files, commands, flags, links, and the worked example."""

import configparser
import importlib
import pathlib
import re
import shlex
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tips_jax.core import schema, strict
from tips_jax.train import method as method_lib
from tips_jax.train import state as state_lib

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ('configs', 'method', 'data', 'training', 'evaluation', 'export', 'scale', 'lab')
PAGES = ('README.md', 'BUILD.md', *(f'docs/{name}.md' for name in DOCS))


def blocks(page, language):
  return re.findall(rf'```{language}\n(.*?)```', (ROOT / page).read_text(), re.S)


def commands(page):
  """Every command of the sh blocks and of the inline code that starts like one, as words."""
  text = (ROOT / page).read_text()
  lines = '\n'.join(blocks(page, 'sh')).replace('\\\n', ' ').split('\n')
  lines += re.findall(
    r'`((?:python|pip|pytest|ruff) [^`]*)`', re.sub(r'```.*?```', '', text, flags=re.S)
  )
  parts = [part for line in lines for part in line.split('&&')]
  return [words for words in (shlex.split(part, comments=True) for part in parts) if words]


COMMANDS = [(page, words) for page in PAGES for words in commands(page)]


def tree():
  """Paths in BUILD.md's list of files."""
  folders, found = [], []
  for line in blocks('BUILD.md', 'text files')[0].splitlines():
    depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
    folders = folders[:depth]
    if name.endswith('/'):
      folders.append(name)
    else:
      found.append(''.join(folders) + name)
  return found


def test_the_tree_shows_every_file_and_nothing_else():
  there = [
    p.relative_to(ROOT).as_posix()
    for folder in ('tips_jax', 'configs')
    for p in (ROOT / folder).rglob('*.py')
    if p.read_text().strip()
  ]
  assert sorted(tree()) == sorted(there)


def test_every_line_of_the_tree_says_something():
  for line in blocks('BUILD.md', 'text files')[0].splitlines():
    if line.split()[0].endswith('.py'):
      assert len(line.split()) > 1, line


def flags_of(path):
  """Flags that a program defines; booleans with their 'no'."""
  source = path.read_text()
  if 'cli.Flags()' in source:
    values = importlib.import_module(f'tips_jax.{path.stem}').FLAGS
    return {*values} | {f'no{n}' for n in values if values[n].boolean}
  names = set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", source))
  names |= set(re.findall(r"add_argument\(\s*'--(\w+)'", source))  # benchmarks
  return names | {f'no{n}' for n in re.findall(r"DEFINE_bool\(\s*'(\w+)'", source)}


def check_config(words):
  """The config of a training command builds, and its overrides name fields that exist."""
  given = [w.removeprefix('--config=') for w in words if w.startswith('--config=')]
  if not given:
    return
  path, _, arg = given[0].partition(':')
  assert (ROOT / path).is_file(), path
  module = importlib.import_module(path.removesuffix('.py').replace('/', '.'))
  config = module.get_config(arg) if arg else module.get_config()
  for word in words:
    if word.startswith('--config.'):
      check_field(config, word.removeprefix('--config.').split('=')[0])


def check_field(config, path):
  for key in path.split('.'):
    assert key in config, path
    config = config[key]


@pytest.mark.parametrize(
  'page, words', COMMANDS, ids=[f'{p}: {" ".join(w)[:60]}' for p, w in COMMANDS]
)
def test_commands_exist(page, words):
  if words[:3] == ['python3', '-m', 'venv'] or words[0] == '.':  # the virtual environment
    return
  if words[0] == 'img2dataset':  # a program of others
    return
  if words[0] == 'pip':
    extras = configparser.ConfigParser()
    extras.read(ROOT / 'setup.cfg')
    for extra in [e for w in words if w.startswith('.[') for e in w[2:-1].split(',')]:
      assert extra in extras['options.extras_require']
  elif words[0] == 'python':
    program = words[2].replace('.', '/') + '.py' if words[1] == '-m' else words[1]
    known = flags_of(ROOT / program)
    assert known, program
    for word in words[2:]:
      if word.startswith('--') and not word.startswith('--config.'):
        assert word[2:].split('=')[0] in known, word
    if program.endswith(('main.py', 'plan.py')):
      check_config(words)
  elif words[0] in ('pytest', 'ruff'):
    assert all((ROOT / w).exists() for w in words[1:] if '/' in w or w == '.')
  else:
    assert (ROOT / words[0]).is_file(), words


def test_the_readme_is_short_and_has_the_two_commands():
  lines = (ROOT / 'README.md').read_text().splitlines()
  assert len(lines) <= 180
  quickstart = (
    "pip install -e '.[cpu]' && python -m tips_jax.main --config=configs/quickstart.py --workdir="
  )
  [first] = [i for i, line in enumerate(lines) if line.startswith(quickstart)]
  assert first < lines.index("pip install -e '.[cpu,test]' && pytest")


@pytest.mark.parametrize('page', PAGES)
def test_flags_and_fields_in_the_text_exist(page):
  text = (ROOT / page).read_text()
  programs = 'main prepare caption annotate curate plan export encode evaluate'.split()
  known = set().union(*(flags_of(ROOT / f'tips_jax/{name}.py') for name in programs))
  for flag in re.findall(r'`--(\w+)[=`.]', text):
    assert flag in known, flag
  distilled = importlib.import_module('configs.vits').get_config('distill')
  for path in re.findall(r'--config\.([\w.]+)', text):
    check_field(distilled, path)


@pytest.mark.parametrize('page', PAGES)
def test_links_and_named_files_exist(page):
  text = (ROOT / page).read_text()
  for link in re.findall(r'\]\(([^)#]+)\)', text):
    assert link.startswith('https://') or (ROOT / page).parent.joinpath(link).exists(), link
  for name in re.findall(r'`((?:core|data|models|objectives|train|evals)(?:/\w+)+(?:\.py)?)', text):
    path = ROOT / 'tips_jax' / name
    assert path.exists() or path.with_suffix('.py').exists(), name


def test_exit_codes_are_the_documented_ones():
  from tips_jax.core.errors import AGAIN

  codes = re.findall(r'^\| (\d+) \|', (ROOT / 'docs/training.md').read_text(), re.M)
  assert codes == ['0', '2', '3', str(AGAIN), str(128 + signal.SIGABRT)]  # the last one is jax's
  source = (ROOT / 'tips_jax/main.py').read_text()
  assert all(line in source for line in ('sys.exit(3)', 'code = error.code', 'code = AGAIN\n'))


def test_the_worked_example_works(monkeypatch):
  function, line, config = blocks('BUILD.md', 'python')
  agreement = types.ModuleType('agreement')
  exec(function, agreement.__dict__)  # noqa: S102
  # noqa: S307
  added = eval('{' + line + '}', {'Objective': method_lib.Objective, 'agreement': agreement})
  for name, objective in added.items():
    monkeypatch.setitem(method_lib.LOSSES, name, objective)
  scope = {}
  exec(config, scope)  # noqa: S102
  method = method_lib.build(strict.build(schema.Config, scope['get_config']('runlocal')))
  assert 'agreement' in method.config.losses and 'other.cls' in method.reads
  assert jax.eval_shape(lambda: state_lib.init(method)).params['image']
  one = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 8)), jnp.float32)
  loss = agreement.agreement(one, -one, temperature=2.0)
  np.testing.assert_allclose((loss.value, loss.metrics['cosine']), (1.0, -1.0), rtol=1e-6)

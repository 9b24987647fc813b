"""Programs end with one line and a code; importing the package changes nothing for the importer."""

import logging
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from tips_jax.core import cli
from tips_jax.core.errors import InputError

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / 'configs/quickstart.py')
VITS = str(ROOT / 'configs/vits.py')

# Entry points are left out: they are programs. What logs at which level is the importer's choice.
IMPORT_ALL = """
import importlib, logging, pathlib
loggers = [logging.getLogger(name) for name in (None, 'absl', 'jax')]
before = [logger.level for logger in loggers]
import absl.logging, jax, orbax.checkpoint
with_libraries = [logger.level for logger in loggers]
for path in sorted(pathlib.Path('tips_jax').rglob('*.py')):
  importlib.import_module('.'.join(path.with_suffix('').parts))
after = [logger.level for logger in loggers]
assert after == with_libraries, (before, with_libraries, after)
"""


def test_importing_every_module_changes_no_logger():
  result = subprocess.run(
    [sys.executable, '-c', IMPORT_ALL], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


@pytest.fixture
def values():
  values = cli.Flags()
  values.add_integer('number', 1, 'A number.', 0)
  return values


def test_the_help_gives_flags_to_the_program_that_defines_them(values):
  lines = values.main_module_help() + values.module_help(sys.modules[__name__])
  assert '--number: A number.' in lines
  assert cli.__name__ not in values.flags_by_module_dict()


def test_a_bound_of_a_flag_holds(values):
  with pytest.raises(flags.IllegalFlagValueError, match='number'):
    values(['program', '--number=-1'])


@pytest.fixture
def values_with_config(values):
  values.add_config_file()

  def parse(*words):
    cli.parse(values, ['program', *words])
    return values

  return parse


def test_a_program_silences_orbax_for_its_own_time_alone(values):
  logger = logging.getLogger('absl')
  before, levels = logger.level, []

  def work(argv):
    levels.append(logger.level)
    raise InputError('x: got 1; expected 2')

  assert cli.run(work, ['program'], values, about='', stopped='') == 2
  assert levels == [logging.CRITICAL] and logger.level == before


def test_help_and_errors_are_one_way_for_all(values, capsys):
  assert cli.run(lambda argv: 1 / 0, ['program', '--help'], values, about='Adds.', stopped='') == 0
  assert 'Adds.' in capsys.readouterr().out

  def work(argv):
    cli.parse(values, argv)
    return values.number

  assert cli.run(work, ['program', '--number=3'], values, about='', stopped='') == 3
  assert cli.run(work, ['program', 'three'], values, about='', stopped='') == 2
  assert capsys.readouterr().err == (
    "error: arguments: got 'three'; expected only flags, written --name=value\n"
  )


def test_a_config_with_overrides(values_with_config):
  values = values_with_config(f'--config={QUICKSTART}', '--config.seed=7', '--number=2')
  assert cli.load_config(values).seed == 7 and values.number == 2


def test_a_number_for_a_value_that_moves_holds_it(values_with_config):
  values = values_with_config(f'--config={VITS}', '--config.teachers.ema.momentum=0.99')
  momentum = cli.load_config(values).teachers['ema'].momentum
  assert (momentum.start, momentum.end) == (0.99, 0.99)
  values = values_with_config(f'--config={QUICKSTART}', '--config.losses.masked.weight=2e-1')
  weight = cli.load_config(values).losses['masked'].weight
  assert (weight.start, weight.end) == (0.2, 0.2)


def test_a_field_called_as_a_keyword_of_python_can_be_overridden(values_with_config):
  values = values_with_config(f'--config={QUICKSTART}', '--config.data.views.global.size=80')
  assert cli.load_config(values).data.views['global'].size == 80


@pytest.mark.parametrize(
  'content, message',
  [
    ('def get_config(:', 'line 1: SyntaxError: invalid syntax'),
    ('import no_such_module', "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ('def get_config():\n  return 1 / 0', 'line 2: ZeroDivisionError: division by zero'),
    ('def get_config():\n  raise RuntimeError("a\\nb")', 'line 2: RuntimeError: a b'),
    ('import sys\nsys.exit(3)', 'line 2: SystemExit: 3'),
    ('def get_config():\n  return get_config()', 'line 2: RecursionError'),
  ],
)
def test_a_config_file_that_fails_is_named_with_its_line(
  values_with_config, tmp_path, content, message
):
  file = tmp_path / 'broken.py'
  file.write_text(content)
  with pytest.raises(InputError) as error:
    cli.load_config(values_with_config(f'--config={file}'))
  assert str(error.value).startswith(f'--config={file}: {message}')
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'words, message',
  [
    ([f'--config={QUICKSTART}', '--config.optimizer.learning_rat=1'], 'learning_rat'),
    (
      [f'--config={QUICKSTART}', '--config.batch_size=64'],
      "^--config.batch_size=64: unknown field 'batch_size'; did you mean .*'schedule.batch_size'",
    ),
    (
      [f'--config={QUICKSTART}', '--config.scedule.batch_size=64'],
      "unknown field 'scedule'; did you mean 'schedule.batch_size'",
    ),
    (['--config=no/such/file.py'], '--config: got a file that cannot be read'),
    (['--nunber=1'], 'command line: .*nunber'),
    ([f'--config={QUICKSTART}:nothing'], 'nothing'),
    ([], '--config: missing; expected a file such as configs/quickstart.py'),
  ],
)
def test_errors_of_a_config(values_with_config, words, message):
  with pytest.raises(InputError, match=message) as error:
    cli.load_config(values_with_config(*words))
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'given, value',
  [
    ('~/x', '/home/me/x'),
    ('~', '/home/me'),
    ('~/a,b/~c,~/d e', '/home/me/a,b/~c,/home/me/d e'),
    ('a ~/b', 'a ~/b'),
    ('x~/b', 'x~/b'),
  ],
)
def test_a_home_is_expanded_in_every_flag(monkeypatch, given, value):
  monkeypatch.setenv('HOME', '/home/me')
  values = cli.Flags()
  values.add_string('path', '', 'A path.')
  cli.parse(values, ['program', f'--path={given}'])
  assert values.path == value
  cli.parse(values, ['program', '--path', given])
  assert values.path == value


def test_a_home_is_expanded_in_every_field(values_with_config, monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'mine.py').write_text(
    f'import runpy\nnamespace = runpy.run_path({QUICKSTART!r})\n'
    "def get_config(arg=''):\n  config = namespace['get_config'](arg)\n"
    "  config.evals.data = '~/data'\n  return config\n"
  )
  values = values_with_config(
    '--config=~/configs/mine.py',
    '--config.data.store=~/store',
    """--config.data.extra_stores=('~/a','~/b')""",
  )
  config = cli.load_config(values)
  assert config.evals.data == f'{tmp_path}/data'
  assert config.data.store == f'{tmp_path}/store'
  assert config.data.extra_stores == (f'{tmp_path}/a', f'{tmp_path}/b')


def test_a_bucket_in_a_config_file_is_named_by_its_field(values_with_config):
  values = values_with_config(f'--config={QUICKSTART}')
  values.config.data.store = 'foo://bucket/store'
  with pytest.raises(InputError, match="config.data.store: got 'foo://bucket/store'; expected a"):
    cli.load_config(values)


def test_letters_that_a_terminal_lacks_are_escaped_and_a_path_that_is_not_utf8_is_refused():
  code = (
    'import sys\n'
    'from tips_jax.core import cli\n'
    'values = cli.Flags()\n'
    'def work(argv):\n'
    '  cli.parse(values, argv[:1])\n'
    '  print("caf\\xe9")\n'
    '  cli.parse(values, argv)\n'
    'sys.exit(cli.run(work, sys.argv, values, about="", stopped=""))\n'
  )
  done = subprocess.run(
    [sys.executable, '-c', code, b'--output=\xff'],
    env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
    capture_output=True,
    check=False,
  )
  assert done.stdout == b'caf\\xe9\n' and done.returncode == 2
  assert done.stderr == b"error: arguments: got '--output=\\udcff'; expected UTF-8, also in paths\n"


LIMITED = (
  'import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, 2 * (2 << 30,)); '
  'os.execv(sys.executable, [sys.executable, *sys.argv[1:]])'
)


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems do not hold to the limit')
def test_little_address_space_is_one_line_at_once(tmp_path):
  command = ['-m', 'tips_jax.main', f'--config={QUICKSTART}', f'--workdir={tmp_path / "run"}']
  done = subprocess.run(
    [sys.executable, '-c', LIMITED, *command], cwd=ROOT, capture_output=True, text=True, timeout=60
  )
  said = 'error: ulimit -v: got 2.0 GiB of address space; expected at least 4 GiB, or unlimited'
  assert done.returncode == 2 and done.stderr.startswith(said), done
  assert done.stdout == '' and done.stderr.count('\n') == 1

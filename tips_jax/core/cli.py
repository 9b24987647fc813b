"""What the command-line programs share: flags, a config from a file, one line for bad input, exit
codes.
"""

import contextlib
import io
import keyword
import logging
import os
import pathlib
import re
import resource
import signal
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

from tips_jax.core import buckets, schema, strict
from tips_jax.core.errors import InputError

# Flags belong to the program that defines them, as its help says, not to this module.
flags.disclaim_key_flags()
_HELP = {'--help', '-help', '-h'}
# The smallest config takes 4 GiB on two cores: most of it is reserved and never used.
_ADDRESS_SPACE = 4 << 30
_QUOTES = '\'"() '
_NUMBER = re.compile(r'[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?', re.IGNORECASE)
# Fields of a config that may name a path in a bucket.
_IN_BUCKETS = re.compile(
  r'(--)?config\.(data\.(store|extra_stores|tokenizer)|(teachers\.[^.]+\.)?init_from'
  r'|steps\.(encoder|evaluations|queries))'
)
_NO_PATHS = ('config.steps.patterns',)  # regular expressions
Group = typing.TypeVar('Group')
_HOME = re.compile(r"""(?<![^,'"(])~[^/,'")]*(?=[/,'")]|$)""")


class Flags(flags.FlagValues):
  """The flags of one program; another program's may have the same names.

  Each method adds a flag: its name, its default and a line of help.
  """

  def add_path(self, name: str, default: str | None, text: str) -> None:
    """A flag whose value may be a path in a bucket; of all others a URL is refused."""
    self.add_string(name, default, text)
    self[name].takes_buckets = True

  def add_string(self, name: str, default: str | None, text: str) -> None:
    flags.DEFINE_string(name, default, text, flag_values=self)

  def add_strings(self, name: str, default: Sequence[str], text: str) -> None:
    flags.DEFINE_list(name, default, text, flag_values=self)

  def add_texts(self, name: str, default: Sequence[str], text: str) -> None:
    """A flag that may be given several times, each time with a text that may have commas."""
    flags.DEFINE_multi_string(name, default, text, flag_values=self)

  def add_boolean(self, name: str, default: bool | None, text: str) -> None:
    flags.DEFINE_bool(name, default, text, flag_values=self)

  def add_enum(self, name: str, default: str | None, values: Sequence[str], text: str) -> None:
    flags.DEFINE_enum(name, default, values, text, flag_values=self)

  def add_integer(
    self,
    name: str,
    default: int | None,
    text: str,
    least: int | None = None,
    most: int | None = None,
  ) -> None:
    flags.DEFINE_integer(name, default, text, least, most, flag_values=self)

  def add_number(
    self, name: str, default: float, text: str, least: float, most: float | None = None
  ) -> None:
    flags.DEFINE_float(name, default, text, least, most, flag_values=self)

  def add_config_file(self) -> None:
    """--config=FILE[:arg], and --config.a.b=value for each field."""
    text = 'Config file, with an argument after a colon: configs/vitb.py:v2.'
    config_flags.DEFINE_config_file('config', None, text, flag_values=self)

  def add_model(self) -> None:
    """The flags that say which weights a program reads."""
    formats = (
      'WORKDIR or WORKDIR@step of a run, Hugging Face folder, export, or official npz files.'
    )
    chosen = "Of a run: 'student', 'teacher' or a teacher's name. Default: as its evaluations."
    self.add_path('checkpoint', '', formats)
    self.add_string('weights', '', chosen)
    self.add_path('tokenizer', '', 'SentencePiece model, where none is beside the weights.')


def run(
  work: Callable[[Sequence[str]], int | None],
  argv: Sequence[str],
  values: flags.FlagValues,
  *,
  about: str,
  stopped: str,
) -> int:
  """Calls work(argv) and returns its exit code, or 0.

  values: the program's flags; about: its help. An InputError is one line and its code; Ctrl-C
  prints `stopped` and is 130, SIGTERM 143.
  """
  if print_help(argv, values, about):
    return 0
  for stream in (sys.stdout, sys.stderr):
    if isinstance(stream, io.TextIOWrapper):
      stream.reconfigure(errors='backslashreplace')  # not every terminal has every letter
  before = signal.signal(signal.SIGTERM, _stop)
  try:
    with _libraries_silent():
      return work(argv) or 0
  except (InputError, flags.Error) as error:
    print(f'error: {error}', file=sys.stderr)
    return getattr(error, 'code', InputError.code)
  except KeyboardInterrupt as stop:
    print(f'\nstopped: {stopped}', file=sys.stderr)
    return 143 if stop.args == ('SIGTERM',) else 130
  finally:
    signal.signal(signal.SIGTERM, before)


def print_help(argv: Sequence[str], values: flags.FlagValues, about: str) -> bool:
  """Whether the command line asks for help, which is then printed."""
  if not _HELP & set(argv):
    return False
  print(f'{about}\n{values.get_help()}')
  if 'config' in values:
    print('\nFields of the config: tips_jax/core/schema.py, or tips_jax.main --dry_run.')
  return True


def require_address_space() -> None:
  """InputError where the system grants less than any run takes (ulimit -v): XLA would hang."""
  granted, _ = resource.getrlimit(resource.RLIMIT_AS)
  if granted != resource.RLIM_INFINITY and granted < _ADDRESS_SPACE:
    raise InputError(
      f'ulimit -v: got {granted / 2**30:.1f} GiB of address space; expected at least '
      f'{_ADDRESS_SPACE / 2**30:.0f} GiB, or unlimited (it is not the memory that is used)'
    )


def parse(values: flags.FlagValues, argv: Sequence[str], hint: str = '') -> None:
  """Reads the command line into `values`, afresh; InputError for what is no flag."""
  for arg in argv:
    try:
      arg.encode()
    except UnicodeEncodeError as error:
      raise InputError(f'arguments: got {arg!r}; expected UTF-8, also in paths') from error
  argv = [argv[0], *_with_own_paths(argv[1:], values)]
  values.unparse_flags()
  for name in values:
    values[name].unparse()
  if 'config' in values:
    rest = _parse_config(values, argv)[1:]
  else:
    rest = values(argv)[1:]
  if rest:
    raise InputError(f'arguments: got {rest[0]!r}; expected only flags, written --name=value{hint}')


def _with_own_paths(arguments, values):
  """The arguments with their paths as on this machine: shells leave the ~ behind '=' as it is."""
  result = []
  flag = 'arguments'
  for argument in arguments:
    start = ''
    value = argument  # of the flag before it
    if argument.startswith('-'):
      flag, equals, value = argument.partition('=')
      start = flag + equals
    for path in value.split(','):
      _check_path(path.strip(_QUOTES), flag, values)
    result.append(start + _expanded(value))
  return result


def _check_path(path, name, values):
  """InputError for a URL that a flag or field does not take, or that cannot be used here."""
  flag = name.lstrip('-')
  takes_buckets = flag in values and getattr(values[flag], 'takes_buckets', False)
  if takes_buckets or _IN_BUCKETS.fullmatch(name):
    buckets.check(path, name)
  else:
    buckets.require_local(path, name)


def _expanded(text):
  """Text with its paths that start with ~ expanded; lists have commas, tuples quotes."""
  return _HOME.sub(_home, text)


def _home(match):
  return os.path.expanduser(match[0])


# --- a config -----------------------------------------------------------------------------------


def load_config(
  values: flags.FlagValues,
  of: type[Group] = schema.Config,
  example: str = 'configs/quickstart.py',
) -> Group:
  """The checked config; InputError for a file, an argument, a field or a value that does not
  fit.
  """
  if values.config is None:
    raise InputError(f'--config: missing; expected a file such as {example}')
  return strict.build(of, _with_paths(values.config, 'config', values))


def _with_paths(value, name, flags):
  """A config, a group or a value of it, with its paths as on this machine."""
  if name in _NO_PATHS:
    return value
  if isinstance(value, str):
    _check_path(value, name, flags)
    return _expanded(value)
  if isinstance(value, (tuple, list)):
    return type(value)([_with_paths(item, name, flags) for item in value])
  if hasattr(value, 'to_dict'):
    value = value.to_dict()
  if isinstance(value, dict):
    return {key: _with_paths(item, f'{name}.{key}', flags) for key, item in value.items()}
  return value


def _parse_config(values, argv):
  # A config file may import its neighbors, wherever it is called from.
  for arg in argv:
    if arg.startswith('--config='):
      file = arg.removeprefix('--config=').split(':')[0]
      sys.path.insert(0, str(pathlib.Path(file).absolute().parent.parent))
  fields = set(_fields_of_file(argv, values))
  overrides = []
  for arg in argv:
    overrides += _of_both_ends(_without_keywords(arg), fields)
  before = sys.argv
  # Where ml_collections looks for overrides.
  sys.argv = overrides
  try:
    rest = values(sys.argv)
    # A file that cannot be read is an error on first use only: use it here.
    hasattr(values.config, 'lock')
  except InputError:
    raise
  # A config file is a program of the user's: it may raise anything.
  except (Exception, SystemExit) as error:
    raise InputError(_reason(error, argv, values)) from None
  finally:
    sys.argv = before
  return rest


def _without_keywords(argument):
  """An override whose path has a keyword of Python, as the view 'global', for ml_collections."""
  if not argument.startswith('--config.'):
    return argument
  path, equals, value = argument.partition('=')
  first, *names = path.split('.')
  for name in names:
    first += f'["{name}"]' if keyword.iskeyword(name) else f'.{name}'
  return first + equals + value


def _of_both_ends(argument, fields):
  """A number for what moves from a start to an end holds it there."""
  path, _, value = argument.partition('=')
  ends = [f'{path}.start', f'{path}.end']
  if not _NUMBER.fullmatch(value) or not {end.removeprefix('--config.') for end in ends} <= fields:
    return [argument]
  return [f'{end}={value}' for end in ends]


def _reason(error, argv, values):
  """One line for what absl, ml_collections or a config file raised."""
  text = str(error).strip()
  last = (text.splitlines() or [''])[-1].strip()
  for arg in argv:
    line = _line_of(error, arg.removeprefix('--config=').split(':')[0])
    if line:
      return f'{arg}: line {line}: {type(error).__name__}: {" ".join(text.split())}'
  if isinstance(error, OSError):
    return f'--config: got a file that cannot be read; {last}'
  if 'Traceback' in text:  # from inside a config file
    if 'InputError: ' in last:
      return last.split('InputError: ')[-1]
    return f'--config: {last}'
  if 'is not a dict' in text:
    for arg in argv:
      flag, _, value = arg.partition('=')
      if f'{flag}=' in text:
        return f'{flag}: got {value!r} for a group; expected its fields, as {flag}.FIELD=VALUE'
  if isinstance(error, (AttributeError, KeyError)):
    name = re.search(r'\w+', text)
    for arg in argv:
      path = arg.partition('=')[0].removeprefix('--config.')
      if name and arg.startswith('--config.') and name[0] in path.split('.'):
        return f'{arg}: unknown field {name[0]!r}{_near(path, name[0], argv, values)}'
  return f'command line: {" ".join(text.split())}'


def _line_of(error, file):
  """The last line of a file that an error passed through, or where it is no Python; else None."""
  if isinstance(error, SyntaxError) and error.filename == file:
    return error.lineno or 1
  line = None
  for frame in traceback.extract_tb(error.__traceback__):
    if frame.filename == file:
      line = frame.lineno
  return line


def _near(path, name, argv, values):
  """The end of an error message: fields of that name in other groups, else the nearest path."""
  fields = _fields_of_file(argv, values)
  alike = [repr(field) for field in fields if field.rpartition('.')[2] == name]
  if alike and path.endswith(name):
    return f'; did you mean {" or ".join(alike[:3])}?'
  return strict.did_you_mean(path, fields)


def _fields_of_file(argv, values):
  """The paths of all groups and fields of the config file; none of a file that fails, which is
  reported where it is used.
  """
  for arg in argv:
    if arg.startswith('--config='):
      try:
        return _fields(values['config'].parser.parse(arg.removeprefix('--config=')))
      except (Exception, SystemExit):
        return []
  return []


def _fields(group, prefix=''):
  """Paths of the groups and fields of a config."""
  paths = []
  for name, value in group.items():
    paths.append(prefix + name)
    if hasattr(value, 'items'):
      paths += _fields(value, f'{prefix}{name}.')
  return paths


# --- what the libraries log ---------------------------------------------------------------------


@contextlib.contextmanager
def _libraries_silent() -> Iterator[None]:
  """Within it orbax logs nothing, through absl's logger.

  It would log the traceback of every thread that an error passes through; the error itself reaches
  us, and the user in one line. The level comes back, for a caller that is no program of ours.
  """
  logger = logging.getLogger('absl')
  before = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(before)


def set_verbosity(verbosity: int | None) -> None:
  """What the libraries may log, to the end of the process, as absl counts: 0 information, -1
  warnings. None: jax its warnings, orbax nothing (see _libraries_silent).
  """
  absl_logging.use_absl_handler()
  absl_logging.set_verbosity(absl_logging.WARNING if verbosity is None else verbosity)
  if verbosity is None:
    logging.getLogger('absl').setLevel(logging.CRITICAL)


def _stop(signum, frame):
  raise KeyboardInterrupt('SIGTERM')

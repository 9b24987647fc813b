"""The structure: which folder imports which, how long files are, and that every field is read."""

import ast
import dataclasses
import graphlib
import pathlib
import subprocess
import sys

import pytest

from tips_jax.core import schema

ROOT = pathlib.Path(__file__).parent.parent
# A module imports lower layers and its own folder.
LAYERS = {
  'core': 0,
  'models': 1,
  'objectives': 1,
  'data': 1,
  'runs': 2,
  'runtime': 2,
  'interop': 3,
  'evals': 4,
  'curation': 5,
  'train': 5,
  'planning': 6,
}
TOP = 7  # entry points, configs; above them benchmarks, which measure both
DEVICE = {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}


def path_of(module):
  return str(module.relative_to(ROOT))


PACKAGE = sorted((ROOT / 'tips_jax').rglob('*.py'))
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))
BENCHMARKS = sorted((ROOT / 'benchmarks').rglob('*.py'))
OURS = PACKAGE + CONFIGS + BENCHMARKS


def name_of(path):
  parts = path.relative_to(ROOT).with_suffix('').parts
  return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


MODULES = {name_of(p): p for p in OURS}


def imports(path):
  """Absolute names of everything a file imports, wherever it stands in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {a.name for a in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      names |= {f'{node.module}.{a.name}' for a in node.names} | {node.module}
  return names


def ours(path):
  """Our modules that a file imports."""
  return {n for n in imports(path) if n in MODULES and MODULES[n].name != '__init__.py'}


def layer(name):
  parts = name.split('.')
  if parts[0] == 'benchmarks':
    return TOP + 1
  return LAYERS[parts[1]] if parts[0] == 'tips_jax' and len(parts) > 2 else TOP


def folder(name):
  parts = name.split('.')
  return parts[1] if parts[0] == 'tips_jax' and len(parts) > 2 else parts[0]


def test_every_folder_has_a_layer():
  inside = [name.split('.') for name in MODULES if name.startswith('tips_jax.')]
  assert {parts[1] for parts in inside if len(parts) > 2} == set(LAYERS)


@pytest.mark.parametrize('path', OURS, ids=path_of)
def test_a_module_imports_lower_layers_and_its_own_folder(path):
  name = name_of(path)
  for other in ours(path):
    assert layer(other) < layer(name) or folder(other) == folder(name), f'{name} imports {other}'
  foreign = (
    ('tests',) if path in BENCHMARKS else ('tests', 'torch', 'tensorflow')
  )  # a benchmark may compare itself
  assert not any(n.split('.')[0] in foreign for n in imports(path))


def test_imports_form_no_circle():
  graph = {name: ours(path) - {name} for name, path in MODULES.items()}
  # static_order raises CycleError with the circle.
  assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(MODULES)


# Nested folders too: worker processes of the input pipeline import all of them.
DATA = sorted((ROOT / 'tips_jax' / 'data').rglob('*.py'))


def test_the_folders_of_data_are_among_those_checked():
  folders = {'data', 'benchmarks', 'ingest', 'pixels', 'reading', 'scenes'}
  assert {path.parent.name for path in DATA} == folders


@pytest.mark.parametrize('path', DATA + CONFIGS, ids=path_of)
def test_data_and_configs_touch_no_device(path):
  seen, todo = set(), {name_of(path)}
  while todo:
    name = todo.pop()
    seen.add(name)
    heavy = {n for n in imports(MODULES[name]) if n.split('.')[0] in DEVICE}
    assert not heavy, f'{name_of(path)} reaches {heavy} by way of {name}'
    todo |= ours(MODULES[name]) - seen


@pytest.mark.parametrize('path', OURS + sorted((ROOT / 'tests').rglob('*.py')), ids=path_of)
def test_files_are_short(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 500


def test_every_module_imports():
  """Each in one fresh interpreter; entry points in turn, as their flags may share names."""
  library = [n for n in MODULES if layer(n) < TOP] + [name_of(p) for p in CONFIGS]
  alone = [n for n in MODULES if n not in library]
  flags = (
    'from absl import flags; [delattr(flags.FLAGS, n) for n in list(flags.FLAGS) if n not in known]'
  )
  code = ['import importlib', 'from absl import flags', 'known = set(flags.FLAGS)']
  code += [f'importlib.import_module({n!r})' for n in library]
  for n in alone:
    code += [f'importlib.import_module({n!r})', flags]
  result = subprocess.run(
    [sys.executable, '-c', '\n'.join(code)], cwd=ROOT, capture_output=True, text=True
  )
  assert result.returncode == 0, result.stderr


def groups():
  return [g for g in vars(schema).values() if dataclasses.is_dataclass(g)]


def test_every_field_of_the_schema_is_read():
  read = set()
  for path in PACKAGE:
    if path.name not in ('schema.py', 'schema_data.py'):
      nodes = list(ast.walk(ast.parse(path.read_text())))
      read |= {
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)
      }
      if any(
        isinstance(n, ast.Name) and n.id == 'getattr' for n in nodes
      ):  # names held as strings: the mesh's axes
        read |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}
  unread = [
    f'{g.__name__}.{f.name}' for g in groups() for f in dataclasses.fields(g) if f.name not in read
  ]
  assert unread == []

"""Random configs: each one ends in the page of --dry_run, or is refused in one line.

  JAX_PLATFORMS=cpu python benchmarks/fuzz_configs.py [--configs=5000 --seed=0 --lower_every=10
    --only=17]

The configs of configs/, small, with one to three values, names or groups changed into others. Every
tenth one of those that are accepted is also lowered, as a run or `plan` would do. Faults: a
traceback, an error of several lines, over 20 s of a processor. Prints the counts, and each fault
once with the number that repeats it (--seed and --only); exit code 1 where there is one.
"""

import argparse
import collections
import copy
import importlib
import pathlib
import random
import resource
import signal
import sys
import traceback
from typing import Any

RECIPES = {
  'quickstart': ('', 'v2'),
  'laptop': ('', 'clip'),
  'vits': ('v1', 'v2', 'hr', 'v2,hr', 'distill', 'distill,hr', 'separate_heads', 'student_ema'),
  'methods.clip': ('',),
  'methods.siglip': ('',),
  'methods.silc': ('',),
  'methods.dino_ibot': ('',),
  'methods.mae': ('',),
}
LIMIT_S = 20
LIMIT_BYTES = 6 * 10**9
WORDS = ['', 'x', 'image', 'text', 'head', 'student', 'teacher', 'batch.global', 'random', 'vit']
NUMBERS = [0, 1, -1, 2, 7, 16, 10**6, 10**12, 0.5, 1.5, -0.1, 1e-30, float('nan'), float('inf')]
OTHERS = [None, True, (), (1,), [0.5, 0.1], {}, {'start': 1, 'end': 0}]


class Hang(BaseException):
  """Over LIMIT_S; no reader of errors takes it for a refusal."""


def places(group: dict, place: tuple = ()) -> list[tuple]:
  """The path of every field and group."""
  found = []
  for name, value in group.items():
    found.append((*place, name))
    if isinstance(value, dict):
      found += places(value, (*place, name))
  return found


def at(config: dict, place: tuple) -> Any:
  for name in place:
    config = config[name]
  return config


def changed(rng: random.Random, value: Any, config: dict) -> Any:
  """Another value: mostly of the same type, so that more than the types are tried."""
  others = [*WORDS, *NUMBERS, *OTHERS]
  if rng.random() < 0.1:
    return rng.choice(others)
  others += [at(config, place) for place in places(config)]
  others = [other for other in others if type(other) is type(value)]
  if type(value) in (int, float) and rng.random() < 0.6:
    others = [2 * value, value // 2, value + 1, value - 1, -value, 3 * value, value / 3]
    return type(value)(rng.choice(others))
  return copy.deepcopy(rng.choice(others))  # a group may be put into itself


def change(rng: random.Random, config: dict) -> None:
  *groups, name = rng.choice(places(config))
  group = at(config, tuple(groups))
  kind = rng.random()
  if kind < 0.05:
    del group[name]
  elif kind < 0.1:
    group[rng.choice((*group, *WORDS))] = group.pop(name)
  else:
    group[name] = changed(rng, group[name], config)


def random_config(name: str, argument: str, key: str) -> dict:
  """The plain config of a recipe with some changes; the same for the same key."""
  rng = random.Random(key)
  argument = ','.join(filter(None, (argument, 'runlocal')))
  config = importlib.import_module(f'configs.{name}').get_config(argument).to_dict()
  for _ in range(rng.choice((1, 1, 2, 3))):
    change(rng, config)
  return config


def outcome(plain: dict, *, lower: bool = False) -> tuple[str, str]:
  """('described', 'lowered', 'refused' or a fault, detail) of a config."""
  from tips_jax.core import schema, strict
  from tips_jax.core.errors import InputError
  from tips_jax.evals import during_training
  from tips_jax.train import lowering, sharding, summary
  from tips_jax.train import method as method_lib

  signal.setitimer(signal.ITIMER_PROF, LIMIT_S)  # of this process, whatever else runs
  try:
    config = strict.build(schema.Config, plain)
    during_training.check(config)
    method = method_lib.build(config)
    summary.text(method)
    if lower:
      mesh = sharding.make_mesh(config.mesh, config.schedule.batch_size)
      lowering.lower(method, mesh)
    result = 'lowered' if lower else 'described', ''
  except InputError as error:
    several = '\n' in str(error)
    result = 'lines' if several else 'refused', str(error)
  except (Exception, Hang) as error:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if 'tips_jax' in frame.filename] or frames
    place = f'{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}'
    reason = (str(error).splitlines() or [''])[0][:120]
    result = 'traceback', f'{place}: {type(error).__name__}: {reason}'
  finally:
    signal.setitimer(signal.ITIMER_PROF, 0)
  return result


def hang(number: int, frame: object) -> None:
  raise Hang(f'over {LIMIT_S} s')


def main() -> None:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--configs', type=int, default=5_000)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--lower_every', type=int, default=10, help='of those that are accepted')
  parser.add_argument('--only', type=int, help='the number of one config, which is lowered')
  options = parser.parse_args()
  signal.signal(signal.SIGPROF, hang)
  resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES))
  recipes = [(name, argument) for name, arguments in RECIPES.items() for argument in arguments]
  counts = collections.Counter()
  faults = {}
  numbers = range(options.configs)
  if options.only is not None:
    numbers = [options.only]
  for number in numbers:
    name, argument = recipes[number % len(recipes)]
    plain = random_config(name, argument, f'{options.seed} {number}')
    kind, detail = outcome(plain)
    accepted = counts['described'] + counts['lowered']
    if kind == 'described' and (accepted % options.lower_every == 0 or options.only is not None):
      kind, detail = outcome(plain, lower=True)
    counts[kind] += 1
    if kind in ('lines', 'traceback'):
      faults.setdefault(':'.join(detail.split(':')[:3]), []).append((number, detail))
      print(f'{name}:{argument} --only={number}: {detail}', file=sys.stderr, flush=True)
    if options.only is not None:
      print(kind, detail)
    if number % 500 == 499:
      print(number + 1, dict(counts), file=sys.stderr, flush=True)
  print(f'{len(numbers):,} configs: ' + ', '.join(f'{n:,} {kind}' for kind, n in counts.items()))
  for found in faults.values():
    number, detail = found[0]
    print(f'{len(found)} x, --only={number}: {detail}')
  sys.exit(bool(faults))


if __name__ == '__main__':
  main()

"""The page of a session on a GPU (benchmarks/gpu.py), from its lines.

python benchmarks/gpu_page.py FOLDER/gpu.jsonl ... > gpu.md      of several sessions together
"""

import contextlib
import json
import pathlib
import sys

TARGET_SHARE = 0.5  # of the measured peak of products
TARGET_RATIO = 1.3  # to the twin
ROWS = 15


def read(*files):
  """The lines of files that are there, one dict each; without one that was cut short."""
  lines = []
  for file in map(pathlib.Path, files):
    if file.exists():
      for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
          lines.append(json.loads(line))
  return lines


def latest(lines):
  """{(part, config): the last line that measured it, or the last error}"""
  found = {}
  for line in lines:
    key = line['part'], line.get('config', '')
    if 'error' not in line or key not in found:
      found[key] = line
  return found


def text(lines):
  """The page, in Markdown."""
  found = latest(lines)
  configs = list(dict.fromkeys(config for _, config in found if config))
  peak = best(found.get(('peak', ''), {}))
  blocks = [['# A session on a GPU', *machine(found, peak)]]
  if configs:
    blocks.append(['## Steps', *steps(found, configs, peak)])
  for config in configs:
    for part in ('ours', 'launches', 'torch'):
      profile = found.get((part, config), {}).get('profile')
      if profile:
        blocks.append([f'## What takes the time: {part}, {config}', *consumers(profile)])
  missing = []
  for (part, config), line in found.items():
    if 'error' in line:
      missing.append(f'- {part} {config}: {line["error"]}')
  if missing:
    blocks.append(['## Not measured', '\n'.join(missing)])
  return '\n\n'.join('\n\n'.join(block) for block in blocks) + '\n'


def best(line):
  """The highest rate of products, TFLOP/s; None where there is none."""
  rates = [rate for library in ('jax', 'torch') for rate in (line.get(library) or {}).values()]
  return max(rates, default=None)


def machine(found, peak):
  check = found.get(('check', ''), {})
  versions = ', '.join(f'{name} {version}' for name, version in check.get('versions', {}).items())
  rows = [
    ('device', check.get('device')),
    ('nvidia-smi', (check.get('nvidia_smi') or '').replace('\n', '; ')),
    ('versions', f'Python {check.get("python")}, {versions}'),
    ('memory that a run may use, GB', number(check.get('usable_gb'), 1)),
  ]
  for library in ('jax', 'torch'):
    rates = found.get(('peak', ''), {}).get(library) or {}
    cells = ', '.join(f'{side}: {number(rate, 1)}' for side, rate in rates.items())
    rows.append((f'products of bfloat16 by {library}, side: TFLOP/s', cells))
  rows.append(('**measured peak, TFLOP/s**', number(peak, 1)))
  return [table(('', ''), rows)]


def steps(found, configs, peak):
  """A column for each config: ours, the twin, the ratio, the plan."""
  columns = [column(found, config, peak) for config in configs]
  rows = [(name, *(c[name] for c in columns)) for name in columns[0]]
  goals = (
    f'Targets: {TARGET_SHARE:.0%} of the measured peak, {TARGET_RATIO} times the images/s of the '
    'twin. FLOPs of both sides are those of the closed form: nothing that is computed again. The '
    'time of the plan is a floor: the bytes of each kernel over the bandwidth of memory, or its '
    'FLOPs over the published peak.'
  )
  return [table(('', *configs), rows), goals]


def column(found, config, peak):
  ours, other, graphs, plan = (
    found.get((part, config), {}) for part in ('ours', 'torch', 'launches', 'plan')
  )
  time, memory = plan.get('time', {}), plan.get('memory', {})
  header = plan.get('header', {})
  share = lambda line: percent(line.get('gflops'), peak and peak * 1e3)
  milliseconds = lambda seconds: number(seconds and seconds * 1e3, 1)
  return {
    'batch, ours and twin': f'{ours.get("batch_size", "-")}, {other.get("batch_size", "-")}',
    'TFLOP an image': number(ours.get('tflop_per_image'), 3),
    'ours: ms a step': milliseconds(ours.get('seconds_per_step')),
    'ours: images/s': number(ours.get('images_per_s'), 1),
    '**ours: share of the measured peak**': share(ours),
    'ours without CUDA graphs: ms a step': milliseconds(graphs.get('seconds_per_step')),
    'ours: GB at most': number(ours.get('device_peak_gb'), 1),
    'ours: s of compiling': number(ours.get('compile_s'), 0),
    'ours: attention': ', '.join(sorted(set(ours.get('attention', {}).values()))) or '-',
    'twin: ms a step': milliseconds(other.get('seconds_per_step')),
    'twin: images/s': number(other.get('images_per_s'), 1),
    'twin: share of the measured peak': share(other),
    'twin: GB at most': number(other.get('device_peak_gb'), 1),
    'twin: mode of torch.compile': other.get('compile'),
    'twin: blocks computed again': other.get('checkpoint') and 'yes',
    '**ours / twin, images/s**': ratio(ours.get('images_per_s'), other.get('images_per_s')),
    'plan: batch, of': f'{header.get("batch", "-")}, {header.get("topology", "-")}',
    'plan: ms a step at least': milliseconds(time.get('step')),
    'plan: share of the published peak at most': percent(time.get('peak_share'), 1),
    'plan: GB': number(memory.get('total') and memory['total'] / 1e9, 1),
    'plan: kernels, below 3 us': f'{time.get("kernels", "-")}, {time.get("short_kernels", "-")}',
    'ours: kernels a step in the profile': str(ours.get('profile', {}).get('events_per_step', '-')),
    'measured / plan, ms': ratio(ours.get('seconds_per_step'), time.get('step')),
  }


def consumers(profile):
  head = f'{number(profile["busy_ms"], 1)} ms a step in which anything ran'
  if 'span_ms' in profile:
    head += (
      f', of {number(profile["span_ms"], 1)} ms under the profiler; of an unknown origin: '
      f'{profile["unknown_share"]:.1%}'
    )
  blocks = [head + '.']
  if 'parts' in profile:
    rows = [
      (f'{p["part"]} {p["layer"]} {p["direction"]}', number(p['ms'], 2), f'{p["share"]:.1%}')
      for p in profile['parts'][:ROWS]
    ]
    blocks.append(table(('part', 'ms a step', 'share'), rows))
  rows = []
  for k in profile['kernels'][:ROWS]:
    name = f'`{k["kernel"][:70]}`'
    origin = k.get('op_name', '')
    if origin:
      name += f' ({"/".join(origin.split("/")[-4:])})'
    rows.append((name, str(k['count']), number(k['ms'], 2), f'{k["share"]:.1%}'))
  blocks.append(table(('kernel', 'a step', 'ms a step', 'share'), rows))
  return blocks


def table(head, rows):
  body = [[value or '-' for value in row] for row in rows]
  lines = [head, ['---'] * len(head), *body]
  return '\n'.join(
    '| ' + ' | '.join(cell.replace('|', '/') for cell in line) + ' |' for line in lines
  )


def number(value, digits):
  if value is None:
    return '-'
  return f'{value:,.{digits}f}'


def percent(value, whole):
  if value is None or not whole:
    return '-'
  return f'{value / whole:.1%}'


def ratio(value, other):
  if not value or not other:
    return '-'
  return f'{value / other:.2f}'


if __name__ == '__main__':
  print(text(read(*sys.argv[1:])), end='')

"""The plan as a page: fixed width, one screen."""

import collections
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]
WIDTH = 100
_SCALES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'))


def text(plan: Json, top: int = 0) -> str:
  """The page of one plan (`estimate.plan`'s dict); `top` adds that many single instructions."""
  lines = _header(plan['header']) + _memory(plan['memory'])
  # A program that does not fit has neither FLOPs nor time.
  if 'time' in plan:
    lines += _flops(plan['flops'])
    lines += _network(plan['collectives'])
    lines += _time(plan['time'])
    lines += _parts(plan['parts'], plan['time'])
    if top:
      lines += _instructions(plan['instructions'][:top])
  if plan.get('suggestions'):
    lines.append(_rule('what would make it fit'))
    lines += map('  {}'.format, plan['suggestions'])
  return '\n'.join(lines)


def _rule(title: str, right: str = '') -> str:
  """A line of dashes with a title on the left and a result on the right."""
  if right:
    right = f' {right}'
  return f'-- {title} {right:->{WIDTH - len(title) - 4}}'


def size(n: float) -> str:
  """Bytes for people: '1.23 GB' (powers of 1000)."""
  for scale, unit in (*_SCALES, (1e3, 'k')):
    if abs(n) >= 0.9995 * scale:  # so that 999.6 MB is 1.00 GB
      digits = 2 if abs(n) < 100 * scale else 1
      return f'{n / scale:.{digits}f} {unit}B'
  return f'{n:.0f} B'


def seconds(s: float) -> str:
  """Seconds or milliseconds with three significant digits."""
  if s >= 10:
    return f'{s:.1f} s'
  milliseconds = s * 1e3
  digits = max(0, 2 - int(math.log10(max(milliseconds, 1))))
  return f'{milliseconds:.{digits}f} ms'


def mesh(sizes: Mapping[str, int]) -> str:
  """'data 4 x fsdp 2': the axes of a mesh that split anything."""
  return ' x '.join(f'{axis} {n}' for axis, n in sizes.items() if n > 1) or 'one chip'


def duration(days: float) -> str:
  if days >= 1:
    return f'{days:,.1f} days'
  if days * 24 >= 1:
    return f'{days * 24:.1f} hours'
  return f'{days * 1440:.1f} minutes'


def _header(h: Json) -> list[str]:
  axes = ' x '.join(f'{axis} {n}' for axis, n in h['mesh'].items())
  name = f'{h["config"]} on {h["topology"]}'
  if h['slices'] > 1:
    name += f' x {h["slices"]} slices'
  chips = f'{h["chips"]:g} {h["chip"]} chips'
  if h['devices_per_chip'] > 1:
    chips += (
      f' of {h["devices_per_chip"]} devices (memory, FLOPs and communication are of a device)'
    )
  return [
    _rule(name, f'compiled in {h.get("compile_seconds", 0):.0f} s'),
    f'  {chips}, mesh {axes}',
    f'  batch {h["batch"]:,}, {h["images_per_chip"]:g} images a chip, accumulate '
    f'{h["accumulate"]}, remat {h["remat"]}, attention {h["attention"]}, {h["dtype"]}',
  ]


def _memory(m: Json) -> list[str]:
  limit = m['limit']  # 0: unknown
  compared = limit and 'total' in m
  right = size(m.get('total', 0))
  if compared:
    right += f' of {size(limit)}'
  lines = [_rule('memory of a chip', right)]
  items = dict(m['groups'])
  if 'temporaries' in m:
    items['padding of arrays'] = m['padding']
    items['program'] = m['code']
    kinds = m['temporaries_by_kind'] or {'temporaries': m['temporaries']}
    for kind, n in kinds.items():
      if n > 0.002 * m['temporaries']:  # else it would only fill the screen
        items[kind] = n
  cells = [f'{name:<22}{size(n):>10}' for name, n in items.items() if n >= 1]
  for k in range(0, len(cells), 3):
    lines.append('  ' + '   '.join(cells[k : k + 3]))
  if compared:
    if m['fits']:
      lines.append(f'  fits, {size(limit - m["total"])} to spare')
    else:
      lines.append(
        f'  DOES NOT FIT: {size(m["total"])} of {size(limit)} usable, {size(m["over"])} too much'
      )
  return lines


def _flops(f: Json) -> list[str]:
  scale, unit = next((entry for entry in _SCALES if f['total'] >= entry[0]), (1, ''))

  def cell(n: float) -> str:
    if n < scale / 2000:
      return f'{"-":>10}'
    return f'{n / scale:>10.3f}'

  def computed(row: Json) -> float:
    return sum(row.values()) - row['minimum']

  right = (
    f'{f["total"] / scale:,.2f} {unit}, {f["ratio"]:.3f} of the minimum '
    f'({f["minimum"] / scale:,.2f} {unit})'
  )
  columns = '   forward  backward     again    in all   minimum'
  lines = [_rule('FLOPs of a chip and step', right), f'  {unit + "FLOP":<36}{columns}']
  for name, row in sorted(f['parts'].items(), key=lambda item: -computed(item[1])):
    total = computed(row)
    if total >= 0.002 * f['total']:
      line = f'  {name:<36.36}'
      for direction in ('forward', 'backward', 'recompute'):
        line += cell(row.get(direction, 0))
      lines.append(line + cell(total) + cell(row['minimum']))
  lines.append(
    f'  remat computes {f["recomputed"] / scale:,.2f} {unit} again, {f["recomputed_share"]:.1%}'
  )
  return lines


def _network(n: Json) -> list[str]:
  right = size(n['total'])
  if n['minimum']:
    right += f', {n["ratio"]:.2f} of the minimum ({size(n["minimum"])})'
  lines = [_rule('communication of a chip and step', right)]
  # The rows tell the parts of the model apart; the page has one line for all of them.
  counts = collections.Counter()
  parts = {}  # row of the page -> bytes by part
  for r in n['rows']:
    key = (r['kind'], r['axis'], r['dtype'], r['overlapped'])
    counts[key] += r['count']
    parts.setdefault(key, collections.Counter())[r['part']] += r['bytes']
  if parts:
    lines.append(
      f'  {"kind":<20}{"axis":<14}{"dtype":<7}{"count":>7}{"bytes":>12}  {"hidden":<8}mostly for'
    )
  longest = sorted(parts, key=lambda key: -parts[key].total())
  for key in longest[:10]:
    kind, axis, dtype, overlapped = key
    hidden = 'yes' if overlapped else 'no'
    users = ', '.join(part for part, _ in parts[key].most_common(3))
    line = (
      f'  {kind:<20}{axis:<14}{dtype:<7}{counts[key]:>7,}{size(parts[key].total()):>12}  '
      f'{hidden:<8}{users}'
    )
    lines.append(line[:WIDTH])
  if n['minimum']:
    kinds = [f'{kind} {size(moved)}' for kind, moved in n['minimum_by_kind'].items() if moved]
    lines.append(f'  minimum: {", ".join(kinds)}')
  if n['in_open_loops']:
    lines.append(
      f'  WARNING: {n["in_open_loops"]} inside of loops whose length depends on data; counted once'
    )
  return lines


def _time(t: Json) -> list[str]:
  sources = dict(
    compiler="the compiler's cycles", schedule="kernels' schedules", roofline='rooflines'
  )
  compute = []
  for source, name in sources.items():
    if source in t['compute_by_source']:
      compute.append(f'{name} {seconds(t["compute_by_source"][source])}')
  estimate = (
    f'  an estimate: {t["images_per_second_per_chip"]:,.1f} images/s a chip; {t["steps"]:,} steps '
    f'in {duration(t["days"])}, {t["chip_hours"]:,.0f} chip-hours'
  )
  if t['price_per_chip_hour']:
    estimate += f', {t["cost"]:,.0f} at {t["price_per_chip_hour"]:g} each'
  lines = [
    _rule('estimated time of a step', f'{seconds(t["step"])}, bound by {t["bound"]}'),
    f'  compute {seconds(t["compute"])}   memory {seconds(t["memory"])}   '
    f'network {seconds(t["network"])} ({seconds(t["network_exposed"])} not hidden)',
  ]
  if t['network_one_axis'] > t['network']:
    lines.append(
      f'    with all links in use; {seconds(t["network_one_axis"])} if one axis of the torus '
      'carries it'
    )
  if t['kernels']:
    lines.append(
      f'  {t["kernels"]:,} kernels, {t["short_kernels"]:,} below 3 us by this estimate; their '
      'launches are not counted'
    )
  return [
    *lines,
    f'  all overlapped {seconds(t["overlapped"])}, nothing overlapped '
    f'{seconds(t["not_overlapped"])}; {t["peak_share"]:.0%} of peak',
    f'  compute from {", ".join(compute)}',
    estimate,
  ]


def _parts(rows: Sequence[Json], t: Json, most: int = 14) -> list[str]:
  """The parts with the most time, in two columns."""
  directions = dict(forward='fwd', backward='bwd', recompute='again')
  cells = []
  for r in rows[:most]:
    name = r['part'].removeprefix('loss ')
    if len(name) > 18:
      name = name[:17] + '~'
    share = r['seconds'] / max(t['compute'], 1e-12)
    cells.append(
      f'{seconds(r["seconds"]):>9}{share:>6.1%}  {name:<18} {directions[r["direction"]]:<5} '
      f'{r["layer"]:<7.7}'
    )
  half = (len(cells) + 1) // 2
  lines = [_rule('where the time goes', f'{seconds(t["compute"])} compute')]
  for pair in itertools.zip_longest(cells[:half], cells[half:], fillvalue=''):
    lines.append(' '.join(pair).rstrip())
  return lines


def _instructions(rows: Sequence[Json]) -> list[str]:
  lines = [_rule('the longest instructions')]
  for r in rows:
    lines.append(
      f'{seconds(r["seconds"]):>9} x{r["count"]:<5}{r["source"]:<9} {r["name"]:<34.34} '
      f'{r["shape"]:<28.28} {r["op_name"][-70:]}'
    )
  return lines


def ranking(rows: Sequence[Json], command: str) -> str:
  """The table of a search and the command of its winner."""
  lines = [
    _rule('plans, fastest first'),
    f'  {"mesh":<32}{"remat":<10}{"parts":>6}{"fits":>6}{"memory":>11}{"step":>10}'
    f'{"images/s a chip":>17}',
  ]
  for r in rows:
    step = '-'
    rate = '-'
    if r.get('step'):  # else it does not fit
      step = seconds(r['step'])
      rate = f'{r["images_per_second_per_chip"]:,.1f}'
    fits = 'yes' if r['fits'] else 'no'
    lines.append(
      f'  {mesh(r["mesh"]):<32}{r["remat"]:<10}{r["accumulate"]:>6}{fits:>6}'
      f'{size(r["total"]):>11}{step:>10}{rate:>17}'
    )
  if command:
    lines.append(f'\n{command}')
  return '\n'.join(lines)

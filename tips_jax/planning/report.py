"""The plan as a page: fixed width, one screen."""

import math

WIDTH = 100


def text(plan, top=0):
  """The page of one plan (`estimate.plan`'s dict); `top` adds that many single instructions."""
  lines = _header(plan['header']) + _memory(plan['memory'])
  if 'time' in plan:
    lines += (
      _flops(plan['flops'], plan['header'])
      + _network(plan['collectives'])
      + _time(plan['time'], plan['header'])
    )
    lines += _parts(plan['parts'], plan['time'])
    lines += _instructions(plan['instructions'][:top]) if top else []
  if plan.get('suggestions'):
    lines += [_rule('what would make it fit')] + [f'  {line}' for line in plan['suggestions']]
  return '\n'.join(lines)


def _rule(title, right=''):
  return f'{"":-<2} {title} ' + f'{" " + right if right else "":->{WIDTH - len(title) - 4}}'


def size(n):
  """Bytes for people: '1.23 GB' (powers of 1000)."""
  for unit, scale in (('TB', 1e12), ('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if abs(n) >= 0.9995 * scale:
      return f'{n / scale:.{2 if abs(n) < 100 * scale else 1}f} {unit}'
  return f'{n:.0f} B'


def seconds(s):
  if s >= 10:
    return f'{s:.1f} s'
  return f'{s * 1e3:.{max(0, 2 - int(math.log10(max(s * 1e3, 1))))}f} ms'


def duration(days):
  if days >= 1:
    return f'{days:,.1f} days'
  return f'{days * 24:.1f} hours' if days * 24 >= 1 else f'{days * 1440:.1f} minutes'


def _header(h):
  mesh = ' x '.join(f'{axis} {n}' for axis, n in h['mesh'].items())
  name = f'{h["config"]} on {h["topology"]}' + (
    f' x {h["slices"]} slices' if h['slices'] > 1 else ''
  )
  return [
    _rule(name, f'compiled in {h.get("compile_seconds", 0):.0f} s'),
    f'  {h["chips"]} {h["chip"]} chips, mesh {mesh}',
    f'  batch {h["batch"]:,}, {h["images_per_chip"]:g} images a chip, accumulate {h["accumulate"]}, '
    f'remat {h["remat"]}, attention {h["attention"]}, {h["dtype"]}',
  ]


def _memory(m):
  limit = m['limit']
  right = (
    f'{size(m["total"])} of {size(limit)}' if limit and 'total' in m else size(m.get('total', 0))
  )
  lines = [_rule('memory of a chip', right)]
  items = [(k, n) for k, n in m['groups'].items() if n]
  if 'temporaries' in m:
    items += [('padding of arrays', m['padding']), ('program', m['code'])]
    kinds = m['temporaries_by_kind'] or {'temporaries': m['temporaries']}
    items += [(k, n) for k, n in kinds.items() if n > 0.002 * m['temporaries']]
  cells = [f'{k:<22}{size(n):>10}' for k, n in items if n >= 1]
  lines += ['  ' + '   '.join(cells[k : k + 3]) for k in range(0, len(cells), 3)]
  if limit and 'total' in m:
    if m['fits']:
      lines.append(f'  fits, {size(limit - m["total"])} to spare')
    else:
      lines.append(
        f'  DOES NOT FIT: {size(m["total"])} of {size(limit)} usable, {size(m["over"])} too much'
      )
  return lines


def _flops(f, h):
  scale, unit = next(
    ((s, u) for s, u in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')) if f['total'] >= s), (1, '')
  )
  lines = [
    _rule(
      'FLOPs of a chip and step',
      f'{f["total"] / scale:,.2f} {unit}, {f["ratio"]:.3f} of the minimum '
      f'({f["minimum"] / scale:,.2f} {unit})',
    )
  ]
  lines.append(
    f'  {unit + "FLOP":<36}{"forward":>10}{"backward":>10}{"again":>10}{"in all":>10}{"minimum":>10}'
  )
  cell = lambda n: f'{n / scale:>10.3f}' if n >= scale / 2000 else f'{"-":>10}'
  rows = sorted(
    f['parts'].items(), key=lambda row: -sum(v for k, v in row[1].items() if k != 'minimum')
  )
  for name, row in rows:
    total = sum(v for k, v in row.items() if k != 'minimum')
    if total >= 0.002 * f['total']:
      lines.append(
        f'  {name:<36.36}'
        + ''.join(cell(row.get(k, 0)) for k in ('forward', 'backward', 'recompute'))
        + cell(total)
        + cell(row['minimum'])
      )
  lines.append(
    f'  remat computes {f["recomputed"] / scale:,.2f} {unit} again, {f["recomputed_share"]:.1%}'
  )
  return lines


def _network(n):
  right = size(n['total'])
  if n['minimum']:
    right += f', {n["ratio"]:.2f} of the minimum ({size(n["minimum"])})'
  lines = [_rule('communication of a chip and step', right)]
  merged = {}
  for r in n['rows']:
    row = merged.setdefault((r['kind'], r['axis'], r['dtype'], r['overlapped']), [0, 0.0, {}])
    row[0] += r['count']
    row[1] += r['bytes']
    row[2][r['part']] = row[2].get(r['part'], 0) + r['bytes']
  if merged:
    lines.append(
      f'  {"kind":<20}{"axis":<14}{"dtype":<7}{"count":>7}{"bytes":>12}  {"hidden":<8}mostly for'
    )
  for (kind, axis, dtype, hidden), (count, moved, by) in sorted(
    merged.items(), key=lambda item: -item[1][1]
  )[:10]:
    who = ', '.join(k for k, _ in sorted(by.items(), key=lambda item: -item[1])[:3])
    line = f'  {kind:<20}{axis:<14}{dtype:<7}{count:>7,}{size(moved):>12}  {"yes" if hidden else "no":<8}{who}'
    lines.append(line[:WIDTH])
  if n['minimum']:
    lines.append(
      '  minimum: ' + ', '.join(f'{k} {size(v)}' for k, v in n['minimum_by_kind'].items() if v)
    )
  if n['in_open_loops']:
    lines.append(
      f'  WARNING: {n["in_open_loops"]} inside of loops whose length only the data tell; counted once'
    )
  return lines


def _time(t, h):
  lines = [_rule('estimated time of a step', f'{seconds(t["step"])}, bound by {t["bound"]}')]
  lines.append(
    f'  compute {seconds(t["compute"])}   memory {seconds(t["memory"])}   network {seconds(t["network"])} '
    f'({seconds(t["network_exposed"])} not hidden),\n'
    f'    with all links in use; {seconds(t["network_one_axis"])} if one axis of the torus carries it'
  )
  lines.append(
    f'  all overlapped {seconds(t["overlapped"])}, nothing overlapped {seconds(t["not_overlapped"])}; '
    f'{t["peak_share"]:.0%} of peak'
  )
  sources = t['compute_by_source']
  told = dict(compiler="the compiler's cycles", schedule="kernels' schedules", roofline='rooflines')
  lines.append(
    '  compute from ' + ', '.join(f'{told[k]} {seconds(sources[k])}' for k in told if k in sources)
  )
  lines.append(
    f'  an estimate: {t["images_per_second_per_chip"]:,.1f} images/s a chip; {t["steps"]:,} steps in '
    f'{duration(t["days"])}, {t["chip_hours"]:,.0f} chip-hours'
    + (
      f', {t["cost"]:,.0f} at {t["price_per_chip_hour"]:g} each' if t['price_per_chip_hour'] else ''
    )
  )
  return lines


def _parts(rows, t, most=14):
  lines = [_rule('where the time goes', f'{seconds(t["compute"])} compute')]
  short = dict(forward='fwd', backward='bwd', recompute='again')
  cells = [
    f'{seconds(r["seconds"]):>9}{r["seconds"] / max(t["compute"], 1e-12):>6.1%}  '
    f'{_short(r["part"], 18):<18} {short[r["direction"]]:<5} {r["layer"]:<7.7}'
    for r in rows[:most]
  ]
  half = (len(cells) + 1) // 2
  return (
    lines
    + [' '.join(pair).rstrip() for pair in zip(cells[:half], cells[half:] + [''] * half)][:half]
  )


def _short(name, width):
  name = name.removeprefix('loss ')
  return name if len(name) <= width else name[: width - 1] + '~'


def _instructions(rows):
  lines = [_rule('the longest instructions')]
  for r in rows:
    lines.append(
      f'{seconds(r["seconds"]):>9} x{r["count"]:<5}{r["source"]:<9} {r["name"]:<34.34} {r["shape"]:<28.28} '
      f'{r["op_name"][-70:]}'
    )
  return lines


def ranking(rows, command):
  """The table of a search and the command of its winner."""
  lines = [
    _rule('plans, fastest first'),
    f'  {"mesh":<32}{"remat":<10}{"parts":>6}{"fits":>6}{"memory":>11}{"step":>10}{"images/s a chip":>17}',
  ]
  for r in rows:
    mesh = ' x '.join(f'{k} {v}' for k, v in r['mesh'].items() if v > 1) or 'one chip'
    step = seconds(r['step']) if r.get('step') else '-'
    rate = f'{r["images_per_second_per_chip"]:,.1f}' if r.get('step') else '-'
    fits = 'yes' if r['fits'] else 'no'
    lines.append(
      f'  {mesh:<32}{r["remat"]:<10}{r["accumulate"]:>6}{fits:>6}{size(r["total"]):>11}{step:>10}{rate:>17}'
    )
  return '\n'.join(lines + ([f'\n{command}'] if command else []))

"""Reads optimized HLO text: computations, instructions, and how often each of them runs in a step."""

import dataclasses
import functools
import math
import re

BYTES = {
  'pred': 1,
  's4': 0.5,
  'u4': 0.5,
  's8': 1,
  'u8': 1,
  's16': 2,
  'u16': 2,
  'bf16': 2,
  'f16': 2,
  's32': 4,
  'u32': 4,
  'f32': 4,
  's64': 8,
  'u64': 8,
  'f64': 8,
  'c64': 8,
  'c128': 16,
  'f8e4m3fn': 1,
  'f8e5m2': 1,
  'token': 0,
}
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'^(ENTRY )?%?(\S+) \(.*\) -> .*\{$')
_NAME = re.compile(r'^\s*(?:ROOT )?%?(\S+) = ')
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-<>]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  dtype: str
  dims: tuple[int, ...]
  on_chip: bool = False  # memory space other than HBM: S(n) in the layout

  @property
  def size(self):
    return math.prod(self.dims)

  @property
  def nbytes(self):
    return math.ceil(self.size * BYTES.get(self.dtype, 4))


@dataclasses.dataclass(frozen=True)
class Instruction:
  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of the result; several for a tuple
  operands: tuple[str, ...]
  rest: str  # what follows the operands: attributes, metadata, backend config
  literal: str  # the operands' text
  root: bool

  def attribute(self, key):
    found = re.search(rf'\b{key}=(\{{[^}}]*\}}|[^,\s]+)', self.rest)
    return found[1] if found else ''

  @property
  def op_name(self):
    found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.rest)
    return found[1] if found else ''

  @property
  def called(self):
    """Names of the computations that it calls."""
    names = _CALLED.findall(self.rest)
    branches = re.search(r'branch_computations=\{([^}]*)\}', self.rest)
    return tuple(names + (re.findall(r'%?([\w.\-<>]+)', branches[1]) if branches else []))

  @property
  def cycles(self):
    """The TPU compiler's estimate, or None."""
    found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
    return int(found[1]) if found and 0 < int(found[1]) < 1 << 60 else None

  @property
  def target(self):
    found = re.search(r'custom_call_target="([^"]*)"', self.rest)
    return found[1] if found else ''


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction as it runs: how often in a step, and inside of which fusion or asynchronous
  call.
  """

  instruction: Instruction
  computation: dict
  times: int
  inside: Instruction | None  # fusion or async-start around it; its cost is theirs
  open_ended: bool  # in a loop whose number of turns the text does not tell
  loop: str  # op_name of the loop around it, or ''

  @property
  def op_name(self):
    """Where it comes from in the model; names inside of a loop may lack their beginning."""
    own = self.instruction.op_name
    return own if own.startswith('jit(') or not self.loop else f'{self.loop}/{own}'


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict  # name -> {name: Instruction}, in order
  entry: str

  @functools.cached_property
  def runs(self):
    """Every instruction that is reached from the entry, `Run`s in the order of the text."""
    result = []
    self._walk(self.entry, 1, None, False, '', result)
    return result

  def _walk(self, name, times, inside, open_ended, loop, result):
    computation = self.computations.get(name, {})
    for instruction in computation.values():
      result.append(Run(instruction, computation, times, inside, open_ended, loop))
      if instruction.opcode == 'while':
        count = trips(self, instruction, computation)
        for called in instruction.called:
          self._walk(
            called,
            times * (count or 1),
            inside,
            open_ended or count is None,
            instruction.op_name or loop,
            result,
          )
      elif instruction.opcode in ('call', 'conditional'):
        for called in instruction.called:
          self._walk(called, times, inside, open_ended, loop, result)
      elif instruction.opcode in ('fusion', 'async-start'):
        for called in instruction.called:
          self._walk(called, times, inside or instruction, open_ended, loop, result)


def parse(text):
  """Module of HLO text as `compiled.as_text()` or `--xla_dump_to` write it."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head:
        current = computations[head[2]] = {}
        entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      current = None
    else:
      instruction = _instruction(line)
      if instruction:
        current[instruction.name] = instruction
  return Module(computations, entry)


def _instruction(line):
  named = _NAME.match(line)
  if not named:
    return None
  text = line[named.end() :]
  end = _closing(text, 0) if text.startswith('(') else text.index(' ')
  opcode, _, rest = text[end:].strip().partition('(')
  stop = _closing('(' + rest, 0) - 1
  literal = rest[: stop - 1]
  operands = tuple(re.findall(r'%([\w.\-<>]+)', literal))
  if not operands and opcode not in ('constant', 'parameter'):  # written without %
    operands = tuple(
      part.split()[-1] for part in _COMMENT.sub('', literal).split(', ') if part.strip()
    )
  return Instruction(
    named[1],
    opcode,
    arrays(text[:end]),
    operands,
    rest[stop:],
    literal,
    line.lstrip().startswith('ROOT'),
  )


def _closing(text, start):
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in re.compile('[()]').finditer(text, start):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  return len(text)


def arrays(text):
  """The arrays of a shape; dimensions as written, without padding."""
  result = []
  for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub('', text)):
    if dtype in BYTES:
      sizes = tuple(int(re.sub(r'\D', '', d)) for d in dims.split(',') if d.strip())
      result.append(Array(dtype, sizes, bool(re.search(r'S\([1-9]', layout))))
  return tuple(result)


def trips(module, loop, computation):
  """How often a while loop turns, or None where only the data tell."""
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
  if known:
    return int(known[1])
  condition = module.computations.get(loop.attribute('condition').lstrip('%'), {})
  compare = next((i for i in condition.values() if i.root), None)
  scope = condition
  parameters = {}
  while compare is not None and compare.opcode in ('fusion', 'call') and compare.called:
    inner = module.computations[compare.called[0]]
    given = [_resolve(scope, o, parameters) for o in compare.operands]
    parameters = {i.name: given[int(i.literal)] for i in inner.values() if i.opcode == 'parameter'}
    scope, compare = inner, next((i for i in inner.values() if i.root), None)
  if compare is None or compare.opcode != 'compare':
    return None
  sides = [_resolve(scope, o, parameters) for o in compare.operands]
  if compare.attribute('direction') in ('GT', 'GE'):
    sides.reverse()
  sides = [_initial(module, loop, computation, s) for s in sides]
  if not all(isinstance(s, int) for s in sides):
    return None
  begin, end = sides
  return max(0, end - begin + (compare.attribute('direction') in ('LE', 'GE')))


def _resolve(scope, name, parameters):
  """A constant's value, or ('element', index) of the loop's state, or None."""
  for _ in range(20):
    instruction = scope.get(name)
    if instruction is None or name in parameters:
      return parameters.get(name)
    if instruction.opcode == 'constant':
      return int(instruction.literal) if re.fullmatch(r'-?\d+', instruction.literal) else None
    if instruction.opcode == 'get-tuple-element':
      return 'element', int(instruction.attribute('index'))
    if instruction.opcode not in (
      'copy',
      'bitcast',
      'convert',
      'reshape',
      'copy-done',
      'copy-start',
    ):
      return None
    name = instruction.operands[0]
  return None


def _initial(module, loop, computation, side):
  """The value that an element of the loop's state starts with, if the text tells."""
  if not isinstance(side, tuple):
    return side
  state = computation.get(loop.operands[0])
  while state is not None and state.opcode in ('copy', 'optimization-barrier'):
    state = computation.get(state.operands[0])
  if state is None or state.opcode != 'tuple':
    return None
  value = _resolve(computation, state.operands[side[1]], {})
  return value if isinstance(value, int) else None

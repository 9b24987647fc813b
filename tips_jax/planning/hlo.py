"""Parses optimized HLO text: computations, instructions, how often each runs in a step."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

BYTES = {
  **dict.fromkeys(('s4', 'u4'), 0.5),
  **dict.fromkeys(('pred', 's8', 'u8', 'f8e4m3fn', 'f8e5m2'), 1),
  **dict.fromkeys(('s16', 'u16', 'bf16', 'f16'), 2),
  **dict.fromkeys(('s32', 'u32', 'f32'), 4),
  **dict.fromkeys(('s64', 'u64', 'f64', 'c64'), 8),
  'c128': 16,
  'token': 0,
}
_SAME_VALUE = ('copy', 'bitcast', 'convert', 'reshape', 'copy-done', 'copy-start')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?')
_HEAD = re.compile(r'^(ENTRY )?%?(\S+) \(.*\) -> .*\{$')
_NAME = re.compile(r'^\s*(?:ROOT )?%?(\S+) = ')
_COMMENT = re.compile(r'/\*.*?\*/')
_CALLED = re.compile(
  r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-<>]+)'
)


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of an instruction's result."""

  dtype: str
  dims: tuple[int, ...]
  on_chip: bool = False  # memory space other than HBM: S(n) in the layout

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @property
  def nbytes(self) -> int:
    return math.ceil(self.size * BYTES.get(self.dtype, 4))


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of a computation."""

  name: str
  opcode: str
  arrays: tuple[Array, ...]  # of the result; several for a tuple
  operands: tuple[str, ...]
  rest: str  # what follows the operands: attributes, metadata, backend config
  literal: str  # the operands' text
  root: bool

  def search(self, pattern: str) -> str:
    """The first group of a pattern in the attributes, or ''."""
    match = re.search(pattern, self.rest)
    if not match:
      return ''
    return match[1]

  def attribute(self, key: str) -> str:
    return self.search(rf'\b{key}=(\{{[^}}]*\}}|[^,\s]+)')

  @property
  def op_name(self) -> str:
    return self.search(r'op_name="((?:[^"\\]|\\.)*)"')

  @property
  def called(self) -> tuple[str, ...]:
    """Names of the computations that it calls."""
    branches = self.search(r'branch_computations=\{([^}]*)\}')
    return (*_CALLED.findall(self.rest), *re.findall(r'%?([\w.\-<>]+)', branches))

  @property
  def cycles(self) -> int | None:
    """The TPU compiler's estimate."""
    cycles = int(self.search(r'"estimated_cycles":"(\d+)"') or 0)
    # Zero and huge values mean that there is no estimate.
    if 0 < cycles < 1 << 60:
      return cycles
    return None

  @property
  def target(self) -> str:
    return self.search(r'custom_call_target="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Run:
  """An executed instruction: how often it runs in a step, and inside of what."""

  instruction: Instruction
  computation: dict[str, Instruction]  # that the instruction is in
  times: int  # in a step
  inside: Instruction | None  # fusion or async-start around it, which carries its cost
  open_ended: bool  # in a loop whose trip count is not in the text
  loop: str  # op_name of the loop around it, or ''

  @property
  def op_name(self) -> str:
    """Its place in the model; names inside of a loop may lack their beginning."""
    op_name = self.instruction.op_name
    if self.loop and not op_name.startswith('jit('):
      return f'{self.loop}/{op_name}'
    if not op_name and self.inside is not None:
      return self.inside.op_name
    return op_name


@dataclasses.dataclass(frozen=True)
class Module:
  computations: dict[str, dict[str, Instruction]]  # in the order of the text
  entry: str

  @functools.cached_property
  def runs(self) -> list[Run]:
    """Every instruction that is reached from the entry, in the order of the text."""
    return list(self._walk(self.entry, 1, None, False, ''))

  def _walk(
    self, name: str, times: int, inside: Instruction | None, open_ended: bool, loop: str
  ) -> Iterator[Run]:
    computation = self.computations.get(name, {})
    for instruction in computation.values():
      yield Run(instruction, computation, times, inside, open_ended, loop)
      context = (times, inside, open_ended, loop)
      if instruction.opcode == 'while':
        count = trips(self, instruction, computation)
        # A loop of unknown length counts once, and says so.
        context = (
          times * (count or 1),
          inside,
          open_ended or count is None,
          instruction.op_name or loop,
        )
      elif instruction.opcode in ('fusion', 'fusion-start', 'async-start'):
        context = (times, inside or instruction, open_ended, loop)
      elif instruction.opcode not in ('call', 'conditional'):
        continue  # such as the addition of a reduce, which has no cost of its own
      for called in instruction.called:
        yield from self._walk(called, *context)

  def scope(self, name: str) -> dict[str, Instruction]:
    """The computation that an instruction is in; {} where there is none of that name."""
    return next((c for c in self.computations.values() if name in c), {})


def parse(text: str) -> Module:
  """Module of HLO text as `compiled.as_text()` or `--xla_dump_to` write it."""
  computations = {}
  entry = None
  current = None
  for line in _lines(text):
    if current is None:
      head = _HEAD.match(line)
      if head:
        current = computations[head[2]] = {}
        if head[1]:
          entry = head[2]
    elif line.startswith('}'):
      current = None
    else:
      instruction = _instruction(line)
      if instruction:
        _name_elements(instruction, current)
        current[instruction.name] = instruction
  return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
  """Lines of HLO text, those of one instruction joined: attributes of kernels may go over several,
  until a line begins with their braces' end.
  """
  begun = ''
  for line in text.splitlines():
    if begun:
      begun += line
      if line.startswith('}'):
        yield begun
        begun = ''
    elif line.endswith('{') and _NAME.match(line):
      begun = line
    else:
      yield line


def _instruction(line: str) -> Instruction | None:
  named = _NAME.match(line)
  if not named:
    return None
  text = line[named.end() :]
  # The shape, a tuple in parentheses or one array without spaces; then opcode(operands), rest.
  if text.startswith('('):
    end = _closing(text, 0)
  else:
    end = text.index(' ')
  opcode, _, rest = text[end:].strip().partition('(')
  stop = _closing('(' + rest, 0) - 1
  literal = rest[: stop - 1]
  operands = tuple(re.findall(r'%([\w.\-<>#]+)', literal))
  if not operands and opcode not in ('constant', 'parameter'):  # written without %
    words = _COMMENT.sub('', literal).split(', ')
    operands = tuple(word.split()[-1] for word in words if word.strip())
  return Instruction(
    named[1],
    opcode,
    arrays(text[:end]),
    operands,
    rest[stop:],
    literal,
    line.lstrip().startswith('ROOT'),
  )


def _name_elements(instruction: Instruction, computation: dict[str, Instruction]) -> None:
  """Adds the elements of tuples that an instruction reads as `tuple#index`.

  jaxlib 0.11 writes so what 0.10 writes as get-tuple-element; the rest of planning knows that one.
  """
  for operand in instruction.operands:
    source, mark, index = operand.partition('#')
    if mark and operand not in computation and source in computation:
      element = computation[source].arrays[int(index)]
      computation[operand] = Instruction(
        operand, 'get-tuple-element', (element,), (source,), f', index={index}', f'%{source}', False
      )


def _closing(text: str, start: int) -> int:
  """Index after the parenthesis that closes the one at `start`."""
  depth = 0
  for parenthesis in re.compile('[()]').finditer(text, start):
    depth += 1 if parenthesis[0] == '(' else -1
    if not depth:
      return parenthesis.end()
  return len(text)


def arrays(text: str) -> tuple[Array, ...]:
  """The arrays of a shape; dimensions as written, without padding."""
  result = []
  for dtype, dims, layout in _ARRAY.findall(_COMMENT.sub('', text)):
    if dtype in BYTES:
      sizes = tuple(int(re.sub(r'\D', '', d)) for d in dims.split(',') if d.strip())
      result.append(Array(dtype, sizes, bool(re.search(r'S\([1-9]', layout))))
  return tuple(result)


def trips(module: Module, loop: Instruction, computation: dict[str, Instruction]) -> int | None:
  """The trip count of a while loop, or None where it depends on data."""
  known = loop.search(r'"known_trip_count":\{"n":"(\d+)"')
  if known:
    return int(known)
  # Else from the condition: a comparison of the loop's counter with a constant, maybe in a fusion.
  scope = module.computations.get(loop.attribute('condition').lstrip('%'), {})
  compare = _root(scope)
  parameters = {}
  while compare is not None and compare.opcode in ('fusion', 'call') and compare.called:
    inner = module.computations[compare.called[0]]
    given = [_resolve(scope, o, parameters) for o in compare.operands]
    parameters = {i.name: given[int(i.literal)] for i in inner.values() if i.opcode == 'parameter'}
    scope = inner
    compare = _root(inner)
  if compare is None or compare.opcode != 'compare':
    return None
  sides = [_resolve(scope, o, parameters) for o in compare.operands]
  if compare.attribute('direction') in ('GT', 'GE'):
    sides.reverse()
  sides = [_initial(loop, computation, s) for s in sides]
  if not all(isinstance(s, int) for s in sides):
    return None
  begin, end = sides
  if compare.attribute('direction') in ('LE', 'GE'):
    end += 1
  return max(0, end - begin)


def _root(computation: dict[str, Instruction]) -> Instruction | None:
  return next((i for i in computation.values() if i.root), None)


def _resolve(
  scope: dict[str, Instruction], name: str, parameters: dict[str, Any]
) -> int | tuple[str, int] | None:
  """A constant's value, or ('element', index) of the loop's state, or None."""
  for _ in range(20):
    instruction = scope.get(name)
    if instruction is None or name in parameters:
      return parameters.get(name)
    if instruction.opcode == 'constant':
      if re.fullmatch(r'-?\d+', instruction.literal):
        return int(instruction.literal)
      return None
    if instruction.opcode == 'get-tuple-element':
      return 'element', int(instruction.attribute('index'))
    if instruction.opcode not in _SAME_VALUE:
      return None
    name = instruction.operands[0]
  return None


def _initial(
  loop: Instruction, computation: dict[str, Instruction], side: int | tuple[str, int] | None
) -> int | None:
  """The initial value of an element of the loop's state, if it is a constant."""
  if not isinstance(side, tuple):
    return side
  state = computation.get(loop.operands[0])
  while state is not None and state.opcode in ('copy', 'optimization-barrier'):
    state = computation.get(state.operands[0])
  if state is None or state.opcode != 'tuple':
    return None
  value = _resolve(computation, state.operands[side[1]], {})
  if isinstance(value, int):
    return value
  return None

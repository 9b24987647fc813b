"""How the processes of a run find each other (`main --multihost`), and make sure that they run the
same thing.

jax's own rendezvous ends a process that waits too long, without saying for whom. So all meet before
it, over plain sockets at the coordinator's address: each tells process 0 who and what it is, and
process 0 answers all at once. After that jax takes over the same address.
"""

import hashlib
import json
import os
import pathlib
import platform
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

# jax itself looks at the cluster only inside its own rendezvous.
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from tips_jax.core import schema, strict
from tips_jax.core.errors import InputError, PassingError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'numpy', 'libtpu')
_LINE = 1 << 16  # bytes of a message, at most
_ANSWER_S = 5  # for one message, once connected


class Missing(PassingError):
  """Not all processes have come. They may yet."""


def find() -> tuple[str, int, int, Sequence[int] | None]:
  """(coordinator's address, number of processes, number of this one, its local devices or None for
  all).

  From JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; what they leave open jax
  detects (Cloud TPU, GKE, SLURM, Open MPI). InputError where that is not enough.
  """
  env = os.environ
  try:
    known = (
      env.get('JAX_COORDINATOR_ADDRESS'),
      *(int(env[n]) if n in env else None for n in ('JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')),
    )
  except ValueError as error:
    raise InputError(f'JAX_NUM_PROCESSES, JAX_PROCESS_ID: expected integers ({error})') from None
  devices = env.get('JAX_LOCAL_DEVICE_IDS')
  devices = [int(i) for i in devices.split(',')] if devices else None
  if None in known:
    try:
      *known, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
        *known, devices, None, 60
      )
    except Exception as error:  # whatever the cluster's own tools raise
      raise InputError(
        f'--multihost: the cluster cannot be read ({type(error).__name__}: {error})'
      ) from None
  missing = [
    n
    for n, value in zip(('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'), known)
    if value is None
  ]
  if missing:
    raise InputError(
      f'--multihost: got no {", ".join(missing)} and no cluster that jax knows (Cloud TPU, GKE, '
      'SLURM, Open MPI); expected one or the other'
    )
  address, count, index = known
  if ':' not in address or not 0 <= index < count:
    raise InputError(
      f'--multihost: got process {index} of {count} at {address!r}; expected 0 to {count - 1}, at '
      'host:port'
    )
  return address, count, index, devices


def others(env: Mapping[str, str]) -> str:
  """What says that there are several processes, as text; '' where nothing does: the environment, or
  the metadata of a Cloud TPU. Without the others a process of it would wait for ever at its chips.
  """

  def number(name):
    value = env.get(name, '')
    return value.isdigit() and int(value)

  for name in ('JAX_NUM_PROCESSES', 'MEGASCALE_NUM_SLICES', 'OMPI_COMM_WORLD_SIZE'):
    if number(name) > 1:
      return f'{name}={env[name]}'
  if number('SLURM_NTASKS') > 1 and 'SLURM_PROCID' in env:
    return f'SLURM_NTASKS={env["SLURM_NTASKS"]}'
  for name in ('TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'):
    if ',' in env.get(name, ''):
      return f'{name} with {env[name].count(",") + 1} hosts'
  hosts = _tpu_hosts()
  if hosts > 1:
    return f'a Cloud TPU slice of {hosts} hosts'
  return ''


def _tpu_hosts():
  """Hosts of the slice that this machine belongs to, as its metadata server says; 1 elsewhere."""
  cluster = cloud_tpu_cluster.GceTpuCluster
  try:
    if cluster.is_env_present():
      return cluster.get_process_count()
  except Exception as error:  # of the network, or of a server that is none
    print(f'Cloud TPU metadata cannot be read: {error}', file=sys.stderr)
  return 1


# --- what all must have in common ---------------------------------------------------------------


def facts(config: schema.Config) -> dict[str, Any]:
  """{name: value} of this process: hashes of the code and of each group of the config, versions of
  what it uses.
  """
  package = pathlib.Path(__file__).resolve().parents[1]
  code = hashlib.sha256()
  for path in sorted(package.rglob('*.py')):
    code.update(f'{path.relative_to(package)}\n'.encode() + path.read_bytes())
  groups = {
    f'config.{name}': short(json.dumps(value, sort_keys=True))
    for name, value in strict.plain(config).items()
  }
  return {
    'code': code.hexdigest()[:8],
    **groups,
    'python': platform.python_version(),
    **{name: _version(name) for name in _PACKAGES},
  }


def short(text: str) -> str:
  """Eight hexadecimal digits that stand for a text."""
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _version(name):
  try:
    return metadata.version(name)
  except metadata.PackageNotFoundError:
    return 'none'


def differences(found: Mapping[int, Mapping[str, Any]]) -> str:
  """One line that names every fact in which processes differ, and who has what; '' where all agree.

  found: {process: {name: value}}.
  """
  parts = []
  for name in dict.fromkeys(n for f in found.values() for n in f):
    who = {}
    for process in sorted(found):
      who.setdefault(str(found[process].get(name)), []).append(process)
    if len(who) > 1:
      parts.append(f'{name} is ' + ', '.join(f'{value} on {ranges(p)}' for value, p in who.items()))
  return '; '.join(parts)


def ranges(numbers: Sequence[int]) -> str:
  """'0-2, 5' for 0, 1, 2, 5."""
  runs = []
  for n in sorted(numbers):
    if runs and runs[-1][1] == n - 1:
      runs[-1][1] = n
    else:
      runs.append([n, n])
  return ', '.join(f'{a}-{b}' if a < b else f'{a}' for a, b in runs)


# --- the meeting --------------------------------------------------------------------------------


def meet(address: str, *, count: int, index: int, facts: Mapping[str, Any], seconds: float) -> None:
  """Returns once all `count` processes have come and agree on `facts`; else one error, the same on
  each.

  Raises Missing where some do not come in time, InputError where they differ.

  Args:
    address: host:port of process 0, where it listens. seconds: how long it waits for the others,
    and they for it.
  """
  host, port = address.rsplit(':', 1)
  facts = {'processes': count, **facts}
  if index == 0:
    answer = _receive(address, int(port), count, facts, seconds)
  else:
    hello = {'process': index, 'host': socket.gethostname(), 'facts': facts}
    answer = _visit(address, (host.strip('[]'), int(port)), hello, seconds)
  if answer['error']:
    raise (Missing if answer['missing'] else InputError)(f'--multihost: {answer["error"]}')


def _receive(address, port, count, own, seconds):
  """Process 0: everybody's hello, then one answer for all, which it returns."""
  found = {0: own}  # process -> its facts
  guests = {}
  connections = []
  errors = []
  end = time.monotonic() + seconds
  with _listen(port, end) as server:
    while len(found) < count and not errors and time.monotonic() < end:
      server.settimeout(min(1.0, max(end - time.monotonic(), 0.01)))
      try:
        guest = server.accept()[0]
        hello = _read(guest)
        process = int(hello['process'])
        facts = dict(hello['facts'])
      except (OSError, ValueError, TypeError, KeyError):  # nobody yet, or a stranger
        continue
      if process == 0 or process in guests and _there(guests[process]):
        errors.append(f'process {process} came twice, the second time from {hello.get("host")}')
      found[process] = facts
      guests[process] = guest
      connections.append(guest)
  missing = [p for p in range(count) if p not in found]
  text = differences(found)
  late = bool(missing) and not errors and not text
  if missing and not errors:
    errors.append(
      f'{len(missing)} of {count} processes did not come to {address} within {seconds:g} s: '
      f'{ranges(missing)} missing'
    )
  if text:
    errors.append(f'the processes differ: {text}; expected the same on all')
  answer = {'error': '; '.join(errors), 'missing': late}
  for guest in connections:
    try:
      guest.sendall(json.dumps(answer).encode() + b'\n')
      guest.close()
    except OSError:  # gone again: whoever waits for it names it
      pass
  return answer


def _listen(port, end):
  """A server at the port, which the run before may still be leaving."""
  both = socket.has_dualstack_ipv6()
  options = dict(
    family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=1024
  )
  while True:
    try:
      return socket.create_server(('', port), **options)
    except OSError as error:
      if time.monotonic() > end:
        raise InputError(
          f'--multihost: process 0 cannot listen at port {port} ({error.strerror}): is another run '
          'using it?'
        ) from None
    time.sleep(0.5)


def _visit(address, where, hello, seconds):
  """Any other process: says hello and returns the answer."""
  end = time.monotonic() + seconds
  reason = 'no answer'
  while time.monotonic() < end:
    try:
      with socket.create_connection(where, timeout=_ANSWER_S) as connection:
        connection.sendall(json.dumps(hello).encode() + b'\n')
        answer = _read(connection, seconds + _ANSWER_S)
        return {key: answer[key] for key in ('error', 'missing')}
    # Not there yet, or the end of another run, whose answer has another form.
    except (OSError, ValueError, TypeError, KeyError) as error:
      reason = getattr(error, 'strerror', None) or type(error).__name__
      time.sleep(0.2)
  return {
    'error': f'process 0 is missing: nobody answered at {address} within {seconds:g} s ({reason})',
    'missing': True,
  }


def _read(connection, seconds=_ANSWER_S):
  """One line of JSON."""
  connection.settimeout(seconds)
  with connection.makefile('rb') as file:
    return json.loads(file.readline(_LINE))


def _there(connection):
  """Whether the other side has not hung up."""
  connection.setblocking(False)
  try:
    return connection.recv(1) != b''
  except BlockingIOError:
    return True
  except OSError:
    return False

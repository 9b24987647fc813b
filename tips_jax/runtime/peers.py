"""The other processes of a run: what they agree on, when all stop, and who is gone. Nothing to do
for one process.

Between start-up and the end (`together` ... `apart`) every process walks through the same points
(`check`), between which there is work that all must share: a step, an evaluation, a save. A signal
to one host becomes a signal to all. Each then promises the next point at which it can stop, and all
stop at the latest of these: at the same step, with no word exchanged in a step that nobody stops.
Outside of that there is nothing to save, and each leaves at once.

Words go through the key-value store of jax's coordination service, which lives in process 0. A
thread of each process looks into it twice a second, gives signs of life, and ends the process when
another one fails or is lost.
"""

import atexit
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

from tips_jax.core import schema
from tips_jax.core.errors import AGAIN, InputError
from tips_jax.runtime import rendezvous
from tips_jax.runtime.signals import Preemption, Stopped

_POLL_S = 0.5
_BEAT = 4  # polls between two signs of life
_GRACE_S = 10  # to leave after a signal, for a process that has nothing to save
_LEAVE_S = 20  # process 0, which holds the store, waits so long for the others to leave
_ROOT = 'tips_jax'


def join(config: schema.Config, preemption: Preemption) -> 'Peers':
  """Joins the other processes, before anything else touches a device: Peers. InputError names who
  is missing.
  """
  address, count, index, devices = rendezvous.find()
  if count == 1:
    return Peers(preemption)
  rendezvous.meet(
    address,
    count=count,
    index=index,
    facts=rendezvous.facts(config),
    seconds=config.hosts.rendezvous_seconds,
  )
  jax.config.update('jax_enable_preemption_service', False)  # signals are ours
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  lost = config.hosts.lost_seconds
  jax.distributed.initialize(
    address,
    count,
    index,
    local_device_ids=devices,
    cluster_detection_method='deactivate',
    # jax's own limits end a process without a word: ours come first.
    initialization_timeout=120,
    heartbeat_timeout_seconds=int(2 * lost) + 10,
    shutdown_timeout_seconds=60,
  )
  return Peers(
    preemption, client=distributed.global_state.client, index=index, count=count, lost_seconds=lost
  )


def rows(places: jax.sharding.Sharding, batch_size: int) -> list[int]:
  """This process's rows of a batch that is sharded as `places` says; others may hold the same."""
  held = {}
  for device, index in places.devices_indices_map((batch_size,)).items():
    held.setdefault(device.process_index, set()).update(range(batch_size)[index[0]])
  parts = {frozenset(part) for part in held.values()}
  if sum(map(len, parts)) != batch_size:
    raise InputError(
      'mesh: got an order of devices in which processes share some of their rows of a batch; '
      'expected that two share all or none'
    )
  return sorted(held[jax.process_index()])


class Peers:
  """The processes of a run, seen from one of them."""

  def __init__(self, preemption, *, client=None, index=0, count=1, lost_seconds=60):
    self.index = index
    self.count = count
    self.lead = index == 0
    self._preemption = preemption
    self._client = client
    self._lost_s = lost_seconds
    self._lock = threading.Lock()
    self._passed = -1  # the last point that this process went through
    self._promised = None  # where it can stop, once somebody has asked
    self._stop_at = None  # where all stop, once all have promised
    self._together = self._left = False
    self._leaving = threading.Lock()
    self._asked_at = 0.0  # when somebody asked all to stop
    self._gone = 0  # processes that are lost: nobody waits for them
    self._beats = {}  # process -> (its last sign of life, when it came)
    if count > 1:
      atexit.register(self._close)
      threading.Thread(target=self._watch, name='peers', daemon=True).start()

  # --- words ---

  def gather(self, name: str, value: Any) -> list[Any]:
    """[value of each process]; every process calls it with the same name, which is used once."""
    if self.count == 1:
      return [value]
    self._set(f'{name}/{self.index}', value)
    found = {}
    while self.lead and len(found) < self.count:
      found = self._dir(name)
      time.sleep(0.02)
    in_order = [found.get(str(process)) for process in range(self.count)]
    return self.share(f'{name}-all', in_order)  # of the first process, which has them all

  def share(self, name: str, value: Any = None) -> Any:
    """The value that process 0 gives (what JSON can hold). Others wait for it; Stopped where all
    stop instead.
    """
    if self.count == 1:
      return value
    if self.lead:
      self._set(name, value)
      return value
    while True:
      try:
        return json.loads(
          self._client.blocking_key_value_get(f'{_ROOT}/{name}', int(1000 * _POLL_S))
        )
      except jax.errors.JaxRuntimeError as error:
        if 'DEADLINE_EXCEEDED' not in str(error):
          raise
      if self._stop_at is not None and self._stop_at <= self._passed + 1:
        raise Stopped

  def barrier(self, name: str) -> None:
    self.gather(name, None)

  def agree(self, name: str, facts: Mapping[str, Any]) -> None:
    """One InputError, the same on every process, where a fact is not the same on all."""
    differ = rendezvous.differences(dict(enumerate(self.gather(name, facts))))
    if differ:
      raise InputError(f'--multihost: the processes differ: {differ}; expected the same on all')

  # --- stopping together ---

  def together(self) -> None:
    """All have come so far. From here to `apart` they stop at the same point."""
    self.barrier('together')
    self._together = True

  def apart(self) -> None:
    """All have come so far, and there is nothing more to save."""
    if self._together:
      self.barrier('apart')
      self._together = False

  @property
  def can_save(self) -> bool:
    """Whether the others are there to save with."""
    return self.count == 1 or self._together

  def check(self, point: int) -> None:
    """Goes through a point; Stopped where all stop. Points are numbered from 0, without gaps."""
    if self.count == 1:
      if self._preemption.requested:
        raise Stopped
      return
    with self._lock:
      if self._promised is None and not self._preemption.requested:
        self._passed = point
        return
    self._promise()
    while self._stop_at is None:  # the threads are at it
      time.sleep(0.01)
    if point >= self._stop_at:
      raise Stopped
    self._passed = point

  def _promise(self):
    """From now on this process goes no further than the next point, unless another one has come
    further.
    """
    with self._lock:
      if self._promised is None:
        self._promised = self._passed + 1

  # --- leaving ---

  def fail(self, code: int, text: str) -> None:
    """Tells the others that this process ends with an error, so that they do too; then leaves."""
    if self.count > 1 and not self._left:
      self._tell('failed', code=code, text=text)
    self.leave()

  def leave(self) -> None:
    """The last thing before os._exit: process 0 goes last."""
    if self.count == 1:
      return
    self._leaving.acquire()  # once: the other thread waits here for the end
    self._left = True
    end = time.monotonic() + _LEAVE_S
    try:
      if self._preemption.requested:  # the thread may not have said it yet
        self._tell('stop')
      self._set(f'left/{self.index}', None)
      while (
        self.lead and len(self._dir('left')) < self.count - self._gone and time.monotonic() < end
      ):
        time.sleep(0.05)
    except jax.errors.JaxRuntimeError:  # process 0 is gone
      pass

  def verdict(self, error: BaseException) -> None:
    """Waits until a process must have been found lost, should `error` be that of a broken
    connection: then the thread ends this one too, and else the error is our own.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) and 'RESOURCE_EXHAUSTED' not in str(error):
      print(
        f'process {self.index}: {str(error).splitlines()[0][:200]}', file=sys.stderr, flush=True
      )
      time.sleep(self._lost_s + 2 * _BEAT * _POLL_S)

  def _close(self):
    self._left = True

  def _end(self, code, text):
    """Ends the process from the thread, whatever the main thread waits for."""
    print(text, file=sys.stderr, flush=True)
    self.leave()
    for child in multiprocessing.active_children():
      child.kill()
    os._exit(code)

  # --- the thread ---

  def _watch(self):
    polls = 0
    while not self._left:
      try:
        if polls % _BEAT == 0:
          self._set(f'alive/{self.index}', polls, again=True)
          if self.lead:
            self._look_for_lost()
        polls += 1
        if self._preemption.requested:
          self._tell('stop')
        for name, event in self._dir('event').items():
          if not self._left:
            {'stop': self._stop, 'failed': self._failed, 'lost': self._lost}[name](event)
      except jax.errors.JaxRuntimeError as error:
        if not self._left:
          self._end(
            AGAIN,
            f'process 0 is gone, and with it the run ({str(error).splitlines()[0][:200]}): run the '
            'same command again to go on from the last checkpoint',
          )
      interval = _POLL_S
      if self._promised is not None:
        interval /= 10
      time.sleep(interval)

  def _look_for_lost(self):
    now = time.monotonic()
    for process, beat in self._dir('alive').items():
      if self._beats.get(process, (None,))[0] != beat:
        self._beats[process] = beat, now
    lost = [int(p) for p, (_, when) in self._beats.items() if now - when > self._lost_s]
    if lost:
      self._tell('lost', lost=sorted(lost))

  def _stop(self, event):
    self._promise()
    if not self._asked_at:
      self._asked_at = time.monotonic()
      self._set(f'stop/{self.index}', self._promised)
      if not self._preemption.requested:
        print(f'process {event["process"]} was asked to stop: all do', file=sys.stderr, flush=True)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)
    if self._stop_at is None:
      promised = self._dir('stop')
      if len(promised) == self.count:
        self._stop_at = max(promised.values())
    stuck = self._preemption.disposable and time.monotonic() - self._asked_at > _GRACE_S
    if stuck or self._together and self._dir('left'):  # who left had not begun: no step was made
      self._end(
        AGAIN, 'stopped by a signal to another process: run the same command again to go on'
      )

  def _failed(self, event):
    self._end(event['code'], f'error: process {event["process"]}: {event["text"]}')

  def _lost(self, event):
    self._gone = len(event['lost'])
    self._end(
      AGAIN,
      f'process {rendezvous.ranges(event["lost"])} of {self.count} gave no sign of life for '
      f'{self._lost_s:g} s: run the same command again to go on from the last checkpoint',
    )

  # --- the store ---

  def _tell(self, name, **event):
    """Leaves an event, unless there is one of that name."""
    try:
      self._set(f'event/{name}', {'process': self.index, **event})
    except jax.errors.JaxRuntimeError as error:
      if 'ALREADY_EXISTS' not in str(error):
        raise

  def _set(self, name, value, again=False):
    self._client.key_value_set(f'{_ROOT}/{name}', json.dumps(value), allow_overwrite=again)

  def _dir(self, name):
    """{last part of the key: value} of all keys below a name."""
    found = self._client.key_value_dir_get(f'{_ROOT}/{name}/')
    return {key.rsplit('/', 1)[1]: json.loads(value) for key, value in found}

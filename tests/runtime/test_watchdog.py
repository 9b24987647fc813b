import time

from tips_jax.runtime.watchdog import Watchdog

SECONDS = 0.2


def stalls(tmp_path):
  path = tmp_path / 'stall-1.txt'
  if not path.exists():
    return 0
  return path.read_text().count('stacks of all threads')


def test_waiting_for_the_evaluation_of_another_process_is_no_stall(tmp_path):
  dog = Watchdog(tmp_path, seconds=SECONDS, process=1)
  try:
    dog.beat('at step 5')
    with dog.paused():
      time.sleep(4 * SECONDS)
    assert stalls(tmp_path) == 0
    # And then it watches again.
    end = time.monotonic() + 30
    while not stalls(tmp_path) and time.monotonic() < end:
      time.sleep(SECONDS / 4)
    assert stalls(tmp_path) == 1
  finally:
    dog.close()

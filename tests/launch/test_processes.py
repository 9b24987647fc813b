"""gpu_slurm.sh, gpu_single.sh and local_fake.sh."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'


# --- GPUs ---


def test_slurm_submits_one_process_a_gpu(machine):
  machine.call(
    'gpu_slurm.sh',
    'run',
    '--nodes=4',
    '--config=c',
    f'--workdir={machine.place}/w',
    '--gpus=4',
    '--sbatch_flags=--partition=p --account=a',
    '--',
    '--config.seed=1',
  )
  (call,) = machine.calls
  assert {
    '--nodes=4',
    '--ntasks-per-node=4',
    '--gpus-per-node=4',
    '--signal=TERM@120',
    '--requeue',
    '--partition=p',
    '--account=a',
    '--open-mode=append',
    f'--output={machine.place}/w/slurm-%j.log',
  } <= set(call)
  assert not [
    w for w in call if 'gpus-per-task' in w
  ]  # jax picks the GPU by number: all must be visible
  assert call[-4:] == [
    str(LAUNCH / 'slurm_job.sh'),
    '--config=c',
    f'--workdir={machine.place}/w',
    '--config.seed=1',
  ]
  machine.call('gpu_slurm.sh', 'stop', '--job=7')
  assert machine.calls == [
    ['scontrol', 'update', 'JobId=7', 'Requeue=0'],
    ['scancel', '--signal=TERM', '7'],
  ]


def test_slurm_with_a_work_folder_in_a_bucket(machine):
  """Main gets it as it is; SLURM's own log, which no bucket takes, is in the folder of the call."""
  workdir = 'gs://bucket/runs/x'
  machine.call('gpu_slurm.sh', 'run', '--nodes=2', '--config=c', f'--workdir={workdir}')
  (call,) = (c for c in machine.calls if c[0] == 'sbatch')
  assert f'--output={machine.place}/slurm-%j.log' in call and f'--workdir={workdir}' in call
  assert not (machine.place / 'gs:').exists()
  machine.call('gpu_slurm.sh', 'logs', '--dry_run', '--job=7', f'--workdir={workdir}')
  assert machine.out.split()[-1] == f'{machine.place}/slurm-7.log'


@pytest.mark.parametrize('restarts', ['', '99', '100'])
@pytest.mark.parametrize('code', [0, 2, 3, 75, 1, 137, 143])
def test_slurm_queues_again_what_was_stopped_or_lost_its_node(machine, code, restarts):
  machine.env['SLURM_JOB_ID'] = '7'
  machine.answer('srun', code=code)
  if restarts:
    machine.env['SLURM_RESTART_COUNT'] = restarts
  machine.call('slurm_job.sh', '--config=c', '--config.name=a b', code=code)
  assert machine.calls[0] == [
    'srun',
    '--kill-on-bad-exit=0',
    'python',
    '-m',
    'tips_jax.main',
    '--multihost',
    '--config=c',
    '--config.name=a b',
  ]
  again = code == 75 or code not in (0, 2, 3) and restarts != '100'
  assert machine.calls[1:] == ([['scontrol', 'requeue', '7']] if again else [])


def test_slurm_gives_each_process_the_cpus_of_the_job(machine):
  srun = machine.place / 'stubs/srun'
  srun.write_text('#!/bin/bash\necho "each: $SRUN_CPUS_PER_TASK"\n')
  machine.env |= {'SLURM_JOB_ID': '7', 'SLURM_CPUS_PER_TASK': '12'}
  machine.call('slurm_job.sh', '--config=c')
  assert machine.out == 'each: 12\n'


def test_single_machine(machine):
  machine.answer('list-gpus', 'GPU 0: H200\nGPU 1: H200')
  machine.answer('tips_jax.main', code=75)
  machine.call(
    'gpu_single.sh', '--config=c', '--workdir=w', '--gpus=1', '--', '--config.seed=1', code=75
  )
  argv, visible, _ = machine.records[-1]
  assert (
    argv == ['python', '-m', 'tips_jax.main', '--config=c', '--workdir=w', '--config.seed=1']
    and visible == '1'
  )
  assert '2 GPU(s)' in machine.err
  machine.answer('list-gpus', code=9)
  machine.call('gpu_single.sh', '--config=c', '--workdir=w', code=2)
  assert machine.err.startswith('error: GPUs: nvidia-smi found none')


# --- several processes on this machine ---

PROGRAM = """
import os, signal, sys, time
me = int(os.environ['JAX_PROCESS_ID'])
code = int(sys.argv[1:][me])
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), time.sleep(0.1 * me), os._exit(75)))
print(*(os.environ[k] for k in ('JAX_NUM_PROCESSES', 'JAX_PLATFORMS', 'NPROC', 'XLA_FLAGS')), flush=True)
open(f'{os.environ["JAX_COORDINATOR_ADDRESS"].split(":")[1]}-{me}', 'w')
if code == 9:
  os.kill(os.getpid(), signal.SIGKILL)
while code < 0:
  time.sleep(0.02)
sys.exit(code)
"""


def local(place, codes, *args, **options):
  (place / 'program.py').write_text(PROGRAM)
  environment = {
    **os.environ,
    'PATH': f'{pathlib.Path(sys.executable).parent}:/usr/bin:/bin',
    'XLA_FLAGS': '--a',
  }
  command = [
    LAUNCH / 'local_fake.sh',
    f'--processes={len(codes)}',
    '--devices=3',
    f'--program={sys.executable} -IS {place}/program.py',
    *args,
    '--',
    *map(str, codes),
  ]
  return subprocess.Popen(
    command,
    env=environment,
    cwd=place,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    **options,
  )


@pytest.mark.parametrize(
  'codes, worst',
  [((0, 0), 0), ((0, 75), 75), ((75, 1), 1), ((2, 75), 2), ((1, 3, 75), 3), ((9, 75), 137)],
)
def test_local_processes(tmp_path, codes, worst):
  process = local(tmp_path, codes)
  out, err = process.communicate(timeout=30)
  assert process.returncode == worst, err
  line = f'{len(codes)} cpu 32 --a --xla_force_host_platform_device_count=3'
  assert sorted(out.splitlines()) == [f'[{i}] {line}' for i in range(len(codes))]
  ports = {p.name.split('-')[0] for p in tmp_path.glob('*-*')}
  assert len(ports) == 1 and int(ports.pop()) > 1023


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_signals_go_to_all(tmp_path, number):
  # Who starts the tests in the background hands down an ignored SIGINT.
  process = local(
    tmp_path,
    (-1, -1),
    start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  try:
    for _ in range(2):
      assert process.stdout.readline().startswith('[')
    process.send_signal(number)  # to the script alone
    out, err = process.communicate(timeout=30)
  finally:
    try:
      os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
      pass
  assert process.returncode == 75, err
  assert sorted(out.splitlines()) == ['[0] saved', '[1] saved']

"""What every script of launch/ does: help, errors, dry runs; shellcheck; the page that explains
them.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
SCRIPTS = sorted(p.relative_to(LAUNCH).as_posix() for p in LAUNCH.rglob('*.sh'))
PROGRAMS = [s for s in SCRIPTS if s not in ('common.sh', 'tpu.sh', 'worker.sh', 'slurm_job.sh')]
SLICE = ['--name=pod', '--zone=us-west4-a']
RUN = [*SLICE, '--topology=v5e:4x4', '--config=configs/vitb.py:v2', '--workdir=gs://bucket/run']


@pytest.mark.parametrize('script', SCRIPTS)
def test_shellcheck(script):
  tool = shutil.which(
    'shellcheck', path=f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  )
  assert tool, "shellcheck is missing: pip install -e '.[test]' brings it"
  done = subprocess.run(
    [tool, '--external-sources', LAUNCH / script], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize('script', PROGRAMS)
def test_help_names_every_flag_and_calls_nothing(machine, script):
  source = (LAUNCH / script).read_text()
  known = ' '.join(re.findall(r"^parse '([^']+)' \"", source, re.M)).split()
  assert len(known) > 2
  for args in (['--help'], ['-h'], []):
    machine.call(script, *args)
    assert not machine.calls
    assert not [flag for flag in known if f'--{flag}' not in machine.out]
    assert 'shellcheck' not in machine.out


RUNS = {
  'tpu_pod.sh': ['run', *RUN],
  'tpu_queued.sh': ['run', *RUN],
  'gke/run.sh': [
    'run',
    '--name=pod',
    '--image=i',
    '--topology=v5e:4x4',
    '--config=c',
    '--workdir=gs://bucket/run',
  ],
  'gpu_slurm.sh': ['run', '--nodes=2', '--config=c', '--workdir=w'],
  'gpu_single.sh': ['--config=c', '--workdir=w'],
  'local_fake.sh': ['--config=c', '--workdir=w', '--port=1'],
}


@pytest.mark.parametrize('script', PROGRAMS)
def test_bad_flags_are_one_clear_error(machine, script):
  good = RUNS[script]
  cases = [
    ([*good, '--confg=c'], '--confg: unknown flag; did you mean --config?'),
    ([*good, '--dry_ru'], '--dry_ru: unknown flag; did you mean --dry_run?'),
    ([*good, '--config'], '--config: missing value'),
    ([*good, '--config='], '--config: missing value'),
    ([*good, '--dry_run=maybe'], "--dry_run: got 'maybe'; expected true or false"),
    ([*good, 'stray'], "arguments: got 'stray'"),
    ([a for a in good if not a.startswith('--config=')], '--config: missing; expected'),
    ([a for a in good if not a.startswith('--workdir=')], '--workdir: missing; expected'),
  ]
  if good[0] == 'run':
    cases.append((['rum', *good[1:]], "command: got 'rum'; expected one of: "))
  for args, message in cases:
    machine.call(script, *args, code=2)
    assert machine.err.startswith(f'error: {message}') and machine.err.count('\n') == 1, machine.err
    assert not [c for c in machine.calls if c[0] != 'git']


@pytest.mark.parametrize('script', PROGRAMS)
def test_a_dry_run_prints_what_the_run_calls(machine, script):
  """The printed commands, read by a shell, are the calls of the real run; and none of them was
  made.
  """
  args = [*RUNS[script], '--', '--config.name=it\'s "a" $b']
  made = lambda: [c for c in machine.calls if c[0] != 'git' or 'archive' in c]
  machine.call(script, '--dry_run', *args) if args[0] != 'run' else machine.call(
    script, 'run', '--dry_run', *args[1:]
  )
  assert not made()
  text = machine.out
  machine.answer('list-gpus', 'GPU 0: H200')
  machine.answer('list', 'ACTIVE' if 'queued' in script else '')
  if script == 'gke/run.sh':
    machine.call(script, *args)
    ((call, _, manifest),) = machine.records
    assert text == f"{shlex.join(call)} <<'EOF'\n{manifest}\nEOF\n"
    return
  printed = [shlex.split(line) for line in text.splitlines() if line and not line.startswith('#')]
  machine.call(script, *args)
  if 'queued' in script:  # the dry run shows every case, the run has met one
    assert made() and all(c in printed for c in made())
  else:  # env and mkdir are themselves here; python behind env is a stand-in
    printed = [w[w.index('python') :] if w[0] == 'env' else w for w in printed if w[0] != 'mkdir']
    assert printed == [c for c in made() if c[0] != 'nvidia-smi']


def test_the_commands_of_the_readme(machine):
  """Each is accepted as it stands, with --dry_run; scripts and links exist."""
  text = (LAUNCH / 'README.md').read_text()
  blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.S)).replace('\\\n', ' ')
  variables = dict(re.findall(r'(\w+)=([\w.-]+)', ''.join(re.findall(r'^export .*', blocks, re.M))))
  commands = [
    shlex.split(line, comments=True) for line in blocks.splitlines() if line.startswith('launch/')
  ]
  assert {words[0].removeprefix('launch/') for words in commands} == set(PROGRAMS) - {
    'tpu_queued.sh'
  }
  for script, *args in commands:
    args = [re.sub(r'\$(\w+)', lambda m: variables.get(m[1], 'x'), arg) for arg in args]
    machine.call(script.removeprefix('launch/'), *args[:1], '--dry_run', *args[1:])
    assert machine.out and not [c for c in machine.calls if c[0] != 'git' or 'archive' in c]
  links = re.findall(r'\]\((?!http)(.*?)\)', text) + re.findall(r'`(\w+\.sh)`', text)
  assert links and all((LAUNCH / link).is_file() for link in links)

"""The scripts of launch/, against stand-ins for gcloud, kubectl, sbatch and the rest that record
how they are called.

Nothing here reaches a cloud: PATH has the stand-ins, which answer as each test says, and a few
plain tools; no other command exists.
"""

import pathlib
import re
import shlex
import shutil
import subprocess

import pytest

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
COMMIT = '0123456789ab'

# Records its arguments (and kubectl its input), and answers with the first rule left whose words
# all occur in them.
STUB = f"""#!/bin/bash
name=${{0##*/}}
record=$(printf '%s\\x1f' "$name" "$@"; printf '\\x1d%s\\x1d' "${{CUDA_VISIBLE_DEVICES-}}"
  [[ $name != kubectl ]] || cat)
printf '%s\\x1e' "$record" >>"$STUBS/calls"
for rule in "$STUBS"/rules/*; do
  [[ -e $rule ]] || break
  {{ read -r words; read -r code; IFS= read -r -d '' out; }} <"$rule"
  for word in $words; do [[ "$name $*" == *"$word"* ]] || continue 2; done
  rm "$rule"
  printf '%s\\n' "$out"
  exit "$code"
done
[[ "$name $*" != git*rev-parse* ]] || echo {COMMIT}
"""
STUBS = (
  'gcloud',
  'kubectl',
  'sbatch',
  'srun',
  'scontrol',
  'scancel',
  'squeue',
  'ssh',
  'scp',
  'nvidia-smi',
  'docker',
  'git',
  'python',
)
TOOLS = (
  'awk',
  'bash',
  'cat',
  'dirname',
  'env',
  'grep',
  'head',
  'mkdir',
  'rm',
  'sed',
  'sleep',
  'tail',
)


class Machine:
  """A machine whose PATH has the stand-ins. `call` runs a script; `calls` is what it called."""

  def __init__(self, place):
    self.place = place
    stubs = place / 'stubs'
    stubs.mkdir()
    for name in STUBS:
      (stubs / name).write_text(STUB)
      (stubs / name).chmod(0o755)
    for name in TOOLS:
      (stubs / name).symlink_to(shutil.which(name))
    self.env = {'PATH': str(stubs), 'STUBS': str(place), 'HOME': str(place), 'TMPDIR': str(place)}
    self.calls_file, self.rules_folder, self.count = place / 'calls', place / 'rules', 0
    self.rules_folder.mkdir()

  def answer(self, words, out='', code=0):
    """The next call with these words prints `out` and ends with `code`; once, in the order of the
    answers.
    """
    self.count += 1
    (self.rules_folder / f'{self.count:03}').write_text(f'{words}\n{code}\n{out}')

  def call(self, script, *args, code=0):
    self.calls_file.write_text('')
    done = subprocess.run(
      [LAUNCH / script, *args],
      env=self.env,
      cwd=self.place,
      capture_output=True,
      text=True,
      timeout=60,
      stdin=subprocess.DEVNULL,
    )
    assert done.returncode == code, done.stderr + done.stdout
    self.out, self.err = done.stdout, done.stderr
    records = [r.split('\x1d') for r in self.calls_file.read_text().split('\x1e')[:-1]]
    self.records = [(argv.split('\x1f')[:-1], visible, text) for argv, visible, text in records]
    return self

  @property
  def rules(self):
    """The answers that nobody has asked for."""
    return sorted(self.rules_folder.iterdir())

  @property
  def calls(self):
    return [argv for argv, _, _ in self.records]

  @property
  def verbs(self):
    """What the calls do, in a word each; queries of git left out."""
    found = []
    for argv in self.calls:
      command = [w for w in argv if w.startswith('--command=')]
      if command:
        found.append(re.search(r'worker\.sh (\w+)', command[0])[1])
      elif argv[0] == 'git':
        found += ['archive'] if 'archive' in argv else []
      else:
        found.append(argv[4] if argv[0] == 'gcloud' else argv[0])
    return found

  @property
  def printed(self):
    """The commands of a dry run, as words."""
    return [
      shlex.split(line) for line in self.out.splitlines() if line and not line.startswith('#')
    ]


@pytest.fixture
def machine(tmp_path):
  return Machine(tmp_path)

import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from benchmarks import caption as bench
from tests.data.pictures import picture
from tips_jax import caption
from tips_jax.data import store
from tips_jax.data.ingest import asking, captioners, captioning
from tips_jax.data.ingest.captioners import Answer, Caption
from tips_jax.data.ingest.reader import Sample

pytestmark = pytest.mark.once

QUICK = ('--tries=8', '--timeout_s=0.5', '--requests=4')


def run(*flags):
  return caption.main(['caption', *map(str, flags)])


@pytest.fixture
def source(tmp_path):
  return bench.write_store(tmp_path / 'in', 40)


@pytest.fixture
def out(tmp_path):
  return tmp_path / 'out'


def serve(source, out, server, *flags):
  names = (f'--store={source}', f'--output={out}', f'--captioner=openai:{server.url}#m')
  return run(*names, *QUICK, *flags)


def captions(path, split='train'):
  records = store.open_store(path).source(split)
  return {r['id'].decode(): [text.decode() for text in r['captions']] for r in records}


def counts(path):
  return json.loads((path / 'report.json').read_text())['splits']


# --- a server -----------------------------------------------------------------------------------


def test_every_image_gets_its_caption_from_a_server_that_fails_in_all_ways(source, out, capsys):
  with bench.Server(failing=0.4, stall_s=1.0) as server:
    assert serve(source, out, server, '--prompt=say') == 0
  assert bench.judge(out) == {'right': 40, 'images': 40}
  assert len(server.failed) == 7
  info = store.open_store(out).info
  assert info['made_by'] == 'caption'
  [made] = info['captions']
  assert made['captioner'].endswith('#m') and made['prompts'] == ['say']
  assert made['of'] == store.open_store(source).fingerprint
  assert re.fullmatch(r'20\d\d-\d\d-\d\d', made['date'])
  assert 'img/s' in capsys.readouterr().err
  assert 'tasks' not in os.listdir(out)


def test_killed_it_asks_only_for_what_it_does_not_know(source, out):
  with bench.Server(failing=0.2, latency_s=0.05, stall_s=1.0) as server:
    flags = ['--requests=2', '--timeout_s=0.5']
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    process = subprocess.Popen(bench.command(source, out, server.url, *flags), env=environment)
    while len(server.answered) < 12:
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sum(len(path.read_text().splitlines()) for path in out.parent.glob('*/tasks/*.journal'))
    assert kept >= 10
    command = bench.command(source, out, server.url, *flags)
    assert subprocess.run(command, env=environment).returncode == 0
  assert bench.judge(out) == {'right': 40, 'images': 40}
  # Those that were on their way.
  assert sum(count > 1 for count in server.answered.values()) <= 2


def test_a_server_that_never_answers_stops_it_and_what_is_known_is_kept(source, out, capsys):
  with bench.Server() as server:
    server.refuse = 503
    assert serve(source, out, server, '--tries=2') == 75
  error = capsys.readouterr().err.splitlines()[-1]
  assert 'gave no answer in 2 tries (503' in error and 'the same command again' in error.replace(
    'run the', 'the'
  )
  assert not out.exists()


@pytest.mark.parametrize('status', [401, 404])
def test_a_wrong_key_or_model_is_an_error_at_once(source, out, capsys, status):
  with bench.Server() as server:
    server.refuse = status
    assert serve(source, out, server) == 2
    assert len(server.requests) <= 2 * 4
  assert f'answers {status}' in capsys.readouterr().err
  assert not out.parent.joinpath('out.partial').exists() or list(
    out.parent.glob('*/tasks/*.journal')
  )


def test_a_server_that_takes_no_image_is_an_error(source, out, capsys):
  with bench.Server() as server:
    server.refuse = 400
    assert serve(source, out, server) == 2
  assert 'answers 400' in capsys.readouterr().err


def test_what_is_asked(source, out):
  with bench.Server() as server:
    flags = ['--prompt=Describe it, please.', '--prompt=More than "{alt_text}"?', '--captions=2']
    flags += ['--temperature=0.7', '--top_p=0.9', '--max_tokens=20', '--seed=5', '--splits=test']
    assert serve(source, out, server, *flags) == 0
  asked = {request['messages'][0]['content'][1]['text'] for request in server.requests}
  assert 'Describe it, please.' in asked and 'More than "alt 9"?' in asked and len(asked) == 5
  first = server.requests[0]
  numbers = {name: first[name] for name in ('temperature', 'top_p', 'max_tokens', 'seed', 'n')}
  assert numbers == {'temperature': 0.7, 'top_p': 0.9, 'max_tokens': 20, 'seed': 5, 'n': 2}
  assert {request['seed'] for request in server.requests} == {5, 7}
  assert store.open_store(out).splits == {'test': 4}
  # The same caption four times is one.
  assert counts(out)['test']['caption_repeated'] == 12 and counts(out)['test']['captions'] == 4


@pytest.mark.parametrize(
  'text, finish, kind',
  [
    ('  ', 'stop', 'caption_empty'),
    ('a cut one', 'length', 'caption_runaway'),
    ('a dog and a dog and a dog and a dog and', 'stop', 'caption_runaway'),
  ],
)
def test_bad_captions_are_dropped_and_counted(source, out, capsys, text, finish, kind):
  with bench.Server() as server:
    server.text = text
    server.finish = finish
    assert serve(source, out, server) == 0
  assert counts(out)['train'][kind] == 36 and counts(out)['test'][kind] == 4
  assert set(map(tuple, captions(out).values())) == {()}
  assert 'dropped: new captions' in capsys.readouterr().out


def test_new_captions_follow_the_old_ones_or_replace_them(source, out, tmp_path):
  with bench.Server() as server:
    assert serve(source, out, server) == 0
    server.text = 'another'
    assert serve(out, tmp_path / 'more', server) == 0
    assert serve(out, tmp_path / 'new', server, '--replace') == 0
  assert captions(tmp_path / 'more')['0'] == [captions(out)['0'][0], 'another']
  assert captions(tmp_path / 'new')['0'] == ['another']
  assert len(store.open_store(tmp_path / 'more').info['captions']) == 2


def test_parts_and_a_merge_write_the_same_records(source, out, tmp_path):
  with bench.Server() as server:
    assert serve(source, out, server, '--task_mib=0.005') == 0
    for part in ('1/2', '0/2'):
      assert serve(source, tmp_path / 'b', server, '--task_mib=0.005', f'--part={part}') == 0
    assert serve(source, tmp_path / 'b', server, '--task_mib=0.005', '--merge') == 0
  assert store.open_store(tmp_path / 'b').fingerprint == store.open_store(out).fingerprint


def test_beam_asks_too(source, out):
  pytest.importorskip('apache_beam')
  with bench.Server(failing=0.2, stall_s=1.0) as server:
    assert serve(source, out, server, '--task_mib=0.005', '--runner=DirectRunner') == 0
  assert bench.judge(out) == {'right': 40, 'images': 40}


def test_images_that_servers_do_not_read_go_as_jpeg():
  exif = Image.Exif()
  exif[0x0112] = 6
  turned = io.BytesIO()
  Image.open(io.BytesIO(picture(0))).save(turned, 'jpeg', exif=exif)
  for data, same in (
    (picture(0), True),
    (picture(0, kind='bmp'), False),
    (turned.getvalue(), False),
  ):
    url = captioners._data_url(data)
    assert url.startswith('data:image/jpeg;base64,')
    sent = captioners.base64.b64decode(url.partition(',')[2])
    assert (sent == data) == same
  assert Image.open(io.BytesIO(sent)).size == (24, 32)


def test_a_server_that_gives_one_choice_is_asked_again_with_another_seed():
  with bench.Server() as server:
    server.choices = 1
    ask = captioners.Ask(captioner='', captions=3, temperature=1.0)
    asked = captioners.Server(server.url, 'm', ask, threads=1, tries=1, timeout_s=5)
    [answer] = asked.answers([Sample('0', picture(0), '', [], {})])
  assert len(answer.captions) == 3
  assert [request['seed'] for request in server.requests] == [0, 1, 2]


# --- a table ------------------------------------------------------------------------------------


def test_a_table(source, out, tmp_path, capsys):
  rows = [{'id': str(i), 'caption': f'caption {i}'} for i in range(0, 40, 2)]
  rows.append({'id': '0', 'caption': 'a second one'})
  (tmp_path / 'c.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  flags = (f'--store={source}', f'--captioner=table:{tmp_path / "c.jsonl"}')
  assert run(*flags, f'--output={out}') == 0
  found = captions(out)
  assert found['0'] == ['caption 0', 'a second one'] and found['2'] == ['caption 2']
  rows = [{'id': f'x{i}', 'caption': 'c'} for i in range(3)]
  (tmp_path / 'd.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  many = bench.write_store(tmp_path / 'many', 130)
  assert run(f'--store={many}', f'--output={out}1', f'--captioner=table:{tmp_path}/d.jsonl') == 2
  assert "expected ids of the store, got 'x0'" in capsys.readouterr().err
  assert found['1'] == [] and counts(out)['train']['caption_failed'] == 16
  assert run(f'--store={source}', f'--output={out}2', f'--captioner=table:{tmp_path}/none') == 2
  assert 'cannot read the table' in capsys.readouterr().err


# --- what is usable -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  'text, circles',
  [
    ('very very very very nice', True),
    ('a man in a hat in a hat in a hat in a hat in', True),
    ('no no no, it is a cat', False),
    ('a b c d a b c d a b c d', False),
    ('', False),
  ],
)
def test_circles(text, circles):
  assert captioning._turns_in_circles(text) == circles


def test_usable():
  answer = Answer([Caption('a\n b'), Caption('old'), Caption('a b'), Caption('cut', False)])
  found, notes = captioning.usable(answer, ['old'])
  assert found == ['a b']
  assert [note.kind for note in notes] == ['caption_repeated'] * 2 + ['caption_runaway']


def test_a_journal_survives_a_cut_line(tmp_path):
  # Ends of lines for Python, none for JSON.
  odd = Answer([Caption('ä\u2028\x85\n', False), Caption('b')])
  with asking.Journal(tmp_path, 'train-0-9') as journal:
    journal.add(3, odd)
    journal.add(4, Answer([Caption('c')]))
  [path] = tmp_path.iterdir()
  path.write_bytes(path.read_bytes()[:-4])
  again = asking.Journal(tmp_path, 'train-0-9')
  assert 3 in again and 4 not in again
  assert again.get(3) == journal.get(3) == json.loads(json.dumps(odd))
  assert 3 not in asking.Journal(tmp_path, 'train-9-18')


# --- the command line ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--captioner=gpt'], "got 'gpt'; expected one of hf:"),
    (['--captioner=openai:localhost#m'], 'expected http://HOST:PORT/v1'),
    (['--captioner=openai:http://x'], 'expected one of hf:'),
    (['--captioner=hf:/nowhere'], "cannot load '/nowhere'"),
    (['--captioner=table:x.csv', '--captions=2'], 'all the same'),
    (['--captioner=table:x.csv', '--splits=tset'], "did you mean 'test'"),
    ([], '--captioner: missing'),
  ],
)
def test_bad_command_lines_are_one_line(source, out, capsys, flags, message):
  assert run(f'--store={source}', f'--output={out}', *flags) == 2
  assert message in capsys.readouterr().err.splitlines()[-1]
  assert os.listdir(out.parent) == ['in']


# --- models of transformers ---------------------------------------------------------------------

WORDS = 'a the red blue dog cat on of picture caption en alt in with and one two'.split()


def blip(folder):
  """A BLIP of random weights, of a few thousand parameters."""
  transformers = pytest.importorskip('transformers')
  vocabulary = folder / 'vocab.txt'
  special = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '[DEC]']
  vocabulary.write_text('\n'.join([*special, *WORDS]) + '\n')
  tokenizer = transformers.BertTokenizerFast(vocab=str(vocabulary), bos_token='[DEC]')
  size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  text = dict(size, vocab_size=len(tokenizer), encoder_hidden_size=16, bos_token_id=5)
  text |= dict(pad_token_id=0, eos_token_id=3, sep_token_id=3, max_position_embeddings=64)
  config = transformers.BlipConfig(
    text_config=text, vision_config=dict(size, image_size=32, patch_size=16), projection_dim=16
  )
  images = transformers.BlipImageProcessor(size={'height': 32, 'width': 32})
  transformers.set_seed(0)
  transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
  transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
  return folder


def paligemma(folder):
  """A PaliGemma of random weights."""
  transformers = pytest.importorskip('transformers')
  import tokenizers

  special = ['<pad>', '<eos>', '<bos>', '<unk>', '<image>', '\n']
  words = {word: number for number, word in enumerate([*special, *WORDS])}
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
  inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=inner,
    pad_token='<pad>',
    eos_token='<eos>',
    bos_token='<bos>',
    unk_token='<unk>',
    extra_special_tokens={'image_token': '<image>'},
  )
  images = transformers.SiglipImageProcessor(size={'height': 28, 'width': 28})
  images.image_seq_length = 4
  processor = transformers.PaliGemmaProcessor(images, tokenizer)
  size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
  config = transformers.PaliGemmaConfig(
    text_config=dict(
      size,
      model_type='gemma',
      vocab_size=len(processor.tokenizer),
      num_key_value_heads=1,
      head_dim=8,
      pad_token_id=0,
      eos_token_id=1,
      bos_token_id=2,
    ),
    vision_config=dict(size, model_type='siglip_vision_model', image_size=28, patch_size=14),
    image_token_index=processor.image_token_id,
    projection_dim=16,
  )
  transformers.set_seed(0)
  transformers.PaliGemmaForConditionalGeneration(config).save_pretrained(folder)
  processor.save_pretrained(folder)
  return folder


@pytest.mark.parametrize('make', [blip, paligemma])
@pytest.mark.parametrize('prompts', [[], ['caption en'], ['a picture of {alt_text}', 'the red']])
def test_a_model_of_transformers_answers_each_image_as_it_does_alone(tmp_path, make, prompts):
  if make is paligemma and not prompts:
    prompts = ['']
  (tmp_path / 'model').mkdir()
  ask = captioners.Ask(
    captioner=f'hf:{make(tmp_path / "model")}', prompts=tuple(prompts) or ('',), max_tokens=6
  )
  model = captioning.open_captioner(ask, batch=4, threads=1, tries=1, timeout_s=1)
  texts = ['a dog', 'the cat on a dog', '', 'one']
  samples = [Sample(str(i), picture(i), text, [], {}) for i, text in enumerate(texts)]
  answers = model.answers(samples)
  assert answers == [model.answers([sample])[0] for sample in samples]
  for answer, text in zip(answers, texts):
    assert len(answer.captions) == len(ask.prompts) and not answer.problem
    for found, prompt in zip(answer.captions, ask.prompts):
      # Only words that were generated, the prompt not among them.
      assert len(found.text.split()) <= 6
      prompt = prompt.replace('{alt_text}', text)
      assert not prompt or not found.text.startswith(prompt + ' ')
  assert any(found.text for answer in answers for found in answer.captions)
  bad = Sample('x', b'no image', '', [], {})
  assert model.answers([bad, samples[0]])[1] == answers[0]
  assert model.answers([bad])[0].problem


def test_sampling_gives_several_captions_of_a_model(source, out, tmp_path):
  (tmp_path / 'model').mkdir()
  model = blip(tmp_path / 'model')
  flags = ['--captions=3', '--temperature=2', '--max_tokens=5', '--splits=test', '--batch_size=3']
  assert run(f'--store={source}', f'--output={out}', f'--captioner=hf:{model}', *flags) == 0
  found = counts(out)['test']
  dropped = sum(found.get(f'caption_{kind}', 0) for kind in ('empty', 'repeated', 'runaway'))
  assert found['captions'] + dropped == 3 * 4
  assert np.mean([len(texts) for texts in captions(out, 'test').values()]) <= 3

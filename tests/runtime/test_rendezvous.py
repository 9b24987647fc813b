import pytest
from jax._src.clusters import cloud_tpu_cluster

from tips_jax.runtime import rendezvous

METADATA = {
  'agent-worker-number': '1',
  'worker-network-endpoints': 'a:1:10.0.0.1,b:2:10.0.0.2,c:3:10.0.0.3',
  'tpu-env': "ACCELERATOR_TYPE: 'v5litepod-16'",
}


@pytest.fixture
def metadata(monkeypatch):
  """The metadata server of a TPU VM; a test changes what it answers."""
  answers = dict(METADATA)

  def get(key):
    if key not in answers:
      raise OSError('no server')
    return answers[key], 200

  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', get)
  monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
  return answers


def test_a_slice_of_several_hosts_is_seen_before_its_chips_are_touched(metadata):
  assert rendezvous.others({}) == 'a Cloud TPU slice of 3 hosts'


def test_a_slice_of_one_host_runs_for_itself(metadata):
  metadata['worker-network-endpoints'] = 'a:1:10.0.0.1'
  assert rendezvous.others({}) == ''


def test_several_slices_of_one_host_each_are_several_processes(metadata):
  metadata['worker-network-endpoints'] = 'a:1:10.0.0.1'
  metadata['tpu-env'] = "MEGASCALE_NUM_SLICES: '2'"
  assert rendezvous.others({}) == 'a Cloud TPU slice of 2 hosts'


def test_a_machine_without_metadata_is_said_and_runs(metadata, capsys):
  metadata.clear()
  assert rendezvous.others({}) == ''
  assert 'metadata cannot be read: no server' in capsys.readouterr().err

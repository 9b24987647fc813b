"""gke/run.sh and the manifest that it makes."""

import pathlib
import re

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
RUN = [
  'run',
  '--name=pod',
  '--image=i',
  '--topology=v5e:4x4',
  '--config=c',
  '--workdir=gs://bucket/run',
]


def manifest(machine, *args):
  machine.call('gke/run.sh', *RUN, *args)
  ((call, _, text),) = machine.records
  assert call == ['kubectl', '--namespace=default', 'apply', '--filename=-']
  return yaml.safe_load(text)


def pod_of(job):
  return job['spec']['replicatedJobs'][0]['template']['spec']['template']


def test_manifest(machine):
  job = manifest(
    machine, '--', '--config.data.store=gs://bucket/a b', '--config.name=a "b" \\ ${HOME} & $(c)'
  )
  assert (job['apiVersion'], job['kind'], job['metadata']['name']) == (
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
    'pod',
  )
  assert job['metadata']['annotations'] == {
    'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
  }
  assert 'labels' not in job['metadata']
  policy = job['spec']['failurePolicy']
  assert policy['maxRestarts'] == 100
  assert [(r['action'], r['onJobFailureReasons']) for r in policy['rules']] == [
    ('FailJobSet', ['PodFailurePolicy'])
  ]
  (part,) = job['spec']['replicatedJobs']
  spec = part['template']['spec']
  assert (part['replicas'], spec['completions'], spec['parallelism'], spec['backoffLimit']) == (
    1,
    4,
    4,
    0,
  )
  (rule,) = spec['podFailurePolicy']['rules']
  assert rule == {
    'action': 'FailJob',
    'onExitCodes': {'containerName': 'tips', 'operator': 'In', 'values': [2, 3]},
  }
  pod = pod_of(job)
  assert pod['metadata']['annotations'] == {
    'gke-gcsfuse/volumes': 'true',
    'gke-gcsfuse/cpu-limit': '0',
    'gke-gcsfuse/memory-limit': '0',
    'gke-gcsfuse/ephemeral-storage-limit': '0',
  }
  assert (
    pod['spec']['restartPolicy'] == 'Never' and pod['spec']['terminationGracePeriodSeconds'] == 300
  )
  assert pod['spec']['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
  }
  assert not {'hostNetwork', 'dnsPolicy'} & set(pod['spec'])
  (container,) = pod['spec']['containers']
  assert container['name'] == 'tips' and container['image'] == 'i' and 'command' not in container
  assert container['resources'] == {'limits': {'google.com/tpu': 4}}
  assert container['args'] == [
    '--multihost',
    '--config.hosts.rendezvous_seconds=3600',
    '--config=c',
    '--workdir=/gcs/bucket/run',
    '--config.data.store=/data/bucket/a b',
    '--config.name=a "b" \\ ${HOME} & $(c)',
  ]
  mounts = {m['name']: m['mountPath'] for m in container['volumeMounts']}
  assert mounts == {'bucket': '/gcs/bucket', 'data': '/data/bucket', 'shm': '/dev/shm'}
  assert not container['env'] or 'JAX_NUM_PROCESSES' not in str(container['env'])
  bucket, data, shm = pod['spec']['volumes']
  assert bucket['csi']['volumeAttributes'] == {
    'bucketName': 'bucket',
    'mountOptions': (
      'implicit-dirs,file-system:rename-dir-limit:200000,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0'
    ),
  }
  assert data['csi']['readOnly'] is True
  assert data['csi']['volumeAttributes'] == {
    'bucketName': 'bucket',
    'mountOptions': (
      'implicit-dirs,metadata-cache:ttl-secs:-1,metadata-cache:stat-cache-max-size-mb:-1,metadata-cache:type-cache-max-size-mb:-1'
    ),
  }
  assert shm == {'name': 'shm', 'emptyDir': {'medium': 'Memory'}}


def test_manifest_of_several_spot_slices(machine):
  job = manifest(
    machine,
    '--topology=v5p:4x4x8',
    '--slices=3',
    '--spot',
    '--host_network',
    '--queue=q',
    '--grace=60',
    '--service_account=trainer',
    '--max_restarts=7',
  )
  pod, part = pod_of(job)['spec'], job['spec']['replicatedJobs'][0]
  assert job['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'q'}
  assert (part['replicas'], part['template']['spec']['completions']) == (3, 32)
  assert (
    job['spec']['failurePolicy']['maxRestarts'] == 7 and pod['terminationGracePeriodSeconds'] == 60
  )
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '4x4x8',
    'cloud.google.com/gke-spot': 'true',
  }
  assert pod['hostNetwork'] is True and pod['dnsPolicy'] == 'ClusterFirstWithHostNet'
  assert pod['serviceAccountName'] == 'trainer'
  assert pod['volumes'][0]['csi']['volumeAttributes']['hostNetworkPodKSA'] == 'true'


@pytest.mark.parametrize(
  'topology, more, chips, nodes',
  [
    ('v5e:2x4', [], 4, 2),
    ('v5e:2x4', ['--chips_per_node=8'], 8, 1),
    ('v6e:2x4', [], 4, 2),
    ('tpu7x:4x4x4', [], 4, 16),
    ('v6e:1x1', [], 1, 1),
    ('v6e:16x16', [], 4, 64),
    ('v4:2x2x1', [], 4, 1),
    ('v5p:2x2x2', [], 4, 2),
  ],
)
def test_nodes_of_a_slice(machine, topology, more, chips, nodes):
  job = manifest(machine, f'--topology={topology}', *more)
  assert pod_of(job)['spec']['containers'][0]['resources']['limits']['google.com/tpu'] == chips
  assert job['spec']['replicatedJobs'][0]['template']['spec']['completions'] == nodes


@pytest.mark.parametrize(
  'gpu, label, each', [('h100', 'nvidia-h100-80gb', 8), ('gb200', 'nvidia-gb200', 4)]
)
def test_nodes_with_gpus_find_each_other_by_their_names(machine, gpu, label, each):
  job = manifest(machine, f'--gpu={gpu}', '--nodes=3')
  assert not job['metadata']['annotations']
  spec = job['spec']['replicatedJobs'][0]['template']['spec']
  assert (spec['completions'], spec['parallelism']) == (3, 3)
  pod = pod_of(job)['spec']
  assert pod['nodeSelector'] == {'cloud.google.com/gke-accelerator': label}
  assert {'key': 'nvidia.com/gpu', 'operator': 'Exists', 'effect': 'NoSchedule'} in pod[
    'tolerations'
  ]
  (container,) = pod['containers']
  assert container['resources'] == {'limits': {'nvidia.com/gpu': each}}
  address, count, index = container['env']
  assert address == {'name': 'JAX_COORDINATOR_ADDRESS', 'value': 'pod-slice-0-0.pod:8482'}
  assert count == {'name': 'JAX_NUM_PROCESSES', 'value': '3'}
  path = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert index == {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': path}}}


def test_gke_commands(machine):
  machine.call('gke/run.sh', 'build', '--image=r/i:1')
  assert sorted(machine.verbs) == [
    'archive',
    'docker',
    'docker',
  ]  # the first two at once, through a pipe
  assert machine.calls[-1] == ['docker', 'push', 'r/i:1']
  machine.call('gke/run.sh', 'build', '--image=r/i:1', '--dry_run')
  assert not machine.calls and machine.out.count('\n') == 2 and ' | docker build ' in machine.out
  machine.answer('docker build', code=1)
  machine.call('gke/run.sh', 'build', '--image=r/i:1', code=1)
  assert ['docker', 'push', 'r/i:1'] not in machine.calls
  for command, words in (('logs', ['logs', '--follow']), ('delete', ['delete', 'jobset', 'pod'])):
    machine.call('gke/run.sh', command, '--name=pod', '--namespace=team')
    assert (
      machine.calls[0][:2] == ['kubectl', '--namespace=team']
      and machine.calls[0][2 : 2 + len(words)] == words
    )
  for bad, message in (
    ('--name=Pod', '--name: got'),
    ('--chips_per_node=3', '--chips_per_node: got'),
    ('--slices=0', '--slices: got'),
    ('--gpu=h100', '--nodes: missing'),
    ('--gpu=h300', '--nodes: missing'),
    ('--topology=v5e:4x6', '--topology: shape of v5e: got'),
  ):
    machine.call('gke/run.sh', *RUN, bad, code=2)
    assert message in machine.err and not machine.calls


def test_the_image_has_what_main_needs():
  text = (LAUNCH / 'gke/Dockerfile').read_text()
  assert 'ENTRYPOINT ["python", "-m", "tips_jax.main"]' in text  # no shell: SIGTERM must arrive


def test_images_and_workers_have_the_newest_python_that_is_tested():
  ci = (LAUNCH.parent / '.ci/run').read_text()
  newest = re.search(r'^for version in (3\.\d+)', ci, re.M)[1]
  assert f'\nFROM python:{newest}-slim\n' in (LAUNCH / 'gke/Dockerfile').read_text()
  assert f'--python {newest} .venv' in (LAUNCH / 'worker.sh').read_text()

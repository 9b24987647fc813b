"""Servers on this machine that speak as Amazon's and Google's object stores do: moto's for S3 and
gcp-storage-emulator for GCS, each in a thread, empty at the start.
"""

import contextlib
import logging
import os
import uuid
from collections.abc import Iterator

import pytest

SCHEMES = ('memory', 's3', 'gs')


@contextlib.contextmanager
def bucket(scheme: str) -> Iterator[str]:
  """The path of an empty bucket; the environment leads there, also that of other processes."""
  fsspec = pytest.importorskip('fsspec')
  with _SERVERS[scheme]() as environment, pytest.MonkeyPatch.context() as patch:
    for name, value in environment.items():
      patch.setenv(name, value)
    name = f'bucket-{uuid.uuid4().hex[:8]}'
    fsspec.filesystem(scheme, use_listings_cache=False).mkdir(name)
    yield f'{scheme}://{name}'
    # The next server has another address.
    fsspec.filesystem(scheme).clear_instance_cache()


@contextlib.contextmanager
def _memory():
  yield {}


@contextlib.contextmanager
def _s3():
  moto = pytest.importorskip('moto.server', reason='S3 is not emulated: no moto')
  pytest.importorskip('s3fs')
  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = moto.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  yield {
    'AWS_ENDPOINT_URL': f'http://{host}:{port}',
    'AWS_ACCESS_KEY_ID': 'nobody',
    'AWS_SECRET_ACCESS_KEY': 'nothing',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }
  server.stop()


@contextlib.contextmanager
def _gs():
  emulator = pytest.importorskip(
    'gcp_storage_emulator.server', reason='GCS is not emulated: no gcp-storage-emulator'
  )
  # Else gcsfs asks Google, by gRPC, of what kind each bucket is.
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  pytest.importorskip('gcsfs')
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
  server = emulator.create_server('127.0.0.1', 0, in_memory=True)
  server.start()
  port = server._api._httpd.server_address[1]
  yield {'STORAGE_EMULATOR_HOST': f'http://127.0.0.1:{port}', 'GOOGLE_CLOUD_PROJECT': 'none'}
  server.stop()


_SERVERS = {'memory': _memory, 's3': _s3, 'gs': _gs}

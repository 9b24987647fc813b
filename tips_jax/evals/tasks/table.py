"""All tasks that can be measured."""

from tips_jax.evals.tasks import common, dense
from tips_jax.evals.tasks.spec import TaskSpec

_SPECS = (
  TaskSpec(
    'segmentation',
    dense.segments,
    outputs=('patch',),
    needs='mask',
    shape='own',
    cells=dense.window_cells,
  ),
  TaskSpec('depth', dense.linear_depth, outputs=('patch',), needs='depth', shape='native'),
  TaskSpec(
    'dpt_depth', dense.decoder, outputs=('intermediate_layers',), needs='depth', shape='cut'
  ),
  TaskSpec(
    'dpt_normals', dense.decoder, outputs=('intermediate_layers',), needs='normals', shape='cut'
  ),
  TaskSpec('knn', common.neighbors, needs='label'),
  TaskSpec('linear', common.logistic, needs='label'),
  TaskSpec('instance_retrieval', common.instances, roles=('test',), needs='label'),
  TaskSpec('retrieval', common.texts_and_images, roles=('test',), needs='captions', text=True),
  TaskSpec('zeroshot', common.named_classes, roles=('test',), needs='label', text=True),
  TaskSpec(
    'zeroshot_segmentation',
    dense.named_segments,
    roles=('test',),
    outputs=('value_patch',),
    needs='mask',
    text=True,
    shape='own',
    cells=dense.view_cells,
  ),
)
TASKS = {spec.name: spec for spec in _SPECS}

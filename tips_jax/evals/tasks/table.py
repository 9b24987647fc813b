"""All tasks that can be measured, by their names in evals/datasets/protocols.py."""

from tips_jax.evals.tasks import common, dense
from tips_jax.evals.tasks.spec import TaskSpec

KINDS = {  # by their names in protocols.py
  'segmentation': TaskSpec(
    dense.segments,
    outputs=('patch',),
    needs='mask',
    shape='own',
    cells=dense.window_cells,
  ),
  'depth': TaskSpec(dense.linear_depth, outputs=('patch',), needs='depth', shape='native'),
  'dpt_depth': TaskSpec(
    dense.decoder, outputs=('intermediate_layers',), needs='depth', shape='cut'
  ),
  'normals': TaskSpec(
    dense.decoder,
    name='dpt_normals',
    outputs=('intermediate_layers',),
    needs='normals',
    shape='cut',
  ),
  'knn': TaskSpec(common.neighbors, needs='label'),
  'linear': TaskSpec(common.logistic, needs='label'),
  'instance_retrieval': TaskSpec(common.instances, name='instance', roles=('test',), needs='label'),
  'retrieval': TaskSpec(common.texts_and_images, roles=('test',), needs='captions', text=True),
  'zeroshot': TaskSpec(common.named_classes, roles=('test',), needs='label', text=True),
  'zeroshot_segmentation': TaskSpec(
    dense.named_segments,
    roles=('test',),
    outputs=('value_patch',),
    needs='mask',
    text=True,
    shape='own',
    cells=dense.view_cells,
  ),
}
KIND_OF = {kind.name: name for name, kind in KINDS.items() if kind.name} | {
  name: name for name in KINDS
}

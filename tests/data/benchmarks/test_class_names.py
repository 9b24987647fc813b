from tips_jax.data.benchmarks import class_names


def test_class_names():
  assert len(class_names.VOC) == 21 and len(class_names.CONTEXT) == 60
  assert len(set(class_names.ADE20K)) == 150 and len(class_names.IMAGENET) == 1000
  assert class_names.IMAGENET[0] == 'tench' and class_names.IMAGENET[-1] == 'toilet paper'
  prompts = {
    'pottedplant': 'potted plant',
    'wall-brick': 'brick wall',
    'sky-other-merged': 'sky',
    't-shirt': 't-shirt',
  }
  assert {name: class_names.prompt(name) for name in prompts} == prompts

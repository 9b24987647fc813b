"""Every metric against scikit-learn and torchmetrics, on random and on adversarial inputs.

Where ours differs by definition, the docstring of the test says how, and the reference gets what makes both the same.
"""

import warnings

import numpy as np
import pytest

from tips_jax.data.ingest.checks import VOID
from tips_jax.evals.features import reading as features
from tips_jax.evals.probes import depth, logistic, normals
from tips_jax.evals.probes import masks as masks_lib
from tips_jax.evals.tasks import common, knn, retrieval, zeroshot, zeroshot_segmentation
from tips_jax.evals.tasks import instance_retrieval as instance


@pytest.fixture(scope='module')
def sk():
  pytest.importorskip('sklearn')
  from sklearn import dummy, linear_model, metrics, model_selection, neighbors, preprocessing

  return type(
    'sklearn',
    (),
    dict(
      metrics=metrics,
      neighbors=neighbors,
      selection=model_selection,
      linear=linear_model,
      scaler=preprocessing,
      dummy=dummy,
    ),
  )


@pytest.fixture(scope='module')
def tm():
  pytest.importorskip('torchmetrics')
  import torch
  import torchmetrics
  from torchmetrics import classification, retrieval

  return type(
    'torchmetrics',
    (),
    dict(
      all=torchmetrics,
      classification=classification,
      retrieval=retrieval,
      tensor=staticmethod(lambda x: torch.as_tensor(np.array(x))),
    ),
  )


def cosines(a, b):
  """float64 [A, B]; rows that are not finite count as zero. Cosines equal up to rounding become
  equal.
  """
  unit = lambda x: normals.unit(np.where(np.isfinite(x).all(-1, keepdims=True), np.float64(x), 0))
  return np.round(unit(a) @ unit(b).T, 6)


def lowered(scores, right):
  """Scores in which a wrong candidate precedes a right one of the same score: our order of ties,
  for others.
  """
  return np.where(right, scores - 1e-7, scores)


# --- retrieval ----------------------------------------------------------------------------------


def hit_rates(tm, scores, right):
  """Hit rate at 1, 5 and 10 of torchmetrics; queries (rows) without a right candidate take no
  part.
  """
  query = np.repeat(np.arange(len(scores)), scores.shape[1])
  result = []
  for k in (1, 5, 10):
    metric = tm.retrieval.RetrievalHitRate(
      top_k=min(k, scores.shape[1]), empty_target_action='skip'
    )
    args = (lowered(scores, right).ravel(), right.ravel(), query)
    result.append(float(metric(*map(tm.tensor, args[:2]), indexes=tm.tensor(args[2]))))
  return result


RETRIEVAL = {
  'random': lambda rng: (rng.normal(size=(25, 6)), rng.integers(0, 25, 60), 1.0),
  'captions apart': lambda rng: (
    rng.normal(size=(12, 6)),
    rng.permutation(np.repeat(np.arange(0, 12, 2), 5)),
    0.5,
  ),
  'ties': lambda rng: (np.eye(4)[rng.integers(0, 4, 30)], np.repeat(np.arange(30), 2), 0.0),
  'constant': lambda rng: (np.ones((20, 3)), np.arange(20), 0.0),
  'one image': lambda rng: (rng.normal(size=(1, 4)), np.zeros(3, int), 1.0),
  'one text': lambda rng: (rng.normal(size=(9, 4)), np.array([4]), 0.3),
  'broken rows': lambda rng: (
    np.where(rng.random((30, 1)) < 0.2, np.nan, rng.normal(size=(30, 6))),
    np.arange(30),
    0.4,
  ),
}


@pytest.mark.parametrize('case', RETRIEVAL)
def test_recalls_equal_the_hit_rate(tm, case):
  """A tie of a right with a wrong candidate is lost here, in torchmetrics it goes to the one that comes first.

  Rows that are not finite are zeroed first (`features.finite`), as `features.extract` does: their cosine is 0.
  """
  rng = np.random.default_rng(0)
  image, owner, noise = RETRIEVAL[case](rng)
  text = np.nan_to_num(image)[owner] + noise * rng.normal(size=(len(owner), image.shape[1]))
  image, text = features.finite(image), features.finite(text)
  scores, right = cosines(text, image), owner[:, None] == np.arange(len(image))
  found = retrieval.recalls(image, text, owner)
  assert [found[f't2i_r{k}'] for k in retrieval.KS] == pytest.approx(
    hit_rates(tm, scores, right), abs=1e-6
  )
  assert [found[f'i2t_r{k}'] for k in retrieval.KS] == pytest.approx(
    hit_rates(tm, scores.T, right.T), abs=1e-6
  )


@pytest.mark.parametrize('case', ['random', 'singletons', 'duplicates', 'broken rows', 'two rows'])
def test_instance_recall_equals_hit_rate_and_nearest_neighbors(sk, tm, case):
  """Ties as in image-text retrieval. Queries whose class no other image has take no part, here
  as in torchmetrics.
  """
  rng = np.random.default_rng(1)
  n = 2 if case == 'two rows' else 80
  tags = rng.integers(0, 60 if case == 'singletons' else 8, n) if n > 2 else np.zeros(2, int)
  x = (rng.normal(size=(60, 5))[tags] + 0.8 * rng.normal(size=(n, 5))).astype(np.float32)
  if case == 'duplicates':
    x = x[rng.integers(0, 20, n)]
  if case == 'broken rows':
    x[rng.random(n) < 0.2] = np.inf
  found = instance.evaluate({'a': instance.Domain(query=x, tags=tags)})['r1']
  others = ~np.eye(n, dtype=bool)
  pick = lambda array: array[others].reshape(n, n - 1)
  scores, right = pick(cosines(x, x)), pick(tags[:, None] == tags)
  assert found == pytest.approx(hit_rates(tm, scores, right)[0], abs=1e-6)
  if case in ('random', 'singletons'):  # without ties
    near = (
      sk.neighbors.NearestNeighbors(n_neighbors=1, metric='cosine')
      .fit(x)
      .kneighbors(return_distance=False)[:, 0]
    )
    assert found == pytest.approx((tags[near] == tags)[right.any(1)].mean())
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    half = instance.Domain(
      query=x[: n // 2], tags=tags[: n // 2], index=x[n // 2 :], index_tags=tags[n // 2 :]
    )
    own = instance.evaluate({'a': half})['r1']
  split = np.s_[: n // 2, n // 2 :]
  expected = hit_rates(tm, cosines(x, x)[split], (tags[:, None] == tags)[split])[0]
  assert own == pytest.approx(expected, abs=1e-6)


# --- classification -----------------------------------------------------------------------------


def vote(k, temperature=0.07):
  return dict(
    n_neighbors=k, metric='cosine', algorithm='brute', weights=lambda d: np.exp(-d / temperature)
  )


@pytest.mark.parametrize('case', ['random', 'duplicates', 'one class', 'empty class', 'zero rows'])
@pytest.mark.parametrize('k', [1, 7, 40])
def test_knn_equals_scikit_learn(sk, k, case):
  """Which of equally near rows counts is not defined there, and here the first; so duplicates share their class.

  The cosine of a zero row is 0 to all here, as in scikit-learn.
  """
  rng = np.random.default_rng(k)
  labels = (
    np.zeros(90, int)
    if case == 'one class'
    else rng.integers(0, 5, 90) * (2 if case == 'empty class' else 1)
  )
  centers = rng.normal(size=(10, 6))
  x = centers[labels] + rng.normal(size=(90, 6))
  if case == 'duplicates':
    copies = rng.integers(0, 25, 90)
    x, labels = x[copies], labels[copies]
  test = np.concatenate([x[:10], centers[rng.integers(0, 10, 50)] + rng.normal(size=(50, 6))])
  if case == 'zero rows':
    x[::9] = 0
  expected = sk.neighbors.KNeighborsClassifier(**vote(k)).fit(x, labels).predict(test)
  np.testing.assert_array_equal(knn.predict(x, labels, test, k=k), expected)
  assert common.accuracy(
    knn.predict(x, labels, test, k=k), np.arange(60) % 5
  ) == sk.metrics.accuracy_score(np.arange(60) % 5, expected)


def test_k_is_chosen_as_cross_validation_would(sk):
  rng = np.random.default_rng(0)
  labels, groups = rng.integers(0, 4, 80), rng.permutation(np.arange(80) // 5)
  x = rng.normal(size=(4, 5))[labels] + rng.normal(size=(80, 5))
  for cv, own in ((sk.selection.LeaveOneOut(), None), (sk.selection.LeaveOneGroupOut(), groups)):
    expected = {
      k: np.mean(
        sk.selection.cross_val_predict(
          sk.neighbors.KNeighborsClassifier(**vote(k)), x, labels, cv=cv, groups=own
        )
        == labels
      )
      for k in (1, 3, 10, 30)
    }
    best, found = knn.choose_k(x, labels, ks=(1, 3, 10, 30), groups=own)
    assert found == pytest.approx(expected)
    assert best == max(expected, key=lambda k: (expected[k], -k))
  held = np.arange(0, 80, 4)  # a validation split of one group: its rows do not see each other
  left = np.setdiff1d(np.arange(80), held)
  alone = np.where(np.isin(np.arange(80), held), 999, np.arange(80))
  expected = np.mean(knn.predict(x[left], labels[left], x[held], k=7) == labels[held])
  assert knn.choose_k(x, labels, ks=(7,), groups=alone, rows=held) == (
    7,
    {7: pytest.approx(expected)},
  )


def test_majority_equals_the_dummy(sk):
  rng = np.random.default_rng(0)
  for seen in (
    rng.integers(0, 4, 30),
    np.array([3]),
    np.array([2, 2, 1, 1]),
  ):  # a tie: the lowest class
    truth = rng.integers(0, 4, 50)
    dummy = sk.dummy.DummyClassifier(strategy='most_frequent').fit(np.zeros((len(seen), 1)), seen)
    assert common.majority(seen, truth) == dummy.score(np.zeros((50, 1)), truth)


@pytest.mark.parametrize('l2', [1e-1, 1e-3])
def test_linear_probe_equals_logistic_regression(sk, l2):
  """l2 is per row here, and on standardized features: C = 1 / (l2 N) after a StandardScaler."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 4, 300)
  x = (rng.normal(size=(4, 6))[labels] + rng.normal(size=(300, 6))) * 10.0 ** rng.integers(
    -2, 3, 6
  ) + 5
  x[:, 3] = x[:, 2]
  test = x + 0.3 * x.std(0) * rng.normal(size=x.shape)
  scaler = sk.scaler.StandardScaler().fit(x)
  model = sk.linear.LogisticRegression(C=1 / (l2 * 300), tol=1e-9, max_iter=10_000).fit(
    scaler.transform(x), labels
  )
  probe = logistic.fit(x.astype(np.float32), labels, classes=4, strengths=(l2,), steps=300)
  logits = probe.logits(test)
  softmax = np.exp(logits - logits.max(1, keepdims=True))
  np.testing.assert_allclose(
    softmax / softmax.sum(1, keepdims=True), model.predict_proba(scaler.transform(test)), atol=5e-3
  )
  assert (logits.argmax(1) == model.predict(scaler.transform(test))).mean() > 0.99


@pytest.mark.parametrize('case', ['random', 'broken rows', 'one row', 'unlabeled'])
def test_zero_shot_top_k_equals_both(sk, tm, case):
  """Rows that are not finite count as zero: all classes tie, and the lowest is the answer (the highest in
  scikit-learn, any in torchmetrics); so the references get scores that fall with the class."""
  rng = np.random.default_rng(0)
  classes, labels = rng.normal(size=(9, 6)), rng.integers(0, 9, 1 if case == 'one row' else 120)
  image = (classes[labels] + 1.5 * rng.normal(size=(len(labels), 6))).astype(np.float32)
  if case == 'broken rows':
    image[rng.random(len(image)) < 0.3] = np.nan
  if case == 'unlabeled':
    labels[::3] = -1
  scorer = zeroshot.ZeroshotScorer(classes)
  for part in (np.s_[:50], np.s_[50:]):
    scorer(image[part], labels[part])
  asked = labels >= 0
  scores, labels = (cosines(image, classes) - 1e-8 * np.arange(9))[asked], labels[asked]
  for name, k in {'accuracy': 1, 'top5': 5}.items():
    found = scorer.result()[name]
    assert found == pytest.approx(
      sk.metrics.top_k_accuracy_score(labels, scores, k=k, labels=np.arange(9)), abs=1e-12
    )
    metric = tm.classification.MulticlassAccuracy(num_classes=9, top_k=k, average='micro')
    assert found == pytest.approx(float(metric(tm.tensor(scores), tm.tensor(labels))), abs=1e-6)
  np.testing.assert_array_equal(
    scorer.counts, sk.metrics.confusion_matrix(labels, scores.argmax(1), labels=range(9))
  )


def test_equal_classes_go_to_the_lowest(sk):
  """scikit-learn answers with the highest of equal classes, we with the lowest: its numbers of
  the reversed list.
  """
  rng = np.random.default_rng(0)
  few, labels = rng.normal(size=(3, 6)), rng.integers(0, 9, 90)
  classes = few[np.arange(9) % 3]
  image = few[labels % 3] + 0.1 * rng.normal(size=(90, 6))
  scorer = zeroshot.ZeroshotScorer(classes, ks=(1, 2))
  scorer(image, labels)
  scores = cosines(image, classes)[:, ::-1]
  for name, k in {'accuracy': 1, 'top2': 2}.items():
    expected = sk.metrics.top_k_accuracy_score(8 - labels, scores, k=k, labels=range(9))
    assert scorer.result()[name] == pytest.approx(expected)


# --- segmentation -------------------------------------------------------------------------------


MASKS = {
  'random': lambda rng: (rng.integers(0, 6, (4, 9, 7)), rng.integers(0, 6, (4, 9, 7))),
  'void': lambda rng: (
    rng.choice([0, 1, 5, VOID], (4, 9, 7), p=[0.2, 0.1, 0.1, 0.6]),
    rng.integers(0, 6, (4, 9, 7)),
  ),
  'empty classes': lambda rng: (rng.choice([0, 3], (4, 9, 7)), rng.choice([3, 5], (4, 9, 7))),
  'one pixel': lambda rng: (np.full((1, 1, 1), 2), np.full((1, 1, 1), 2)),
  'all wrong': lambda rng: (np.zeros((2, 3, 3), int), np.ones((2, 3, 3), int)),
  'a void image': lambda rng: (
    np.stack([np.full((5, 5), VOID), np.eye(5, dtype=int)]),
    rng.integers(0, 2, (2, 5, 5)),
  ),
}


@pytest.mark.parametrize('case', MASKS)
def test_mean_iou_equals_both(sk, tm, case):
  """The mean is over the classes that occur in the truth or in the prediction, of all images together.

  scikit-learn counts only the labels it is given, hence those; torchmetrics' JaccardIndex, 'macro', leaves out absent
  classes as we do; its masks_lib.MeanIoU is another metric, a mean over images.
  """
  truth, found = MASKS[case](np.random.default_rng(0))
  scorer = zeroshot_segmentation.SegmentationScorer(6)
  for one, mask in zip(found, truth):
    scorer(one, mask)
  known = truth != VOID
  t, p = truth[known], found[known]
  present = np.union1d(t, p)
  np.testing.assert_array_equal(scorer.counts, sk.metrics.confusion_matrix(t, p, labels=range(6)))
  result = scorer.result()
  assert result['miou'] == pytest.approx(
    sk.metrics.jaccard_score(t, p, labels=present, average='macro'), abs=1e-12
  )
  assert result['pixel_accuracy'] == pytest.approx(sk.metrics.accuracy_score(t, p), abs=1e-12)
  each = sk.metrics.jaccard_score(t, p, labels=range(6), average=None, zero_division=0)
  np.testing.assert_allclose(
    masks_lib.class_iou(scorer.counts),
    np.where(np.isin(range(6), present), each, np.nan),
    atol=1e-12,
  )
  jaccard = tm.classification.MulticlassJaccardIndex(
    num_classes=6, ignore_index=VOID, average='macro'
  )
  for one, mask in zip(found, truth):
    jaccard.update(tm.tensor(one), tm.tensor(mask))
  assert result['miou'] == pytest.approx(float(jaccard.compute()), abs=1e-6)


def test_linear_segmentation_equals_both(sk, tm):
  """Classes of the test that training lacks count as missed: they occur in the truth."""
  rng = np.random.default_rng(0)
  probe = logistic.LinearProbe(
    kernel=rng.normal(size=(5, 4)).astype(np.float32), bias=np.zeros(4, np.float32), l2=1.0
  )
  patch = rng.normal(size=(6, 3, 3, 5)).astype(np.float32)
  masks = rng.choice([0, 1, 3, 6, VOID], (6, 12, 15)).astype(np.uint8)
  found = np.stack([masks_lib.upsample_argmax(probe.logits(p), (12, 15)) for p in patch])
  known = masks != VOID
  counts = 0
  for part in (np.s_[:4], np.s_[4:]):  # as the task adds up what it counts of each image
    seen = known[part]
    counts += masks_lib.confusion(masks[part][seen], found[part][seen], size=256)
  expected = sk.metrics.jaccard_score(masks[known], found[known], average='macro')
  assert masks_lib.mean_iou(counts) == pytest.approx(expected, abs=1e-12)
  jaccard = tm.classification.MulticlassJaccardIndex(num_classes=7, ignore_index=VOID)
  assert masks_lib.mean_iou(counts) == pytest.approx(
    float(jaccard(tm.tensor(found), tm.tensor(masks))), abs=1e-6
  )


def test_nothing_but_void_is_not_a_number():
  scorer = zeroshot_segmentation.SegmentationScorer(3)
  scorer(np.zeros((4, 4), int), np.full((4, 4), VOID))
  assert all(np.isnan(v) for v in scorer.result().values()) and np.isnan(
    masks_lib.mean_iou(scorer.counts)
  )


# --- depth and normals --------------------------------------------------------------------------


@pytest.mark.parametrize('case', ['random', 'void', 'one pixel', 'exact', 'far off'])
def test_depth_errors_equal_both(sk, tm, case):
  """'rmse' and 'abs_rel' are means over images of each image's value, void left out; the references get an image each.

  'rmse_pooled' is torchmetrics' MeanSquaredError over all valid pixels.
  """
  rng = np.random.default_rng(0)
  truth = rng.uniform(0.2, 9, (5, 8, 6)).astype(np.float32)
  found = (truth * np.exp(0.2 * rng.normal(size=truth.shape))).astype(np.float32)
  if case == 'void':
    truth[rng.random(truth.shape) < 0.6] = 0
    truth[1], truth[2, 0], truth[3, 0] = (
      0,
      np.nan,
      11,
    )  # nothing; not a number; beyond the largest depth
  if case == 'one pixel':
    truth[:, 1:], truth[:, :, 1:] = 0, 0
  found = {'exact': truth, 'far off': 1e4 * found}.get(case, found)
  scorer, pooled = depth.DepthScorer(), tm.all.MeanSquaredError(squared=False)
  rmse, relative, near = [], [], []
  for p, t in zip(found, truth):
    scorer.add(p, t)
    valid = (t > 0) & (t <= 10)
    if valid.any():
      p, t = p[valid].astype(np.float64), t[valid].astype(np.float64)
      pooled.update(tm.tensor(p), tm.tensor(t))
      rmse.append(sk.metrics.root_mean_squared_error(t, p))
      relative.append(sk.metrics.mean_absolute_percentage_error(t, p))
      near.append(np.mean(np.maximum(p / t, t / p) < 1.25))
  expected = {
    'rmse': np.mean(rmse),
    'abs_rel': np.mean(relative),
    'delta1': np.mean(near),
    'rmse_pooled': float(pooled.compute()),
  }
  assert scorer.result() == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize('case', ['random', 'void', 'opposite', 'near', 'any length'])
def test_angular_errors_equal_both(sk, tm, case):
  """The references take the arccos of the cosine, which is good to about 1e-2 degrees near 0 in float32, ours is exact
  there; hence the tolerance. 'angular_rmse' is a mean over images, 'rmse_pooled' and 'mean' are over pixels."""
  rng = np.random.default_rng(0)
  truth = normals.unit(rng.normal(size=(4, 7, 6, 3)))
  found = truth + 0.5 * rng.normal(size=truth.shape)
  if case == 'void':
    truth[rng.random(truth.shape[:3]) < 0.5] = 0
    truth[2] = 0
  found = {
    'opposite': -truth,
    'near': truth + 1e-3 * rng.normal(size=truth.shape),
    'any length': found * rng.uniform(1e-2, 1e2, (4, 7, 6, 1)),
  }.get(case, found)
  scorer, angles = normals.NormalScorer(), []
  for p, t in zip(found, truth):
    scorer.add(p, t)
    valid = t.any(-1)
    if valid.any():
      cosine = 1 - sk.metrics.pairwise.paired_cosine_distances(p[valid], t[valid])
      angles.append(np.degrees(np.arccos(np.clip(cosine, -1, 1))))
      mean = tm.all.CosineSimilarity(reduction='mean')(tm.tensor(p[valid]), tm.tensor(t[valid]))
      assert np.cos(np.radians(normals.degrees(p[valid], t[valid]))).mean() == pytest.approx(
        float(mean), abs=1e-6
      )
  pixels, result = np.concatenate(angles), scorer.result()
  expected = {
    'angular_rmse': np.mean([sk.metrics.root_mean_squared_error(a, 0 * a) for a in angles]),
    'mean': pixels.mean(),
    'rmse_pooled': np.sqrt(np.mean(pixels**2)),
    'median': np.median(pixels),
  }
  assert {name: result[name] for name in expected} == pytest.approx(expected, abs=0.02)
  for t in normals.WITHIN:
    assert result[f'within_{t:g}'] == pytest.approx(
      np.mean([np.mean(a < t) for a in angles]), abs=1e-12
    )

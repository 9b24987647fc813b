import pytest

from tips_jax.core.errors import InputError
from tips_jax.data.ingest.splits import select, splits_in


@pytest.mark.parametrize(
  'name, splits',
  [
    ('train', {'train'}),
    ('train-00000-of-00004.parquet', {'train'}),
    ('cc3m-training-0000.tar', {'train'}),
    ('cc3m-validation-0000.tar', {'validation'}),
    ('val_0.tar', {'validation'}),
    ('COCO_val2014.json', {'validation'}),
    ('Validation.CSV', {'validation'}),
    ('dev.jsonl', {'validation'}),
    ('coco-test-0.tar', {'test'}),
    ('testset.csv', {'test'}),
    ('minitrain.tar', {'train'}),
    ('trainImages.tar', {'train'}),
    ('contest.csv', set()),
    ('pretrained-0.tar', set()),
    ('latest.tar', set()),
    ('evaluated_by_hand.csv', set()),
    ('train_val.csv', {'train', 'validation'}),
  ],
)
def test_splits_by_the_words_of_a_name(name, splits):
  assert splits_in(name) == splits


def test_files_of_one_split_are_chosen_and_the_others_are_given_too():
  names = ['cc3m-train-0.tar', 'cc3m-train-1.tar', 'cc3m-validation-0.tar', 'coco_test_0.tar']
  assert select(names, 'train', 'x') == (names[:2], names[2:])
  assert select(names, 'val', 'x') == (names[2:3], names[:2] + names[3:])
  assert select(['a-0.tar', 'a-1.tar'], 'train', 'x') == (['a-0.tar', 'a-1.tar'], [])


def test_the_very_word_wins_over_another_one_for_the_same_split():
  assert select(['dev.tar', 'val.tar', 'train.tar'], 'dev', 'x')[0] == ['dev.tar']
  assert select(['val.tar', 'train.tar'], 'dev', 'x')[0] == ['val.tar']
  assert select(['minival-0.tar', 'train-0.tar'], 'minival', 'x')[0] == ['minival-0.tar']
  assert select(['train2014.csv', 'train2017.csv'], 'train2017', 'x')[0] == ['train2017.csv']


@pytest.mark.parametrize(
  'names', [['a.tar', 'test-0.tar'], ['train-0.tar', 'extra.tar'], ['train_val.tar', 'test.tar']]
)
def test_where_the_split_cannot_be_told_the_files_are_listed(names):
  with pytest.raises(InputError, match='split cannot be told') as error:
    select(names, 'train', 'x')
  assert all(name in str(error.value) for name in names)


def test_a_split_that_is_not_there_is_an_error():
  with pytest.raises(InputError, match=r"\['test-0.tar'\], none of split 'train'.*--input_split"):
    select(['test-0.tar'], 'train', 'x')

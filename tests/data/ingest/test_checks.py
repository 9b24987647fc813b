import pytest

from tests.data.pictures import picture, png_bomb
from tips_jax.data.ingest import checks


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_giant_image_is_refused_before_it_is_decoded(monkeypatch):
  def explode(self):
    raise AssertionError('decoded')

  monkeypatch.setattr('PIL.PngImagePlugin.PngImageFile.load', explode)
  check = checks.check_image(png_bomb(), min_side=16, max_pixels=50_000_000)
  assert (check.problem, check.size) == ('giant', (10_000, 10_000))
  assert (
    checks.check_image(png_bomb(100_000), min_side=16, max_pixels=50_000_000).problem == 'giant'
  )


@pytest.mark.parametrize('kind', ['jpeg', 'png', 'webp'])
def test_every_format_is_decoded_to_its_end(kind):
  whole = picture(0, size=(300, 200), kind=kind)
  assert checks.check_image(whole, min_side=16, max_pixels=10**6) == checks.Check(
    '', '', (300, 200)
  )
  assert (
    checks.check_image(whole[: len(whole) * 3 // 4], min_side=16, max_pixels=10**6).problem
    == 'unreadable'
  )

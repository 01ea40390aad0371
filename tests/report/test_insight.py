"""What a page shows of a network, from arrays whose answer is known."""
import io

import numpy as np
from PIL import Image

from unimiss_jax.report import figures, insight


def opened(data):
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB'))


def test_the_own_patient_is_found_and_framed():
  """Embeddings of an image and of its volume agree: the first neighbour is the own one, in a green frame."""
  rng = np.random.default_rng(0)
  e = rng.standard_normal((8, 16))
  views = {'xray': rng.uniform(size=(8, 32, 32, 3)), 'ct': rng.uniform(-1, 1, (8, 6, 24, 24, 1))}
  made = insight.neighbours({'xray': e, 'ct': e}, views, True, 'pa')
  assert [p.title for p in made] == ['Nearest neighbours: xray to ct', 'Nearest neighbours: ct to xray']
  sheet = opened(made[0].data).astype(int)
  green = (np.abs(sheet - insight.OWN).sum(-1) < 60).sum(0)      # of each column of pixels
  side = insight.sheets.TILE + 6
  assert green[side:2 * side + 6].sum() > 1000 and green[2 * side + 6:].sum() == 0
  assert opened(insight.neighbours({'xray': e, 'ct': e}, views, False, 'pa')[0].data).shape == sheet.shape


def test_the_map_separates_what_is_apart():
  rng = np.random.default_rng(0)
  label = np.arange(20) % 2
  e = rng.standard_normal((20, 8)) * .01 + np.where(label[:, None], 1., -1.) * np.eye(8)[0]
  made = insight.embedding_map({'ct': e, 'drr': e}, {'ct': {'finding': label.astype(float)}})
  x = np.array(made.points)[:, 0]
  value = np.array(made.labels['finding'])
  assert made.plain()['kinds'] == ['ct', 'drr'] and len(x) == len(value) == 40
  assert (x[value == 1].min() > x[value == 0].max()) or (x[value == 1].max() < x[value == 0].min())


def test_components_colour_what_differs():
  maps = np.zeros((1, 4, 6, 5))
  maps[0, :, 3:, 2] = 1.
  rgb = insight.components(maps)
  assert rgb.shape == (1, 4, 6, 3) and rgb.dtype == np.uint8
  assert (rgb[0, :, :3, 0] == rgb[0, 0, 0, 0]).all() and abs(int(rgb[0, 0, 0, 0]) - int(rgb[0, 0, 5, 0])) == 255


def test_attention_is_that_of_the_last_block():
  row = lambda at: (np.eye(10)[None, None, at],)      # [1, 1, 1 + 9 places]
  sown = {'transformer': {'block4_2': {'attn': {'class_row': row(1)}}, 'block4_10': {'attn': {'class_row': row(5)}},
                          'block3_0': {'attn': {'class_row': (np.ones((1, 1, 17)),)}}}}
  assert np.argmax(insight._class_row(sown, (3, 3))) == 4 and insight._class_row({}, (3, 3)) is None


def test_a_perfect_reconstruction_has_no_error():
  views = {'xray': np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)}
  made, = insight.reconstructions(lambda p, extra, b: b, {}, views)
  side = insight.sheets.TILE + 6
  sheet = opened(made.data)[16:16 + insight.sheets.TILE]
  assert sheet[8:-8, 2 * side + 14:3 * side - 8].max() < 30 and sheet[:, side + 8:side + 60].max() > 100


def test_colours_of_heat():
  assert figures.heat([0., 1., np.nan]).tolist() == [[0, 0, 4], [252, 255, 164], [0, 0, 4]]
  image = Image.new('L', (64, 64))
  assert figures.uri(figures.encoded(image)).startswith('data:image/png') and figures.encoded(image, b'x') == b'x'

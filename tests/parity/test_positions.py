"""Position tables on other grids: the released arithmetic against its fixture, and how ours differs from it."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import models
from unimiss_jax.models import layers, reference
from unimiss_jax.models.mit import MiTPlus

CASES = {'2d_s1_sq': (16, 16), '2d_s1_rect': (16, 16), '2d_s2_down': (8, 8), '2d_s4': (2, 2),
         '3d_s1': (8, 16, 16), '3d_s3': (4, 4, 4), '3d_s3_rect': (4, 4, 4)}
TINY = dict(embed_dims=(4, 8, 16, 32, 40, 40), decoder_dims=(40, 32, 16, 8, 4), image_size=64, volume_size=(16, 64, 64))


@pytest.fixture(scope='module')
def stored(fixtures):
  return np.load(fixtures / 'parity' / 'plus_posembed_interp.npz')


def grid_of(stored, case):
  return tuple(int(n) for n in stored[f'{case}/{"hw" if case.startswith("2d") else "dhw"}'])


@pytest.mark.parametrize('case', CASES)
def test_released_interpolation(stored, case):
  got = reference.resize_positions(jnp.asarray(stored[f'{case}/in']), CASES[case], grid_of(stored, case), True)
  np.testing.assert_allclose(got, stored[f'{case}/out'], rtol=0, atol=1e-5)


@pytest.mark.parametrize('case', ['2d_s1_rect', '3d_s3_rect'])
def test_rectangles_are_transposed_in_the_released_code_only(stored, case):
  """Its result lies W-major: as (W, H) it is the interpolation of the table with H and W exchanged, which is what
  `grid` gives for the exchanged table, but for the 0.1 tokens that the released code lays the table over in excess."""
  native, (*depth, h, w) = CASES[case], grid_of(stored, case)
  table, theirs = stored[f'{case}/in'], stored[f'{case}/out'][0, 1:].reshape(*depth, w, h, -1).swapaxes(-2, -3)
  maps = table[0, 1:].reshape(*native, -1)
  matrix = layers.linear_matrix if depth else layers.cubic_matrix
  exact = maps.swapaxes(-2, -3)
  for axis, (old, new) in enumerate(zip(native, (*depth, h, w))):
    if old != new or not depth:
      exact = np.moveaxis(np.tensordot(matrix(old, new, new + 0.1), exact, (1, axis)), 0, axis)
  np.testing.assert_allclose(exact, theirs, rtol=0, atol=1e-5)

  def grid(maps):
    flat = np.concatenate([table[:, :1], maps.reshape(1, -1, maps.shape[-1])], 1)
    return layers.resize_positions(jnp.asarray(flat), native, (*depth, h, w), True)[0, 1:].reshape(theirs.shape)
  error = lambda ours: np.sqrt(((ours - theirs)**2).mean() / (theirs**2).mean())
  assert error(grid(maps.swapaxes(-2, -3))) < 0.1 < 1 < error(grid(maps))


def test_what_the_released_code_cannot_do_is_said():
  tables = {n: jnp.zeros((1, 1 + np.prod(n), 2)) for n in ((4, 4), (4, 4, 4), (4, 4, 6))}
  for native, grid, cls_token, fault in [((4, 4), (6, 6), False, 'the decoder'),
                                         ((4, 4, 4), (8, 6, 6), True, 'another depth'),
                                         ((4, 4, 6), (4, 6, 6), True, 'not square')]:
    with pytest.raises(ValueError, match=f"pos_interp='reference' cannot interpolate .*{fault}"):
      reference.resize_positions(tables[native], native, grid, cls_token)
  assert reference.resize_positions(tables[4, 4, 4], (4, 4, 4), (16, 2, 2), True) is tables[4, 4, 4]    # as released


def test_the_model_says_so_too():
  model = MiTPlus(**TINY, pos_interp='reference')
  params = jax.eval_shape(lambda: models.init_params(model, jax.random.key(0)))
  run = lambda size, decode: jax.eval_shape(
      lambda p, x: model.apply({'params': p}, x, decode=decode), params, jax.ShapeDtypeStruct(size, 'float32'))
  assert run((1, 96, 64, 3), False).embedding.shape == (1, 40)
  for size, decode in [((1, 96, 64, 3), True), ((1, 32, 64, 64, 1), False)]:
    with pytest.raises(ValueError, match="pos_interp='grid'"):
      run(size, decode)


@pytest.mark.parametrize('size', [(1, 64, 64, 3), (1, 16, 64, 64, 1)])
def test_at_its_native_size_nothing_is_interpolated(size):
  """Both ways of interpolation trace to one and the same program there."""
  programs = set()
  for name in ('grid', 'reference'):
    model = MiTPlus(**TINY, pos_interp=name)
    params = jax.eval_shape(lambda m=model: models.init_params(m, jax.random.key(0)))
    programs.add(str(jax.make_jaxpr(lambda p, x, m=model: m.apply({'params': p}, x))(
        params, jax.ShapeDtypeStruct(size, 'float32'))))
  assert len(programs) == 1


def test_flat_zoom(fixtures):
  """The released fine-tuning code stretches a table along its tokens, class token and all: written out here only."""
  stored = np.load(fixtures / 'parity' / 'data_ops.npz')
  tokens, out = stored['zoom/in'], stored['zoom/out_145']
  at = np.linspace(0, len(tokens) - 1, len(out))
  np.testing.assert_allclose(np.stack([np.interp(at, np.arange(len(tokens)), c) for c in tokens.T], 1), out, atol=1e-5)

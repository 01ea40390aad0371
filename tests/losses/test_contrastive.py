"""InfoNCE, SigLIP and NT-Xent against sums written out in numpy, reference gradients, and their own sharded forms."""
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from unimiss_jax.losses import contrastive, ring

RNG = np.random.default_rng(0)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_nt_xent_written_out():
  z = RNG.standard_normal((2, 5, 8))
  flat, terms = unit(z.reshape(10, 8)), []
  for i in range(10):
    scores = np.exp(flat @ flat[i] / 0.2)
    terms.append(-np.log(scores[(i + 5) % 10] / (scores.sum() - scores[i])))
  np.testing.assert_allclose(contrastive.nt_xent(z.astype(np.float32), 0.2), np.mean(terms), rtol=1e-5)


def test_chance_levels():
  same = np.ones((2, 8, 4), np.float32)
  np.testing.assert_allclose(contrastive.nt_xent(same, 0.2), np.log(15), rtol=1e-6)
  np.testing.assert_allclose(contrastive.info_nce(same[0], same[1], 1.), np.log(8), rtol=1e-6)


def test_gradients_are_finite_when_a_projection_is_zero():
  z = np.zeros((2, 4, 3), np.float32)
  assert np.isfinite(jax.grad(lambda z: contrastive.nt_xent(contrastive.standardize(z.reshape(8, 3)).reshape(z.shape),
                                                            0.2))(z)).all()


def info_nce_numpy(image, text, log_scale, valid, positive):
  """Mean over both directions; the positives of a row share its mass."""
  scores, total = np.exp(log_scale) * unit(image) @ unit(text).T, 0
  for s in (scores, scores.T):
    log_p = s - np.log(np.exp(s[:, valid]).sum(1, keepdims=True))
    total += -np.mean([log_p[i, positive[i] & valid].mean() for i in np.flatnonzero(valid)])
  return total / 2


@pytest.mark.parametrize('rows', ['all', 'valid', 'reports'])
def test_info_nce_written_out(rows):
  image, text = RNG.standard_normal((2, 6, 5))
  report = np.array([0, 1, 2, 0, 4, 1])
  valid = np.array([1, 1, 0, 1, 1, 1], bool) if rows == 'valid' else np.ones(6, bool)
  positive = report[:, None] == report if rows == 'reports' else np.eye(6, dtype=bool)
  options = {'all': {}, 'valid': {'valid': valid}, 'reports': {'report_id': report}}[rows]
  value = contrastive.info_nce(image.astype(np.float32), text.astype(np.float32), 1.5, **options)
  np.testing.assert_allclose(value, info_nce_numpy(image, text, 1.5, valid, positive), rtol=1e-5)


CASES = {'infonce': (), 'infonce_valid': ('valid',), 'multipos': ('report_id',), 'siglip': ()}


@pytest.fixture(scope='module')
def reference(fixtures):
  return np.load(fixtures / 'unimedi' / 'contrastive.npz')


def loss_of(case, form=contrastive, **more):
  """(inputs, loss of them, names of the gradients by input) of a case of the reference."""
  if case == 'siglip':
    return (np.log(10.), -10.), lambda i, t, s, b, **o: form.siglip(i, t, s, b, **o, **more), (
        'dimg', 'dtxt', 'dtprime', 'db')
  return (np.log(1 / .07),), lambda i, t, s, **o: form.info_nce(i, t, s, **o, **more), ('dimg', 'dtxt', 'dlogscale')


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('double', [False, True])
def test_losses_and_gradients_equal_the_torch_reference(reference, case, double):
  scalars, loss, names = loss_of(case)
  options = {k: reference[k] for k in CASES[case]}
  dtype, rtol = (np.float64, 1e-10) if double else (np.float32, 1e-5)
  with jax.enable_x64(double):
    given = [np.asarray(x, dtype) for x in (reference['img_raw'], reference['txt_raw'], *scalars)]
    value, grads = jax.value_and_grad(lambda *a: loss(*a, **options), argnums=tuple(range(len(given))))(*given)
  np.testing.assert_allclose(value, reference[f'{case}_loss'], rtol=rtol)
  for grad, name in zip(grads, names):
    if f'{case}_{name}' in reference:
      want = reference[f'{case}_{name}']
      np.testing.assert_allclose(grad, want, rtol=rtol, atol=rtol * abs(want).max(), err_msg=name)


def test_rows_that_are_not_valid_count_as_absent_whatever_they_hold(reference):
  """SigLIP of the valid rows alone is that of all rows with the others masked; even where those are not numbers."""
  image, text = reference['img_raw'].astype(np.float32), reference['txt_raw'].astype(np.float32)
  valid = reference['valid']
  spoiled = [np.where(valid[:, None], x, np.nan) for x in (image, text)]
  for case in ('siglip', 'infonce'):
    scalars, loss, _ = loss_of(case)
    want, of_rows = jax.value_and_grad(lambda i, loss=loss, s=scalars: loss(i, text[valid], *s))(image[valid])
    got, grad = jax.value_and_grad(lambda i, loss=loss, s=scalars: loss(i, spoiled[1], *s, valid=valid))(spoiled[0])
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(grad[valid], of_rows, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(grad[~valid], 0)
    empty, grad = jax.value_and_grad(lambda i, loss=loss, s=scalars: loss(i, text, *s, valid=np.zeros(12, bool)))(image)
    assert empty == 0 and not np.asarray(grad).any()


@pytest.mark.parametrize('form', ['gathered', 'ring'])
@pytest.mark.parametrize('devices', [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 6))])
def test_losses_over_devices_are_the_global_ones(reference, devices, form):
  """Loss and gradients equal the unsharded ones: negatives are global, no gradient is lost on the way."""
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  order = np.random.default_rng(devices).permutation(12)      # rows may lie on any device
  rows = {k: reference[k][order] for k in ('img_raw', 'txt_raw', 'valid', 'report_id')}

  def gradients(case):
    scalars, loss, _ = loss_of(case, ring if form == 'ring' else contrastive, axis_name='data')
    local = lambda r, *s: loss(r['img_raw'], r['txt_raw'], *s, **{k: r[k] for k in CASES[case]})
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec('data'), *[PartitionSpec()] * len(scalars)),
                            out_specs=PartitionSpec())
    given = rows['img_raw'], rows['txt_raw'], *scalars
    return jax.value_and_grad(lambda i, t, *s: sharded(rows | {'img_raw': i, 'txt_raw': t}, *s),
                              argnums=tuple(range(len(given))))(*given)
  with jax.enable_x64(True):
    found = jax.jit(lambda: {case: gradients(case) for case in CASES})()
  for case, (value, grads) in found.items():
    np.testing.assert_allclose(value, reference[f'{case}_loss'], rtol=1e-10)
    for grad, name in zip(grads, loss_of(case)[2]):
      if f'{case}_{name}' in reference:
        want = reference[f'{case}_{name}']
        np.testing.assert_allclose(grad, want[order] if want.ndim else want, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize('case', ['infonce', pytest.param('siglip', marks=pytest.mark.slow)])
def test_no_device_of_a_ring_holds_all_logits_of_its_rows(case):
  """Compiled shapes: blocks of [rows a device, rows a device], where the gathered form has [rows a device, rows]."""
  n, devices = 60, 4
  mesh = jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
  scalars = loss_of(case)[0]

  def shapes(form):
    _, loss, _ = loss_of(case, form, axis_name='data')
    f = jax.shard_map(lambda i, t: loss(i, t, *scalars), mesh=mesh, in_specs=PartitionSpec('data'),
                      out_specs=PartitionSpec())
    x = jax.ShapeDtypeStruct((n, 3), np.float32)
    text = jax.jit(jax.grad(f, (0, 1))).lower(x, x).compile().as_text()
    return {tuple(map(int, s.split(','))) for s in re.findall(r'f32\[([\d,]+)\]', text)}
  full, of_ring = shapes(contrastive), shapes(ring)
  assert any(sorted(s) == [n // devices, n] for s in full)
  assert any(sorted(s) == [n // devices] * 2 for s in of_ring)
  assert max(np.prod(s) for s in of_ring) <= (n // devices)**2


def test_standardize():
  z = RNG.standard_normal((16, 4)).astype(np.float32) * [1, 10, .1, 3] + [0, 5, -2, 100]
  y = np.asarray(contrastive.standardize(z.astype(np.float32)))
  np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(0), 1, atol=1e-4)


def test_gap_is_how_much_nearer_pairs_are_than_others():
  a, b = np.random.default_rng(5).normal(size=(2, 7, 4))
  unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
  cosines = unit(a) @ unit(b).T
  others = cosines[~np.eye(7, dtype=bool)].mean()
  np.testing.assert_allclose(contrastive.gap(*jax.numpy.asarray((a, b))), np.trace(cosines) / 7 - others, rtol=1e-5)

"""Five successive calls of the released loss, with its temperature warm-up; losses of hidden tokens, their centre."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from unimiss_jax.losses import distillation


@pytest.fixture(scope='module')
def fixture(fixtures):
  return np.load(fixtures / 'parity' / 'plus_losses.npz')


def test_loss_gradient_and_centre(fixture):
  with jax.enable_x64(True):
    schedule = distillation.temperature_schedule(0.04, 0.07, 3, steps_per_epoch=10)
    center = fixture['0/center_before'].astype(np.float64)
    for call in range(5):
      student, teacher = (fixture[f'{call}/{k}'].astype(np.float64) for k in ('student', 'teacher'))
      temperature = schedule(10 * int(fixture[f'{call}/epoch'][0]) + 9)
      loss = lambda s, t, c=center, tau=temperature: distillation.dino_loss(
          s, t, c, student_temp=0.1, teacher_temp=tau, center_momentum=0.9)
      (value, center), grad = jax.value_and_grad(loss, has_aux=True)(student, teacher)
      np.testing.assert_allclose(value, fixture[f'{call}/loss'][0], rtol=1e-6)
      want = fixture[f'{call}/grad_student']
      np.testing.assert_allclose(grad, want, rtol=0, atol=1e-6 * abs(want).max())
      np.testing.assert_allclose(center, fixture[f'{call}/center_after'], rtol=0, atol=1e-6)


def test_stacked_and_flat_views_are_the_same_and_the_teacher_gets_no_gradient(fixture):
  student, teacher, center = fixture['1/student'], fixture['1/teacher'], fixture['1/center_before']
  loss = lambda s, t: distillation.dino_loss(
      s, t, center, student_temp=0.1, teacher_temp=0.04, center_momentum=0.9)[0]
  stacked = loss(student.reshape(2, 3, -1), teacher.reshape(2, 3, -1))
  assert stacked == loss(student, teacher)
  assert not jax.grad(loss, argnums=1)(student, teacher).any()


def test_uniform_logits_cost_ln_k():
  zeros = np.zeros((2, 3, 16), np.float32)
  value, _ = distillation.dino_loss(zeros, zeros, np.zeros((1, 16)), student_temp=0.1, teacher_temp=0.04,
                                    center_momentum=0.9)
  np.testing.assert_allclose(value, np.log(16), rtol=1e-6)


def test_temperature_schedule(fixture):
  schedule = distillation.temperature_schedule(0.04, 0.07, 3, steps_per_epoch=5)
  np.testing.assert_allclose([schedule(5 * e) for e in range(8)], fixture['temp_schedule'], rtol=1e-6)
  assert schedule(4) == schedule(0) and schedule(5) != schedule(4)
  np.testing.assert_allclose(distillation.temperature_schedule(0.04, 0.07, 0, 5)(0), 0.07, rtol=1e-6)


def test_the_mean_probability_of_slices():
  x = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
  softmax = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)
  got = distillation.mean_probability(jnp.asarray(x), .1, 1)
  assert got.shape == (3, 7)
  np.testing.assert_allclose(softmax(np.asarray(got, np.float64) / .1), softmax(x.astype(np.float64) / .1).mean(1),
                             rtol=1e-4, atol=1e-7)


# ---- one view with hidden tokens

@pytest.fixture(scope='module')
def unimedi(fixtures):
  return dict(np.load(fixtures / 'unimedi' / 'distill.npz'))


def hidden_losses(f, student_cls, student_patch, mask):
  ce = functools.partial(distillation.cross_entropy, student_temp=float(f['tau_s']))
  icl = distillation.mean_of_rows(ce(student_cls, f['teacher_cls'], f['center_cls'], teacher_temp=f['tau_t_cls']))
  each = ce(student_patch, f['teacher_patch'], f['center_patch'], teacher_temp=f['tau_t_patch'])
  return icl, distillation.mean_of_rows(distillation.mean_of_hidden(each, mask)), each


@pytest.mark.parametrize('dtype, tolerance', [(np.float32, 1e-6), (np.float64, 1e-12)])
def test_losses_of_hidden_tokens_equal_the_torch_reference(unimedi, dtype, tolerance):
  with jax.enable_x64(dtype == np.float64):
    f = {k: v.astype(dtype) if v.dtype == np.float64 else v for k, v in unimedi.items()}
    icl, pcl, each = hidden_losses(f, f['student_cls'], f['student_patch'], f['mask'])
    np.testing.assert_allclose([icl, pcl, each.mean()], [f['L_icl'], f['L_pcl_masked'], f['L_pcl_all']], rtol=tolerance)
    pooled = each[f['mask']].mean()
    assert abs(pooled - f['L_pcl_masked']) > 1
    of_both = lambda c, p: sum(hidden_losses(f, c, p, f['mask'])[:2])
    for got, name in zip(jax.grad(of_both, (0, 1))(f['student_cls'], f['student_patch']),
                         ('d_student_cls', 'd_student_patch')):
      np.testing.assert_allclose(got, f[name], rtol=0, atol=tolerance)
    for name in ('cls', 'patch'):
      teacher = f[f'teacher_{name}']
      want, momentum = f[f'new_center_{name}'], float(f['center_momentum'])
      for parts in ([teacher], [teacher[:1], teacher[1:]]):
        got = distillation.moved_center(f[f'center_{name}'], parts, momentum)
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
      padded = np.concatenate([teacher, np.full_like(teacher[:2], 1e3)])
      got = distillation.moved_center(f[f'center_{name}'], [padded], momentum, [np.arange(6) < 4])
      np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)


def test_no_hidden_token_is_no_loss_and_no_gradient(unimedi):
  f = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in unimedi.items()}
  value, grad = jax.value_and_grad(lambda p: hidden_losses(f, f['student_cls'], p, np.zeros((4, 9), bool))[1])(
      f['student_patch'])
  assert value == 0
  np.testing.assert_array_equal(grad, 0)


def test_no_gradient_reaches_the_teacher(unimedi):
  f = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in unimedi.items()}
  grad = jax.grad(lambda t: distillation.cross_entropy(f['student_cls'], t, f['center_cls'], .1, .04).sum())
  np.testing.assert_array_equal(grad(f['teacher_cls']), 0)


def test_the_centre_over_devices_is_the_global_one(unimedi):
  teacher = unimedi['teacher_patch'].astype(np.float32)
  mesh = jax.make_mesh((4,), ('data',), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
  x = jax.device_put(teacher, NamedSharding(mesh, PartitionSpec('data')))
  got = jax.jit(lambda x: distillation.moved_center(unimedi['center_patch'].astype(np.float32), [x], .9))(x)
  np.testing.assert_allclose(got, unimedi['new_center_patch'], rtol=0, atol=1e-6)

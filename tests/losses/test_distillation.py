"""Five successive calls of the released loss, with its temperature warm-up."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

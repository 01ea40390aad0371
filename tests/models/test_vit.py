"""The ViT: what its sequences hold and what each token depends on; class rows against the whole attention."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimiss_jax import models
from unimiss_jax.models import layers, slices
from unimiss_jax.models.vit import ViT, class_rows
from unimiss_jax.optim import decays, named_leaves

RNG = np.random.default_rng(0)
TINY = dict(embed_dims=(16,), depths=(2,), num_heads=(2,), patch=8, patch_depth=2, image_size=16,
            volume_size=(16, 16, 16))
VOLUME = RNG.standard_normal((2, 16, 16, 16, 1)).astype(np.float32)      # 8 planes of 4 tokens
IMAGE = RNG.standard_normal((2, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope='module')
def vit():
  model = ViT(**TINY)
  params = jax.tree.map(lambda x: 8 * x if x.ndim > 1 else x, models.init_params(model, jax.random.key(0)))
  run = jax.jit(lambda params, given: model.apply({'params': params}, **given, method='encode'))
  return model, params, lambda params=params, **given: run(params, given)


def differ(a, b, at_least=1e-3):
  return np.abs(np.asarray(a) - np.asarray(b)).max() > at_least


def test_a_sequence_has_its_tokens_and_one_class_token(vit):
  model, params, encode = vit
  sel = np.array([[1, 5], [0, 15]])
  assert encode(image=IMAGE).patches.shape == (2, 4, 16)
  assert encode(volume=VOLUME).patches.shape == (2, 32, 16)
  assert encode(volume=VOLUME, slices=sel).patches.shape == (2, 32 + 2 * 4, 16)
  _, rows = class_rows(model, params, volume=VOLUME, slices=sel)
  assert rows.shape == (2, 2, 2, 1 + 32 + 2 * 4)


def test_a_volume_is_seen_whole_and_through_its_chosen_slices(vit):
  _, _, encode = vit
  sel = np.array([[1, 5], [0, 15]])
  base = encode(volume=VOLUME, slices=sel).cls
  other = VOLUME.copy()
  other[:, 9] += RNG.standard_normal((2, 16, 16, 1))                       # a slice that is not chosen
  assert differ(encode(volume=other, slices=sel).cls, base)
  assert differ(encode(volume=VOLUME, slices=np.array([[1, 6], [1, 15]])).cls, base)
  assert differ(encode(volume=VOLUME).cls, base)
  swapped = encode(volume=VOLUME, slices=sel[:, ::-1])                     # a set: order does not matter
  np.testing.assert_allclose(swapped.cls, base, atol=1e-5)


def test_an_image_does_not_depend_on_what_is_of_volumes(vit):
  _, params, encode = vit
  spoiled = jax.tree_util.tree_map_with_path(
      lambda path, x: x * np.nan if '3D' in jax.tree_util.keystr(path) else x, params)
  np.testing.assert_array_equal(encode(spoiled, image=IMAGE).cls, encode(image=IMAGE).cls)
  assert np.isnan(encode(spoiled, volume=VOLUME).cls).all()


def test_a_chosen_slice_has_the_depth_of_its_plane(vit):
  """Without blocks that mix, its tokens are those of an image plus the depth embedding of the plane."""
  _, params, _ = vit
  model = ViT(**TINY | {'depths': (0,)})
  plain = {'transformer': {k: v for k, v in params['transformer'].items() if 'block' not in k}}
  tree = plain['transformer']
  tree['final_norm'] = {'scale': jnp.ones(16), 'bias': jnp.zeros(16)}
  sel = np.array([[1, 5], [0, 15]])
  got = model.apply({'params': plain}, volume=VOLUME, slices=sel, method='encode').patches[:, 32:].reshape(2, 2, 4, 16)
  cut = np.stack([VOLUME[b, sel[b]] for b in range(2)])                    # [B, k, H, W, 1]
  patches = cut.reshape(2, 2, 2, 8, 2, 8, 1).transpose(0, 1, 2, 4, 3, 5, 6).repeat(3, -1).reshape(2, 2, 4, -1)
  kernel = np.asarray(tree['patch_embed2D']['kernel']).reshape(-1, 16)
  want = (patches @ kernel + tree['plane_table'][0] + tree['modality_table'][0, 0]
          + np.asarray(tree['depth_table3D'])[0][sel // 2][:, :, None])
  want = (want - want.mean(-1, keepdims=True)) / np.sqrt(want.var(-1, keepdims=True) + 1e-6)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_hidden_token_shows_its_place_and_nothing_else(vit):
  _, _, encode = vit
  hidden = np.zeros((2, 32), bool)
  hidden[:, 3] = True                                                      # plane 0: slices 0 and 1, lower right
  other = VOLUME.copy()
  other[:, :2, 8:, 8:] = 7
  np.testing.assert_array_equal(*(encode(volume=v, hidden=hidden).cls for v in (VOLUME, other)))
  moved = np.roll(hidden, 1, axis=1)
  zero = np.zeros_like(VOLUME)
  assert differ(encode(volume=zero, hidden=hidden).cls, encode(volume=zero, hidden=moved).cls)


def test_class_rows_are_those_of_the_whole_attention(vit):
  """Recomputed from queries and keys of every token; and the ordinary result does not change."""
  model, params, encode = vit
  out, rows = class_rows(model, params, volume=VOLUME)
  np.testing.assert_allclose(out.cls, encode(volume=VOLUME).cls, atol=1e-5)
  _, kept = model.apply({'params': params}, volume=VOLUME, method='encode', capture_intermediates=True)
  seen = kept['intermediates']['transformer']
  for i in range(2):
    attn = params['transformer'][f'block1_{i}']['attn']
    x = np.asarray(seen[f'block1_{i}']['norm1']['__call__'][0], np.float64)
    q = (x @ attn['q']['kernel'] + attn['q']['bias']).reshape(2, 33, 2, 8)
    k = (x @ attn['kv']['kernel'] + attn['kv']['bias'])[..., :16].reshape(2, 33, 2, 8)
    scores = np.einsum('bqhd,bkhd->bhqk', q, k) / 8**.5
    full = np.exp(scores - scores.max(-1, keepdims=True))
    np.testing.assert_allclose(rows[:, i], (full / full.sum(-1, keepdims=True))[:, :, 0], atol=1e-6)


def test_the_score_of_a_plane_depends_on_the_others(vit):
  model, params, _ = vit
  score = lambda v: np.asarray(slices.scores(class_rows(model, params, volume=v)[1], 8)[1])
  other = VOLUME.copy()
  other[:, 14:] *= 3                                                       # plane 7
  assert np.abs(score(VOLUME) - score(other))[:, :7].max(1).min() > 1e-5


def test_contract_of_a_backbone(vit):
  model, params, encode = vit
  out = model.apply({'params': params}, IMAGE, decode=True)
  assert out.reconstruction is None and out.pyramid[0].shape == (2, 2, 2, 16)
  np.testing.assert_allclose(out.embedding, encode(image=IMAGE).cls, atol=1e-5)
  out = model.apply({'params': params}, VOLUME)
  assert out.pyramid[0].shape == (2, 8, 2, 2, 16) and out.embedding.shape == (2, 16)
  with pytest.raises(ValueError, match=r'\(8, 8\); the nearest valid size is \(16, 24\)'):
    model.apply({'params': params}, np.zeros((1, 17, 25, 3)))
  with pytest.raises(ValueError, match='has 1 channels: expected 3'):
    model.apply({'params': params}, np.zeros((1, 16, 16, 1)))


def test_other_sizes_interpolate_the_tables(vit):
  _, params, encode = vit
  wide = encode(volume=np.zeros((1, 8, 24, 16, 1), np.float32))
  assert wide.patches.shape == (1, 4 * 3 * 2, 16)
  table = params['transformer']['depth_table3D']
  np.testing.assert_allclose(layers.resize_positions(table, (8,), (4,), False)[0],
                             np.asarray(table)[0].reshape(4, 2, 16).mean(1), atol=1e-5)


@pytest.mark.parametrize('name, count', [('vit_b16', 86.6e6), ('vit_tiny', 5.7e6)])
def test_sizes_are_those_of_the_field(name, count):
  """Without their classifier of 1,000 classes; tables and tokens do not decay."""
  model = models.build({'name': name})
  shapes = {'/'.join(path): x for path, x in models.param_shapes(model).items()}
  both = sum(x.size for n, x in shapes.items() if '3D' not in n and 'mask_token' not in n)
  width = model.embed_dims[0]
  blocks = 12 * (12 * width**2 + 13 * width)
  want = blocks + 2 * width + (3 * 256 + 1) * width + (196 + 1 + 2) * width      # norm, tokenizer, places and tokens
  assert both == want and abs(both - (count - 1001 * width)) < .02 * count
  assert {n for n, x in shapes.items() if x.ndim > 1 and not decays(n, x, 'tokens')} == {
      f'transformer/{n}' for n in ('plane_table', 'depth_table3D', 'modality_table', 'class_token', 'mask_token')}


@pytest.mark.slow
def test_recomputing_blocks_changes_no_gradient(vit):
  _, params, _ = vit

  def grads(remat):
    model = ViT(**TINY | {'depths': (1,)}, remat=remat)
    return jax.jit(jax.grad(lambda p: (model.apply({'params': p}, IMAGE).embedding**2).sum()))(params)
  for name, x in named_leaves(grads('')).items():
    np.testing.assert_allclose(named_leaves(grads('blocks'))[name], x, rtol=1e-4, atol=1e-4, err_msg=name)

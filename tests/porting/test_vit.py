"""An image ViT in PyTorch, written out here, against ours with its weights."""
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import unflatten_dict

from unimiss_jax import models
from unimiss_jax.models.vit import ViT
from unimiss_jax.porting import PortingError, vit

WIDTH, DEPTH, HEADS, PATCH, GRID = 12, 2, 3, 4, 3
MODEL = ViT(embed_dims=(WIDTH,), depths=(DEPTH,), num_heads=(HEADS,), mlp_ratio=2, patch=PATCH, patch_depth=2,
            image_size=PATCH * GRID, volume_size=(4, 12, 12))
RNG = np.random.default_rng(0)


def weights():
  shapes = {'cls_token': (1, 1, WIDTH), 'pos_embed': (1, 1 + GRID**2, WIDTH), 'patch_embed.proj.bias': (WIDTH,),
            'patch_embed.proj.weight': (WIDTH, 3, PATCH, PATCH), 'norm.weight': (WIDTH,), 'norm.bias': (WIDTH,),
            'head.weight': (5, WIDTH), 'head.bias': (5,)}
  for i in range(DEPTH):
    for name, (a, b) in {'attn.qkv': (3, 1), 'attn.proj': (1, 1), 'mlp.fc1': (2, 1), 'mlp.fc2': (1, 2)}.items():
      shapes |= {f'blocks.{i}.{name}.weight': (a * WIDTH, b * WIDTH), f'blocks.{i}.{name}.bias': (a * WIDTH,)}
    shapes |= {f'blocks.{i}.norm{k}.{end}': (WIDTH,) for k in (1, 2) for end in ('weight', 'bias')}
  return {n: RNG.normal(0, .3, s).astype(np.float32) for n, s in shapes.items()}


def torch_vit(w, image):
  """[B, 3, H, W] -> [B, 1 + N, C] behind the last norm."""
  import torch
  from torch.nn import functional as F
  w = {n: torch.from_numpy(x).double() for n, x in w.items()}
  norm = lambda x, n: F.layer_norm(x, (WIDTH,), w[f'{n}.weight'], w[f'{n}.bias'], 1e-6)
  linear = lambda x, n: F.linear(x, w[f'{n}.weight'], w[f'{n}.bias'])
  x = F.conv2d(torch.from_numpy(image).double(), w['patch_embed.proj.weight'], w['patch_embed.proj.bias'], PATCH)
  x = torch.cat([w['cls_token'].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + w['pos_embed']
  for i in range(DEPTH):
    b = f'blocks.{i}'
    q, k, v = linear(norm(x, f'{b}.norm1'), f'{b}.attn.qkv').reshape(
        *x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
    x = x + linear(y, f'{b}.attn.proj')
    x = x + linear(F.gelu(linear(norm(x, f'{b}.norm2'), f'{b}.mlp.fc1')), f'{b}.mlp.fc2')
  return norm(x, 'norm').numpy()


@pytest.fixture(scope='module')
def given(tmp_path_factory):
  path, w = tmp_path_factory.mktemp('vit') / 'vit.safetensors', weights()
  safetensors.numpy.save_file(w, path)
  return path, w


def filled(path):
  """Parameters of MODEL from a file; what an image ViT lacks is 0."""
  shapes, found = {'/'.join(at): x.shape for at, x in models.param_shapes(MODEL).items()}, vit.read(path, MODEL)
  assert set(shapes) - set(found) == {'transformer/depth_table3D', 'transformer/mask_token'}
  assert {n: x.shape for n, x in found.items()} == {n: shapes[n] for n in found}
  flat = {n: jnp.zeros(s) for n, s in shapes.items()} | found
  return unflatten_dict({tuple(n.split('/')): x for n, x in flat.items()})


def test_images_are_seen_as_pytorch_sees_them(given):
  pytest.importorskip('torch')
  path, w = given
  image = RNG.random((2, 12, 12, 3)).astype(np.float32)
  want = torch_vit(w, 2 * image.transpose(0, 3, 1, 2) - 1)      # images come in [0, 1]
  out = MODEL.apply({'params': filled(path)}, image=image, method='encode')
  np.testing.assert_allclose(out.cls, want[:, 0], rtol=0, atol=1e-5)
  np.testing.assert_allclose(out.patches, want[:, 1:], rtol=0, atol=1e-5)


def test_a_volume_of_equal_slices_gets_the_tokens_of_its_slice(given):
  """The modality of both is 0, and so is the depth here."""
  params = filled(given[0])
  one = RNG.random((1, 12, 12)).astype(np.float32)
  volume = np.broadcast_to(one[:, None, :, :, None], (1, 4, 12, 12, 1))
  image = np.repeat(one[..., None], 3, -1)
  kernel = {n: np.asarray(params['transformer'][f'patch_embed{n}D']['kernel']).reshape(-1, WIDTH) for n in (2, 3)}
  of_image = image[0, :4, :4].reshape(-1) @ kernel[2]
  of_volume = volume[0, :2, :4, :4].reshape(-1) @ kernel[3]
  np.testing.assert_allclose(of_volume, of_image, atol=1e-5)


def test_positions_of_another_size_are_interpolated(given):
  larger = MODEL.clone(image_size=24)
  assert vit.read(given[0], larger)['transformer/plane_table'].shape == (1, 36, WIDTH)


@pytest.mark.parametrize('change, what', [
    (lambda w: w.pop('blocks.1.attn.qkv.bias'), '1 missing: blocks.1.attn.qkv.bias'),
    (lambda w: w.update({'dist_token': w['cls_token']}), '1 unexpected: dist_token'),
    (lambda w: w.update({'norm.bias': w['norm.bias'][:-1]}), r'1 mis-shaped: norm.bias \(11,\), expected \(12,\)')])
def test_other_architectures_are_named(given, tmp_path, change, what):
  w = dict(given[1])
  change(w)
  safetensors.numpy.save_file(w, tmp_path / 'w.safetensors')
  with pytest.raises(PortingError, match=what):
    vit.read(tmp_path / 'w.safetensors', MODEL)

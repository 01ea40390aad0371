"""Position tables of other sizes: on the grid, and as the released code stretches them."""
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from unimiss_jax import models
from unimiss_jax.models.mit import MiTPlus
from unimiss_jax.porting import PortingError, positions, reference

ARCH = dict(embed_dims=(4, 4, 8, 8, 16, 16), depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), decoder_dims=(16, 8, 8, 4, 4),
            image_size=64, volume_size=(16, 32, 32))
LARGER = dict(ARCH, image_size=128, volume_size=(32, 96, 64))


def test_flat_zoom_is_the_released_stretch(fixtures):
  data = np.load(fixtures / 'parity' / 'data_ops.npz')
  ours = reference.resize_table(data['zoom/in'][None], (6, 6), (12, 12), True)[0]
  np.testing.assert_allclose(ours, data['zoom/out_145'], rtol=0, atol=1e-5)


def ramps(arch):
  """Parameters whose position tables hold the places of their tokens as a share of the axis; class slots hold 7."""
  module = MiTPlus(**arch)
  leaves = {path: np.zeros(leaf.shape, np.float32) for path, leaf in models.param_shapes(module).items()}
  for path, (grid, cls_token) in positions.tables(module).items():
    places = np.stack(np.meshgrid(*((np.arange(n) + .5) / n for n in grid), indexing='ij'), -1).reshape(-1, len(grid))
    table = leaves[path]
    table[0, int(cls_token):, :len(grid)] = places
    table[0, :int(cls_token)] = 7.
  return unflatten_dict(leaves)


def test_grid_reproduces_a_ramp_and_copies_the_class_slot():
  """Away from the edges, which are repeated: trilinear exactly, cubic (a = -0.75) within .05 of an old cell."""
  new, want = (flatten_dict(tree) for tree in (positions.resize(ramps(ARCH), ARCH, LARGER), ramps(LARGER)))
  old = positions.tables(MiTPlus(**ARCH))
  seen = 0
  for path, (grid, cls_token) in positions.tables(MiTPlus(**LARGER)).items():
    first, n = int(cls_token), len(grid)
    got, ramp = new[path][0], want[path][0]
    assert got.shape == ramp.shape and got.dtype == np.float32
    np.testing.assert_array_equal(got[:first], np.full_like(got[:first], 7.))
    places, margin = ramp[first:, :n], np.where(n == 2, 1.51, .51) / old[path][0]
    inner = np.all((places > margin) & (places < 1 - margin), 1)
    seen += inner.any()
    limit = .05 / min(old[path][0]) if n == 2 else 1e-6
    np.testing.assert_allclose(got[first:][inner, :n], places[inner], rtol=0, atol=limit)
  assert seen > 6


def test_grid_in_the_plane_is_pytorchs_bicubic():
  torch = pytest.importorskip('torch')
  maps = np.random.default_rng(0).standard_normal((1, 6, 5, 7))
  table = np.concatenate([np.zeros((1, 1, 6)), maps.reshape(1, 6, 35).swapaxes(1, 2)], 1)
  ours = positions.resize_table(table, (5, 7), (9, 4), True)
  theirs = torch.nn.functional.interpolate(torch.from_numpy(maps), (9, 4), mode='bicubic', align_corners=False)
  np.testing.assert_allclose(ours[0, 1:].T.reshape(6, 9, 4), theirs[0].numpy(), rtol=0, atol=1e-5)


def test_tables_of_the_right_size_are_untouched():
  tree = ramps(ARCH)
  same = flatten_dict(positions.resize(tree, ARCH, dict(ARCH, volume_size=(16, 64, 32))))
  for path, leaf in flatten_dict(tree).items():
    assert (same[path] is leaf) == ('PosEmbed3D' not in path[-1] and 'pos_embed3D' not in path[-1])


def test_an_unknown_way():
  with pytest.raises(PortingError, match="pos_resize='zoom': known are grid, flat_zoom"):
    positions.resize(ramps(ARCH), ARCH, LARGER, 'zoom')


def test_a_network_without_a_class_token_takes_the_rest_of_each_table():
  old = dict(image_size=64, volume_size=(16, 64, 64))
  table = np.random.default_rng(0).normal(size=(1, 1 + 256, 8)).astype(np.float32)      # s1 of 64 x 64: 16 x 16
  tree = {'transformer': {'pos_embed2D1': table}}
  got = positions.resize(tree, old, old | {'cls_token': False})['transformer']['pos_embed2D1']
  np.testing.assert_allclose(got, table[:, 1:], atol=1e-6)
  flat = positions.resize(tree, old, old | {'cls_token': False}, 'flat_zoom')['transformer']['pos_embed2D1']
  assert flat.shape == (1, 256, 8) and np.abs(flat - table[:, 1:]).max() > .1      # the slot is stretched in
  same = positions.resize({'transformer': {'pos_embed2D1': table[:, 1:]}}, old | {'cls_token': False}, old)
  assert same['transformer']['pos_embed2D1'].shape == (1, 256, 8)                  # nothing makes up a class slot


def test_tables_of_a_vit():
  """The plane by cubic, the depth by linear interpolation; tokens stay."""
  old = dict(embed_dims=(4,), num_heads=(1,), patch=8, patch_depth=2, image_size=16, volume_size=(8, 16, 16))
  tree = {'transformer': {'plane_table': np.arange(16.).reshape(1, 4, 4), 'class_token': np.ones((1, 1, 4)),
                          'depth_table3D': np.arange(4.)[None, :, None] * np.ones(4)}}
  got = positions.resize(tree, old, old | {'image_size': 24, 'volume_size': (16, 24, 24)})['transformer']
  assert got['plane_table'].shape == (1, 9, 4) and got['class_token'] is tree['transformer']['class_token']
  np.testing.assert_allclose(got['plane_table'].reshape(3, 3, 4)[1, 1], tree['transformer']['plane_table'][0].mean(0),
                             atol=1e-5)
  np.testing.assert_allclose(got['depth_table3D'][0, :, 0], [0, .25, .75, 1.25, 1.75, 2.25, 2.75, 3], atol=1e-6)

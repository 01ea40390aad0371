"""Views that the device makes (data.place='device'): what the host ships for them, and their part of the step.

The host draws the same numbers as ever and ships them beside the record: whole where DRR are made of it, else the part
that the two crops see. Arrays get one static shape: what is smaller lies at the start of the axes and carries its true
shape. `finish` makes the views with the functions that the host uses (sample.py); its results are those of the host but
for rounding, and for the noise, of which each has its own of one law.
"""
import numpy as np

from data_pipelines import draw, sample, sources
from data_pipelines.errors import DataError

KEPT = 'id', 'group', 'rng', 'bad'                       # fields of a row that no view is made of
FULL_RANGE = np.uint16(257)                              # of 8 bits to that of 16, exactly
LEAVES = {'volume': 'ct', 'whole': 'whole', 'image': 'xray'}      # array -> its leaf of data.device_shape


def frame(name: str, config, source) -> dict:
  """{array: static shape of its spatial axes} of stream `name`.

  A leaf of data.device_shape, or what the largest record of the source needs.

  Raises:
    DataError: DEVICE_SHAPE; a leaf is too small, or 0 while the source does not know the sizes of its records.
  """
  out, known = {}, source.largest
  for array in ('image',) if name == 'xray' else ('volume', 'whole') if _whole(config) else ('volume',):
    leaf, needed = LEAVES[array], known.get(array)
    given = tuple(config.data.device_shape[leaf])
    if needed is None and 0 in given:
      raise DataError('DEVICE_SHAPE', f'data.{name}', 'data.place=device needs one shape for all records, and nothing '
                      'says how large they are before they are read',
                      f'set data.device_shape.{leaf} to a shape that holds the largest, or data.place=host')
    if needed is not None and array == 'volume' and not _tile(config):
      needed = draw.reach(config.views.ct, needed)
    if needed is not None and any(g and g < n for g, n in zip(given, needed)):
      raise DataError('DEVICE_SHAPE', f'data.{name}', f'data.device_shape.{leaf}={given}, but the largest record needs '
                      f'{tuple(needed)}', 'give it that shape, or 0 for what is needed')
    out[array] = tuple(g or n for g, n in zip(given, needed or given))
  return out


def raw(name: str, record: dict, config, rng, shapes: dict) -> dict:
  """What is shipped for two random views of a record: flat {field: array}, drawn numbers as 'group/name'.

  Args:
    name: of the stream.
    record: as of `sample.ct_sample` or `sample.xray_sample`.
    config: the run config.
    rng: np.random.Generator; what is drawn is what `streams.views` draws.
    shapes: as `frame` gives them.

  Raises:
    DataError: DEVICE_SHAPE; the record is larger than its frame.
  """
  if name == 'xray':
    params = draw.xray_pair(rng, config, record['image'].shape)
    low, image = _seen(record['image'], {k: np.concatenate([p[k] for p in params.values()])
                                         for k in ('box_start', 'box_size')})
    image = image if image.dtype == np.uint16 else image.astype(np.uint16) * FULL_RANGE
    out = {'image': _filled(image, 'image', shapes)}
    for group in params:
      out |= _flat(params, group, low)
    return out
  params = draw.ct_pair(rng, config, *sample.sizes(record))
  if not _drr(config):
    params = {'ct': params['ct']}
  low, volume = (np.zeros(3, int), record['volume']) if _tile(config) else _seen(record['volume'], params['ct'])
  out = {'volume': _filled(volume, 'volume', shapes), 'shape': np.array(volume.shape[-3:], np.int32)}
  if 'pad' in record:
    out['pad'] = np.asarray(record['pad'], np.float32)
  if _tile(config):
    out['spacing_mm'] = np.array(record['spacing_mm'], np.float32)
  if _whole(config):
    whole = record['whole']
    out |= {'whole': _filled(whole, 'whole', shapes), 'whole_shape': np.array(whole.shape, np.int32),
            'whole_spacing_mm': np.array(record['whole_spacing_mm'], np.float32)}
  for group in params:
    out |= _flat(params, group, low)
  return out


def finish(name: str, config):
  """The jittable raw batch -> batch of views of stream `name`; rows do not look at each other."""
  make = sample.xray_sample if name == 'xray' else sample.ct_sample

  def one(row):
    record, params = {}, {}
    for field, value in row.items():
      group, _, number = field.rpartition('/')
      (params.setdefault(group, {}) if group else record)[number] = value
    return make(record, params, config) | {field: row[field] for field in KEPT}

  def batch(rows):
    import jax  # late: a data worker has no use for it
    with jax.default_matmul_precision('highest'):      # crops are matrix products, which accelerators shorten
      return jax.vmap(one)(rows)
  return batch


def _drr(config) -> bool:
  return config.data.modality == 'ct' and sample.needs_drr(config)


def _whole(config) -> bool:
  """Whether DRR are made of the whole scan."""
  return _drr(config) and sources.needs_whole(config)


def _tile(config) -> bool:
  """Whether DRR are made of the tile: then all of it is needed."""
  return _drr(config) and not sources.needs_whole(config)


def _seen(array, params) -> tuple:
  """(first voxel, part) of the last axes of an array which the boxes of all views see."""
  start, size = params['box_start'], params['box_size']
  shape = array.shape[-start.shape[1]:]
  low = np.clip(np.floor(start.min(0)), 0, shape).astype(int)
  high = np.clip(np.ceil((start + size).max(0)), low, shape).astype(int)
  return low, array[(..., *map(slice, low, high))]


def _filled(array, name: str, shapes: dict):
  """The array in its frame. What fills up is a value of the array: its range stays."""
  shape = array.shape[:-len(shapes[name])] + shapes[name]
  if array.shape == shape:
    return array
  if any(n > m for n, m in zip(array.shape, shape)):
    raise DataError('DEVICE_SHAPE', f'a record with {name} {array.shape}', f'is larger than {shape}',
                    f'set data.device_shape.{LEAVES[name]} to a shape that holds the largest, and go on with '
                    '--resume=force')
  out = np.full(shape, array.flat[0] if array.size else 0, array.dtype)
  out[tuple(map(slice, array.shape))] = array
  return out


def _flat(params, group: str, low) -> dict:
  """Parameters of a group as fields of a row, boxes counted from voxel `low`."""
  of = params[group] | ({'box_start': params[group]['box_start'] - low} if 'box_start' in params[group] else {})
  return {f'{group}/{k}': v.astype(np.float32) if v.dtype.kind == 'f' else v for k, v in of.items()}

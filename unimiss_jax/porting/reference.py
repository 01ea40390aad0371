"""How the released downstream code brings position tables to another size."""
import numpy as np
from scipy import ndimage


def resize_table(table, native, grid, cls_token: bool) -> np.ndarray:
  """The whole token axis stretched as one line, class slot included: rows and planes mix (specification: order 1).

  Args:
    table: [1, N, C].
    native: not used.
    grid: wanted grid.
    cls_token: whether the result has a class slot.

  Returns:
    [1, prod(grid) + cls_token, C].
  """
  tokens = int(np.prod(grid)) + int(cls_token)
  wide = table[0].astype(np.promote_types(table.dtype, np.float32))
  return ndimage.zoom(wide, (tokens / len(wide), 1), order=1)[None]

"""DICOM files for the tests, written by pydicom."""
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

CT, ENHANCED_CT, CR = '1.2.840.10008.5.1.4.1.1.2', '1.2.840.10008.5.1.4.1.1.2.1', '1.2.840.10008.5.1.4.1.1.1'
AXIAL = (1, 0, 0, 0, 1, 0)


def dataset(pixels, kind='CT', **tags):
  """One image; pixels [rows, columns] of the stored type. A tag set to None is left out."""
  ds = Dataset()
  ds.file_meta = FileMetaDataset()
  ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
  ds.SOPClassUID, ds.SOPInstanceUID = {'CT': CT, 'CR': CR}[kind], generate_uid()
  ds.SeriesInstanceUID, ds.StudyInstanceUID = '1.2.3', '1.2'
  ds.Modality = kind
  ds.Rows, ds.Columns = pixels.shape[-2:]
  ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, 'MONOCHROME2'
  ds.BitsAllocated = ds.BitsStored = 8 * pixels.dtype.itemsize
  ds.HighBit = ds.BitsStored - 1
  ds.PixelRepresentation = int(pixels.dtype.kind == 'i')
  if kind == 'CT':
    ds.ImageType = ['ORIGINAL', 'PRIMARY', 'AXIAL']
    ds.PixelSpacing, ds.SliceThickness = [1.5, 2.], 5.
    ds.ImageOrientationPatient, ds.ImagePositionPatient = list(AXIAL), [0, 0, 0]
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
  if pixels.ndim == 3:
    ds.NumberOfFrames = len(pixels)
  ds.PixelData = pixels.tobytes() + bytes(pixels.nbytes % 2)
  ds['PixelData'].VR = 'OW' if ds.BitsAllocated > 8 else 'OB'
  for name, value in tags.items():
    if value is None:
      delattr(ds, name)
    else:
      setattr(ds, name, value)
  return ds


def save(path, ds, syntax=None):
  """Writes a data set, as it is or in another uncompressed or lossless syntax (a pydicom UID)."""
  if syntax is None or syntax == ds.file_meta.TransferSyntaxUID:
    pass
  elif syntax.is_compressed:
    ds.compress(syntax, generate_instance_uid=False)
  else:
    if not syntax.is_little_endian:
      ds.PixelData = np.frombuffer(ds.PixelData, f'u{ds.BitsAllocated // 8}').byteswap().tobytes()
    ds.file_meta.TransferSyntaxUID = syntax
  path.parent.mkdir(parents=True, exist_ok=True)
  ds.save_as(path, enforce_file_format=True)
  return path


def bare(path, ds):
  """As files of old archives: no preamble, no meta header, implicit little-endian."""
  meta = ds.file_meta
  del ds.file_meta
  pydicom.dcmwrite(path, ds, implicit_vr=True, little_endian=True)
  ds.file_meta = meta
  return path


def turns(orientation):
  rows, columns = np.reshape(orientation, (2, 3)).astype(float)
  return rows, columns, np.cross(rows, columns)


def series(folder, pixels, *, step=3., orientation=AXIAL, start=(-30., -20., 40.), positions=None, seed=0, each=None,
           syntax=None, **tags):
  """A series in shuffled order: neither names nor instance numbers tell where a slice lies.

  Args:
    pixels: [slices, rows, columns] of the stored type.
    step: mm along the normal, or a vector; positions [slices, 3] instead, if they are not regular.
    each: {tag: one value per slice}.
    tags: for all slices.

  Returns:
    Affine [4, 4] from (column, row, slice, 1) to RAS mm.
  """
  rows, columns, normal = turns(orientation)
  step = normal * step if np.ndim(step) == 0 else np.asarray(step, float)
  if positions is None:
    positions = np.asarray(start) + np.outer(np.arange(len(pixels)), step)
  names = np.random.default_rng(seed).permutation(len(pixels))
  for k, slice_ in enumerate(pixels):
    ds = dataset(slice_, **tags)
    ds.ImageOrientationPatient = [float(f'{v:.10g}') for v in orientation]
    ds.ImagePositionPatient = [float(f'{v:.10g}') for v in positions[k]]
    ds.InstanceNumber = int(names[-1 - k]) + 1
    for name, values in (each or {}).items():
      setattr(ds, name, values[k])
    save(folder / f'IM{names[k]:04d}', ds, syntax)
  spacing = tags.get('PixelSpacing', [1.5, 2.])
  lps = np.eye(4)
  lps[:3, :3] = np.stack([rows * spacing[1], columns * spacing[0], step], 1)
  lps[:3, 3] = positions[0]
  return np.diag([-1., -1, 1, 1]) @ lps


def noise(shape=(18, 20, 17), seed=0, dtype=np.int16, low=-1024, high=2000):
  return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)

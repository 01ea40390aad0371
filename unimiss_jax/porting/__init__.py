"""Exchange of weights with the released PyTorch code."""
from unimiss_jax.porting.convert import PortingError, from_torch, infer_arch, to_torch

__all__ = ['PortingError', 'from_torch', 'infer_arch', 'to_torch']

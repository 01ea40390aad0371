"""Exchange of weights with the released PyTorch code."""
from unimiss_jax.porting.arch import infer_arch
from unimiss_jax.porting.convert import from_torch, to_torch
from unimiss_jax.porting.errors import PortingError

__all__ = ['PortingError', 'from_torch', 'infer_arch', 'to_torch']

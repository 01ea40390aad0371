"""Digitally reconstructed radiographs: slice-wise separable projection, numpy or jax, light to import."""
from unimiss_jax.drr.geometry import Detector
from unimiss_jax.drr.project import project
from unimiss_jax.drr.xray import hu_to_mu

__all__ = ['Detector', 'hu_to_mu', 'project']

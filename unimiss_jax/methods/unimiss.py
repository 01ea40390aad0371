"""UniMiSS, the pilot: self-distillation between CT volumes and their slices, and of X-rays.

CT phase      teachers see the volume v and its slices s (mean of their logits), and so do the students:
              L(s_v, t_v) + L(s_s, t_v) + L(s_s, t_s) + L(s_v, t_s)
X-ray phase   L(s, t)
(after the released code of UniMiSS, Xie et al., ECCV 2022; weights of the terms in configs/unimiss.py).
These are terms of UniMiSS+ (methods/unimiss_plus.py), which has DRR and reconstructions beside them. What differs is
the order: X-rays begin, and an epoch of a phase is one pass over its own stream.
"""
from unimiss_jax.methods import alternation, unimiss_plus
from unimiss_jax.methods.base import Method


def make(config, data) -> Method:
  return unimiss_plus.make(config, data, alternation.own)

"""Gradient surgery for alternating multimodal learning."""

from gaal_surgery.alternator import GradientAlignedAlternator
from gaal_surgery.features import FreshFeatures
from gaal_surgery.fusion import (
    CalibratedFusion,
    CalibratedGaussianFusion,
    CalibratedLabelFusion,
    fuse_gaussians,
    fuse_logits,
)
from gaal_surgery.guidance import binary_entropy, entropy, gaussian_entropy, guide_gradient, select_uncertain
from gaal_surgery.per_sample import per_sample_alignment, per_sample_gradients, per_sample_norms
from gaal_surgery.projection import align, combine, gramian
from gaal_surgery.rounds import Turn
from gaal_surgery.stats import AlignmentStats, ConflictMonitor
from gaal_surgery.surgery import DualFloor, HalfSpace, Orthogonal

__version__ = "0.2.0"

__all__ = ["AlignmentStats", "CalibratedFusion", "CalibratedGaussianFusion", "CalibratedLabelFusion"]
__all__ += ["ConflictMonitor", "DualFloor", "FreshFeatures", "GradientAlignedAlternator", "HalfSpace", "Orthogonal"]
__all__ += ["Turn", "align", "binary_entropy", "combine", "entropy", "fuse_gaussians", "fuse_logits"]
__all__ += ["gaussian_entropy", "gramian", "guide_gradient", "per_sample_alignment", "per_sample_gradients"]
__all__ += ["per_sample_norms", "select_uncertain"]

"""The methods, one file each."""

from __future__ import annotations

from .alternating import Alternating
from .base import Method
from .charms import CHARMS
from .concatenation import Concatenation
from .daft import DAFT
from .di_mml import DIMML
from .fmr import FMR
from .gaal import GAAL
from .gaal_star import GAALStar
from .image_only import ImageOnly
from .kd import KD
from .lfm import LFM
from .maximum import Maximum
from .mfh import MFH
from .mla import MLA
from .mmcl import MMCL
from .mmpareto import MMPareto
from .ogm_ge import OGMGE
from .reconboost import ReconBoost
from .table_only import TableOnly
from .tip import TIP

METHODS: dict[str, type[Method]] = {
    "image": ImageOnly,
    "table": TableOnly,
    "concatenation": Concatenation,
    "maximum": Maximum,
    "daft": DAFT,
    "tip": TIP,
    "ogm_ge": OGMGE,
    "mmpareto": MMPareto,
    "mla": MLA,
    "di_mml": DIMML,
    "reconboost": ReconBoost,
    "lfm": LFM,
    "alternating": Alternating,
    "gaal": GAAL,
    "kd": KD,
    "mfh": MFH,
    "fmr": FMR,
    "mmcl": MMCL,
    "charms": CHARMS,
    "gaal_star": GAALStar,
}

__all__ = ["METHODS", "Method"]

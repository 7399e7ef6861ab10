"""The methods, one file each; a file is imported when its method is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..registry import Registry
from . import settings as of

if TYPE_CHECKING:
    from .base import Method

_REGISTERED: dict[str, tuple[str, type[Any]]] = {
    "image": ("image_only:ImageOnly", of.NoSettings),
    "table": ("table_only:TableOnly", of.NoSettings),
    "concatenation": ("concatenation:Concatenation", of.ConcatenationSettings),
    "maximum": ("maximum:Maximum", of.MaximumSettings),
    "daft": ("daft:DAFT", of.DAFTSettings),
    "tip": ("tip:TIP", of.TIPSettings),
    "ogm_ge": ("ogm_ge:OGMGE", of.OGMGESettings),
    "mmpareto": ("mmpareto:MMPareto", of.MMParetoSettings),
    "mla": ("mla:MLA", of.MLASettings),
    "di_mml": ("di_mml:DIMML", of.DIMMLSettings),
    "reconboost": ("reconboost:ReconBoost", of.ReconBoostSettings),
    "lfm": ("lfm:LFM", of.LFMSettings),
    "alternating": ("alternating:Alternating", of.AlternatingSettings),
    "gaal": ("gaal:GAAL", of.GAALSettings),
    "gaal_joint": ("gaal_joint:GAALJoint", of.GAALJointSettings),
    "kd": ("kd:KD", of.KDSettings),
    "mfh": ("mfh:MFH", of.MFHSettings),
    "fmr": ("fmr:FMR", of.FMRSettings),
    "mmcl": ("mmcl:MMCL", of.MMCLSettings),
    "charms": ("charms:CHARMS", of.CHARMSSettings),
    "gaal_star": ("gaal_star:GAALStar", of.GAALSettings),
}

_PLACES = {name: place for name, (place, _) in _REGISTERED.items()}
METHODS: Registry[type[Method]] = Registry("method", __name__, _PLACES)
SETTINGS = {name: settings for name, (_, settings) in _REGISTERED.items()}

__all__ = ["METHODS", "SETTINGS"]

"""The methods, one file each. A file is imported when its method is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import registry
from . import settings as of

if TYPE_CHECKING:
    from .base import Method

Family = Literal["one modality", "joint", "alternating", "image alone at test time"]
_ALONE: Family = "image alone at test time"


@dataclass(frozen=True)
class Entry(registry.Entry):
    """The registration of a method.

    Attributes:
        settings: the class of the method's own options.
        family: the modalities that the method looks at, and whether they are trained jointly or take turns.
        predictions: the names of the predictions that the method reports. The method is judged by the first one.
        paper: the method's row in the paper's Table I; None where the paper has no such row.
    """

    settings: type[of.MethodSettings]
    family: Family
    predictions: tuple[str, ...]
    paper: str | None = None


_FUSED = ("fused",)
_THREE = ("fused", "image", "table")

METHODS: registry.Registry[type[Method], Entry] = registry.Registry(
    "method",
    __name__,
    {
        "image": Entry("image_only:ImageOnly", of.MethodSettings, "one modality", ("image",), "ResNet50"),
        "table": Entry("table_only:TableOnly", of.MethodSettings, "one modality", ("table",), "MLP"),
        "concatenation": Entry("concatenation:Concatenation", of.ConcatenationSettings, "joint", _THREE, "CF"),
        "maximum": Entry("maximum:Maximum", of.MaximumSettings, "joint", _FUSED, "MF"),
        "daft": Entry("daft:DAFT", of.DAFTSettings, "joint", _FUSED, "DAFT"),
        "tip": Entry("tip:TIP", of.TIPSettings, "joint", _FUSED, "TIP"),
        "ogm_ge": Entry("ogm_ge:OGMGE", of.OGMGESettings, "joint", _THREE, "OGM"),
        "mmpareto": Entry("mmpareto:MMPareto", of.MMParetoSettings, "joint", _THREE, "MMPareto"),
        "mla": Entry("mla:MLA", of.MLASettings, "alternating", _THREE, "MLA"),
        "di_mml": Entry("di_mml:DIMML", of.DIMMLSettings, "joint", _THREE, "DI-MML"),
        "reconboost": Entry("reconboost:ReconBoost", of.ReconBoostSettings, "alternating", _THREE, "ReconBoost"),
        "lfm": Entry("lfm:LFM", of.LFMSettings, "joint", _THREE, "LFM"),
        "alternating": Entry("alternating:Alternating", of.AlternatingSettings, "alternating", _THREE),
        "gaal": Entry("gaal:GAAL", of.GAALSettings, "alternating", _THREE, "GAAL"),
        "gaal_joint": Entry("gaal_joint:GAALJoint", of.GAALJointSettings, "alternating", (*_THREE, "joint")),
        "kd": Entry("kd:KD", of.KDSettings, _ALONE, ("image",), "KD"),
        "mfh": Entry("mfh:MFH", of.MFHSettings, _ALONE, ("image",), "MFH"),
        "fmr": Entry("fmr:FMR", of.FMRSettings, _ALONE, ("image",), "FMR"),
        "mmcl": Entry("mmcl:MMCL", of.MMCLSettings, _ALONE, ("image",), "MMCL"),
        "charms": Entry("charms:CHARMS", of.CHARMSSettings, _ALONE, ("image",), "CHARMS"),
        "gaal_star": Entry("gaal_star:GAALStar", of.GAALSettings, _ALONE, ("image",), "GAAL*"),
    },
)
SETTINGS = {name: entry.settings for name, entry in METHODS.entries.items()}

__all__ = ["METHODS", "SETTINGS", "Entry", "Family"]

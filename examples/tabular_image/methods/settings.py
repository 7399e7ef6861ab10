"""The options that single methods have, `--NAME.OPTION` on the command line; they stand apart from the methods' code.

The command line and its help need all of them, and the code of no method, whose imports take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt

from ..options import Finite, Fraction, Share

# The keys of gaal_surgery.surgery.RULES, which would import torch; a test compares them.
RuleName = Literal["halfspace", "dualfloor", "orthogonal"]

_PRETRAINED = {"corruption": (0.3, 0.1, 0.5), "temperature": (0.1, 0.05, 0.2)}
_GUIDES = {"image_fraction": (0.5, 0.25, 1.0), "table_fraction": (0.5, 0.25, 1.0)}


@dataclass(frozen=True)
class MethodSettings:
    """The options of a method; itself, those of a method without any.

    Attributes:
        searched: values that the benchmark's search may choose, by option; the default first. Two options of three
            values each, where a method has as many that act on its training: the defaults and what lies around them in
            papers and released code. The search's draws then try all values of such a pair in three trials.
        stages: options that are lengths of earlier stages, as multiples of the benchmark's epochs.
    """

    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    stages: ClassVar[Mapping[str, float]] = {}


@dataclass(frozen=True)
class ConcatenationSettings(MethodSettings):
    """What to measure."""

    measure_conflict: bool = False
    """Record in every step, for each encoder, the cosine between the gradients of the joint loss and of the loss of its
    own slice, as in the paper's Figure 1(a). The training stays the same and takes about twice as long."""


@dataclass(frozen=True)
class MaximumSettings(MethodSettings):
    """Fusion."""

    projection: Literal["linear", "identity"] = "linear"
    """What the image features pass before the maximum: a linear layer, or nothing."""

    searched: ClassVar = {"projection": ("linear", "identity")}


@dataclass(frozen=True)
class DAFTSettings(MethodSettings):
    """The transform."""

    reduction: PositiveInt = 7
    """The hidden layer that scale and shift are computed through has (C + D) / reduction units."""

    searched: ClassVar = {"reduction": (7, 2, 14)}


@dataclass(frozen=True)
class TIPSettings(MethodSettings):
    """Size, pretraining and what follows it."""

    width: PositiveInt = 128
    """Features of a token; a multiple of heads. The paper has 512."""
    blocks: PositiveInt = 1
    """Blocks of the table transformer, and of the multimodal one. The paper has 4 each."""
    heads: PositiveInt = 8
    """Attention heads, as many as in the paper."""
    pretraining_epochs: PositiveInt = 20
    """Epochs of pretraining, before those of --epochs."""
    encoder: Literal["frozen", "trainable"] = "trainable"
    """What becomes of the pretrained network: a linear probe on it (the paper's default), or fine-tuning."""
    corruption: ClosedUnitInterval = 0.3
    """Share of the cells of a table row that are redrawn from their columns for contrast and matching."""
    masked: Fraction = 0.5
    """Share of the cells that are hidden and reconstructed; at least one cell."""
    crop: Fraction = 0.08
    """Least share of an image's area that pretraining sees of it."""
    temperature: PositiveFloat = 0.1
    """Of the similarities."""

    searched: ClassVar = _PRETRAINED
    stages: ClassVar = {"pretraining_epochs": 1}


@dataclass(frozen=True)
class OGMGESettings(MethodSettings):
    """Modulation of the encoders' gradients."""

    alpha: PositiveFloat = 0.8
    """Strength of the restraint; the authors suggest 0.1 to 0.8, by data set."""
    enhance: bool = True
    """Add Gaussian noise to the gradients of both encoders (GE)."""
    share: Fraction = 0.5
    """Share of the epochs, from the first, in which gradients are modulated; half in the released code."""
    tensors: Literal["matrices", "convolutions"] = "matrices"
    """What is modulated: every tensor of an encoder that is not one-dimensional, or those of four dimensions alone. The
    latter is the released code's, and never restrains a table encoder."""

    searched: ClassVar = {"alpha": (0.8, 0.1, 0.3), "share": (0.5, 0.25, 1.0)}


@dataclass(frozen=True)
class MMParetoSettings(MethodSettings):
    """Size of the encoders' gradients."""

    gamma: PositiveFloat = 1.5
    """What all gradients of the encoders are multiplied by."""
    rescale: Literal["tensor", "encoder"] = "tensor"
    """What is brought to the length of the plain sum: each tensor by itself, as in the released code, which bends the
    direction; or the whole encoder's gradient, which keeps it."""

    searched: ClassVar = {"rescale": ("tensor", "encoder"), "gamma": (1.5, 1.0, 2.0)}


@dataclass(frozen=True)
class MLASettings(MethodSettings):
    """Projection of the head's gradient, and fusion."""

    projection: Literal["paper", "code", "none"] = "paper"
    """Project with what earlier turns absorbed and then absorb this one (paper); absorb this one first (the intention
    of the released code); or never (its effect, since it looks for the head's weight under another name)."""
    unit_norm: bool = False
    """Bring P to Frobenius norm 1 after each turn, as the released code does: a slower head under sgd."""
    gate: Literal["entropy", "fixed"] = "entropy"
    """Weigh the two predictions of a sample by their entropies, or all by image_weight."""
    image_weight: ClosedUnitInterval = 0.55
    """Weight of the image for gate fixed."""

    searched: ClassVar = {"gate": ("entropy", "fixed"), "image_weight": (0.55, 0.4, 0.7)}


@dataclass(frozen=True)
class DIMMLSettings(MethodSettings):
    """Stages, loss weights and temperatures."""

    encoder_epochs: PositiveInt | None = None
    """Epochs of the encoders' stage; default as many as --epochs gives the fusion stage."""
    shared_weight: NonNegativeFloat = 1.0
    """Weight of the two losses of the head that both modalities share (lambda)."""
    contrast_start: ClosedUnitInterval = 0.15
    """Share of the encoders' stage before the contrast of dimensions begins; 1 is never. The released code begins at
    epoch 20 of 150."""
    temperature: PositiveFloat = 10.0
    """Temperature of the contrast (tau); 10 to 50 in the released code, by data set."""
    confidence_temperature: PositiveFloat = 1.0
    """Temperature of the weights of the three predictions (tau_2); 1 or 3 in the released code, by data set."""

    searched: ClassVar = {"temperature": (10.0, 20.0, 50.0), "confidence_temperature": (1.0, 0.3, 3.0)}


@dataclass(frozen=True)
class ReconBoostSettings(MethodSettings):
    """Rounds and loss weights."""

    pretraining_epochs: PositiveInt = 10
    """Epochs of the pretraining, before those of --epochs."""
    turn_epochs: PositiveInt = 1
    """Epochs of one modality's own phase (E_1); 4 in the released code, over hundreds of rounds."""
    joint_epochs: PositiveInt = 1
    """Epochs of the joint phase after it (E_2); 4 in the released code."""
    label_weight: PositiveFloat = 4.0
    """Weight of the cross-entropy in a modality's own phase (w_1)."""
    residual_weight: NonNegativeFloat = 1.0
    """How much less a sample counts where the other modality is right already (w_2); as label_weight, it is the pure
    boosting residual."""
    divide_by_classes: bool = False
    """Divide the loss of the own phase by the number of classes C, as the released code does. A step of sgd is then C
    times as short; adam and adamw hardly notice."""
    memory: NonNegativeFloat = 0.0
    """A variant: weight of the squared distance between the modality's probabilities and the other's. The released
    code has it with weight 0.5 and detaches both sides, so that it has no gradient there; here it has."""
    fresh_optimizer: bool = False
    """Begin every phase with an optimizer without memory, as the released code does."""

    searched: ClassVar = {"label_weight": (4.0, 5.0, 8.0), "residual_weight": (1.0, 2.0, 4.0)}
    stages: ClassVar = {"pretraining_epochs": 0.5}


@dataclass(frozen=True)
class LFMSettings(MethodSettings):
    """The weight of classification."""

    alpha: ClosedUnitInterval | None = None
    """A constant weight of classification against matching; None takes the authors' curve over the epochs."""

    searched: ClassVar = {"alpha": (None, 0.3, 0.5, 0.7, 0.9)}


@dataclass(frozen=True)
class GuideSettings(MethodSettings):
    """Guides."""

    image_fraction: Fraction = 0.5
    """Share of uncertain images that guides the table's turn."""
    table_fraction: Fraction = 0.5
    """Share of uncertain table rows that guides the image's turn."""
    uncertainty: Literal["entropy", "random"] = "entropy"
    """Which samples guide: those of the highest entropy, or any."""
    align: Literal["gradient", "update"] = "gradient"
    """Look at the gradient before the optimizer's step, or at the update that it makes."""
    max_norm: PositiveFloat | None = None
    """Clip the gradient of each guiding sample to this norm."""


@dataclass(frozen=True)
class AlternatingSettings(GuideSettings):
    """Turns and guides."""

    guidance: Literal["fresh", "cached"] = "fresh"
    """Compute the guide's features anew for each turn, or keep those of its own last turn (cheaper)."""
    order: Literal["table_first", "image_first"] = "table_first"
    """Whose turn comes first. With fresh guidance the encoder of the last turn runs once a round and the other twice,
    so the costly image comes last; image_first is the paper's order."""
    idle_moves: bool = False
    """Step the idle encoder too, on a gradient of zeros, as the released code does under torch 1: momentum and weight
    decay then move it, and every turn runs both encoders."""


@dataclass(frozen=True)
class SurgerySettings(MethodSettings):
    """Surgery."""

    rule: RuleName = "halfspace"
    """Rule of surgery: halfspace is the paper's, dualfloor that of its released code."""
    margin: Finite = 0.0
    """Margin of halfspace, the least inner product with the guide."""
    relative: bool = False
    """The margin is a cosine."""


@dataclass(frozen=True)
class GAALSettings(AlternatingSettings, SurgerySettings):
    """Turns, guides and surgery."""

    searched: ClassVar = _GUIDES


@dataclass(frozen=True)
class GAALJointSettings(GuideSettings, SurgerySettings):
    """The joint turn, guides and surgery."""

    rule: Literal[RuleName, "none"] = "halfspace"
    """Rule of surgery: halfspace is the paper's, dualfloor that of its released code; none is plain alternation."""
    head: Literal["own", "shared"] = "own"
    """The head of the joint turn: one of its own, or that of image and table."""
    gradient: Literal["encoders", "joint"] = "encoders"
    """Where the gradient of the joint turn ends: in both encoders, which run once more, or in the joint network."""
    guided: bool = False
    """The joint turn is guided by image and table, and guides their turns; for head shared."""
    joint_fraction: Fraction = 0.5
    """Share of uncertain rows that guides for the joint voice."""
    dropout: Share = 0.5
    """Share of its hidden features that the joint network misses in training."""

    searched: ClassVar = _GUIDES


@dataclass(frozen=True)
class KDSettings(MethodSettings):
    """Teacher and distillation."""

    weight: ClosedUnitInterval = 0.5
    """Weight of the distillation (lambda); that of the cross-entropy is 1 - weight."""
    temperature: PositiveFloat = 4.0
    """Temperature T of the distillation."""
    teacher_epochs: PositiveInt = 20
    """Epochs of the teacher's stage, before those of --epochs."""
    teacher_dropout: Share = 0.5
    """Share of its features that the teacher misses in training, so that it is less sure of the rows it has seen."""

    searched: ClassVar = {"temperature": (4.0, 1.0, 2.0), "weight": (0.5, 0.25, 0.75)}
    stages: ClassVar = {"teacher_epochs": 1}


@dataclass(frozen=True)
class MFHSettings(MethodSettings):
    """Which columns are kept, and the teacher."""

    removed: Share = 0.75
    """Share r of the columns that the teacher does not see, rounded down: those of the lowest saliency; 0.75 in the
    released code on RAVDESS."""
    permutations: PositiveInt = 10
    """Permutations of each column that saliency is averaged over."""
    rows: PositiveInt = 1024
    """Training rows that saliency is measured on, at most."""
    pair_epochs: PositiveInt = 10
    """Epochs of teacher and student together, before those of the teacher."""
    teacher_epochs: PositiveInt = 20
    """Epochs of the teacher on the kept columns, before those of --epochs."""
    teacher_dropout: Share = 0.5
    """Share of its features that the teacher misses in training, so that it is less sure of the rows it has seen."""

    searched: ClassVar = {"removed": (0.75, 0.25, 0.5), "teacher_dropout": (0.5, 0.0, 0.25)}
    stages: ClassVar = {"pair_epochs": 0.5, "teacher_epochs": 1}


@dataclass(frozen=True)
class FMRSettings(MethodSettings):
    """The knockdown's schedule and the table's reconstruction."""

    joint: ClosedUnitInterval = 1 / 3
    """Share of the epochs, at the start, with all columns wired in."""
    knockdown: ClosedUnitInterval = 1 / 3
    """Share of the epochs after these that remove the columns, as many in each; in the rest (at least the last epoch)
    the image is alone, and only epochs of the rest are validated."""
    reconstruction: NonNegativeFloat = 0.1
    """Weight of the table's reconstruction from the image's features, averaged over rows and columns."""

    searched: ClassVar = {"knockdown": (1 / 3, 1 / 6, 1 / 2), "reconstruction": (0.1, 0.01, 1.0)}


@dataclass(frozen=True)
class MMCLSettings(MethodSettings):
    """Pretraining and what follows it."""

    pretraining_epochs: PositiveInt = 60
    """Epochs of pretraining, before those of --epochs."""
    encoder: Literal["frozen", "trainable"] = "trainable"
    """What becomes of the pretrained image encoder: a linear probe on it (the released default), or fine-tuning."""
    corruption: ClosedUnitInterval = 0.3
    """Share of the cells of a table row that are redrawn from their columns in pretraining."""
    crop: Fraction = 0.08
    """Least share of an image's area that pretraining sees of it."""
    temperature: PositiveFloat = 0.1
    """Of the similarities."""
    image_weight: ClosedUnitInterval = 0.5
    """Weight of finding an image's table row among the batch's; the rest is for finding a row's image."""

    searched: ClassVar = _PRETRAINED
    stages: ClassVar = {"pretraining_epochs": 2}


@dataclass(frozen=True)
class CHARMSSettings(MethodSettings):
    """Weights of the losses and the pairing; the workshop version has all weights 1 and sums over the columns."""

    table_weight: NonNegativeFloat = 0.6
    """Weight of the table model's cross-entropy."""
    numeric_weight: NonNegativeFloat = 0.03
    """Weight of the squared error of the numeric columns, their mean."""
    categorical_weight: NonNegativeFloat = 0.03
    """Weight of the cross-entropy of the categorical columns, their mean."""
    pairings: PositiveInt = 3
    """Pairings in a training, spread evenly over its epochs; a short training has fewer, one of two epochs or more has
    at least one. Before the first pairing, all channels predict all columns. The released code pairs every fifth epoch:
    three times in 20 epochs."""
    clusters: PositiveInt = 40
    """Groups of channels, at most."""
    rows: PositiveInt = 512
    """Training rows that a pairing is made from, at most."""

    # A table of one kind of columns has one of the two weights.
    searched: ClassVar = {"numeric_weight": (0.03, 0.3, 1.0), "categorical_weight": (0.03, 0.3, 1.0)}

"""The options of single methods, `--NAME.OPTION` on the command line.

The options stand apart from the code of the methods: the command line needs all options, and importing the code of a
method takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, PositiveFloat, PositiveInt

from ..options import Finite, Fraction, Share

# The keys of gaal_surgery.surgery.RULES, copied because importing RULES imports torch. A test compares them.
RuleName = Literal["halfspace", "dualfloor", "orthogonal"]

_PRETRAINED = {"corruption": (0.3, 0.1, 0.5), "temperature": (0.1, 0.05, 0.2)}
_GUIDES = {"image_fraction": (0.5, 0.25, 1.0), "table_fraction": (0.5, 0.25, 1.0)}


@dataclass(frozen=True)
class MethodSettings:
    """Base of the options of a method. A method without options uses this class itself.

    Attributes:
        searched: the values that the benchmark's search tries, by option; the default comes first. Most methods have
            two options of three values each: the default and values around the default in papers and released code.
            Three trials then try each value of both options. A method with fewer options that act on the training has
            fewer here.
        stages: the options that set the length of a stage before the last one. The value is the length that the
            benchmark gives the stage, as a multiple of `--epochs`.
    """

    searched: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    stages: ClassVar[Mapping[str, float]] = {}


@dataclass(frozen=True)
class ConcatenationSettings(MethodSettings):
    """What to measure."""

    measure_conflict: bool = False
    """Record in every step, for each encoder, the cosine between two gradients, as in the paper's Figure 1(a). One
    gradient is of the joint loss. The other is of the loss of the encoder's own slice of the classifier. The training
    stays the same and takes about twice as long."""


@dataclass(frozen=True)
class MaximumSettings(MethodSettings):
    """Fusion."""

    projection: Literal["linear", "identity"] = "linear"
    """Layer between the image features and the maximum: a linear layer, or none."""

    searched: ClassVar = {"projection": ("linear", "identity")}


@dataclass(frozen=True)
class DAFTSettings(MethodSettings):
    """The transform."""

    reduction: PositiveInt = 7
    """Divisor of the hidden layer's size. The layer that computes scales and shifts has (C + D) / reduction units, for
    C channels and D encoded table columns."""

    searched: ClassVar = {"reduction": (7, 2, 14)}


@dataclass(frozen=True)
class TIPSettings(MethodSettings):
    """Size, pretraining and what follows it."""

    width: PositiveInt = 128
    """Features of a token; a multiple of heads. The paper has 512."""
    blocks: PositiveInt = 1
    """Blocks of the table transformer, and of the multimodal transformer. The paper has 4 each."""
    heads: PositiveInt = 8
    """Attention heads, as many as in the paper."""
    pretraining_epochs: PositiveInt = 20
    """Epochs of the pretraining, which come before --epochs."""
    encoder: Literal["frozen", "trainable"] = "trainable"
    """Whether the pretrained network is trained further. frozen trains a linear classifier alone (the paper's default);
    trainable fine-tunes the whole network."""
    corruption: ClosedUnitInterval = 0.3
    """Share of the cells of a table row that contrast and matching see replaced by values of other rows."""
    masked: Fraction = 0.5
    """Share of the cells that are hidden and reconstructed; at least one cell."""
    crop: Fraction = 0.08
    """Least share of an image's area that a random crop of the pretraining keeps."""
    temperature: PositiveFloat = 0.1
    """Temperature of the similarities."""

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
    """Share of the epochs, from the first on, in which gradients are modulated; half in the released code."""
    tensors: Literal["matrices", "convolutions"] = "matrices"
    """Tensors of an encoder whose gradients are modulated. matrices takes all tensors but one-dimensional ones.
    convolutions takes tensors of four dimensions alone, as the released code does, and never restrains a table
    encoder."""

    searched: ClassVar = {"alpha": (0.8, 0.1, 0.3), "share": (0.5, 0.25, 1.0)}


@dataclass(frozen=True)
class MMParetoSettings(MethodSettings):
    """Size of the encoders' gradients."""

    gamma: PositiveFloat = 1.5
    """Factor of all gradients of the encoders."""
    rescale: Literal["tensor", "encoder"] = "tensor"
    """Unit that is brought up to the length of the plain sum of the gradients. tensor rescales each tensor by itself,
    as the released code does, and bends the direction. encoder rescales the whole encoder's gradient and keeps the
    direction."""

    searched: ClassVar = {"rescale": ("tensor", "encoder"), "gamma": (1.5, 1.0, 2.0)}


@dataclass(frozen=True)
class MLASettings(MethodSettings):
    """Projection of the head's gradient, and fusion."""

    projection: Literal["paper", "code", "none"] = "paper"
    """When the head's gradient is projected. paper projects with the features of earlier turns and then absorbs the
    features of this turn. code absorbs the features of this turn first, as the released code intends. none never
    projects: the effect of the released code, which looks for the head's weight under a wrong name."""
    unit_norm: bool = False
    """Bring P to Frobenius norm 1 after each turn, as the released code does. The head then learns more slowly under
    sgd."""
    gate: Literal["entropy", "fixed"] = "entropy"
    """Weights of the two predictions in their fusion: by their entropies, or image_weight in every row."""
    image_weight: ClosedUnitInterval = 0.55
    """Weight of the image under gate fixed."""

    searched: ClassVar = {"gate": ("entropy", "fixed"), "image_weight": (0.55, 0.4, 0.7)}


@dataclass(frozen=True)
class DIMMLSettings(MethodSettings):
    """Stages, loss weights and temperatures."""

    encoder_epochs: PositiveInt | None = None
    """Epochs of the encoders' stage, which comes before --epochs; by default as many as --epochs."""
    shared_weight: NonNegativeFloat = 1.0
    """Weight of the two losses of the head that both modalities share (lambda)."""
    contrast_start: ClosedUnitInterval = 0.15
    """Share of the encoders' stage that passes before the contrast of dimensions begins. With 1 the contrast never
    begins. The released code begins at epoch 20 of 150."""
    temperature: PositiveFloat = 10.0
    """Temperature of the contrast (tau); 10 to 50 in the released code, by data set."""
    confidence_temperature: PositiveFloat = 1.0
    """Temperature of the weights of the three predictions (tau_2); 1 or 3 in the released code, by data set."""

    searched: ClassVar = {"temperature": (10.0, 20.0, 50.0), "confidence_temperature": (1.0, 0.3, 3.0)}


@dataclass(frozen=True)
class ReconBoostSettings(MethodSettings):
    """Rounds and loss weights."""

    pretraining_epochs: PositiveInt = 10
    """Epochs of the pretraining, which come before --epochs."""
    turn_epochs: PositiveInt = 1
    """Epochs of one modality's own phase (E_1); 4 in the released code, over hundreds of rounds."""
    joint_epochs: PositiveInt = 1
    """Epochs of the joint phase that follows each own phase (E_2); 4 in the released code."""
    label_weight: PositiveFloat = 4.0
    """Weight of the cross-entropy in a modality's own phase (w_1)."""
    residual_weight: NonNegativeFloat = 1.0
    """How much less a sample counts where the other modality is right already (w_2). A value equal to label_weight
    gives the pure boosting residual."""
    divide_by_classes: bool = False
    """Divide the loss of the own phase by the number of classes C, as the released code does. A step of sgd is then C
    times as short; adam and adamw hardly notice."""
    memory: NonNegativeFloat = 0.0
    """Weight of the squared distance between the probabilities of the two modalities (a variant). The released code has
    this term with weight 0.5 and detaches both sides, so that the term has no gradient there. Here the term has a
    gradient."""
    fresh_optimizer: bool = False
    """Clear the optimizer's state at the start of every phase, as the released code does."""

    searched: ClassVar = {"label_weight": (4.0, 5.0, 8.0), "residual_weight": (1.0, 2.0, 4.0)}
    stages: ClassVar = {"pretraining_epochs": 0.5}


@dataclass(frozen=True)
class LFMSettings(MethodSettings):
    """The weight of classification."""

    alpha: ClosedUnitInterval | None = None
    """A constant weight of classification; matching has weight 1 - alpha. None takes the authors' curve over the
    epochs."""

    searched: ClassVar = {"alpha": (None, 0.3, 0.5, 0.7, 0.9)}


@dataclass(frozen=True)
class GuideSettings(MethodSettings):
    """Guides."""

    image_fraction: Fraction = 0.5
    """Share of a batch's images, the most uncertain ones, that guides the table's turn."""
    table_fraction: Fraction = 0.5
    """Share of a batch's table rows, the most uncertain ones, that guides the image's turn."""
    uncertainty: Literal["entropy", "random"] = "entropy"
    """Which samples guide: those with the highest entropy, or random ones."""
    align: Literal["gradient", "update"] = "gradient"
    """Compare guides with the gradient before the optimizer's step, or with the update that the optimizer makes."""
    max_norm: PositiveFloat | None = None
    """Clip the gradient of each guiding sample to this norm."""


@dataclass(frozen=True)
class AlternatingSettings(GuideSettings):
    """Turns and guides."""

    guidance: Literal["fresh", "cached"] = "fresh"
    """Features of the guide: computed anew for each turn, or kept from the guide's own last turn (cheaper)."""
    order: Literal["table_first", "image_first"] = "table_first"
    """Modality whose turn comes first. With fresh guidance the encoder of the last turn runs once a round and the other
    encoder twice, so the costly image comes last. image_first is the paper's order."""
    idle_moves: bool = False
    """Step the idle encoder too, on a gradient of zeros, as the released code does under torch 1. Momentum and weight
    decay then move the idle encoder, and every turn runs both encoders."""


@dataclass(frozen=True)
class SurgerySettings(MethodSettings):
    """Surgery."""

    rule: RuleName = "halfspace"
    """Rule of surgery: halfspace is the paper's rule, dualfloor the rule of the paper's released code."""
    margin: Finite = 0.0
    """Margin of halfspace: the least inner product of the step's gradient with the guide's gradient."""
    relative: bool = False
    """Read the margin as a cosine, not as an inner product."""


@dataclass(frozen=True)
class GAALSettings(AlternatingSettings, SurgerySettings):
    """Turns, guides and surgery."""

    searched: ClassVar = _GUIDES


@dataclass(frozen=True)
class GAALJointSettings(GuideSettings, SurgerySettings):
    """The joint turn, guides and surgery."""

    rule: Literal[RuleName, "none"] = "halfspace"
    """Rule of surgery: halfspace is the paper's rule, dualfloor the rule of the paper's released code, none keeps
    every gradient."""
    head: Literal["own", "shared"] = "own"
    """Head of the joint turn: a head of its own, or the head of image and table."""
    gradient: Literal["encoders", "joint"] = "encoders"
    """How far the gradient of the joint turn reaches: into both encoders, which run once more, or into the joint
    network alone."""
    guided: bool = False
    """Let image and table guide the joint turn, and the joint voice guide the turns of image and table. Needs head
    shared."""
    joint_fraction: Fraction = 0.5
    """Share of a batch's rows, the most uncertain ones, that guides for the joint voice."""
    dropout: Share = 0.5
    """Share of the joint network's hidden features that training drops."""

    searched: ClassVar = _GUIDES


@dataclass(frozen=True)
class KDSettings(MethodSettings):
    """Teacher and distillation."""

    weight: ClosedUnitInterval = 0.5
    """Weight of the distillation (lambda); the cross-entropy has weight 1 - lambda."""
    temperature: PositiveFloat = 4.0
    """Temperature T of the distillation."""
    teacher_epochs: PositiveInt = 20
    """Epochs of the teacher's stage, which come before --epochs."""
    teacher_dropout: Share = 0.5
    """Share of the teacher's features that training drops, so that the teacher is less sure of its training rows."""

    searched: ClassVar = {"temperature": (4.0, 1.0, 2.0), "weight": (0.5, 0.25, 0.75)}
    stages: ClassVar = {"teacher_epochs": 1}


@dataclass(frozen=True)
class MFHSettings(MethodSettings):
    """Which columns are kept, and the teacher."""

    removed: Share = 0.75
    """Share r of the columns that are hidden from the teacher, rounded down: the columns of the lowest saliency. The
    released code has 0.75 on RAVDESS."""
    permutations: PositiveInt = 10
    """Permutations of each column over which the saliency is averaged."""
    rows: PositiveInt = 1024
    """Most training rows on which the saliency is measured."""
    pair_epochs: PositiveInt = 10
    """Epochs of the first stage, which trains a table model and an image model together."""
    teacher_epochs: PositiveInt = 20
    """Epochs of the second stage, which trains the teacher on the kept columns. --epochs is the third stage."""
    teacher_dropout: Share = 0.5
    """Share of the teacher's features that training drops, so that the teacher is less sure of its training rows."""

    searched: ClassVar = {"removed": (0.75, 0.25, 0.5), "teacher_dropout": (0.5, 0.0, 0.25)}
    stages: ClassVar = {"pair_epochs": 0.5, "teacher_epochs": 1}


@dataclass(frozen=True)
class FMRSettings(MethodSettings):
    """The knockdown's schedule and the table's reconstruction."""

    joint: ClosedUnitInterval = 1 / 3
    """Share of the epochs, from the first on, that use all columns."""
    knockdown: ClosedUnitInterval = 1 / 3
    """Share of the epochs, after the joint ones, that remove the columns, as many in each epoch. In the remaining
    epochs (at least the last one) the image is alone. Only the remaining epochs are validated."""
    reconstruction: NonNegativeFloat = 0.1
    """Weight of the loss that reconstructs the table from the image's features, averaged over rows and columns."""

    searched: ClassVar = {"knockdown": (1 / 3, 1 / 6, 1 / 2), "reconstruction": (0.1, 0.01, 1.0)}


@dataclass(frozen=True)
class MMCLSettings(MethodSettings):
    """Pretraining and what follows it."""

    pretraining_epochs: PositiveInt = 60
    """Epochs of the pretraining, which come before --epochs."""
    encoder: Literal["frozen", "trainable"] = "trainable"
    """Whether the pretrained image encoder is trained further. frozen trains a linear classifier alone (the released
    code's default); trainable fine-tunes the encoder."""
    corruption: ClosedUnitInterval = 0.3
    """Share of the cells of a table row that the pretraining replaces by values of other rows."""
    crop: Fraction = 0.08
    """Least share of an image's area that a random crop of the pretraining keeps."""
    temperature: PositiveFloat = 0.1
    """Temperature of the similarities."""
    image_weight: ClosedUnitInterval = 0.5
    """Weight w of finding an image's table row in the batch. Finding a row's image has weight 1 - w."""

    searched: ClassVar = _PRETRAINED
    stages: ClassVar = {"pretraining_epochs": 2}


@dataclass(frozen=True)
class CHARMSSettings(MethodSettings):
    """Weights of the losses and the pairing. The workshop version has all weights 1 and sums over the columns."""

    table_weight: NonNegativeFloat = 0.6
    """Weight of the table model's cross-entropy."""
    numeric_weight: NonNegativeFloat = 0.03
    """Weight of the squared error, averaged over the numeric columns."""
    categorical_weight: NonNegativeFloat = 0.03
    """Weight of the cross-entropy, averaged over the categorical columns."""
    pairings: PositiveInt = 3
    """Pairings of channels with columns in a training, spread evenly over the epochs. A short training has fewer
    pairings; a training of two epochs or more has at least one. Before the first pairing all channels predict all
    columns. The released code pairs every fifth epoch: three times in 20 epochs."""
    clusters: PositiveInt = 40
    """Most groups of channels."""
    rows: PositiveInt = 512
    """Most training rows from which a pairing is made."""

    # Both weights are searched: a table with one kind of columns uses one of them.
    searched: ClassVar = {"numeric_weight": (0.03, 0.3, 1.0), "categorical_weight": (0.03, 0.3, 1.0)}

"""Settings of a training, one frozen dataclass per stage. A preset is a named instance.

The defaults are the paper's (§5.2, §5.3, §5.5.2) where it prints a number.
"""

import math
from dataclasses import dataclass, field, replace

CUBE = "cube "
"""How the preparation of a model begins that sees a cube of another model's atlas; see `deepatlas.cascade`."""


@dataclass(frozen=True)
class NetworkConfig:
    """Size of a coordinate network. The defaults are the paper's."""

    size: int = 64
    """Nodes along each axis of the input grid."""
    widths: tuple[int, ...] = (8, 16, 32, 64, 128)
    """Channels at each resolution, finest first; each halves the grid of the one before."""
    head_channels: int = 256
    """F: depth of the feature maps f_l."""
    stem_stride: int = 1
    """1, or 2: the stem halves the grid by a strided 4³ convolution, and only it sees the input in full. Its output
    nodes lie up to half an input voxel off the corner-kept grid; the network learns the map at the latter."""
    groups: int = 8
    """Groups of every group normalisation (fewer where there are fewer channels)."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Nodes along each axis at each resolution, finest first."""
        return tuple(self.size // self.stem_stride // 2**level for level in range(len(self.widths)))


COMPACT = NetworkConfig(widths=(16, 32, 64, 96), head_channels=32, stem_stride=2)
"""For training on a CPU: the stem sees 64³, everything else runs at 32³ and below."""


@dataclass(frozen=True)
class Weights:
    """Weights of the terms. The paper prints none."""

    explicit: float = 1.0
    implicit: float = 1.0
    window: int | None = 8
    """Voxels along each edge of the windows of the correlation (`deepatlas.losses.correlation`); None: eq. 9 whole."""
    edges: float = 5.0
    """Of the Prewitt channel within either similarity (§5.1.5)."""
    smooth_explicit: float = 0.3
    smooth_implicit: float = 0.3
    unsolved: float = 0.3
    """Of the residual that the implicit solve leaves, in voxels: leaving it out would reward insoluble maps."""
    labels: float = 0.3
    """Of the structures drawn on the exams, in either registration, where a training is given any (§5.1.5)."""


@dataclass(frozen=True)
class Augmentation:
    """§5.5.2; cuts and tone are ours, and touch only what the network sees, never what the loss compares."""

    scale: float = 0.3
    rotation: float = 0.5
    """Radians."""
    translation: float = 0.25
    """Box units: 8 of 64 voxels."""
    cut: float = 0.3
    """Probability of losing an end of the field of view."""
    tone: float = 0.3
    """Change of soft-tissue contrast."""

    def gentler(self, share: float) -> "Augmentation":
        """The same with smaller changes of pose and size."""
        return replace(
            self, scale=share * self.scale, rotation=share * self.rotation, translation=share * self.translation
        )


@dataclass(frozen=True)
class AutoencoderStage:
    """§5.3.2."""

    steps: int = 20_000
    batch: int = 16
    rate: float = 0.005


@dataclass(frozen=True)
class WarmStage:
    """Random crops of the seed exam with known coordinates, coarsest head. §5.2.5."""

    steps: int = 7_500
    batch: int = 64
    rate: float = 0.005
    bend: float = 0.08
    """Amplitude of a random smooth deformation of the crop, in box units: a single exam has a single shape."""


@dataclass(frozen=True)
class LevelStage:
    """One resolution of the staged optimisation. §5.2.3 and §5.2.6."""

    steps: int = 7_500
    rate: float = 0.005
    warm_up: int = 500
    """Steps over which the rate grows from 10 % to 100 %."""
    loss_size: int = 64
    """Nodes along each axis of the grid on which images are compared."""


@dataclass(frozen=True)
class Fitting:
    """Fitting a smooth residual to single exams; ours, see `deepatlas.fitting`.

    A single exam has nothing to average its errors away, so the defaults hold the map smoother than training does.
    """

    steps: int = 40
    rate: float = 0.008
    """Adam's rate, in atlas units."""
    nodes: int = 8
    """Control points of the residual along each axis (`deepatlas.grid.spline`)."""
    size: int = 64
    """Nodes of the grid on which images are compared; it may be finer than the network's input."""
    learned: bool = True
    """Compare the autoencoder's features; else `deepatlas.autoencoder.Intensities`, at a quarter of the time."""
    window: int = 16
    """Even, and even when halved."""
    smooth: float = 1.0
    """These two in place of the training's window and weight of smoothness."""
    atlas_steps: int = 8
    """In training, steps of the atlas for every batch of exams that maps were fitted to; 0: it becomes their mean."""


FINE = Fitting(steps=30, rate=0.006, nodes=14, size=96, learned=False, window=12, atlas_steps=0)
"""On intensities and finer than the network's grid: more accurate than the defaults, and faster. For exams whose size
is known, as of one body part."""


@dataclass(frozen=True)
class ConsolidationStage:
    """Maps are fitted to every training exam, then the network learns to predict them from augmented exams. Ours."""

    fitting: Fitting = field(default_factory=Fitting)
    steps: int = 1_000
    rate: float = 0.002
    bend: float = 0.04
    """Amplitude of a random smooth deformation of exam and target, in box units."""
    gentle: float = 0.5
    """Share of the preset's changes of pose and size: the network has seen the large ones, and precision is next."""
    whole: float = 1.0
    """Share of the exams that are fitted and learned from, those that show most of the body first: where little of it
    is shown a fit has little to hold on to."""
    borrow: float = 0.0
    """Probability that an exam is shown only where another exam of the cohort is, `deepatlas.augment.Borrowed`; 0 also
    leaves all exams their length."""
    shapes: float = 0.0
    """Probability that an exam is shown in the shape of another of the cohort, or on the way to it,
    `deepatlas.augment.borrow_shape`."""


@dataclass(frozen=True)
class Preset:
    """Everything that decides a training."""

    name: str
    network: NetworkConfig = field(default_factory=NetworkConfig)
    autoencoder: AutoencoderStage = field(default_factory=AutoencoderStage)
    warm: WarmStage = field(default_factory=WarmStage)
    levels: tuple[LevelStage, ...] = ()
    """Coarsest first; fewer than the network has resolutions: the finer ones stay unused."""
    consolidation: tuple[ConsolidationStage, ...] = ()
    """Rounds after the levels, on the finest resolution; none in the paper."""
    batch: int = 64
    atlas_size: int = 128
    """Nodes along each axis of X; §5.1.2: double the resolution of the data."""
    decay: float = 0.995
    decay_every: int = 50
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    together: int | None = None
    """Exams of a batch whose activations are held at once; the gradient is that of the whole batch. None: all."""
    mixed: bool = False
    """bfloat16 within the networks, on a GPU; coordinates, warps and sums stay in float32."""
    compiled: bool = False
    """`torch.compile` the coordinate network, on a GPU."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    weights: Weights = field(default_factory=Weights)
    checkpoint_minutes: float = 3.0
    seed: int = 0

    @property
    def prepared_size(self) -> int:
        """Voxels along each axis that exams have to be prepared at: twice the network's where maps are fitted finer."""
        finest = max([self.network.size, *(stage.fitting.size for stage in self.consolidation)])
        return self.network.size * (2 if finest > self.network.size else 1)


@dataclass(frozen=True)
class RegSeg:
    """The 2019 system (`deepatlas.regseg`): steps of each stage (0 leaves it out), weights, and how to draw.

    Public re-implementations weigh anatomy 2 to 3, labels 3, and take 2 to 20 registration steps for one of
    segmentation; ours were found on training images (`docs/recipes.md`). ``carried=0.3, lent=0`` are the paper's terms.
    """

    registration: int = 1000
    """Steps of the registration network alone, without labels."""
    segmentation: int = 600
    """Steps of the segmentation network alone, on the labelled images."""
    semi: int = 0
    """Steps of the segmentation network with the registration held."""
    guided: int = 0
    """Steps of the registration network with the segmentation held."""
    joint: int = 500
    """Registration steps of the alternation."""
    ratio: int = 1
    """Registration steps for one of segmentation."""
    batch: int = 2
    rate: float = 2e-3
    warm_up: int = 50
    """Steps over which the rate of a stage rises."""
    clip: float = 0.5
    """Largest norm of a step's gradient: without it the registration falls back to the identity at this rate."""
    passes: int = 3
    """Times the registration network looks at a pair."""
    window: int | None = None
    """Voxels along the windows of the correlation; None: one over the whole image, as in the paper."""
    bending: float = 0.5
    """λ_r, of the bending energy in voxels."""
    anatomy: float = 3.0
    """λ_a of the registration step."""
    carried: float = 0.0
    """λ_c, the paper's anatomy loss of the segmentation step. Labels that a registration carried are less true than
    those drawn: beside lent images they taught nothing and doubled the time; without those, .3 added .02 Dice."""
    supervised: float = 3.0
    """λ_sp."""
    lent: float = 1.0
    """Share of the steps that show labelled images in the shape and tone of others, as the registration lays them
    there: their labels are true however far off it is. Half of it where several have labels. Not in the paper."""
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(scale=0.1, rotation=0.15, translation=0.06, cut=0.0, tone=0.2)
    )
    bend: float = 0.04
    """Amplitude of a random smooth deformation, in box units."""
    gentle: float = 0.3
    """Share of these changes of pose, size and shape in a registration step, whose pairs differ as it is."""
    checkpoint_minutes: float = 3.0
    seed: int = 0


REGSEG_CT = RegSeg(window=8, bending=1.0)
"""For CT laid on an atlas: over a whole CT the contrast of air and tissue decides the correlation. Chosen among three
on the pairs of `docs/results/register-pairs.json`."""


@dataclass(frozen=True)
class FineTuning:
    """Supervised fine-tuning (`deepatlas.finetune`, §3.3.3). The paper prints no settings."""

    steps: int = 3000
    batch: int = 2
    rate: float = 2e-3
    warm_up: int = 50
    """Steps over which the rate rises; then it falls along a cosine to a hundredth."""
    clip: float = 1.0
    """Largest norm of a step's gradient."""
    width: int = 16
    """Channels of the head at its finest level; twice as many at the next."""
    shape: tuple[int, int, int] | None = None
    """Voxels of the head's grid along R, A, S; by default those of the map."""
    mirrored: bool = False
    """Every other step left and right change places, also in the names of structures."""
    mixed: bool = False
    """Convolve in bfloat16: on a processor with AMX the network's step takes about half the time."""
    entropy: float = 10.0
    """Weight of the cross entropy beside soft Dice."""
    astray: float = 0.05
    """Amplitude of a random smooth error of the map, in atlas units."""
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(scale=0.12, rotation=0.15, translation=0.08, cut=0.1, tone=0.3)
    )
    bend: float = 0.06
    """Amplitude of a random smooth deformation, in box units."""
    checkpoint_minutes: float = 3.0
    seed: int = 0

    def rate_at(self, step: int) -> float:
        """Of a step."""
        fall = 0.01 + 0.495 * (1 + math.cos(math.pi * step / self.steps))
        return self.rate * min(1.0, (step + 1) / self.warm_up) * fall


@dataclass(frozen=True)
class Classifying:
    """Learning the voxel classifiers of structures (`deepatlas.classifier`)."""

    least_exams: int = 10
    """A structure that fewer exams show is drawn by its mask alone."""
    members: int = 3
    """Perceptrons side by side; each leaves out another of so many parts of the exams."""
    width: int = 96
    """Units of the first hidden layer; half as many in the second."""
    points: int = 20_000
    """Points of every exam that are learned from, drawn anew at each step."""
    batch: int = 4096
    together: int = 256
    """Points of a step that come from one exam."""
    rate: float = 1e-3
    """It rises over the first steps and falls along a cosine."""
    warm_up: int = 50
    decay: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        """Each exam needs a member that leaves it out, and each step an exam."""
        if self.members < 2 or not 0 < self.together <= self.batch:
            raise ValueError(f"expected 2 members or more and steps of at least one exam, got {self}")


PAPER = Preset(
    name="paper",
    levels=tuple(LevelStage(rate=0.005 / 2**n) for n in range(5)),
    mixed=True,
    compiled=True,
)
"""The sizes of §5.2.6: 64³, five levels of 7,500 steps, 64 exams a step. For a GPU."""

CPU = Preset(
    name="cpu",
    network=COMPACT,
    autoencoder=AutoencoderStage(steps=300, batch=8, rate=0.005),
    warm=WarmStage(steps=500, batch=8, rate=0.004),
    levels=(
        LevelStage(steps=300, rate=0.004, warm_up=40, loss_size=32),
        LevelStage(steps=600, rate=0.003, warm_up=40, loss_size=32),
    ),
    consolidation=(
        ConsolidationStage(Fitting(steps=30, nodes=12, size=48, window=8, smooth=0.3), steps=1200),
        ConsolidationStage(
            Fitting(steps=20, rate=0.006, nodes=12, size=48, window=8, smooth=0.3), steps=1200, rate=0.0015
        ),
        ConsolidationStage(Fitting(steps=25, nodes=12, window=8, smooth=0.3), steps=1200),
        ConsolidationStage(Fitting(steps=25, nodes=12, window=8, smooth=0.3), steps=1600),
        ConsolidationStage(Fitting(steps=15, nodes=12, window=8, smooth=0.3), steps=1200),
        ConsolidationStage(FINE, steps=1600),
        ConsolidationStage(FINE, steps=2000, whole=0.4, borrow=0.7),
        ConsolidationStage(FINE, steps=2400, borrow=0.5),
        ConsolidationStage(FINE, steps=2000, borrow=0.5),
        ConsolidationStage(FINE, steps=2400, borrow=0.5),
    ),
    batch=8,
    atlas_size=128,
    decay=0.94,
    augmentation=Augmentation(scale=0.2, rotation=0.3, translation=0.15),
)
"""For two CPU cores and about five hours."""

DEMO = Preset(
    name="demo",
    network=NetworkConfig(widths=(12, 24, 48, 64), head_channels=16, stem_stride=2, groups=4),
    autoencoder=AutoencoderStage(steps=60, batch=8, rate=0.005),
    warm=WarmStage(steps=400, batch=8, rate=0.004),
    levels=(
        LevelStage(steps=100, rate=0.004, warm_up=20, loss_size=32),
        LevelStage(steps=140, rate=0.003, warm_up=20, loss_size=32),
    ),
    consolidation=(
        ConsolidationStage(Fitting(steps=30, size=48, window=12, atlas_steps=20), steps=300, rate=0.003),
        ConsolidationStage(
            Fitting(steps=30, rate=0.006, nodes=16, size=96, learned=False, window=24, smooth=0.5, atlas_steps=0),
            steps=300,
        ),
    ),
    batch=8,
    atlas_size=96,
    decay=0.9,
    augmentation=Augmentation(scale=0.15, rotation=0.15, translation=0.1),
)
"""The embedded default: minutes on two CPU cores, for the phantoms."""

FINER = replace(
    CPU, name="finer", consolidation=(ConsolidationStage(FINE, steps=1600), ConsolidationStage(FINE, steps=2000))
)
"""For crops of a region, from the model that cut them (`deepatlas.cascade`)."""

JOINT = replace(
    CPU,
    name="joint",
    consolidation=(
        ConsolidationStage(
            Fitting(steps=20, nodes=14, learned=False, window=8, atlas_steps=0),
            steps=3200,
            bend=0.06,
            gentle=0.7,
            borrow=0.5,
            shapes=0.8,
        ),
    ),
    weights=Weights(labels=1.0),
)
"""For going on from a trained model with the label maps of some exams (§5.1.5)."""

PRESETS = {preset.name: preset for preset in (PAPER, CPU, DEMO, FINER, JOINT)}

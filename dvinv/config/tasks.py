"""Settings of the tasks that put images to work: distillation, pruning, continual learning, quantization."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from dvinv.config.checks import validate_bounds, validate_choices, validate_positive
from dvinv.config.training import TrainingSettings, validate_unmixed
from dvinv.errors import DvinvError

DataFreeControl = Literal['noise', 'prior_only']
Cost = Literal['filters', 'flops', 'parameters', 'latency']
ContinualLoss = Literal['deepinversion', 'always_be_dreaming']
CONTINUAL_LOSSES: tuple[ContinualLoss, ...] = get_args(ContinualLoss)
BITS = re.compile(r'w(\d+)a(\d+)')


@dataclasses.dataclass(frozen=True)
class DistillationSettings(TrainingSettings):
    """How a student learns from the teacher."""

    temperature: float = 3.0  # of the softmax of both networks
    # Weight of what the student is compared with besides the teacher's logits; 0: the paper, logits alone.
    hint: float = 0.0
    # 'layers': the inputs of BatchNorm layers that both have; 'stages': the last values of each resolution, for any
    # two networks; 'none'; or 'auto': layers where both have the same ones, else stages.
    hints: Literal['auto', 'layers', 'stages', 'none'] = 'auto'
    graft: float = 0.5  # probability, falling to 0, with which an image enters a stage from the teacher's stage before it
    hint_decay: float = 0.0  # power p of (1 - share of the updates done)^p, by which that weight falls to 0; 0: it stays
    updates_per_round: int = 0  # between two rounds of new images; the other updates follow the last round
    counts: tuple[int, ...] = ()  # students of the first so many images besides: the curve of accuracy against image count
    # Students with the same budget, from other images.
    controls: tuple[Literal['noise', 'prior_only', 'real'], ...] = ('noise', 'prior_only', 'real')

    def __post_init__(self):
        """Validates the fields.

        Raises:
          DvinvError: names the field, its value and the way out.
        """
        super().__post_init__()
        validate_positive(self, 'temperature')
        validate_bounds(self, 0, 'hint', 'hint_decay', 'updates_per_round')
        if self.hints in ('layers', 'stages') and not self.hint:
            raise DvinvError(
                f'hints is {self.hints!r}, but distillation.hint, their weight, is 0; give it a weight, 100 for instance, '
                "or set distillation.hints='auto'."
            )
        if not 0 <= self.graft <= 1:
            raise DvinvError(f'graft is {self.graft}; it is a probability, from 0 to 1.')


@dataclasses.dataclass(frozen=True)
class PruningSettings(TrainingSettings):
    """How a network loses channels; the fields of a training are those of the fine-tuning after the last step."""

    updates_per_step: int = 100  # of the fine-tuning after every step
    temperature: float = 3.0  # of the distillation from the whole network
    hint: float = 0.0  # weight of the BatchNorm inputs of the channels that are kept
    measure: Cost = 'flops'  # the cost that `target_ratio` is a share of: filters, flops, parameters or latency
    target_ratio: float = 0.5  # of the whole network's cost
    steps: int = 5  # in which it is reached, fine-tuned in between; as many per cent go in each
    importance: Literal['taylor', 'magnitude', 'random'] = 'taylor'  # or 'magnitude', 'random'
    importance_batches: int = 10  # of images that the Taylor importance is estimated on, in every step
    eta: float = 0.0  # how much of a share of the importance a share of the cost is worth (the paper's hardware-aware term)
    cost: Cost = 'latency'  # that eta is about; one of the measures
    min_channels: int = 2  # that every layer keeps
    round_to: int = 1  # channels that go at a time; with 8, widths stay such as a CPU's or GPU's convolutions like best
    ignored_layers: tuple[str, ...] = ()  # layers that keep all their channels
    adaptive_batches: int = 0  # made in every step in competition with the network just pruned; 0: the pool alone
    latency_batch: int = 128  # images in a batch that the latency is measured on
    # Networks besides: never fine-tuned, pruned by other importances, from other images.
    controls: tuple[Literal['untuned', 'magnitude', 'random', 'noise', 'prior_only', 'real'], ...] = (
        'untuned',
        'random',
        'real',
    )

    def __post_init__(self):
        """Validates the fields.

        Raises:
          DvinvError: names the field, its value and the way out.
        """
        super().__post_init__()
        if not 0 < self.target_ratio < 1:
            raise DvinvError(
                f'target_ratio is {self.target_ratio}; it must be a share of what the network costs, between 0 and 1.'
            )
        validate_bounds(self, 1, 'steps', 'importance_batches', 'min_channels', 'round_to', 'latency_batch')
        validate_bounds(self, 0, 'eta', 'updates_per_step', 'hint', 'adaptive_batches')
        validate_positive(self, 'temperature')
        if 0 < self.updates_per_step <= self.warmup:
            raise DvinvError(f'warmup is {self.warmup}, but a step has only {self.updates_per_step} updates.')

    @property
    def needs_latency(self) -> bool:
        """Whether a table of latencies must be measured."""
        return 'latency' in (self.measure, self.cost if self.eta else '')

    def target_of_step(self, step: int) -> float:
        """Returns the share of the cost that a step, 1 to `steps`, leaves."""
        return self.target_ratio ** (step / self.steps)


@dataclasses.dataclass(frozen=True)
class ContinualSettings(TrainingSettings):
    """What comes after the teacher's classes, and how it is learned."""

    # A dict a task: the fields of the group `data` in which it differs from it; {'classes': (5, 6)} are more classes of the
    # same data set, {'name': 'digits', 'image_size': 32} are those of another.
    steps: tuple[Mapping[str, Any], ...] = ()
    loss: ContinualLoss = 'deepinversion'  # the paper's; or 'always_be_dreaming', which treats old and new classes alike
    temperature: float = 1.0  # of the KL divergences from the old network
    old_images: float = 1.0  # weight of the term on synthesized images; of the first loss, see dvinv.continual.losses
    old_answers: float = 1.0  # weight of the term on the old classes' logits for new images; of the first loss
    head: float = 1.0  # weight of the term on the head; of the second loss
    features: float = 1.0  # weight of the term on the features; of the second loss
    # Networks besides: no images of old classes, LwF.MC, real images of old classes; or the other loss, by its name.
    controls: tuple[Literal['finetune', 'lwf_mc', 'replay', 'joint', 'deepinversion', 'always_be_dreaming'], ...] = (
        'finetune',
        'lwf_mc',
        'replay',
        'joint',
    )

    def __post_init__(self):
        """Validates the fields.

        Raises:
          DvinvError: names the field, its value and the choices.
        """
        super().__post_init__()
        validate_unmixed(self)
        if self.loss in self.controls:
            raise DvinvError(f'controls names {self.loss!r}, which is the loss already; leave it out.')
        validate_positive(self, 'temperature')
        validate_bounds(self, 0, *self.weights)

    @property
    def weights(self) -> dict[str, float]:
        """Weights of the losses' terms, by their names."""
        return {name: getattr(self, name) for name in ('old_images', 'old_answers', 'head', 'features')}


@dataclasses.dataclass(frozen=True)
class QuantizationSettings:
    """How a network is quantized."""

    settings: tuple[str, ...] = ('w8a8', 'w6a6', 'w4a4')  # bits of weights and of layers' inputs
    distilled: tuple[str, ...] = ('w4a4',)  # those of them that learn from the float network, on the pool
    edge_bits: int = 8  # the first and the last layer have no fewer
    float_layers: tuple[str, ...] = ()  # patterns (*, ?) of layers that stay in float32
    # Of the pool (and of each control), to take ranges from; 0: none, ranges by BatchNorm's statistics.
    images: int = 512
    ranges: Literal['minmax', 'percentile', 'mse'] = 'mse'  # 'minmax', 'percentile' or 'mse' (of least squared error)
    equalise: bool = False  # channels between two layers are brought to a like range; see docs/experiments.md
    correct: bool = True  # bias correction: removes the shift of the means by rounding, by BatchNorm's statistics
    controls: tuple[Literal['noise', 'real'], ...] = ('noise', 'real')  # ranges taken from other images
    temperature: float = 3.0  # of the distillation
    # Of the settings that are distilled.
    training: TrainingSettings = TrainingSettings(batch_size=64, learning_rate=2e-4)

    def __post_init__(self):
        """Validates the fields.

        Raises:
          DvinvError: names the field, its value and the choices.
        """
        if not self.settings:
            raise DvinvError("settings is (); name some, as in settings=('w8a8', 'w4a4').")
        for setting in self.settings:
            bits_of(setting)
        for name in self.distilled:
            if name not in self.settings:
                raise DvinvError(f'distilled names {name!r}; choose among {", ".join(self.settings)}.')
        validate_choices(self)
        if not 2 <= self.edge_bits <= 8:
            raise DvinvError(f'edge_bits is {self.edge_bits}; it must be from 2 to 8.')
        validate_bounds(self, 0, 'images')
        validate_positive(self, 'temperature')
        if not self.images and self.controls:
            raise DvinvError('images is 0, but quantization.controls names some; they need as many images.')


def bits_of(setting: str) -> tuple[int, int]:
    """Returns the bits of weights and of layers' inputs: (4, 8) for 'w4a8'.

    Raises:
      DvinvError: no such setting, or bits outside of 2 to 8.
    """
    match = BITS.fullmatch(setting) if isinstance(setting, str) else None
    if not match or not all(2 <= int(bits) <= 8 for bits in match.groups()):
        raise DvinvError(f'settings names {setting!r}; it must be like w4a8, with weights and activations of 2 to 8 bits.')
    return int(match[1]), int(match[2])

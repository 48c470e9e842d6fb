"""What of a training step is not the coordinate network, and what the fused functions make of the CPU preset."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Row, device, interleaved, operations_per_second
from deepatlas import grid, pretrain
from deepatlas.config import CPU, PAPER, Preset
from deepatlas.machine import denormals_are_zero, keep_freed_memory


def cohort(exams: int, size: int) -> pretrain.Cohorted:
    """Smooth noise in bodies: the time of a step does not hang on what the exams show."""
    where = grid.identity((size,) * 3)
    chance = torch.Generator().manual_seed(0)
    coarse = torch.rand(exams, 1, 12, 12, 12, generator=chance)
    inside = ((where * torch.tensor([1.1, 1.4, 1.0]).view(1, 3, 1, 1, 1)).norm(dim=1, keepdim=True) < 1).expand(
        exams, -1, -1, -1, -1
    )
    image = torch.where(inside, grid.resize(coarse, (size,) * 3), 0.0)
    box_to_mm = torch.diag(torch.tensor([170.0, 170.0, 170.0, 1.0], dtype=torch.float64)).expand(exams, 4, 4).clone()
    return pretrain.Cohorted(
        [f"exam_{n}" for n in range(exams)], image.to(device()), inside.to(device()), box_to_mm, size, "340mm"
    )


class Trainer:
    """A training at one of its levels, after enough of the warm start that the implicit warp has work to do."""

    def __init__(self, preset: Preset, level: int, warm: int = 12) -> None:
        keep_freed_memory()
        data = cohort(preset.batch + 1, preset.network.size)
        self.run = pretrain.Run.begin(data, preset, None, None, str(device()))
        self.run.enter(1)
        for step in range(warm):
            self.run.warm_step(1, step)
        self.run.level = level
        self.number = 2 + self.run.network.coarsest - level
        self.run.enter(self.number)
        self.count = 0

    def step(self) -> None:
        """One whole step: chance, augmentation, network, objective, backward, Adam."""
        self.count += 1
        self.run.level_step(self.number, self.count)

    def network(self) -> None:
        """The coordinate network alone, forward and backward, on as many exams."""
        c_atlas = self.run.network(self.run.data.image[: self.run.preset.batch], self.run.level)
        c_atlas.backward(torch.ones_like(c_atlas))
        self.run.network.zero_grad()


@contextmanager
def reference_functions() -> Iterator[None]:
    """Everything that has a fused kernel runs in its plain PyTorch form."""
    kept = grid.has_kernel
    grid.has_kernel = lambda *tensors: False
    try:
        yield
    finally:
        grid.has_kernel = kept


def convolutions(trainer: Trainer) -> tuple[int, int]:
    """Operations of the convolutions of a step for one exam: the coordinate network's, and the autoencoder's, which
    sees a fixed image, and two moved ones with a gradient to each."""
    run = trainer.run
    image = run.data.image[:1].clone().requires_grad_()
    with FlopCounterMode(display=False) as network:
        run.network(image.detach(), run.level).sum().backward()
    with FlopCounterMode(display=False) as moved:
        sum(features.sum() for features in run.autoencoder.features(image)).backward()
    with FlopCounterMode(display=False) as fixed, torch.no_grad():
        run.autoencoder.features(image)
    run.network.zero_grad()
    return network.get_total_flops(), fixed.get_total_flops() + 2 * moved.get_total_flops()


def step_share(name: str, level: int) -> Row:
    """Share of a step that is not the network, at the paper's sizes; with the paper's batch on a GPU only.

    The bound is the time of the autoencoder's convolutions at the machine's matrix rate; the note says what the share
    would be if there were convolutions alone.
    """
    batch = 64 if torch.cuda.is_available() else 2
    preset = replace(PAPER, batch=batch, warm=replace(PAPER.warm, batch=batch))
    trainer = Trainer(preset, level, warm=4)
    with denormals_are_zero():
        step, network = interleaved(trainer.step, trainer.network, repeats=5, seconds=60)
    of_network, of_autoencoder = convolutions(trainer)
    bound = batch * of_autoencoder / operations_per_second() / (step - network)
    alone = of_autoencoder / (of_network + of_autoencoder)
    note = f"batch {batch}: network {network:.2f} s of {step:.2f} s; share of the convolutions alone {alone:.2f}"
    return Row(name, step - network, step, (step - network) / step, bound_fraction=bound, note=note)


def train_throughput() -> Row:
    """Seconds per exam of the CPU preset's last level, with the fused functions and with the plain ones."""
    trainer = Trainer(CPU, CPU_LAST_LEVEL)

    def reference() -> None:
        with reference_functions():
            trainer.step()

    with denormals_are_zero():
        ours, plain = (s / CPU.batch for s in interleaved(trainer.step, reference, repeats=5, seconds=60))
    return Row("train_throughput", ours, plain, plain / ours, note=f"{1 / ours:.1f} exams a second")


CPU_LAST_LEVEL = len(CPU.network.widths) - len(CPU.levels)

"""The Lightning callback that writes a run's record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mfnet.data import denormalise
from mfnet.files import written_whole
from mfnet.models import evaluation_parameters, unwrapped
from mfnet.normalisation import IMAGENET

SUMMARY = "summary.json"
SAMPLES = "samples.npz"


def count_flops(network: nn.Module, size: tuple[int, int]) -> int:
    """FLOPs of one forward pass of one RGB image of ``size`` (H, W), 2 per multiply-add.

    Convolutions and matrix products are counted (``torch.utils.flop_counter``). The network runs
    in evaluation mode on stand-ins of its parameters and buffers on the meta device, so nothing
    is computed, and no buffer and no random state changes.
    """
    stand_ins = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]
    }
    dtypes = [t.dtype for t in stand_ins.values() if t.is_floating_point()]
    dtype = dtypes[0] if dtypes else torch.float32
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        with torch.inference_mode(False), torch.no_grad(), FlopCounterMode(display=False) as flops:
            image = torch.empty(1, 3, *size, device="meta", dtype=dtype)
            torch.func.functional_call(network, stand_ins, (image,))
    finally:
        for module, training in modes:
            module.training = training
    return flops.get_total_flops()


class RunRecord(Callback):
    """Write ``summary.json`` and ``samples.npz`` into the run's folder.

    ``summary.json``: model, backbone, parameters, trainable_parameters (both without those of an
    auxiliary head, which only trains), gflops (see
    :func:`count_flops`, at the validation images' size; null where it cannot be counted),
    input_size, class_names, palette; written at the first validation.
    ``samples.npz``: ``image_i`` uint8 (H, W, 3), ``truth_i`` and ``prediction_i`` uint8 (H, W) for
    a few validation images, always the same, and ``epoch``; refreshed at every validation.
    Rank 0 alone writes, only while fitting, and not in the sanity check.

    Args:
        model: name of the model; default: the class name of the module's ``network``.
        backbone: name of the backbone; default: empty.
        samples: number of validation images.
        folder: the run's folder; default: ``trainer.log_dir``, which is the first logger's.
    """

    def __init__(
        self,
        model: str = "",
        backbone: str = "",
        samples: int = 4,
        folder: str | Path | None = None,
    ) -> None:
        self.model = model
        self.backbone = backbone
        self.samples = samples
        self.folder = folder
        self._chosen: list[tuple[Tensor, Tensor]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.fast_dev_run or trainer.state.fn != TrainerFn.FITTING:
            return
        # A broadcast: every rank has to ask.
        log_dir = trainer.log_dir if self.folder is None else self.folder
        if log_dir is None or not trainer.is_global_zero:
            return
        folder = Path(log_dir)
        if not self._chosen:
            dataset = trainer.val_dataloaders.dataset
            count = min(self.samples, len(dataset))
            self._chosen = [dataset[index * len(dataset) // count] for index in range(count)]
            self._write_summary(folder / SUMMARY, trainer, pl_module)
        self._write_samples(folder / SAMPLES, trainer, pl_module)

    def _write_summary(self, path: Path, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        network = unwrapped(pl_module.network)
        size = tuple(self._chosen[0][0].shape[-2:])
        try:
            gflops = count_flops(network, size) / 1e9
        except (RuntimeError, NotImplementedError) as error:
            # A foreign network may not run on the meta device; that must not end its training.
            rank_zero_warn(f"the FLOPs of {type(network).__name__} cannot be counted: {error}")
            gflops = None
        parameters = evaluation_parameters(network)
        summary = {
            "model": self.model or type(network).__name__,
            "backbone": self.backbone,
            "parameters": sum(p.numel() for p in parameters),
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "gflops": gflops,
            "input_size": size,
            "class_names": list(trainer.datamodule.class_names),
            "palette": [list(map(int, colour)) for colour in trainer.datamodule.palette],
        }
        with written_whole(path) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _write_samples(self, path: Path, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        arrays: dict[str, Any] = {"epoch": trainer.current_epoch}
        normalisation = getattr(pl_module, "normalisation", IMAGENET)
        for index, (image, mask) in enumerate(self._chosen):
            with torch.no_grad(), trainer.precision_plugin.val_step_context():
                images = trainer.precision_plugin.convert_input(image[None].to(pl_module.device))
                logits = pl_module(images)
            arrays[f"image_{index}"] = denormalise(image, normalisation).permute(1, 2, 0).numpy()
            arrays[f"truth_{index}"] = mask.numpy().astype(np.uint8)
            arrays[f"prediction_{index}"] = logits[0].argmax(0).cpu().numpy().astype(np.uint8)
        with written_whole(path) as partial:
            np.savez_compressed(partial, **arrays)

"""BatchNorm over all ranks, on GPUs and on CPUs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.plugins import TorchSyncBatchNorm
from timm.layers import convert_sync_batchnorm
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNormPlugin(TorchSyncBatchNorm):
    """What ``Trainer(sync_batchnorm=True)`` does, for every network and device.

    timm's conversion keeps the activation inside its ``BatchNormAct2d``, which torch's drops.
    On CPUs, where ``torch.nn.SyncBatchNorm`` refuses to run, ``CPUSyncBatchNorm`` stands in.
    Converted layers stay when training ends: they evaluate as plain BatchNorm.
    """

    def apply(self, model: Any) -> nn.Module:
        model = convert_sync_batchnorm(model)
        if model.trainer.strategy.root_device.type == "cpu":
            stand_ins: dict[type, type] = {
                nn.SyncBatchNorm: CPUSyncBatchNorm,
                SyncBatchNormAct: _CPUSyncBatchNormAct,
            }
            for module in model.modules():
                module.__class__ = stand_ins.get(type(module), type(module))
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        return model


class CPUSyncBatchNorm(_BatchNorm):
    """``torch.nn.SyncBatchNorm`` for CPU tensors: ``(B, C, ...)`` to the same shape.

    In training, mean and variance are those of the batches of all ranks; the gradient flows
    through them. (No subclass: ``DistributedDataParallel`` refuses those on CPUs.)
    """

    # None only where track_running_stats is False.
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank will do, as for ``SyncBatchNorm``."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = [dim for dim in range(x.ndim) if dim != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        count = _AllReduceSum.apply(values.new_tensor(values.numel() / values.shape[1]))
        mean = _AllReduceSum.apply(values.sum(dims)) / count
        centered = values - mean.view(shape)
        var = _AllReduceSum.apply(centered.square().sum(dims)) / count
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # the mean of all batches
                momentum = 1 / int(self.num_batches_tracked)
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * count / (count - 1), momentum)
        y = centered * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)


class _CPUSyncBatchNormAct(CPUSyncBatchNorm):
    """The same for timm's ``SyncBatchNormAct``, whose submodules it finds in its place."""

    act: nn.Module
    drop: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks. Every rank's loss depends on it, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total

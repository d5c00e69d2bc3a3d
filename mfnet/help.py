"""``mfnet --help``, ``mfnet --version``, and the screen of ``mfnet fit --help``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from jsonargparse import ArgumentParser

import mfnet.data
from mfnet.contexts import CONTEXTS
from mfnet.inference import TILE
from mfnet.models import create_model, list_models

COMMANDS = """\
usage: mfnet COMMAND ...

Semantic segmentation with factorized context.

  mfnet fit            train a network
  mfnet validate       score a network on the validation images
  mfnet test           score a network on the test images
  mfnet predict        predict images
  mfnet export RUN     write a trained network as ONNX, torch.export, AOTInductor or weights
  mfnet video RUN FILM OUTPUT   paint a trained network's classes over a film
  mfnet report RUN...  curves, predictions, confusion matrices and tables of finished runs
  mfnet demo           train a small network on generated images and show what it learned

mfnet COMMAND --help says more; mfnet --version tells versions."""

FLAGS = """\
usage: mfnet {command} --config NAME_OR_FILE [--FLAG VALUE ...]

{summary}
  {example}

  --config, -c C           a file, or {configs}
                           what follows overrides it; several are merged
data
  --data CLASS             {classes}, or a class path
  --data.root DIR          folder of the data set
  --data.recipe R          augmentation: modern, paper
  --data.crop_size N       training crop, N or [H,W]            (513)
  --data.resize [H,W]      resize images and masks first
  --data.batch_size N      images per process in a step         (4)
  --data.num_workers N     processes that load images
  --data.channels N        of the images: 1 gray, 3 RGB, or the bands of a TIFF  (3)
  --data.label_map M       what numbers or colors in masks mean: '{{0: 0, 255: 1}}', a YAML file
  --data.predict_images P  what predict reads: files, folders, globs
  --data.help CLASS        all options of CLASS
network
  --model.network.name N               {models}
  --model.network.backbone B           a timm model             (resnet50)
  --model.network.backbone_weights W   timm, a file, or null: random
  --model.network.multi_grid [2,4,8]   dilations of a ResNet's last layer
  --model.network.context C            {contexts}
  --model.network.context_size [h,w]   grid of a learned Z      ([33,33])
  --model.network.init I               of a learned Y, Z: normal, uniform
  --model.network.factorizer F         of mf: learned, em, nmf, vq, cd, double_attention
  --model.network.auxiliary_head true  a second head that only trains
  --model.network CLASS                another network, by its class path
  --model.network.help                 create_model's options
{how}the run
  --trainer.default_root_dir DIR   its folder; default runs/<config>, with another network
                                   than the configuration's runs/<config>-<network>
  --ckpt_path P                    {checkpoint}
  --trainer.devices N, --trainer.accelerator cpu|gpu, --trainer.precision bf16-mixed
  --overlays.output DIR            where predict writes         (predictions)
  --overlays.kinds [K,...]         what: overlay, mask, probabilities
  --print_config                   the whole configuration, to be used with --config

mfnet {command} --help_all lists every flag of Lightning's Trainer too."""

TRAINING = """\
training
  --model.init_from RUN_FILE_OR_NAME        a trained network to start from; docs/training.md
  --model.freeze_backbone true              or statistics: of BatchNorm alone
  --model.backbone_lr, --model.head_lr LR   (0.007, 0.07)
  --model.momentum, --model.weight_decay    of SGD                        (0.9, 0.0005)
  --optimizer CLASS, --lr_scheduler CLASS   others than SGD and polynomial decay; docs/training.md
  --model.lr_warmup E                       epochs of linear warm-up      (0)
  --model.loss CLASS                        called as loss(logits, masks) (cross entropy)
  --model.class_weights W                   a number for each class, or auto
  --model.auxiliary_weight W                of auxiliary outputs' loss    (0.4)
  --model.parameter_groups G                two_rates, or published: as the paper's code
  --model.image_mean, --model.image_std     [R,G,B]; by default what the backbone's weights want
  --model.reconstruction_weight W           of the context's own loss     (0.1)
  --model.reconstruction_warmup N           epochs without that loss      (10)
  --trainer.max_epochs N           {epochs} unless max_epochs, max_steps or max_time is given
  --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/mIoU
      --trainer.callbacks.mode=max         any Lightning callback
  --seed_everything N              (0)
"""

EVALUATION = f"""\
how images are shown to the network
  --tile N                         larger ones in windows of N x N   (predict: {TILE}, else: whole)
  --overlap S                      share of a window that its neighbors cover   (0.25)
  --scales [0.5,1,1.5]             averaged over scales
  --flip true                      averaged with the mirrored image
"""

CONTINUED = "a file, or best or last of the folder; last continues a run"
EVALUATED = f"""\
a run's folder, a checkpoint, a folder of weights, best, last,
{" " * 35}or a shipped network: {{networks}}"""

SUMMARIES = {
    "fit": ("Train a network.", "mfnet fit --config camvid --data.root DIR"),
    "validate": (
        "Score a network on the validation images.",
        "mfnet validate --config runs/camvid/config.yaml --ckpt_path best",
    ),
    "test": (
        "Score a network on the test images.",
        "mfnet test --config runs/camvid/config.yaml --ckpt_path best",
    ),
    "predict": (
        "Predict images.",
        "mfnet predict --ckpt_path camvid_light --data.predict_images photos/*.jpg",
    ),
    "demo": (
        "Train a small network on generated images; takes the flags of fit.",
        "mfnet demo --trainer.max_epochs 5",
    ),
}


def data_classes() -> list[str]:
    """The data sets that ``--data`` knows by their short names."""
    base = mfnet.data.SegmentationDataModule
    return [
        name
        for name, item in vars(mfnet.data).items()
        if isinstance(item, type) and issubclass(item, base) and item is not base
    ]


def nested_flags() -> list[str]:
    """The flags that belong to a class or function which is itself an argument's value."""
    classes = [getattr(mfnet.data, name) for name in data_classes()]
    initializers = [base.__init__ for cls in classes for base in cls.__mro__[:-1]]
    data = [name for function in initializers for name in inspect.signature(function).parameters]
    network = list(inspect.signature(create_model).parameters)
    names = [f"--data.{name}" for name in data if name not in ("self", "args", "kwargs")]
    names += [f"--model.network.{name}" for name in network if name != "kwargs"]
    names += [
        f"--model.network.dict_kwargs.{option.name}"
        for build in CONTEXTS.values()
        for option in _context_options(build)
        if option.name not in network
    ]
    return list(dict.fromkeys(names))


def network_options() -> str:
    """What ``create_model`` takes, for ``--model.network.help``."""
    parser = ArgumentParser(prog="mfnet fit", add_help=False)
    parser.add_function_arguments(
        create_model, "model.network", skip={"num_classes", "in_channels"}
    )
    lines = [parser.format_help(), "--model.network.dict_kwargs.OPTION, by context:"]
    for name, build in CONTEXTS.items():
        own = [str(option) for option in _context_options(build) if option.name != "context_size"]
        lines.append(f"  {name}: {', '.join(own) or '-'}")
    lines.append("--model.network.help CLASS_PATH: the options of another network")
    return "\n".join(lines)


def _context_options(build: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters of a context, after those that the network sets."""
    options = list(inspect.signature(build).parameters.values())[2:]
    return [option for option in options if option.name not in ("num_classes", "kwargs")]


def screen(command: str, configs: list[str], networks: list[str], epochs: int) -> str:
    """What people set, for ``mfnet COMMAND --help``; configs and networks are those shipped."""
    summary, example = SUMMARIES[command]
    contexts = list(CONTEXTS)
    half = len(contexts) // 2
    trains = command in ("fit", "demo")
    return FLAGS.format(
        command=command,
        summary=summary,
        example=example,
        configs=", ".join(configs),
        classes=", ".join(data_classes()),
        models=", ".join(list_models()),
        contexts=f"{', '.join(contexts[:half])},\n{' ' * 39}{', '.join(contexts[half:])}",
        how=TRAINING.format(epochs=epochs) if trains else EVALUATION,
        checkpoint=CONTINUED if trains else EVALUATED.format(networks=", ".join(networks)),
    )


def versions() -> str:
    """One line; mfops and mfnet are one distribution."""
    own = version("mfops")
    others = [f"{name} {version(name)}" for name in ("torch", "lightning")]
    return ", ".join([f"mfnet {own}", f"mfops {own}", *others])

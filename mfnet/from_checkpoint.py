"""What a command line need not say because the checkpoint it names tells it."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

from mfnet.data.datamodule import CHANNELS

PHOTOGRAPHS = "mfnet.data.Photographs"

_OF_PHOTOGRAPHS = ("predict_images", "resize", "num_workers")


def defaults(record: dict[str, Any], subcommand: str, data: Namespace) -> dict[str, Any]:
    """Defaults of the subcommand's parser, from a checkpoint's record and the data asked for."""
    values: dict[str, Any] = {}
    if record.get("network"):
        values["model.network"] = record["network"]
    if subcommand == "predict":
        arguments = {"resize": record.get("resize"), "channels": _channels(record)}
        values["data"] = {"class_path": PHOTOGRAPHS, "init_args": arguments}
    elif record.get("resize") and "resize" in data.get("init_args", {}):
        resize = {"resize": record["resize"]}
        values["data"] = {"class_path": data.class_path, "init_args": resize}
    return values


def take_own_options(network: Namespace, record: dict[str, Any], given: Namespace) -> None:
    """Of a network that is not the checkpoint's: the options of flags and files, ``given``, alone.

    jsonargparse keeps those of the defaults, whatever network they belong to.
    """

    def kind(network: Any) -> tuple[Any, ...]:
        arguments = network.get("init_args") or {}
        return network["class_path"], arguments.get("name"), arguments.get("context")

    if record.get("network") and kind(network) != kind(record["network"]):
        network["dict_kwargs"] = given.get("dict_kwargs", {})


def _channels(record: dict[str, Any]) -> int:
    return len(record["normalization"]["mean"]) if "normalization" in record else CHANNELS


def with_channels(data: Namespace, record: dict[str, Any]) -> Namespace:
    """The data of an evaluation, with the checkpoint's channels where none are chosen."""
    arguments = data.get("init_args", Namespace())
    if arguments.get("channels") == CHANNELS:
        arguments["channels"] = _channels(record)
    return data


def photographs(data: Namespace, record: dict[str, Any]) -> Namespace:
    """The data of a prediction, in place of a data set that need not be at hand."""
    given = data.get("init_args", Namespace())
    kept = {name: given[name] for name in _OF_PHOTOGRAPHS if name in given}
    arguments = Namespace(
        class_names=record["class_names"],
        palette=record.get("palette"),
        channels=_channels(record),
        **kept,
    )
    return Namespace(class_path=PHOTOGRAPHS, init_args=arguments)

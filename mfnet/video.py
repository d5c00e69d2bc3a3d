"""``mfnet video RUN FILM OUTPUT``: a film with the classes painted over its pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mfnet.files import atomic_write, refuse_to_replace
from mfnet.inference import TILE
from mfnet.pretrained import SOURCE, TrainedNetwork, load
from mfnet.visualize import overlay


def paint_film(
    network: TrainedNetwork, source: str | Path, output: str | Path, tile: int | None = TILE
) -> int:
    """Write a film with the network's classes over it, upright: H.264, without sound.

    Args:
        network: what ``mfnet.load`` returns.
        source: a film that FFmpeg reads.
        output: the film to write, for instance ``out.mp4``. H.264 wants even numbers of rows and
            columns: an odd last one is left out.
        tile: see ``mfnet.TrainedNetwork.predict``.

    Returns:
        The number of pictures.

    Raises:
        FileNotFoundError: there is no file at ``source``.
        ValueError: PyAV is not installed, ``source`` is no film, or ``output`` is that very file or
            has an ending that is no film's.
    """
    try:
        import av
    except ModuleNotFoundError:
        raise ValueError("video needs PyAV: pip install av") from None
    if not Path(source).is_file():
        raise FileNotFoundError(f"{source}: no such file")
    refuse_to_replace(source, Path(output))
    pictures = 0
    try:
        with atomic_write(Path(output)) as partial, av.open(str(source)) as film:
            if not film.streams.video:
                raise ValueError("expected a film, got a file without pictures")
            read = film.streams.video[0]
            with av.open(str(partial), "w") as painted:
                written = painted.add_stream("libx264", rate=read.average_rate or 25)
                written.pix_fmt = "yuv420p"
                for frame in film.decode(read):
                    image = frame.to_image().rotate(frame.rotation, expand=True)
                    if not pictures:
                        written.width, written.height = (side // 2 * 2 for side in image.size)
                    labels = network.predict(image, tile=tile).numpy()
                    picture: Any = overlay(np.array(image), labels, network.palette)
                    picture = np.ascontiguousarray(picture[: written.height, : written.width])
                    painted.mux(written.encode(av.VideoFrame.from_ndarray(picture)))
                    pictures += 1
                painted.mux(written.encode())
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{source} to {output}: {error}") from error
    return pictures


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``mfnet video``; user errors are raised, for the caller to print."""
    parser = argparse.ArgumentParser(
        prog="mfnet video", description="Paint a trained network's classes over a film."
    )
    parser.add_argument("run", metavar="RUN", help=SOURCE)
    parser.add_argument("film", metavar="FILM", help="a film that FFmpeg reads")
    parser.add_argument("output", metavar="OUTPUT", help="the film to write: out.mp4")
    parser.add_argument(
        "--tile",
        type=int,
        default=TILE,
        help="side of the windows that larger pictures are cut into",
    )
    options = parser.parse_args(arguments)
    pictures = paint_film(load(options.run), options.film, options.output, options.tile)
    print(f"{pictures} pictures painted: {options.output}")

"""Define `idgrpo ingest`, which makes clips of people from films."""

import argparse

from jax_idgrpo.cli.paths import existing, start_runtime
from jax_idgrpo.workdir import require_writable


def ingest_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `ingest`."""
    add = parser.add_argument
    add("--videos", required=True, metavar="DIR", help="folder of films, or one film")
    add("--out", required=True, metavar="DIR", help="folder of clips, photos and tables")
    add(
        "--faces",
        required=True,
        metavar="DIR",
        help='folder of face networks; "photographs" is the set that `idgrpo-convert faces '
        '--photographs` makes, "embedded" knows synthetic people only',
    )
    add(
        "--captions",
        metavar="CSV",
        help="columns video (or path) and prompt; without it, a .txt file beside each film",
    )
    add(
        "--seconds",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        default=(2.0, 20.0),
        help="length of a clip (default 2 20)",
    )
    add(
        "--luminance",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        default=(10.0, 210.0),
        help="mean, 0 to 255 (default 10 210)",
    )
    add(
        "--sharp",
        type=float,
        default=20.0,
        help="least variance of the Laplacian of the luminance, 256 pixels high (default 20)",
    )
    add(
        "--motion",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        default=(0.002, 0.25),
        help="mean difference of neighbouring frames in units of [-1, 1] (default 0.002 0.25)",
    )
    add(
        "--stalled",
        type=float,
        default=0.3,
        help="largest share of steps with less than the least motion (default 0.3)",
    )
    add(
        "--people",
        type=int,
        nargs=2,
        metavar=("LEAST", "MOST"),
        default=(1, 4),
        help="people of a clip (default 1 4)",
    )
    add("--face", type=float, default=48.0, help="least side of a face in pixels (default 48)")
    add(
        "--share",
        type=float,
        default=0.005,
        help="least area of a face as a share of the picture (default 0.005)",
    )
    add(
        "--turn",
        type=float,
        default=0.0,
        help="least range of every person's yaw in degrees (default 0)",
    )
    add(
        "--same",
        type=float,
        default=0.55,
        help="least mean cosine between the clips of one person (default 0.55)",
    )


def ingest(arguments: argparse.Namespace, overrides: list[tuple[str, str]]) -> None:
    """Make clips of people from films."""
    videos = existing(arguments.videos, "--videos", "pass a folder of films")
    captions = arguments.captions
    if captions is not None:
        captions = existing(captions, "--captions", "pass a CSV with the columns video and prompt")
    out = require_writable(arguments.out, "--out")
    from jax_idgrpo.config import RewardConfig

    networks = RewardConfig(faces=arguments.faces).folder()
    start_runtime()
    from jax_idgrpo.ingest import command
    from jax_idgrpo.ingest.faces import FaceLimits
    from jax_idgrpo.ingest.films import Settings
    from jax_idgrpo.ingest.frames import Limits

    settings = Settings(
        Limits(
            tuple(arguments.seconds),
            tuple(arguments.luminance),
            arguments.sharp,
            tuple(arguments.motion),
            arguments.stalled,
        ),
        FaceLimits(tuple(arguments.people), arguments.face, arguments.share, arguments.turn),
    )
    command.ingest(videos, out, networks, settings, arguments.same, captions)

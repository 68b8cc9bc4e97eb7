"""Options of the task "adapter", and the clips or pairs that it trains on.

Clips are those of `video_clips`, as `idgrpo ingest` writes them; pairs those of `csv_source`.
"""

import dataclasses
import difflib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_idgrpo.data.controls import file_digest
from jax_idgrpo.data.places import Places
from jax_idgrpo.data.video import File
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel.hosts import print_once
from jax_idgrpo.preferences.csv_source import Pair, load_pairs, pair_digests
from jax_idgrpo.preferences.video_clips import Clip, read_clips, split_of


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """`finetune.options` of this task.

    Attributes:
      clips: folder with clips.csv, or a CSV in its format.
      pairs: CSV of preference pairs, for loss "dpo".
      loss: "flow" (flow matching on clips) or "dpo" (on pairs).
      dimension: column of the labels of the pairs.
      references: "random" draws among a person's photos at every step; "listed" uses ref_paths.
      text_dropout: share of texts that are replaced by the negative prompt, in [0, 1).
      photo_dropout: share of rows that are trained without photos, in [0, 1).
      face_weight: loss weight of cells inside faces; others have 1.
      identity_weight: weight of 1 - the configuration's reward of the denoised video, on rows with
        little noise (`training.identity_loss`), for loss "flow"; 0 decodes nothing.
      augment: crop photos about the face and replace the background by white, in half of the draws.
      split: "train" holds out the identity clusters of the splits "rl" and "eval"; "all" trains on
        every clip and measures no held-out loss.
      evaluate_every: steps between measurements of the held-out loss.
      cache: folder of encoded clips and photos; "" is `latents` in the workdir.
    """

    clips: str = ""
    pairs: str = ""
    loss: str = "flow"
    dimension: str = "SA"
    references: str = "random"
    text_dropout: float = 0.1
    photo_dropout: float = 0.1
    face_weight: float = 1.0
    identity_weight: float = 0.0
    augment: bool = True
    split: str = "train"
    evaluate_every: int = 100
    cache: str = ""

    def __post_init__(self) -> None:
        choices = {
            "loss": ("flow", "dpo"),
            "references": ("random", "listed"),
            "split": ("train", "all"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"finetune.options: {name} is {getattr(self, name)!r}; use {' or '.join(allowed)}"
                )
        for name in ("text_dropout", "photo_dropout"):
            _check(name, getattr(self, name), 0.0, 1.0)
        for name in ("face_weight", "identity_weight"):
            _check(name, getattr(self, name), 0.0, 1e6)
        if self.identity_weight and self.loss == "dpo":
            raise UserError(
                "finetune.options: identity_weight is a part of loss flow; leave it out of loss dpo"
            )
        _check("evaluate_every", float(self.evaluate_every), 1.0, 2.0**31)
        needed, other = ("clips", "pairs") if self.loss == "flow" else ("pairs", "clips")
        if not getattr(self, needed):
            raise UserError(
                f"finetune.options has no {needed}, which loss {self.loss} trains on; name "
                + ("a folder with clips.csv" if needed == "clips" else "a CSV of preference pairs")
            )
        if getattr(self, other):
            raise UserError(
                f"finetune.options: loss {self.loss} reads no {other}; leave them out, or use loss "
                f"{'dpo' if other == 'pairs' else 'flow'}"
            )


def _check(name: str, value: float, least: float, below: float) -> None:
    if not least <= value < below:
        raise UserError(
            f"finetune.options: {name} is {value}; use a number from {least:g} to below {below:g}"
        )


def read_options(values: Mapping[str, object]) -> AdapterOptions:
    """Read the options of the task from the configuration.

    Raises:
      UserError: an option is unknown or invalid.
    """
    known = {field.name: type(field.default) for field in dataclasses.fields(AdapterOptions)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)[0]
            raise UserError(
                f"finetune.options has no {name!r}; did you mean {match}? The options of the task "
                f"adapter are {', '.join(known)}"
            )
        kind = known[name]
        given[name] = float(value) if kind is float and type(value) is int else value
        if type(given[name]) is not kind:
            wanted = {str: "a text", bool: "true or false", int: "a whole number"}
            raise UserError(
                f"finetune.options: {name} is {value!r}; use {wanted.get(kind, 'a number')}"
            )
    return AdapterOptions(**given)


# ---- rows ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Reference:
    """A photo of one person. own: whether it was cut from the clip that it is a reference of."""

    file: File
    own: bool = False


@dataclasses.dataclass(frozen=True)
class TrainedVideo:
    """A video to train on.

    references: the photos of each person among which a step draws; the first one is listed.
    places: boxes of the people, from the first to the last frame; None without.
    """

    path: Path
    prompt: str
    references: tuple[tuple[Reference, ...], ...]
    places: Places | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a run trains on: videos, or pairs of them as winner and loser; and held-out videos."""

    videos: Sequence[TrainedVideo]
    pairs: Sequence[tuple[TrainedVideo, TrainedVideo]] = ()
    held_out: Sequence[TrainedVideo] = ()
    digests: Sequence[str] = ()

    @property
    def all(self) -> list[TrainedVideo]:
        """All videos."""
        return [*self.videos, *(video for pair in self.pairs for video in pair), *self.held_out]


def read_rows_of(options: AdapterOptions, max_people: int) -> Rows:
    """Read the clips or pairs that the options name.

    Raises:
      UserError: they cannot be used, or a row has more people than `max_people`.
    """
    if options.loss == "dpo":
        return _pairs(Path(options.pairs), options.dimension, max_people)
    place = Path(options.clips)
    if place.is_dir() and not (place / "clips.csv").is_file():
        raise UserError(
            f"finetune.options: clips {place} holds no clips.csv; name a folder that idgrpo ingest "
            "wrote, or a CSV with the header path,ref_paths,prompt"
        )
    csv = place / "clips.csv" if place.is_dir() else place
    listed = read_clips(csv)
    if not listed:
        raise UserError(f"clips {csv}: no rows below the header; write one clip per line")
    for clip in listed:
        _check_people(str(clip.video), len(clip.references), max_people)
    trained = [c for c in listed if options.split == "all" or split_of(c.cluster) == "train"]
    held_out = [c for c in listed if options.split != "all" and split_of(c.cluster) == "eval"]
    clusters = len({clip.cluster for clip in listed})
    if not trained:
        raise UserError(
            f"clips {csv}: none of the {clusters} identity clusters is in the split train; add "
            "clips of other people, or set split all in finetune.options"
        )
    print_once(
        f"{len(trained)} of {len(listed)} clips are trained on, {len(held_out)} are held out; "
        f"{clusters} identity clusters"
    )
    return Rows(
        [_trained(clip, options) for clip in trained],
        held_out=[_trained(clip, options) for clip in held_out],
        digests=[_digest(clip) for clip in (*trained, *held_out)],
    )


def _check_people(name: str, people: int, most: int) -> None:
    if people > most:
        raise UserError(
            f"{name}: has {people} reference photos and data.max_people is {most}; raise it, or "
            "leave the row out"
        )


def _digest(clip: Clip) -> str:
    """Digest a clip in the form of `data.prompts.row_digests`, by the content of its files."""

    def short(*values: object) -> str:
        return hashlib.sha256(repr(values).encode()).hexdigest()[:12]

    photos = [*clip.references, *(photo for group in clip.more for photo in group)]
    files = [clip.video, *(photo for photo in photos if isinstance(photo, Path))]
    places = [dataclasses.astuple(clip.places)] if clip.places else []
    return f"{short(clip.prompt)}-{short(*map(file_digest, files), *places)}"


def _trained(clip: Clip, options: AdapterOptions) -> TrainedVideo:
    def photos_of(person: int) -> tuple[Reference, ...]:
        files = [clip.references[person]]
        if options.references == "random":
            files += clip.more[person] if clip.more else ()
        found = [Reference(file, cut_from(file, clip.video)) for file in dict.fromkeys(files)]
        if options.references == "listed":
            return tuple(dataclasses.replace(photo, own=False) for photo in found)
        return tuple(photo for photo in found if not photo.own) or tuple(found)

    people = range(len(clip.references))
    photos = tuple(photos_of(person) for person in people)
    places = clip.places if clip.places and clip.places.boxes else None
    return TrainedVideo(clip.video, clip.prompt, photos, places)


def cut_from(photo: File, video: Path) -> bool:
    """Return whether a photo was cut from a clip, by the names that `idgrpo ingest` gives them."""
    return (
        isinstance(photo, Path)
        and photo.resolve().parent == video.resolve().parent
        and photo.stem.startswith(f"{video.stem}-")
    )


def _pairs(csv: Path, dimension: str, max_people: int) -> Rows:
    """Read the pairs that have a winner, as (winner, loser)."""
    listed = load_pairs(csv, (dimension,))
    decided = [pair for pair in listed if pair.labels[0] in (1, -1)]
    if not decided:
        raise UserError(
            f"pairs {csv}: none of the {len(listed)} pairs has the label A or B in {dimension}; "
            "dpo needs pairs with a winner"
        )
    print_once(f"{len(decided)} of {len(listed)} pairs have a winner and are trained on")

    def video(pair: Pair, side: int) -> TrainedVideo:
        path = pair.videos[side]
        assert isinstance(path, Path)  # rows of a CSV
        _check_people(str(path), len(pair.references), max_people)
        references = tuple((Reference(file),) for file in pair.references)
        return TrainedVideo(path, pair.prompt, references)

    pairs = [
        (video(pair, winner), video(pair, 1 - winner))
        for pair in decided
        for winner in [0 if pair.labels[0] == 1 else 1]
    ]
    return Rows([], pairs=pairs, digests=pair_digests(decided))

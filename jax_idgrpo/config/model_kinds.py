"""List the kinds of video models: how each is conditioned on reference photos.

Phantom, RefAlign and SkyReels-V3 have plain Wan's tensors and differ only in what is listed here.
All three append the latents of the photos to those of the video, on the time axis, and never
denoise them. Their photos are prepared in the same way (`conditioning.whole_canvas`) and their
guidance has the same form (`sampling.policy`).

Sources: Phantom-video/Phantom, `subject2video.py`; gudaochangsheng/RefAlign,
`diffsynth/pipelines/wan_video_new6.py` and `diffsynth/models/wan_video_dit.py` (`DiTBlock`);
SkyworkAI/SkyReels-V3, `skyreels_v3/pipelines/reference_to_video_pipeline.py`.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelKind:
    """One kind of video model.

    Attributes:
      shift: flow shift of a checkpoint without a scheduler.
      image_guidance: default guidance scale of the photos; None for a model that has no branch
        without photos.
      most_photos: photos per video that the model takes; 0 for none.
      slots: latent frames after every video, for its photos. Slots without a photo are zero latents
        that are attended to. 0 has one per photo, and the padding of a batch is masked.
      photos_read_text: whether the tokens of the photos attend to the text.
      photos_sampled: whether the latents of a photo are drawn from the VAE's posterior instead of
        being its mean.
      surplus: pattern of further tensors that the published file may hold and that sampling does
        not need; "" for none.
      class_name: class of the transformer in its published `config.json`, if only this kind has it.
      license: of the published weights.
    """

    shift: float
    image_guidance: float | None = None
    most_photos: int = 0
    slots: int = 0
    photos_read_text: bool = True
    photos_sampled: bool = False
    surplus: str = ""
    class_name: str = ""
    license: str = "apache-2.0"


MODEL_KINDS = {
    "vace": ModelKind(shift=3.0, most_photos=8),
    "wan": ModelKind(shift=3.0),
    "phantom": ModelKind(shift=5.0, image_guidance=5.0, most_photos=4, surplus=".*"),
    "refalign": ModelKind(
        shift=5.0,
        image_guidance=5.0,
        most_photos=4,
        photos_read_text=False,
        surplus=r"(blocks\.\d+\.)?input_mlp\.",  # of the alignment loss, in training only
    ),
    "skyreels": ModelKind(
        shift=5.0,
        image_guidance=1.0,
        most_photos=4,
        slots=4,
        photos_sampled=True,
        class_name="SkyReelsA2WanI2v3DModel",
        license="other",
    ),
}
REFERENCE_KINDS = tuple(name for name, kind in MODEL_KINDS.items() if kind.most_photos)
"""Kinds that take reference photos: the choices of `model.kind`."""

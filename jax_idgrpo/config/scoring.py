"""Define the configuration of the reward and of the evaluation."""

import dataclasses
import math
import os
import re
from pathlib import Path
from typing import Any, ClassVar

from jax_idgrpo.config.options import Section, option, require
from jax_idgrpo.config.video_model import EMBEDDED, require_size
from jax_idgrpo.config.weakened import HELP, weak_branch
from jax_idgrpo.errors import closest

PENALTIES = (
    "missing",
    "duplicated",
    "swapped",
    "switched",
    "blended",
    "area",
    "copied",
    "confused",
    "unrecognised",
)
CONTRAST = "recognised_log"
"""Term of `reward.mixture` that, like the penalty `unrecognised`, compares people across prompts."""
PERSON_TERMS = ("person_similarity", "person_similarity_min")
"""Terms of the network of `reward.people`."""
PLACED = "placed"
"""Term of `reward.mixture` that says whether people are where the column `places` puts them."""
TURNING = "turning"
"""Term of `reward.mixture` that says how far heads turn."""
DEEPFACE = r"deepface:[\w-]+/[\w-]+"
ADDRESS = r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?(/[\w./~%-]*)?"  # no user, no query
PENALTY_WEIGHTS = {"copied": 0.5}  # default weights of penalties; the others have 0


def photographs_folder() -> Path:
    """Return the folder of the face networks for photographs, in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path("~/.cache").expanduser()
    return base / "jax-idgrpo" / "faces" / "photographs"


@dataclasses.dataclass(frozen=True)
class RewardConfig(Section):
    """The reward: face similarity, a trained head, a VLM, deepface, a server, or your own function."""

    section: ClassVar[str] = "reward"

    faces: str = option(
        "embedded",
        'folder of face networks; "embedded" is the bundled set for synthetic people, '
        '"photographs" the set that `idgrpo-convert faces --photographs` makes; "" = none',
    )
    custom: str = option(
        "", 'your function, as "package.module:function" or "file.py:function"; "" = none'
    )
    custom_timeout: float = option(
        600.0, "seconds after which a call of reward.custom is abandoned", above=0
    )
    backend: str = option(
        "",
        "deepface:DETECTOR/MODEL scores with deepface on the host, http://HOST:PORT/PATH by a server; "
        '"" = the networks of reward.faces',
    )
    http_timeout: float = option(
        120.0, "seconds after which a request to an http reward.backend is abandoned", above=0
    )
    http_retries: int = option(
        3, "further attempts of a failed request to an http reward.backend", least=0
    )
    frames: int = option(5, "evenly spaced frames of a video that are scored", least=1)
    pool: str = option(
        "photo",
        "what a person is compared with: the photo of ref_paths, or the mean of it and the pool of "
        "photos in the column more_paths of the prompts",
        choices=("photo", "pool"),
    )
    similarity_low: float | None = option(
        None, "cosine that scores 0; none = the embedder's own setting"
    )
    similarity_high: float | None = option(
        None,
        "cosine that scores 1, as two photos of one person have; none = the embedder's own setting",
    )
    missing: float | None = option(
        None,
        "smallest cosine of a match; below it the person is missing; "
        "none = the embedder's own setting",
    )
    soft_weight: float = option(
        0.5, "weight of the soft minimum over people against their mean", least=0, most=1
    )
    head: str = option("", 'folder of a trained reward head, which replaces the formula; "" = none')
    linear: str = option(
        "", 'folder of a fitted linear reward, which replaces the formula; "" = none'
    )
    people: str = option(
        "",
        "folder of a vision transformer such as facebook/dino-vits16, which compares whole people "
        "with their photos: the terms person_similarity and person_similarity_min; "
        '"" = none',
    )
    vlm: str = option(
        "",
        "folder of a vision-language reward or of a checklist.json, which replaces the face reward; "
        '"" = none',
    )
    vlm_base: str = option("", "base Qwen2.5-VL checkpoint; supplies files missing from reward.vlm")
    vlm_prompt: str = option("", 'file with the prompt of the VLM; "" = prompt.txt in its folder')
    vlm_dtype: str = option(
        "bfloat16", "dtype of the VLM's weights and products", choices=("float32", "bfloat16")
    )
    vlm_fps: float = option(
        10.0, "frame rate reported to the VLM; the published scores use 10", above=0
    )
    vlm_rows: int = option(0, "videos that the VLM scores at once; 0 = all", least=0)
    vlm_devices: int = option(
        0,
        "devices reserved for the VLM, the last ones; 0 = it shares the video model's mesh",
        least=0,
    )
    penalties: dict[str, Any] = option(
        {},
        f'weights of penalties as JSON, such as {{"swapped": 0.5}}: {", ".join(PENALTIES)}; '
        "copied has 0.5 unless set",
    )
    mixture: dict[str, Any] = option(
        {},
        'weights of further terms as JSON, such as {"motion": 0.25}; each advantage is in units of '
        "its term's spread",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not self.backend or self.served or re.fullmatch(DEEPFACE, self.backend) is not None,
            f"reward.backend is {self.backend!r}; use deepface:DETECTOR/MODEL, such as "
            "deepface:opencv/ArcFace, or http://HOST:PORT/PATH, or leave it out",
        )
        require(
            not (self.backend and self.vlm),
            "reward.backend and reward.vlm are both set; use one of them",
        )
        require(
            self.faces != "" or not self.reads_faces,
            "reward.faces is empty; only a reward.vlm, a reward.custom and models of deepface can "
            "do without face networks",
        )
        require(
            sum(map(bool, (self.head, self.linear, self.vlm))) < 2,
            "reward.head, reward.linear and reward.vlm are mutually exclusive; set one of them",
        )
        require(
            not self.custom or re.fullmatch(r".+:[A-Za-z_]\w*", self.custom) is not None,
            f"reward.custom is {self.custom!r}; use package.module:function or file.py:function",
        )
        require(
            not (self.custom and (self.head or self.linear or self.vlm or self.backend)),
            "reward.custom excludes reward.head, reward.linear, reward.vlm and reward.backend; leave "
            "them empty",
        )
        require(
            not (self.custom and self.mixture),
            "reward.mixture weights terms, which reward.custom can do itself; leave it out",
        )
        require(
            not (self.served and self.mixture),
            "reward.mixture weights terms, and those of a server are not known before it scores; "
            "leave it out",
        )
        require(
            not ((self.head or self.linear) and self.backend),
            "reward.head and reward.linear read the faces of reward.faces, and reward.backend takes "
            "others; leave one empty",
        )
        reads_photos = not (self.head or self.linear or self.vlm or self.custom or self.served)
        require(
            self.pool == "photo" or reads_photos,
            "reward.pool pool changes the formula over faces, and this reward was trained on or reads "
            "one photo per person; leave it out",
        )
        require(
            not self.people or not (self.vlm or self.custom or self.backend),
            "reward.people extends the face reward in JAX; leave out reward.people, or reward.vlm, "
            "reward.custom and reward.backend",
        )
        self.require_faces_beside_people("reward.mixture", {"reward": 1} | self.mixture)
        low, high = self.similarity_low, self.similarity_high
        require(
            low is None or high is None or low < high,
            f"reward.similarity_low {low} is not below similarity_high {high}",
        )
        for name, weight in self.penalties.items():
            require(
                name in PENALTIES,
                f"reward.penalties has no {name!r}{closest(name, list(PENALTIES))}",
            )
            require(
                isinstance(weight, int | float) and weight >= 0,
                f"reward.penalties: {name} is {weight!r}; use a number of 0 or more",
            )
        for name, weight in self.mixture.items():
            require(
                isinstance(weight, int | float)
                and not isinstance(weight, bool)
                and math.isfinite(weight),
                f"reward.mixture: {name} is {weight!r}; use a number",
            )
        others: dict[str, Any] = {"reward": 1} | self.mixture
        secondary = [name for name in (PLACED, TURNING) if others.pop(name, 0)]
        require(
            not secondary or any(others.values()),
            f"reward.mixture {' and '.join(secondary)} cannot be the only reward, because no face "
            "would earn anything by looking like its person; give another term a weight, such as "
            f'{{"reward": 1, "{(secondary or [PLACED])[0]}": 0.25}}',
        )

    def require_faces_beside_people(self, field: str, weights: dict[str, Any]) -> None:
        """Refuse terms of whole people without their network, or without the reward.

        Args:
          field: name of the field that weighs terms, for messages.
          weights: its weights by term.

        Raises:
          UserError: the terms cannot be used so.
        """
        for name in PERSON_TERMS:
            if weights.get(name, 0) == 0:
                continue
            require(
                self.people != "",
                f"{field}: {name} needs a network of whole people; give its folder as reward.people",
            )
            reward = weights.get("reward", 0)
            require(
                isinstance(reward, int | float) and reward > 0,
                f"{field}: {name} without the reward teaches clothes alone; give reward a weight "
                "above 0",
            )

    @property
    def reads_faces(self) -> bool:
        """Whether the reward itself, and not only the judge, uses the networks of `faces`."""
        deepface_alone = self.backend and not self.backend.endswith("/embedder")
        return not (self.vlm or self.custom or self.served or deepface_alone)

    @property
    def follows_people(self) -> bool:
        """Whether the reward assigns faces to people, which the term `placed` needs."""
        return not (self.vlm or self.custom or self.served)

    @property
    def served(self) -> bool:
        """Whether `backend` is the address of a server that scores the videos."""
        return re.fullmatch(ADDRESS, self.backend) is not None

    @property
    def contrasted(self) -> bool:
        """Whether a term compares the people of a video with those of all prompts of the run."""
        return CONTRAST in self.mixture or self.penalty_weights().get("unrecognised", 0) > 0

    def penalty_weights(self) -> dict[str, float]:
        """Return the weights of penalties by name; the others have 0."""
        return PENALTY_WEIGHTS | self.penalties

    def folder(self) -> Path:
        """Return the folder of the face networks."""
        named = {"embedded": EMBEDDED / "faces", "photographs": photographs_folder()}
        return named.get(self.faces, Path(self.faces))


@dataclasses.dataclass(frozen=True)
class EvaluateConfig(Section):
    """Evaluation: sampling of held-out prompts by the ODE from fixed noise."""

    section: ClassVar[str] = "evaluate"

    prompts: str = option("embedded:eval", "CSV of held-out prompts")
    videos: int = option(4, "videos per prompt", least=1)
    steps: int = option(50, "denoising steps", least=1)
    solver: str = option(
        "euler", "solver of the ODE; euler is as published", choices=("euler", "unipc")
    )
    guidance: float = option(0.0, "guidance scale of the prompt; 0 = the rollout's")
    guidance_2: float = option(
        0.0,
        "guidance scale of the prompt for the low-noise expert of a model with two; 0 = "
        "evaluate.guidance if set, else the rollout's",
    )
    image_guidance: float = option(
        0.0, "guidance scale of the photos, for all kinds but vace; 0 = the rollout's"
    )
    weakened: dict[str, Any] = option({}, HELP)
    control_scale: float = option(
        1.0, "strength of the photos' hints in the main blocks, for vace; 1 = as trained", least=0
    )
    batch: int = option(32, "videos per program call, rounded up to what the mesh divides", least=1)
    bootstrap: int = option(2000, "resamples of a bootstrap interval", least=1)
    same: float = option(
        0.5,
        "cosine by the judge above which two faces of a frame are one person twice, for unique",
        above=-1,
        most=1,
    )
    frames: int = option(0, "frames of the videos; 0 = video.frames")
    height: int = option(0, "height in pixels; 0 = video.height")
    width: int = option(0, "width in pixels; 0 = video.width")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance", "guidance_2", "image_guidance"):
            scale = getattr(self, name)
            require(scale >= 0, f"evaluate.{name} is {scale}; use a scale, or 0 for the rollout's")
        weak_branch("evaluate.weakened", self.weakened)
        require_size("evaluate", self.frames, self.height, self.width, "video's")

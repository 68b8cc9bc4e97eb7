r"""Measure the comparison of whole people: does it see the clothes that the face cannot tell?

    python -m benchmarks.people [--steps 500] [--pairs 200] [--folder DIR]

No published network knows drawn people, so a small one with the architecture of DINO is trained
first, on drawn regions of 64 x 64 pixels: photos and frames of one person in the same clothes are
alike, all others of the batch are not, among them the same head in other clothes (InfoNCE, arXiv
1807.03748). People, photos and clips of the measurement are held out.

Each pair has two videos for the same photos. In one, everybody is as in the photos. In the other,
one person has other clothes and shoulders (`clothes`), or another head (`head`). A table says how
often the right video scores higher, for `person_similarity`, for its minimum over people, and for
the faces' `similarity`; a tie counts half. The photos are portraits, which show little below the
chin, or whole figures; the two videos share their scene, or do not.
"""

import argparse
import functools
import itertools
import tempfile
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from checkpoints_convert import dino
from jax_idgrpo.config import RewardConfig
from jax_idgrpo.errors import UserError
from jax_idgrpo.models.dino import Dino, DinoConfig
from jax_idgrpo.rewards import people as whole
from jax_idgrpo.rewards.base import ReferenceFaces, References
from jax_idgrpo.rewards.face_reward import FaceReward
from jax_idgrpo.rewards.factory import make_face_reward
from jax_idgrpo.synthetic import renderer, scenes
from jax_idgrpo.synthetic.people import SPLITS, Identity, identity, with_body_of
from jax_idgrpo.synthetic.training.detector import SEEN
from jax_idgrpo.synthetic.training.faces import degrade

SMALL = DinoConfig(depth=4, width=96, heads=4, ffn=192, patch=16, image_size=64, eps=1e-6)
TERMS = ("person_similarity", "person_similarity_min", "similarity")
CASES = tuple(itertools.product(("clothes", "head"), ("same", "different")))
HEADS = 20  # heads of a training batch, each in two sets of clothes
TEMPERATURE = 0.07
JITTER = 0.04  # standard deviation of the edges of boxes, in sides of the box
BATCH = 20


@flax.struct.dataclass
class Picture:
    """Pictures [N] and the faces [N, M] in them."""

    pixels: jax.Array
    boxes: jax.Array
    visible: jax.Array


# ---- training ------------------------------------------------------------------------------------


def draw_photos(key: jax.Array, people: Identity) -> Picture:
    """Render a portrait of one half of the people [N], and a whole figure of the others."""
    count = people.skin.shape[0]
    keys = jax.random.split(key, count)
    boxes, _ = jax.vmap(renderer.portrait_truth)(people, keys)
    portraits = Picture(
        jax.vmap(renderer.render_portrait)(people, keys), boxes[:, None] - 0.5, jnp.ones((count, 1))
    )
    figures = draw_frames(
        key, jax.tree.map(lambda leaf: leaf[:, None], people), jnp.ones((count, 1), bool)
    )
    first = jnp.arange(count) % 4 < 2

    def chosen(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.where(first.reshape(-1, *[1] * (one.ndim - 1)), one, other)

    return jax.tree.map(chosen, portraits, figures)


def draw_frames(key: jax.Array, people: Identity, mask: jax.Array) -> Picture:
    """Render the first frame of a clip of each row of people [N, M]."""
    keys = jax.random.split(key, len(mask))
    scene = jax.vmap(scenes.sample_scene)(keys, mask)
    clip = jax.vmap(lambda p, m, s: scenes.render_clip(p, m, s, frames=1))(people, mask, scene)
    return Picture(clip.video[:, 0], clip.boxes[:, 0] - 0.5, clip.visible[:, 0])


def jittered(key: jax.Array, picture: Picture) -> jax.Array:
    """Return the boxes of a picture with the errors of a detector."""
    sides = picture.boxes[..., 2:] - picture.boxes[..., :2]
    noise = jax.random.normal(key, picture.boxes.shape)
    return picture.boxes + JITTER * noise * jnp.tile(sides, 2)


def training_regions(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draw regions of photos and of frames, row by row of the same people in the same clothes.

    Returns:
      Regions of photos and of frames [2 HEADS, S, S, 3], and whether the frame shows the person.
    """
    keys = jax.random.split(key, 8)
    ids = jax.random.randint(keys[0], (3, HEADS), *SPLITS["train"])
    heads = identity(ids[0])
    dressed = [with_body_of(heads, identity(bodies)) for bodies in ids[1:]]
    people = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *dressed)
    count = 2 * HEADS
    others = identity(jax.random.randint(keys[1], (count,), *SPLITS["train"]))
    both = jax.tree.map(lambda a, b: jnp.stack([a, b], 1), people, others)
    mask = jnp.stack([jnp.ones(count, bool), jax.random.bernoulli(keys[2], 0.6, (count,))], 1)
    photos, frames = draw_photos(keys[3], people), draw_frames(keys[4], both, mask)
    size = jnp.array([64.0, 64.0])
    photo_boxes, frame_boxes = jittered(keys[5], photos), jittered(keys[6], frames)
    known = whole.regions(photo_boxes, jnp.ones((count, 1), bool), size)[:, 0]
    reach = whole.reach_of(known, photo_boxes[:, 0])
    seen = whole.cut(whole.regions(frame_boxes, mask, size)[:, 0], frame_boxes[:, 0], reach)
    resize = jax.vmap(functools.partial(whole.resized, side=SMALL.image_size))
    pixels = degrade(keys[7], frames.pixels, 1.5)
    shown = (frames.visible[:, 0] >= SEEN) & jnp.all(seen[:, 2:] - seen[:, :2] >= 1, -1)
    seen = jnp.where(shown[:, None], seen, jnp.array([0, 0, 1, 1.0]))
    return resize(photos.pixels, known), resize(pixels, seen), shown


def contrast(photos: jax.Array, frames: jax.Array, shown: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the InfoNCE loss of unit vectors, row by row alike, and the share of right choices."""
    logits = jnp.where(shown, photos @ frames.T / TEMPERATURE, -1e9)
    own = jnp.arange(len(logits))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    losses += optax.softmax_cross_entropy_with_integer_labels(logits.T, own)
    right = jnp.argmax(logits, 1) == own
    total = jnp.maximum(jnp.sum(shown), 1)
    return jnp.sum(losses * shown) / total, jnp.sum(right * shown) / total


def train(steps: int, folder: Path) -> None:
    """Train the network of regions, and write it as `reward.people` reads it.

    Args:
      steps: optimizer steps.
      folder: destination.
    """
    graph, state = nnx.split(Dino(SMALL, rngs=nnx.Rngs(0)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, steps // 10, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.02)

    @jax.jit
    def step(state, moments, key):
        photos, frames, shown = training_regions(key)

        def loss(state):
            network = nnx.merge(graph, state)
            features = whole.describe(network, jnp.concatenate([photos, frames]))
            return contrast(*jnp.split(features, 2), shown)

        (value, right), gradient = jax.value_and_grad(loss, has_aux=True)(state)
        change, moments = optimizer.update(gradient, moments, state)
        return optax.apply_updates(state, change), moments, value, right

    moments, start = optimizer.init(state), time.process_time()
    for number in range(steps):
        state, moments, value, right = step(state, moments, jax.random.key(number))
        if number % 50 == 49:
            seconds = time.process_time() - start
            print(
                f"step {number + 1}: loss {value:.3f}, right {right:.3f}, {seconds:.0f} s",
                flush=True,
            )
    folder.mkdir(parents=True, exist_ok=True)
    dino.save(nnx.merge(graph, state), folder)


# ---- measurement ---------------------------------------------------------------------------------


@jax.jit
def render(key: jax.Array, people: Identity, mask: jax.Array) -> jax.Array:
    """Render clips of people [N, M]."""
    scene = jax.vmap(scenes.sample_scene)(jax.random.split(key, len(mask)), mask)
    return jax.vmap(lambda p, m, s: scenes.render_clip(p, m, s).video)(people, mask, scene)


@functools.partial(jax.jit, static_argnames="figures")
def render_photos(key: jax.Array, people: Identity, figures: bool) -> jax.Array:
    """Render a photo of each of people [N, M]: a whole figure, or a portrait."""
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), people)
    count = flat.skin.shape[0]
    if figures:
        alone = jax.tree.map(lambda leaf: leaf[:, None], flat)
        pixels = draw_frames(key, alone, jnp.ones((count, 1), bool)).pixels
    else:
        pixels = jax.vmap(renderer.render_portrait)(flat, jax.random.split(key, count))
    return pixels.reshape(*people.skin.shape[:2], *pixels.shape[1:])


def replaced(people: Identity, others: Identity, kind: str) -> Identity:
    """Give the first person of each row the clothes, or the head, of the first of the others."""
    first = jax.tree.map(lambda leaf: leaf[:, 0], people)
    other = jax.tree.map(lambda leaf: leaf[:, 0], others)
    new = with_body_of(first, other) if kind == "clothes" else with_body_of(other, first)
    return jax.tree.map(lambda leaf, one: leaf.at[:, 0].set(one), people, new)


def encoded(
    reward: FaceReward, photos: np.ndarray, mask: np.ndarray
) -> tuple[list[int], ReferenceFaces]:
    """Encode the photos of rows, without rows of which a photo shows no face.

    Returns:
      The numbers of the rows that are left, and their references.
    """
    kept, found = [], []
    for number in range(len(mask)):
        row = References.of_pixels(photos[number : number + 1], mask[number : number + 1])
        try:
            found.append(reward.encode_references(row, [""]))
            kept.append(number)
        except UserError:
            continue
    return kept, jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)


def measure(
    reward: FaceReward, pairs: int, figures: bool
) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """Return the terms of the right video minus those of another one, each [pairs].

    Args:
      reward: face reward with whole people.
      pairs: number of pairs.
      figures: photos are whole figures.

    Returns:
      (what is wrong, whether the scene is the same) -> differences by term.
    """
    found: dict[tuple[str, str], list[dict[str, np.ndarray]]] = {case: [] for case in CASES}
    for number in itertools.count():
        keys = jax.random.split(jax.random.key(1000 + number), 6)
        people = identity(scenes.sample_ids(keys[0], BATCH, "eval"))
        others = identity(scenes.sample_ids(keys[1], BATCH, "eval"))
        mask = scenes.sample_mask(keys[2], BATCH)
        photos = np.asarray(render_photos(keys[3], people, figures))
        kept, references = encoded(reward, photos, np.asarray(mask))

        def score(key: jax.Array, shown: Identity) -> dict[str, np.ndarray]:
            video = np.asarray(render(key, shown, mask))[kept]
            return jax.device_get(reward.score(video, references))

        # People in clothes of the same colour are no pair.
        colours = [np.asarray(one.labels[:, 0, 2])[kept] for one in (people, others)]
        apart = np.flatnonzero(colours[0] != colours[1])
        right = score(keys[4], people)
        for kind, scene in CASES:
            wrong = score(keys[4 if scene == "same" else 5], replaced(people, others, kind))
            found[kind, scene].append({name: (right[name] - wrong[name])[apart] for name in TERMS})
        if sum(len(part[TERMS[0]]) for part in found[CASES[0]]) >= pairs:
            break
    return {
        case: {name: np.concatenate([part[name] for part in parts])[:pairs] for name in TERMS}
        for case, parts in found.items()
    }


def order(difference: np.ndarray) -> str:
    """Format the share of pairs in order, with its 95 % interval; a tie counts half."""
    won = (difference > 0) + 0.5 * (difference == 0)
    error = 1.96 * won.std() / np.sqrt(len(won))
    return f"{won.mean():.3f} ± {error:.3f}, {difference.mean():+.3f}"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=500)
    options.add_argument("--pairs", type=int, default=200)
    options.add_argument(
        "--folder", type=Path, help="folder of the network; an existing one is reused"
    )
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made) / "people"
        if not (folder / "config.json").is_file():
            train(arguments.steps, folder)
        reward = make_face_reward(RewardConfig(frames=5, people=str(folder)))
        print("| other | photos | scenes | " + " | ".join(TERMS) + " |\n|" + " --- |" * 6)
        for figures in (False, True):
            measured = measure(reward, arguments.pairs, figures)
            for (kind, scene), found in measured.items():
                names = kind, "figures" if figures else "portraits", scene
                row = [*names, *(order(found[name]) for name in TERMS)]
                print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

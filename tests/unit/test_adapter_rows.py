"""The options of the task `adapter`, the rows that it refuses, and the variants of photos."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jax_idgrpo.config import Config, FinetuneConfig, ModelConfig
from jax_idgrpo.config.video_model import VideoConfig
from jax_idgrpo.data.video import write_video
from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences import train_adapter
from jax_idgrpo.preferences.adapter_rows import cut_from, read_options, read_rows_of
from jax_idgrpo.training import clip_latents

GREEN = (20, 200, 20)


def write_folder(folder, row, header="path,ref_paths,more_paths,prompt"):
    """Write a folder of one clip with photos of two people."""
    for name in ("a", "b", "c"):
        Image.new("RGB", (32, 32), (len(name), ord(name), 0)).save(folder / f"{name}.png")
    write_video(folder / "v.mp4", np.zeros((9, 32, 32, 3), np.float32), 8)
    (folder / "clips.csv").write_text(f"{header}\n{row}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no clips, which loss flow trains on; name a folder"),
        ({"loss": "dpo"}, "has no pairs, which loss dpo trains on; name a CSV of pref"),
        ({"clips": "x", "pairs": "y"}, "loss flow reads no pairs; leave them out, or use loss dpo"),
        ({"clips": "x", "los": "dpo"}, "has no 'los'; did you mean loss"),
        ({"clips": "x", "loss": "sft"}, "loss is 'sft'; use flow or dpo"),
        ({"clips": "x", "split": "eval"}, "split is 'eval'; use train or all"),
        ({"clips": "x", "references": 3}, "references is 3; use a text"),
        ({"clips": "x", "augment": "no"}, "augment is 'no'; use true or false"),
        ({"clips": "x", "text_dropout": 1}, "text_dropout is 1.0; use a number from 0 to below 1"),
        ({"clips": "x", "face_weight": True}, "face_weight is True; use a number"),
        ({"clips": "x", "identity_weight": -1}, "identity_weight is -1.0; use a number from 0"),
        (
            {"pairs": "x", "loss": "dpo", "identity_weight": 1},
            "identity_weight is a part of loss flow; leave it out of loss dpo",
        ),
    ],
)
def test_a_wrong_option_is_one_line(options, message):
    with pytest.raises(UserError, match="^finetune.options") as error:
        read_options(options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_whole_numbers_are_numbers():
    assert read_options({"clips": "x", "photo_dropout": 0}).photo_dropout == 0


@pytest.mark.parametrize(
    ("row", "header", "message"),
    [
        (
            "v.mp4,a.png;b.png,c.png,two",
            None,
            "more_paths has photos of 1 people and ref_paths of 2",
        ),
        ("v.mp4,a.png,x.png,one", None, "x.png: no such file"),
        ("w.mp4,a.png,,one", None, "w.mp4 is no file; write the video's path"),
        ("v.mp4,,,nobody", None, "no reference photo"),
        ("v.mp4,a.png,one", "path,ref_paths,text", "needs one column prompt"),
    ],
)
def test_a_wrong_row_is_one_line(tmp_path, row, header, message):
    given = write_folder(tmp_path, row, *([header] if header else []))
    with pytest.raises(UserError, match="line") as error:
        read_rows_of(read_options({"clips": given, "split": "all"}), 4)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_clips_csv_and_too_many_people_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no clips\.csv; name a folder that idgrpo ingest"):
        read_rows_of(read_options({"clips": str(tmp_path)}), 4)
    with pytest.raises(UserError, match="no such file"):
        read_rows_of(read_options({"clips": str(tmp_path / "no.csv")}), 4)
    given = write_folder(tmp_path, "v.mp4,a.png;b.png,,two")
    with pytest.raises(UserError, match=r"has 2 reference photos and data\.max_people is 1"):
        read_rows_of(read_options({"clips": given, "split": "all"}), 1)


def test_pairs_without_a_winner_are_refused(tmp_path):
    write_folder(tmp_path, "v.mp4,a.png,,one")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        "path_A,path_B,prompt,ref_paths,SA\nv.mp4,v.mp4,one,a.png,same\nv.mp4,v.mp4,one,a.png,invalid\n"
    )
    with pytest.raises(UserError, match="none of the 2 pairs has the label A or B in SA"):
        read_rows_of(read_options({"pairs": str(pairs), "loss": "dpo"}), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "skyreels"}, "the task adapter trains vace, phantom, refalign"),
    ],
)
def test_models_that_the_task_cannot_train_are_refused(change, message):
    finetune = FinetuneConfig(task="adapter", options={"clips": "x"})
    config = Config(model=ModelConfig(**change), finetune=finetune)
    with pytest.raises(UserError, match=message):
        train_adapter.make(config)
    started = dataclasses.replace(finetune, start="x")
    with pytest.raises(UserError, match="continues an adapter with --model.adapter"):
        train_adapter.make(Config(finetune=started))


def test_random_references_leave_out_the_clips_own_photos(tmp_path):
    """By the names of `idgrpo ingest`; a person without another photo keeps the own one."""
    for name in ("v-0-0.png", "v-0-1.png", "w-0-0.png", "v-1-0.png"):
        Image.new("RGB", (32, 32), (0, len(name), ord(name[0]))).save(tmp_path / name)
    row = "v.mp4,v-0-0.png;v-1-0.png,v-0-1.png|w-0-0.png;,two"
    given = {"clips": write_folder(tmp_path, row, "path,ref_paths,more_paths,prompt")}
    (tmp_path / "v-1-0.png").write_bytes((tmp_path / "c.png").read_bytes())
    (video,) = read_rows_of(read_options(given | {"split": "all"}), 4).videos
    found = [[(photo.file.name, photo.own) for photo in group] for group in video.references]
    assert found == [[("w-0-0.png", False)], [("v-1-0.png", True)]]
    listed = {"split": "all", "references": "listed"}
    (video,) = read_rows_of(read_options(given | listed), 4).videos
    found = [[(photo.file.name, photo.own) for photo in group] for group in video.references]
    assert found == [[("v-0-0.png", False)], [("v-1-0.png", False)]]
    assert not cut_from(tmp_path / "v2-0-0.png", tmp_path / "v.mp4")


def test_long_clips_have_evenly_spaced_windows_and_short_ones_none(tmp_path):
    def windows(frames):
        levels = np.linspace(-0.9, 0.9, frames, dtype=np.float32)[:, None, None, None]
        write_video(tmp_path / "v.mp4", np.broadcast_to(levels, (frames, 32, 32, 3)), 8)
        found = clip_latents.clip_windows(tmp_path / "v.mp4", VideoConfig(5, 32, 32, 8))
        times = (found.mean(axis=(2, 3, 4)) + 0.9) / 1.8 * (frames - 1)
        np.testing.assert_allclose(np.diff(times, axis=1), 1, atol=0.4)
        return np.round(times[:, 0]).tolist()

    assert clip_latents.clip_windows(
        write_short(tmp_path), VideoConfig(5, 32, 32, 8)
    ).shape == (0, 5, 32, 32, 3)  # fmt: skip
    assert windows(5) == [0]
    assert windows(7) == [0, 1, 2]
    assert windows(20) == [0, 5, 10, 15]
    assert windows(40) == [0, 5, 10, 15]  # within the first 20 frames


def write_short(folder):
    write_video(folder / "short.mp4", np.zeros((4, 32, 32, 3), np.float32), 8)
    return folder / "short.mp4"


def face_photo():
    """A red face at a known place on green."""
    image = Image.new("RGB", (200, 300), GREEN)
    image.paste((220, 30, 30), (80, 60, 120, 110))
    return image, np.array([80, 60, 120, 110], np.float32)


def test_boxes_go_back_to_the_photos_own_pixels():
    image, box = face_photo()
    video = VideoConfig(5, 64, 96, 8)
    scale, left = 64 / 300, (96 - 200 * 64 / 300) / 2
    on_canvas = box * scale + np.array([left, 0, left, 0])
    np.testing.assert_allclose(clip_latents.in_image(on_canvas, image.size, video), box, atol=1e-3)


def test_crops_hold_the_face_and_white_replaces_the_background():
    image, box = face_photo()
    plain, crop, blank, blank_crop = clip_latents.photo_variants(image, 1, box, True, False)
    assert plain == image
    share = (np.asarray(crop)[:, crop.width // 2, 0] > 150).mean()
    assert 0.25 < share < 0.75
    assert np.asarray(blank)[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(blank)[85, 100].tolist() == [220, 30, 30]
    assert np.asarray(crop).shape == np.asarray(blank_crop).shape
    again = clip_latents.photo_variants(image, 1, box, True, False)
    assert [np.asarray(a).tolist() for a in again[1:2]] == [np.asarray(crop).tolist()]
    unseen = clip_latents.photo_variants(image, 1, None, True, False)
    assert all(variant == image for variant in unseen)


def test_own_photos_are_mirrored_and_relit():
    image = Image.new("RGB", (40, 40), (100, 100, 100))
    image.paste((200, 200, 200), (0, 0, 10, 40))
    variants = clip_latents.photo_variants(image, 3, None, False, True)
    for variant in variants:
        pixels = np.asarray(variant, np.float32)
        assert pixels[:, 30:].mean() > pixels[:, :30].mean() + 50
    assert len({np.asarray(variant).tobytes() for variant in variants}) == len(variants)
    assert clip_latents.photo_variants(image, 3, None, False, False) == [image]

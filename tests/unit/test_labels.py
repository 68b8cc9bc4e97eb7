"""Labels of people: nothing acknowledged is lost, shares overlap as asked, and votes combine."""

import json
import threading

import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.preferences.csv_source import load_pairs
from jax_idgrpo.preferences.label_items import alpha, load_items, majority, ordered
from jax_idgrpo.preferences.labels import LOG, RESERVED, Answer, Desk, Refused
from tests.helpers.label_pairs import write_label_pairs


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_label_pairs(tmp_path_factory.mktemp("pairs"), 40)


def desk(pairs, folder, gold=None, dimensions=("SA",), **options):
    known = load_items(gold, dimensions, gold=True) if gold else []
    return Desk(load_items(pairs, dimensions), known, dimensions, folder, **options)


def label_all(desk, annotator, text="A", most=10**6):
    """Answer everything that an annotator gets, and return the units."""
    answered = []
    while len(answered) < most and (units := desk.next(annotator)):
        labels = dict.fromkeys(units[0].dimensions, text)
        desk.answer(Answer(annotator, units[0].id, labels))
        answered.append(units[0])
    return answered


def test_without_overlap_every_pair_is_labelled_once(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=0.0)
    first = label_all(given, "Ann", most=15)
    second = label_all(given, "Ben")
    assert len(first) + len(second) == 40
    assert not {unit.id for unit in first} & {unit.id for unit in second}


def test_full_overlap_shows_every_pair_to_everybody(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=1.0)
    assert len(label_all(given, "Ann")) == len(label_all(given, "Ben")) == 40


def test_a_share_overlaps(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=0.5)
    label_all(given, "Ann")
    shared = len(label_all(given, "Ben"))
    assert 10 <= shared <= 30


def test_two_people_at_once_get_different_pairs_and_a_reload_keeps_the_pair(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=0.0)
    ann, ben = given.next("Ann")[0], given.next("Ben")[0]
    assert ann != ben
    assert given.next("Ann")[0] == ann  # a reload


def test_a_pair_that_nobody_answers_goes_to_somebody_else(pairs, tmp_path):
    now = [0.0]
    given = desk(pairs, tmp_path, overlap=0.0, clock=lambda: now[0])
    left = given.next("Ann")[0]
    assert left not in label_all(given, "Ben")
    now[0] = RESERVED + 1
    assert label_all(given, "Ben") == [left]


def test_a_skipped_pair_goes_to_somebody_else(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=0.0)
    skipped = given.next("Ann")[0]
    given.answer(Answer("Ann", skipped.id, {}))
    assert skipped not in label_all(given, "Ann", most=5)
    assert skipped in label_all(given, "Ben")


def test_labels_survive_a_kill_and_a_line_that_was_cut_off(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=0.0)
    label_all(given, "Ann", most=5)
    with (tmp_path / LOG).open("ab") as file:  # the process is killed while it writes
        file.write(b'{"annotator": "Ann", "unit": "')
    again = desk(pairs, tmp_path, overlap=0.0)
    assert again.summary()["labelled"] == 5
    label_all(again, "Ann", most=1)
    assert desk(pairs, tmp_path, overlap=0.0).summary()["labelled"] == 6


def test_every_acknowledged_label_is_in_the_file_at_once(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=1.0)
    for count in range(1, 4):
        label_all(given, "Ann", most=1)
        assert len((tmp_path / LOG).read_text().splitlines()) == count


def test_three_people_at_once_lose_nothing(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=1.0)
    people = [threading.Thread(target=label_all, args=(given, name)) for name in "ABC"]
    for person in people:
        person.start()
    for person in people:
        person.join()
    lines = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert len({(line["annotator"], line["unit"]) for line in lines}) == len(lines) == 120


def test_undo_asks_the_last_pair_again_also_after_a_restart(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=0.0)
    *_, last = label_all(given, "Ann", most=3)
    assert given.undo("Ann") == last
    assert desk(pairs, tmp_path, overlap=0.0).next("Ann")[0] == last
    assert given.next("Ann")[0] == last
    given.answer(Answer("Ann", last.id, {"SA": "B"}))
    assert given.votes()[last.item.id] == {"SA": {"Ann": "B"}}
    assert given.undo("Nobody") is None


def test_gold_pairs_come_at_every_tenth_place_and_measure_the_annotator(pairs, tmp_path):
    gold = write_label_pairs(tmp_path / "gold", 3, ["A", "B", "invalid"])
    given = desk(pairs, tmp_path, gold, overlap=1.0)
    units = label_all(given, "Ann")
    assert [number for number, unit in enumerate(units, 1) if unit.item.gold] == [10, 20]
    assert given.summary()["annotators"]["Ann"]["gold"] == 0.5
    out = tmp_path / "out.csv"
    assert given.export(out) == 40  # gold pairs are not among the results


def test_one_dimension_at_a_time_asks_all_pairs_before_the_next(pairs, tmp_path):
    both = ("SA", "motion")
    given = desk(pairs, tmp_path, dimensions=both, overlap=1.0, one_at_a_time=True)
    asked = [unit.dimensions for unit in label_all(given, "Ann")]
    assert asked == [("SA",)] * 40 + [("motion",)] * 40
    assert len(next(iter(given.votes().values()))) == 2


def test_sides_are_exchanged_for_about_half_of_the_pairs(pairs, tmp_path):
    given = desk(pairs, tmp_path)
    exchanged = [given.exchanged("Ann", item) for item in given.items]
    assert 10 <= sum(exchanged) <= 30


def test_the_export_trains_a_reward(pairs, tmp_path):
    given = desk(pairs, tmp_path, overlap=1.0)
    label_all(given, "Ann", "A")
    label_all(given, "Ben", "A", most=10)
    label_all(given, "Cem", "same", most=10)
    out = tmp_path / "labels" / "pairs.csv"
    out.parent.mkdir()
    given.export(out)
    loaded = load_pairs(out, ("SA",))
    assert len(loaded) == 40
    assert {pair.source for pair in loaded} == {"trusted"}
    assert all(pair.labels == (1,) for pair in loaded)
    assert "Ann=A Ben=A Cem=same" in out.read_text()


def test_the_majority_decides():
    assert majority(["A", "A", "B"]) == "A"
    assert majority(["A", "B"]) == "invalid"
    assert majority([]) == "invalid"


def test_alpha_is_one_for_agreement_and_near_zero_by_chance():
    agree = {str(n): {"SA": {"Ann": "AB"[n % 2], "Ben": "AB"[n % 2]}} for n in range(20)}
    assert alpha(agree, "SA", ["Ann", "Ben"]) == 1.0
    half = {str(n): {"SA": {"Ann": "AB"[n % 2], "Ben": "AB"[n // 2 % 2]}} for n in range(40)}
    assert abs(alpha(half, "SA", ["Ann", "Ben"])) < 0.1
    assert alpha({"0": {"SA": {"Ann": "A"}}}, "SA", ["Ann"]) is None


def test_the_order_by_a_model(tmp_path):
    values = [0.5, -0.1, 2.0, 0.0]
    path = write_label_pairs(
        tmp_path, 4, difference_SA=values, difference_motion=[-1.0, 1.0, 0.1, -3.0]
    )
    items = load_items(path, ("SA",))
    unsure = [item.differences["SA"] for item in ordered(items, "uncertain")]
    assert unsure == [0.0, -0.1, 0.5, 2.0]
    assert ordered(items, "disagreement")[0].differences == {"SA": 0.5, "motion": -1.0}
    assert ordered(items, "random", seed=1) != ordered(items, "random", seed=2)
    plain = load_items(write_label_pairs(tmp_path / "plain", 4), ("SA",))
    with pytest.raises(UserError, match="--choose uncertain: the pairs have 0 columns"):
        ordered(plain, "uncertain")


@pytest.mark.parametrize(
    ("unit", "labels", "message"),
    [
        ("nothing", {"SA": "A"}, "no such pair"),
        ("", {"SA": "C"}, "a label is 'C'"),
        ("", {"motion": "A"}, "label SA"),
    ],
)
def test_bad_answers_are_refused(pairs, tmp_path, unit, labels, message):
    given = desk(pairs, tmp_path)
    unit = unit or given.next("Ann")[0].id
    with pytest.raises(Refused, match=message):
        given.answer(Answer("Ann", unit, labels))
    assert (tmp_path / LOG).read_text() == ""


def test_a_folder_with_another_log_is_refused(pairs, tmp_path):
    (tmp_path / LOG).write_text('{"message": "hello"}\n')
    with pytest.raises(UserError, match=r"labels.jsonl, line 1: is no label"):
        desk(pairs, tmp_path)

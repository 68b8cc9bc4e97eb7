"""Measure the labelling page: how soon it opens with many pairs, and how many labels it takes.

    python -m benchmarks.label_page [--pairs 10000] [--labels 300]

Three annotators label at once. Then the server is killed; every acknowledged label must be stored.
"""

import argparse
import json
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from tests.helpers.label_client import get, label_some, serving
from tests.helpers.label_pairs import write_label_pairs


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--pairs", type=int, default=10_000)
    options.add_argument("--labels", type=int, default=300, help="labels of each annotator")
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        pairs = write_label_pairs(folder / "pairs", arguments.pairs)
        began = time.monotonic()
        with serving(pairs, folder / "out") as (process, address):
            print(f"start with {arguments.pairs} pairs: {time.monotonic() - began:.2f} s")
            began = time.monotonic()
            with urllib.request.urlopen(address) as page:
                page.read()
            get(f"{address}next?annotator=Ann")
            print(f"page and first question: {time.monotonic() - began:.3f} s")
            done: list[str] = []
            people = [
                threading.Thread(
                    target=lambda name=name: done.extend(
                        label_some(address, name, arguments.labels)
                    )
                )
                for name in ("Ann", "Ben", "Cem")
            ]
            began = time.monotonic()
            for person in people:
                person.start()
            for person in people:
                person.join()
            print(f"labels per second: {len(done) / (time.monotonic() - began):.0f}")
            process.kill()
        lines = (folder / "out" / "labels.jsonl").read_text().splitlines()
        print(
            f"acknowledged {len(done)}, stored after the kill {len(list(map(json.loads, lines)))}"
        )


if __name__ == "__main__":
    main()

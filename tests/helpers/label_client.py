"""A running labelling page, and its answers over HTTP."""

import contextlib
import json
import subprocess
import sys
import urllib.request


@contextlib.contextmanager
def serving(pairs, out, *options):
    """Run `idgrpo annotate --page` and yield the process and the address of the page."""
    command = [sys.executable, "-m", "jax_idgrpo", "annotate", "--page", "--pairs", str(pairs)]
    process = subprocess.Popen(
        [*command, "--out", str(out), *options], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        yield process, line.split("at ")[1].split(" ")[0]
    finally:
        process.kill()
        process.wait()


def get(address):
    """Return the JSON of an address."""
    with urllib.request.urlopen(address, timeout=60) as reply:
        return json.load(reply)


def post(address, value):
    """Post JSON and return the JSON of the reply."""
    request = urllib.request.Request(address, json.dumps(value).encode())
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


def label_some(address, annotator, count):
    """Answer `count` questions, and return the acknowledged units."""
    state, done = get(f"{address}next?annotator={annotator}"), []
    while state["now"] and len(done) < count:
        unit = state["now"]
        labels = dict.fromkeys(unit["dimensions"], "A")
        state = post(
            f"{address}label", {"annotator": annotator, "unit": unit["unit"], "labels": labels}
        )
        done.append(unit["unit"])
    return done

"""A reward server in a run of several processes: each posts its own videos, and all know every reward."""

import base64
import gzip
import io
import json
import os
import socket
import subprocess
import sys

import numpy as np

from tests.helpers.reward_server import ROOT, Stub


def level(request):
    """The grey level of the video of a request."""
    content = gzip.decompress(base64.b64decode(request["videos"][0]))
    return float(np.load(io.BytesIO(content)).reshape(-1)[0])


def test_each_process_posts_its_own_videos():
    def answer(request, number):
        return "<html>" if request["prompts"] == ["5"] else json.dumps([level(request)])

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    common = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "IDGRPO_PATIENCE": "120",
    }
    with Stub(answer) as stub:
        command = [sys.executable, "-m", "tests.helpers.remote_worker", stub.address]
        started = [
            subprocess.Popen(
                command,
                env=os.environ | common | {"JAX_PROCESS_ID": str(number)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(2)
        ]
        one, other = (
            json.loads(run.communicate(timeout=300)[0].splitlines()[-1]) for run in started
        )
    wanted = [0.0, 0.1, 0.2, 0.3, 0.4, np.nan, 0.6, 0.7]
    np.testing.assert_array_equal(one["reward"], wanted)
    np.testing.assert_array_equal(other["reward"], wanted)
    assert sorted(request["prompts"][0] for request in stub.requests) == list("01234567")
    (line,) = one["lines"] + other["lines"]
    assert "video 5 could not be scored (NoScore: the reply is no JSON" in line

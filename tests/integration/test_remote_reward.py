"""A reward server in a run of several processes: each posts its own videos, and all know every reward."""

import json

import numpy as np

from tests.helpers.processes import finish, start
from tests.helpers.reward_server import Stub, level_of


def test_each_process_posts_its_own_videos(tmp_path):
    def answer(request, number):
        return "<html>" if request["prompts"] == ["5"] else json.dumps([level_of(request)])

    with Stub(answer) as stub:
        words = ["-m", "tests.helpers.remote_worker", stub.address]
        ended = finish(start(words, processes=2, devices=2, folder=tmp_path))
    one, other = (json.loads(printed.splitlines()[-1]) for _, printed in ended)
    wanted = [0.0, 0.1, 0.2, 0.3, 0.4, np.nan, 0.6, 0.7]
    np.testing.assert_array_equal(one["reward"], wanted)
    np.testing.assert_array_equal(other["reward"], wanted)
    assert sorted(request["prompts"][0] for request in stub.requests) == list("01234567")
    (line,) = one["lines"] + other["lines"]
    assert "video 5 could not be scored (NoScore: the reply is no JSON" in line

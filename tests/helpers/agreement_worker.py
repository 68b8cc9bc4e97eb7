"""Run by test_processes.py in two processes: compare photos and rewards across them.

    python -m tests.helpers.agreement_worker FOLDER

FOLDER/0 and FOLDER/1 are the disks of the two hosts. Prints what is refused, line by line.
"""

import os
import sys
from pathlib import Path

import jax

from jax_idgrpo.config import Config, RewardConfig
from jax_idgrpo.data.prompts import load_prompts, row_digests
from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import hosts

hosts.initialise()
os.chdir(Path(sys.argv[1]) / str(jax.process_index()))
rows = row_digests(load_prompts("prompts.csv", 4))
rewards = RewardConfig(), RewardConfig(head="head"), RewardConfig(custom="mine.py:score")
for digests, reward in zip((rows, [], []), rewards, strict=True):
    config = Config(reward=reward)
    try:
        hosts.assert_same_across_hosts(config, digests)
    except UserError as error:
        print(error)

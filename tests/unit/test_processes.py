"""Several processes are one run: the same numbers, the same refusals, and an end when one of them is lost."""

import socket

import jax.numpy as jnp
import numpy as np
import pytest

from jax_idgrpo.errors import UserError
from jax_idgrpo.parallel import hosts

ALL = {"JAX_COORDINATOR_ADDRESS": "10.0.0.2:8476", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


def test_how_processes_find_each_other():
    assert hosts.arguments({}) is None
    assert hosts.arguments(ALL) == {
        "coordinator_address": "10.0.0.2:8476",
        "num_processes": 4,
        "process_id": 3,
    }
    assert hosts.arguments({"IDGRPO_DISTRIBUTED": "auto"}) == {}
    assert hosts.arguments({"SLURM_STEP_NUM_TASKS": "8"}) == {}
    assert hosts.arguments({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}) is None
    assert hosts.arguments(ALL | {"SLURM_STEP_NUM_TASKS": "8"})["process_id"] == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"JAX_PROCESS_ID": ""},
            r"JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES without JAX_PROCESS_ID: set all three",
        ),
        (
            {"JAX_PROCESS_ID": "4"},
            r"JAX_PROCESS_ID is 4 and JAX_NUM_PROCESSES 4; processes are numbered from 0 to 3",
        ),
        ({"JAX_NUM_PROCESSES": "four"}, r"JAX_NUM_PROCESSES is 'four'; set it to a whole number"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host"},
            r"JAX_COORDINATOR_ADDRESS is 'host'; it names a host and a port",
        ),
    ],
)
def test_incomplete_variables_are_refused(change, reason):
    with pytest.raises(UserError, match=reason):
        hosts.arguments(ALL | change)
    with pytest.raises(UserError, match="IDGRPO_DISTRIBUTED is 'yes'"):
        hosts.arguments({"IDGRPO_DISTRIBUTED": "yes"})


def test_alone_nothing_is_gathered_and_everything_agrees():
    hosts.assert_facts_match({"anything": "at all"})
    assert hosts.memory_share(1000) == 1000
    assert hosts.any_process(True)
    assert not hosts.any_process(False)
    tree = hosts.to_host({"a": jnp.arange(3), "b": [np.ones(2)]})
    assert isinstance(tree["a"], np.ndarray)
    assert tree["a"].tolist() == [0, 1, 2]
    assert tree["b"][0].tolist() == [1, 1]


def test_facts_of_a_folder_are_names_sizes_and_contents(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"123")
    before = hosts.folder_facts(tmp_path)
    assert before.startswith("a/x.bin 3 ")
    assert hosts.folder_facts(tmp_path / "a" / "x.bin").startswith("x.bin 3 ")
    (tmp_path / "a" / "x.bin").write_bytes(b"321")  # as another adapter or head of the same shape
    assert hosts.folder_facts(tmp_path) != before
    (tmp_path / "a" / "x.bin").write_bytes(b"123")
    assert hosts.folder_facts(tmp_path) == before
    (tmp_path / "a" / ".hidden").write_bytes(b"")
    assert hosts.folder_facts(tmp_path) == before


@pytest.mark.parametrize("place", [0, 10 * hosts.SAMPLE // 2, 10 * hosts.SAMPLE - 1])
def test_large_files_are_compared_by_samples(tmp_path, place):
    data = bytearray(10 * hosts.SAMPLE)
    (tmp_path / "x.bin").write_bytes(data)
    before = hosts.folder_facts(tmp_path)
    data[place] = 1
    (tmp_path / "x.bin").write_bytes(data)
    assert hosts.folder_facts(tmp_path) != before


def test_a_host_without_an_address_is_named_at_once():
    with pytest.raises(
        UserError,
        match=r"JAX_COORDINATOR_ADDRESS is 'no-such-host\.invalid:8476': the host no-such-host\.invalid cannot",
    ):
        hosts.check_address("no-such-host.invalid:8476", listens=False)
    for address in ("127.0.0.1:8476", "localhost:8476"):
        hosts.check_address(address, listens=False)


def test_a_port_in_use_is_named_by_process_0_alone():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            UserError,
            match=rf"port {port} of process 0 is in use; choose another, the same in all processes",
        ):
            hosts.check_address(f"127.0.0.1:{port}", listens=True)
        hosts.check_address(f"127.0.0.1:{port}", listens=False)
    hosts.check_address(f"127.0.0.1:{port}", listens=True)
    with pytest.raises(UserError, match="port 99999 of process 0 cannot be used"):
        hosts.check_address("127.0.0.1:99999", listens=True)

"""Host groups: the arguments of one, and which environment makes one."""

from __future__ import annotations

import pathlib
import pickle

import pytest

from dvkernels import cluster
from dvkernels.cluster import HostGroup, default_resolver
from dvkernels.errors import ClusterError

LOCAL = {
    "DVKERNELS_GROUP": "job",
    "DVKERNELS_GROUP_TOKEN": "secret",
    "DVKERNELS_GROUP_RANK": "1",
    "DVKERNELS_GROUP_SIZE": "3",
}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("", 0, 1, "t"), "path: expected the path of a file; got ''"),
        ((None, 0, 1, "t"), "path: expected the path of a file; got None"),
        (("a\0b", 0, 1, "t"), "path: expected the path of a file"),
        (("a", 2, 2, "t"), "rank: expected an integer from 0 to 1; got 2"),
        (("a", -1, 2, "t"), "rank: expected an integer from 0 to 1; got -1"),
        (("a", True, 2, "t"), "rank: expected an integer from 0 to 1; got True"),
        (("a", 0, 0, "t"), "size: expected an integer from 1; got 0"),
        (("a", 0, 2.0, "t"), "size: expected an integer from 1; got 2.0"),
        (("a", 0, 2, ""), "token: expected a text or bytes"),
        (("a", 0, 2, 7), "token: expected a text or bytes .* got <class 'int'>"),
    ],
)
def test_arguments_out_of_range(given, text):
    with pytest.raises(ClusterError, match=text):
        HostGroup(*given)


def test_a_group_says_all_but_its_token():
    group = HostGroup("/tmp/job", 1, 3, "secret")
    assert (group.worker_id, group.num_workers) == (group.local_rank, group.num_local_workers)
    assert "secret" not in repr(group)
    again = pickle.loads(pickle.dumps(group))
    assert (again.path, again.token, again.task_id) == (group.path, b"secret", 1)


def test_a_name_without_a_folder_lies_where_there_is_memory(monkeypatch, tmp_path):
    module = cluster.host_group
    monkeypatch.setattr(module.tempfile, "gettempdir", lambda: str(tmp_path))
    for folder, size, expected in (
        (tmp_path / "none", 2, tmp_path),
        (pathlib.Path("/dev"), 10**12, tmp_path),
        (pathlib.Path("/"), 2, pathlib.Path("/")),
    ):
        monkeypatch.setattr(module, "_SHARED_MEMORY", folder)
        assert HostGroup("job", 0, size, "t").path == expected / "job"


def test_the_environment_of_a_local_job():
    group = default_resolver(LOCAL | {"PMI_RANK": "0", "PMI_SIZE": "1"})
    assert isinstance(group, HostGroup)
    assert (group.path.name, group.task_id, group.num_workers) == ("job", 1, 3)
    with pytest.raises(ClusterError, match="DVKERNELS_GROUP_TOKEN is not set, as launch"):
        default_resolver({k: v for k, v in LOCAL.items() if "TOKEN" not in k})
    with pytest.raises(ClusterError, match="no MPI launcher started this process"):
        cluster.MPIClusterResolver(environ=LOCAL)

"""Remote tars in a bucket, as moto pretends one: the extra s3 as a user has it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from making import picture, write_tar

from cmapkd.config import ConfigError
from cmapkd.data import stores
from cmapkd.data.kept_counts import claimed_shards
from cmapkd.data.open import SourceWarning, open_source

pytest.importorskip("s3fs", reason="of the extra s3: uv sync")
pytest.importorskip("moto.server", reason="of the group dev: uv sync")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*remote shards? of"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of botocore and moto
]


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket with three shards, which the environment alone tells of."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "PAUSE", 0.01)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pairs")
    for shard in range(3):
        members = [(f"{number:03}.png", picture(shard * 4 + number)) for number in range(4)]
        members += [(f"{number:03}.txt", f"picture {number} of {shard}".encode()) for number in range(4)]
        file = write_tar(tmp_path / f"{shard:03}.tar", sorted(members))
        client.upload_file(str(file), "pairs", f"train/{shard:03}.tar")
    yield "s3://pairs/train"
    server.stop()


@pytest.mark.parametrize("pattern", ["{000..002}.tar", "*.tar", ""])
def test_a_bucket_is_read_as_a_folder(bucket: str, pattern: str, tmp_path: Path) -> None:
    there, local = open_source(f"webdataset:{bucket}/{pattern}"), open_source(f"webdataset:{tmp_path}/*.tar")
    assert len(there) == len(local) == 12
    assert there.fingerprint() == local.fingerprint()
    for index in (0, 5, 11):
        one, other = there[index], local[index]
        assert (one.id, one.captions) == (other.id, other.captions)
        assert one.image.tobytes() == other.image.tobytes()


def test_a_bucket_is_opened_by_the_counts_in_it(bucket: str, tmp_path: Path) -> None:
    import boto3

    client = boto3.client("s3")
    for shard in range(2):  # the third has none
        client.put_object(Bucket="pairs", Key=f"train/{shard:03}_stats.json", Body=b'{"successes": 4}')
    there = open_source(f"webdataset:{bucket}/{{000..001}}.tar")
    assert (len(there), claimed_shards(there)) == (8, 2)
    copies = tmp_path / "cache" / "cmapkd" / "shards"
    assert not list(copies.iterdir())
    assert there[7].captions == ("picture 3 of 1",)
    assert len(list(copies.glob("*.tar"))) == 1
    client.put_object(Bucket="pairs", Key="train/001_stats.json", Body=b"")  # has no range
    with pytest.warns(SourceWarning, match=r"train/001_stats.json is no JSON"):
        some = open_source(f"webdataset:{bucket}/*.tar")
    assert (len(some), claimed_shards(some)) == (12, 1)


def test_an_object_that_is_not_there_is_named(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "TRIES", 2)
    with pytest.raises(ConfigError, match=r"s3://pairs/train/003.tar cannot be read: .*\(2 tries"):
        open_source(f"webdataset:{bucket}/{{000..003}}.tar")
    with pytest.raises(ConfigError, match=r"'s3://pairs/train/val-\*.tar' matches no file of the store"):
        open_source(f"webdataset:{bucket}/val-*.tar")

"""Batch jobs whose images go to a store of objects: s3fs, before a server that speaks S3 and fails when told to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fastsd.batch.manifest import NAME, OWNER
from fastsd.batch.store import UrlStore
from fastsd.errors import FastsdError
from fastsd.files import fingerprint
from tests.support.cli import refused
from tests.support.s3_server import BROKEN, BUSY, S3Server, s3_server, use_key

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(
        find_spec("s3fs") is None or find_spec("moto") is None, reason="needs s3fs and moto[server], which are large"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of theirs
]
PLACE = "s3://bucket/jöb 1/雪"
LINES = 6


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with s3_server(monkeypatch) as server:
        UrlStore("s3://bucket").files.mkdir("bucket")
        yield server


@pytest.fixture
def job(cli: Callable, model: Path) -> Callable[..., Any]:
    """`job("out", *flags)`: a run of a job of `LINES` lines."""
    asked = [json.dumps({"prompt": f"ein Bär {k} 🐻", "seed": k, "id": f"ß{k}"}) for k in range(LINES)]
    Path("aufträge.jsonl").write_text("\n".join(asked) + "\n", encoding="utf-8")
    return lambda out, *flags: cli("batch", "aufträge.jsonl", "--out", out, "-m", model, "-b", 1, *flags)


def check(out: str, url: str = PLACE) -> None:
    """Each line is done once, and the store has its images, the marker and nothing else."""
    records = [json.loads(line) for line in (Path(out) / NAME).read_text().splitlines()[1:]]
    assert sorted(record["line"] for record in records) == list(range(1, LINES + 1))
    store = UrlStore(url)
    there = {path.removeprefix(f"{store.root}/"): store.files.cat_file(path) for path in store.files.find(store.root)}
    assert there.pop(OWNER) is not None
    assert {name: fingerprint(data) for name, data in there.items()} == {
        one["path"]: one["sha256"] for record in records for one in record["files"]
    }


def test_a_job(s3: S3Server, job: Callable) -> None:
    ran = job("out", "--store", PLACE)
    assert (ran.code, ran.err) == (0, "")
    check("out")
    assert len(s3.puts) == 1 + 1 + LINES  # the bucket of the fixture, the marker, images: no folders
    assert job("out", "--store", PLACE).code == 0 and len(s3.puts) == 1 + 1 + LINES


@pytest.mark.parametrize("error", [BUSY, BROKEN])
def test_answers_that_fail_now_and_then_are_asked_for_again(s3: S3Server, job: Callable, error: Any) -> None:
    s3.fails = lambda number, method: error if number % 3 == 0 else None
    ran = job("out", "--store", PLACE)
    assert (ran.code, ran.err) == (0, "")
    check("out")


def test_a_store_that_fails_in_the_middle_ends_the_run_and_the_next_goes_on(s3: S3Server, job: Callable) -> None:
    s3.fails = lambda number, method: BROKEN if method == "PUT" and len(s3.puts) > 5 else None
    refused(job("out", "--store", PLACE), f"--store {PLACE}", "cannot write: we encountered an internal error")
    written = (Path("out") / NAME).read_text().splitlines()
    assert len(written) == 1 + 3  # the job, and what was in the store
    s3.fails = lambda number, method: None
    assert job("out", "--store", PLACE).code == 0
    check("out")


def test_a_bucket_that_is_not_there_is_not_made(s3: S3Server, job: Callable) -> None:
    refused(job("out", "--store", "s3://typo/job"), "there is no bucket 'typo'")
    assert UrlStore("s3://bucket").files.ls("") == ["bucket"] and not (Path("out") / NAME).exists()
    assert job("out", "--store", PLACE).code == 0
    check("out")


@pytest.mark.parametrize("url", ["s3://", "s3://bucket//job"])
def test_a_url_without_a_bucket_or_with_empty_parts(s3: S3Server, url: str) -> None:
    with pytest.raises(FastsdError, match="it should be s3://bucket/folder"):
        UrlStore(url)


def test_credentials_that_do_not_do(s3: S3Server, job: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3

    iam = boto3.client("iam")
    iam.create_user(UserName="reader")
    key = iam.create_access_key(UserName="reader")["AccessKey"]
    rule = {"Effect": "Allow", "Action": ["s3:Get*", "s3:List*"], "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [rule]})
    iam.put_user_policy(UserName="reader", PolicyName="read", PolicyDocument=policy)
    s3.tell("reset-auth", b"0")
    try:
        for name, secret, said in (
            (key["AccessKeyId"], key["SecretAccessKey"], "cannot write: access denied"),
            (key["AccessKeyId"], "wrong", "signature"),
            ("AKIAUNKNOWN", "wrong", "does not exist"),
        ):
            use_key(monkeypatch, name, secret)
            refused(job("out", "--store", PLACE), f"--store {PLACE}", said)
            assert not (Path("out") / NAME).exists()
    finally:
        s3.tell("reset-auth", b"inf")


def test_more_objects_than_a_listing_has_and_listings_of_others(s3: S3Server) -> None:
    import boto3

    client = boto3.client("s3")
    for k in range(1001):
        client.put_object(Bucket="bucket", Key=f"many/00000/{k}.png", Body=b"")
    names = [f"00000/{k}.png" for k in range(1002)]
    assert UrlStore("s3://bucket/many").lacks(names) == {"00000/1001.png"}
    client.put_object(Bucket="bucket", Key="many/00000/1001.png", Body=b"")  # as another process does
    assert not UrlStore("s3://bucket/many").lacks(names)


def test_a_folder_that_a_console_made_is_empty(s3: S3Server, job: Callable) -> None:
    import boto3

    boto3.client("s3").put_object(Bucket="bucket", Key="made/", Body=b"")
    assert job("out", "--store", "s3://bucket/made").code == 0
    assert len(UrlStore("s3://bucket/made/00000").names()) == LINES

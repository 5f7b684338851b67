"""MinIO's S3 front end, as JuiceFS' gateway contains it: its own reasons decide the advice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fetchkit.filesystems import KEY, SECRET, JuiceFS
from fetchkit.models import PinnedModel, embedding_model
from fetchkit.program import PACKAGE, Pod, assert_failed, assert_ready
from fetchkit.store import serve

MODEL = PinnedModel(embedding_model(weights=1 << 20), "s3://models/tiny")
KEYS = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a store that holds the model."""
    boto3 = pytest.importorskip("boto3", reason="no S3 client here: install boto3")
    store = JuiceFS(tmp_path_factory.mktemp("juicefs") / "store")
    try:
        client = boto3.client(
            "s3",
            endpoint_url=store.s3,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
        )
        client.create_bucket(Bucket="models")
        for path, content in MODEL.files.items():
            client.put_object(Bucket="models", Key=f"tiny/{path}", Body=content)
        yield store.s3
    finally:
        store.end()


def test_right_keys(pod: Pod, s3: str) -> None:
    run = pod.run(MODEL, None, env={**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3})
    assert_ready(run, pod, MODEL)


@pytest.mark.parametrize(
    ("uri", "wrong", "code", "said"),
    [
        (None, {"AWS_SECRET_ACCESS_KEY": "wr0ng"}, 4, "SignatureDoesNotMatch"),
        (None, {"AWS_ACCESS_KEY_ID": "nobody"}, 4, "InvalidAccessKeyId"),
        ("s3://no-such-bucket/tiny", {}, 2, "NoSuchBucket"),
        ("s3://models/other", {}, 3, "NoSuchKey"),
    ],
)
def test_what_the_store_says(
    pod: Pod, s3: str, uri: str | None, wrong: dict[str, str], code: int, said: str
) -> None:
    model = PinnedModel(MODEL.files, uri or MODEL.artifact_uri)
    run = pod.run(model, None, env={**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3, **wrong})
    assert_failed(run, pod, code)
    assert said in run.last
    assert SECRET not in run.log


def test_an_endpoint_that_is_no_s3(pod: Pod) -> None:
    """MLflow's own port, say."""
    pytest.importorskip("boto3", reason="no S3 client here: install boto3")
    with serve(MODEL.files) as mlflow:
        run = pod.run(MODEL, None, env={**KEYS, "MLFLOW_S3_ENDPOINT_URL": mlflow.url})
    assert_failed(run, pod, 2)
    assert "MLFLOW_S3_ENDPOINT_URL" in run.last


CLOCK = """
import datetime
class Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return super().now(tz) + datetime.timedelta(hours={hours})
datetime.datetime = Skewed
"""


@pytest.mark.parametrize("hours", [-2, 2])
def test_a_wrong_clock_is_told_from_the_store_s_own(
    pod: Pod, tmp_path: Path, s3: str, hours: int
) -> None:
    """A store refuses what was signed at another time, by whatever name; both clocks are said."""
    (tmp_path / "sitecustomize.py").write_text(CLOCK.format(hours=hours))
    env = {**KEYS, "MLFLOW_S3_ENDPOINT_URL": s3, "PYTHONPATH": f"{PACKAGE}:{tmp_path}"}
    run = pod.run(MODEL, None, env=env)
    assert_failed(run, pod, 4)
    assert "this machine's clock says" in run.last
    assert "set the clock right" in run.last

"""What this program signs itself is, letter by letter, what boto3 would have signed."""

from __future__ import annotations

from datetime import datetime
from urllib.parse import parse_qs, urlsplit

import pytest
from model_fetch.sigv4 import Keys, signed


@pytest.mark.parametrize("token", ["", "a/session+token=="])
@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:8333", "https://s3.example.com", "https://s3.example.com:443/a"]
)
@pytest.mark.parametrize(
    "key",
    ["model.safetensors", "1/run/artifacts/a b/ü&+=%41?x#y~z", "a//b", "日本/(x)'!*,;:@$"],
)
def test_a_signature_is_boto3_s(endpoint: str, key: str, token: str) -> None:
    boto3 = pytest.importorskip("boto3", reason="the image's own boto3 is not here")
    from botocore.config import Config

    secret = "5ecret/of+the=store"
    client = boto3.session.Session(
        aws_access_key_id="KEY",
        aws_secret_access_key=secret,
        aws_session_token=token or None,
        region_name="eu-west-1",
    ).client(
        "s3",
        endpoint_url=endpoint,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}),
    )
    named = {"Bucket": "mlflow", "Key": key}
    theirs = client.generate_presigned_url("get_object", Params=named, ExpiresIn=3600)
    asked = parse_qs(urlsplit(theirs).query)
    now = datetime.strptime(asked["X-Amz-Date"][0], "%Y%m%dT%H%M%SZ")
    ours = signed(endpoint, f"mlflow/{key}", Keys("KEY", secret, token), "eu-west-1", 3600, now)
    assert parse_qs(urlsplit(ours).query) == asked
    assert urlsplit(ours).path == urlsplit(theirs).path


def test_keys_that_are_not_in_the_environment_are_for_boto3_to_find() -> None:
    assert Keys.from_environment({"AWS_PROFILE": "x"}) is None
    assert Keys.from_environment({"AWS_ACCESS_KEY_ID": "x"}) is None
    keys = Keys.from_environment({"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y\n"})
    assert keys == Keys("x", "y")
    assert "'y'" not in repr(keys)

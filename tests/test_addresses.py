"""What is an address of a server, and which are never asked on a server's word."""

from __future__ import annotations

import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from extensions.addresses import (
    BadAddress,
    checked,
    joined,
    leads_to_metadata,
    never_asked,
    origin,
    place,
)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("http://mlflow:5000", "http://mlflow:5000"),
        ("HTTP://MLflow/a", "http://mlflow/a"),
        ("https://user:pa55@host/x#part", "https://host/x"),
        ("http://bücher.example/ä b?q=ü", "http://xn--bcher-kva.example/%C3%A4%20b?q=%C3%BC"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        (
            "https://s3/b/k?X-Amz-Signature=a%2Fb&X=c+d\"'|",
            "https://s3/b/k?X-Amz-Signature=a%2Fb&X=c+d\"'|",
        ),
        ("http://my_host-1.x:1/", "http://my_host-1.x:1/"),
    ],
)
def test_what_is_an_address(given: str, asked: str) -> None:
    assert checked(given) == asked


@pytest.mark.parametrize(
    "given",
    [
        *("", "host:5000", "ftp://host/", "file:///etc/passwd", "//host/x", "http:", "http:///x"),
        *("http://[::1", "http://::1/", "http://[::1]x/", "http://[zz]/", "http://[1.2.3.4]/"),
        *("http://h:99999/", "http://h:5000x", "http://h:-1/", "http://h:0/", "http://h:+80/"),
        *("http://h:８０/", "http://h:" + "9" * 5000, "http://a..b/", f"http://{'a' * 70}.x/"),
        *("http://漢..", "http://\udcff/", "http://h/\udcff", "http://h\x7f/", "http://h%00/"),
        *("http://h\\@other/", "http://h h/", "http://UPPER_lower!/"),
    ],
)
def test_what_is_none(given: str) -> None:
    with pytest.raises(BadAddress) as caught:
        checked(given)
    assert len(str(caught.value)) < 60


def test_a_redirect_leads_where_a_browser_would_go() -> None:
    assert joined("https://a/b/c?d", "../x y") == "https://a/x%20y"
    assert joined("https://a/b", "//other/x") == "https://other/x"
    # http.client gives UTF-8 as a character for each byte.
    assert joined("https://a/", "/\u00c3\u00a4") == "https://a/%C3%A4"


@pytest.mark.parametrize(
    "number",
    [
        *("169.254.169.254", "169.254.170.2", "169.254.0.1", "fe80::1", "fe80::1%eth0"),
        *("::ffff:169.254.169.254", "::169.254.169.254", "64:ff9b::a9fe:a9fe", "2002:a9fe:a9fe::"),
        *("fd00:ec2::254", "fd00:ec2::23", "fd20:ce::254", "100.100.100.200", "168.63.129.16"),
        *("192.0.0.192", "fd00:c1::a9fe:a9fe", "fd00:42::42", "::ffff:0:169.254.169.254"),
    ],
)
def test_where_credentials_of_machines_are_kept(number: str) -> None:
    assert never_asked(number)


@pytest.mark.parametrize(
    "host",
    [
        *("metadata.google.internal", "METADATA.google.internal.", "metadata.goog", "metadata"),
        *("instance-data.ec2.internal", "2852039166", "0xa9fea9fe", "0251.0376.0251.0376"),
        *("169.254.43518", "fe80::1%nowhere", "[::ffff:a9fe:a9fe]".strip("[]")),
    ],
)
def test_where_a_proxy_would_find_them(host: str) -> None:
    assert leads_to_metadata(host)


@pytest.mark.parametrize("host", ["metadata.example.com", "internal", "8.8.8.8", "a..b", "", "é"])
def test_where_a_proxy_finds_stores(host: str) -> None:
    assert not leads_to_metadata(host)


@pytest.mark.parametrize(
    "number", ["127.0.0.1", "::1", "10.0.0.1", "192.168.1.1", "169.253.0.1", "fd00::1", "8.8.8.8"]
)
def test_where_stores_are(number: str) -> None:
    assert not never_asked(number)


@seed(13)
@given(st.text() | st.from_regex(r"https?://[^/]{0,20}(:.{0,6})?(/.*)?"))
def test_any_text_is_an_address_that_can_be_asked_or_none(text: str) -> None:
    for make in (checked, lambda location: joined("https://a/b", location)):
        try:
            url = make(text)
        except BadAddress:
            continue
        assert url.isascii()
        assert url.isprintable()
        assert " " not in url
        scheme, host, port = origin(url)
        assert scheme in ("http", "https")
        assert host
        assert 0 < port < 65536
        assert "@" not in place(url).partition("://")[2].partition("/")[0]
        assert checked(url) == url

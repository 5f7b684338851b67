"""Everything that a network and a store can do wrong, done by a proxy in between.

After each fault the model is either whole and byte-identical, or the exit code is the documented
one and nothing looks complete.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from fetchkit.models import PinnedModel
from fetchkit.program import Pod, assert_failed, assert_ready
from fetchkit.proxy import Fault, breaking
from fetchkit.store import serve

WEIGHTS = "model.safetensors"


def every(n: int, fault: Fault):
    """The fault happens to every n-th request."""
    return lambda number, path, wanted: fault if number % n == 0 else None


def first(times: int, fault: Fault, of: str = WEIGHTS):
    """The fault happens to the first requests for a file."""
    seen = []

    def plan(number, path, wanted):
        if path.endswith(of) and len(seen) < times:
            seen.append(number)
            return fault
        return None

    return plan


def always(fault: Fault, of: str = WEIGHTS):
    return lambda number, path, wanted: fault if path.endswith(of) else None


def down_after_12_requests(number, path, wanted):
    return Fault(status=503) if number > 12 else None


SURVIVED = {
    "cut after 40,000 bytes, every 2nd request": every(2, Fault(cut_after=40_000)),
    "cut after 1 byte, every 3rd request": every(3, Fault(cut_after=1)),
    "cut before the body, every 2nd request": every(2, Fault(cut_after=0)),
    "reset after 70,000 bytes, every 2nd request": every(2, Fault(cut_after=70_000, reset=True)),
    "every 3rd answer is 500": every(3, Fault(status=500)),
    "every 3rd answer is 502 with a web page": every(
        3, Fault(status=502, headers=("Content-Type: text/html",), body=b"<html>Bad Gateway</html>")
    ),
    "every 3rd answer is 503 with Retry-After": every(
        3, Fault(status=503, headers=("Retry-After: 0",))
    ),
    "every 2nd answer is 429 with Retry-After": every(
        2, Fault(status=429, headers=("Retry-After: 1",))
    ),
    "silence for 2 s": first(1, Fault(stall=2.0)),
    "one slow drip": first(2, Fault(drip=0.004)),
    "no Content-Length": always(Fault(hide_length=True)),
    "ranges are ignored": lambda number, path, wanted: Fault(without_range=True),
    "ranges are ignored, and the stream is cut twice": lambda number, path, wanted: Fault(
        without_range=True, cut_after=1_000_000 if number < 4 else None
    ),
    "ranges are ignored from the 10th request on": lambda number, path, wanted: (
        Fault(without_range=True) if number >= 10 else None
    ),
    "the announced length is wrong once": first(1, Fault(length=-1)),
    "the ETag changes once": lambda number, path, wanted: (
        Fault(etag='"another"') if number == 6 else None
    ),
    "a bit is flipped once": first(1, Fault(flip_at=100_000)),
}


@pytest.mark.parametrize("fault", SURVIVED)
def test_a_passing_fault_is_survived(pod: Pod, mirrored: PinnedModel, fault: str) -> None:
    with serve(mirrored.files) as store, breaking(store.port, SURVIVED[fault]) as proxy:
        run = pod.run(mirrored, proxy.url, "--timeout", "5")
    assert_ready(run, pod, mirrored)
    assert proxy.faults > 0


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(status=404), 3),
        (Fault(status=410), 3),
        (Fault(status=401), 4),
        (Fault(status=403), 4),
        (Fault(status=500), 5),
        (Fault(status=503, headers=("Retry-After: 0",)), 5),
        (Fault(status=400), 5),
        (Fault(cut_after=0), 5),
        (Fault(without_range=True, cut_after=500_000), 5),
        (Fault(status=200, headers=("Content-Type: text/html",), body=b"<html>Log in</html>"), 5),
        (Fault(status=302, headers=("Location: ftp://elsewhere/",)), 5),
        (Fault(length=7), 7),
        (Fault(length=-7), 7),
        (Fault(flip_at=5_000), 7),
        (Fault(status=416), 7),
    ],
    ids=str,
)
def test_a_lasting_fault_has_its_exit_code(
    pod: Pod, mirrored: PinnedModel, fault: Fault, code: int
) -> None:
    with serve(mirrored.files) as store, breaking(store.port, always(fault)) as proxy:
        run = pod.run(mirrored, proxy.url, "--retries", "2")
    assert_failed(run, pod, code)
    assert proxy.faults > 0


def test_a_lasting_fault_leaves_what_a_later_run_goes_on_with(
    pod: Pod, mirrored: PinnedModel
) -> None:
    with serve(mirrored.files) as store:
        with breaking(store.port, down_after_12_requests) as proxy:
            assert_failed(pod.run(mirrored, proxy.url, "--retries", "1"), pod, 5)
        before = store.sent
        assert_ready(pod.run(mirrored, store.url), pod, mirrored)
    total = sum(map(len, mirrored.files.values()))
    assert before > 0
    # At most one chunk of 128 KiB per connection comes twice.
    assert store.sent <= total + 4 * 128 * 1024


def test_a_drip_below_a_kibibyte_per_second_is_given_up(pod: Pod, mirrored: PinnedModel) -> None:
    with serve(mirrored.files) as store, breaking(store.port, always(Fault(drip=2.0))) as proxy:
        run = pod.run(mirrored, proxy.url, "--timeout", "1", "--retries", "0")
    assert_failed(run, pod, 5)


def test_a_drip_is_given_up_though_no_pause_in_it_is_long(pod: Pod, mirrored: PinnedModel) -> None:
    drip = always(Fault(drip=2.0))
    with serve(mirrored.files) as store, breaking(store.port, drip) as proxy:
        run = pod.run(mirrored, proxy.url, "--timeout", "3", "--retries", "0")
    assert_failed(run, pod, 5)
    assert "next to nothing arrives" in run.log


def test_a_flipped_bit_without_any_digest_is_not_seen_but_a_truncated_file_is(
    pod: Pod, model: PinnedModel
) -> None:
    """What the safetensors structure is good for: the store and the pin agree on a short file."""
    short = {**model.files, WEIGHTS: model.files[WEIGHTS][:-4]}
    truncated = replace(model, files=short)
    with serve(short) as store:
        assert_failed(pod.run(truncated, store.url), pod, 7)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(status=401), 4),
        (Fault(status=403), 4),
        (Fault(status=503), 5),
        (Fault(status=404), 2),
    ],
    ids=str,
)
def test_an_mlflow_that_signs_nothing_where_there_is_no_key_either(
    pod: Pod, model: PinnedModel, fault: Fault, code: int
) -> None:
    direct = replace(model, artifact_uri="s3://b/1/r/artifacts/model", more={"run_id": "r"})
    with serve(model.files) as store, breaking(store.port, always(fault, of="")) as proxy:
        run = pod.run(direct, proxy.url, env={"HOME": str(pod.folder)})
    assert_failed(run, pod, code)


def test_nothing_listens(pod: Pod, model: PinnedModel) -> None:
    run = pod.run(model, "http://127.0.0.1:9", "--retries", "1")
    assert_failed(run, pod, 5)


def test_a_store_that_has_another_version_by_now_is_never_mixed_with_what_came_before(
    pod: Pod, model: PinnedModel
) -> None:
    """No digest in the pin: the ETag alone tells the two apart."""
    other = bytes(reversed(model.files[WEIGHTS][1000:]))
    newer = {**model.files, WEIGHTS: model.files[WEIGHTS][:1000] + other}
    with serve(model.files) as store:
        with breaking(store.port, down_after_12_requests) as proxy:
            assert_failed(pod.run(model, proxy.url, "--retries", "0"), pod, 5)
        store.files["model/" + WEIGHTS] = newer[WEIGHTS]
        assert_ready(pod.run(model, store.url), pod, replace(model, files=newer))


def test_without_any_name_of_the_version_nothing_is_resumed(pod: Pod, model: PinnedModel) -> None:
    with serve(model.files, validators=False) as store:
        with breaking(store.port, down_after_12_requests) as proxy:
            assert_failed(pod.run(model, proxy.url, "--retries", "0"), pod, 5)
        store.sent = 0
        assert_ready(pod.run(model, store.url), pod, model)
        assert store.sent >= len(model.files[WEIGHTS])

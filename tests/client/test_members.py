"""Which server is asked, when one goes out, and when it comes back."""

from __future__ import annotations

from typing import Any

import pytest

from eagle3_client.members import Members
from eagle3_schemas.errors import FingerprintMismatch, NotReady, RemoteEagle3Error, TransportError


class Silent:
    """A connection nobody asks."""

    def __init__(self, url: str, address: str | None) -> None:
        self.url = url if address is None else f"{url} [{address}]"
        self.was_interrupted = self.is_closed = False

    def interrupt(self) -> None:
        self.was_interrupted = True

    def close(self) -> None:
        self.is_closed = True


def members_of(*urls: str, is_resolved: bool = False) -> Members:
    return Members(urls, Silent, is_resolved=is_resolved)  # type: ignore[arg-type]


def turns(members: Members, count: int) -> list[str]:
    """Who is taken when every use ends before the next."""
    urls = []
    for _ in range(count):
        member = members.take()
        urls.append(member.connection.url)
        members.give_back(member, None)
    return urls


LOST = TransportError("lost")


def refused() -> TransportError:
    error = TransportError("nothing listens")
    error.__cause__ = ConnectionRefusedError()
    return error


@pytest.mark.parametrize(("rank", "expected"), [(None, "abca"), ("0", "abca"), ("4", "bcab")])
def test_turns_begin_at_the_rank(
    rank: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert "".join(turns(members_of("a", "b", "c"), 4)) == expected


def test_the_least_busy_is_taken() -> None:
    members = members_of("a", "b")
    first, second = members.take(), members.take()
    assert {first.connection.url, second.connection.url} == {"a", "b"}
    members.give_back(second, None)
    assert members.take() is second


def test_one_whose_queue_is_full_is_taken_only_if_all_are() -> None:
    members = members_of("a", "b")
    a, b = members.all
    assert members.note_full(a, 60)  # the other one may have room
    assert set(turns(members, 4)) == {"b"}
    assert not members.note_full(b, 60)
    assert set(turns(members, 4)) == {"a", "b"}


def test_a_rank_of_any_length_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1" * 5000)
    members_of("a").take()


def take(members: Members, url: str) -> Any:
    """The member of a URL, taken."""
    while (member := members.take()).connection.url != url:
        members.give_back(member, None)
    return member


@pytest.mark.parametrize(
    ("failures", "is_out"),
    [
        ([LOST], False),
        ([LOST, LOST], True),
        ([LOST, None, LOST], False),
        ([refused()], True),
        ([NotReady("drains")], True),
        ([FingerprintMismatch("another")], True),
    ],
)
def test_a_server_goes_out_when_it_is_surely_not_well(
    failures: list[RemoteEagle3Error | None], is_out: bool
) -> None:
    members = members_of("a", "b")
    for failure in failures:
        members.give_back(take(members, "b"), failure)
    assert set(turns(members, 4)) == ({"a"} if is_out else {"a", "b"})


def test_it_comes_back_after_two_good_checks_in_a_row() -> None:
    members = members_of("a", "b")
    b = take(members, "b")
    members.give_back(b, refused())
    assert not members.check_succeeded(b)
    members.check_failed(b, LOST)
    assert not members.check_succeeded(b)
    assert members.check_succeeded(b)
    assert b.is_out  # until it was compared
    members.readmit(b)
    members.give_back(take(members, "b"), LOST)  # its failures are forgotten
    assert not b.is_out
    assert set(turns(members, 4)) == {"a", "b"}


def test_three_missed_checks_put_it_out_and_give_up_what_it_holds() -> None:
    members = members_of("a", "b")
    b = next(each for each in members.all if each.connection.url == "b")
    for reason in (LOST, LOST):
        members.check_failed(b, reason)
    members.check_succeeded(b)
    for count in range(3):
        assert not b.is_out, count
        members.check_failed(b, LOST)
    assert b.is_out
    assert b.connection.was_interrupted  # type: ignore[attr-defined]


def test_one_that_drains_is_not_interrupted() -> None:
    members = members_of("a", "b")
    b = members.all[1]
    members.check_failed(b, NotReady("drains"))
    assert b.is_out
    assert not b.connection.was_interrupted  # type: ignore[attr-defined]


def test_the_only_server_never_goes_out() -> None:
    members = members_of("a")
    for _ in range(5):
        members.give_back(members.take(), refused())
    member = members.all[0]
    for _ in range(5):
        members.check_failed(member, LOST)
    assert not member.is_out
    assert not member.connection.was_interrupted  # type: ignore[attr-defined]


def test_when_all_are_out_each_ones_reason_is_told() -> None:
    members = members_of("http://a", "http://b")
    for url, reason in (("http://a", refused()), ("http://b", NotReady("it loads"))):
        members.give_back(take(members, url), reason)
    with pytest.raises(TransportError) as caught:
        members.take()
    assert caught.value.is_retryable
    assert not caught.value.was_sent
    for word in ("none of 2", "http://a: nothing listens", "http://b: it loads"):
        assert word in str(caught.value)


def test_when_only_other_targets_are_left_that_is_the_error() -> None:
    members = members_of("a", "b")
    for member in members.all:
        members.eject(member, LOST)
        members.check_failed(member, FingerprintMismatch("another model"))
    with pytest.raises(FingerprintMismatch):
        members.take()
    members.check_failed(members.all[1], LOST)  # one of them may yet be the right one
    with pytest.raises(TransportError):
        members.take()


# --- names ---


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What each name resolves to; one without an entry does not."""
    known: dict[str, list[str]] = {}

    def look_up(host: str, port: int, **_kwargs: Any) -> list[Any]:
        if host not in known:
            raise OSError(f"{host}: not known")
        return [(30 if ":" in address else 2, 1, 6, "", (address, port)) for address in known[host]]

    monkeypatch.setattr("eagle3_client.resolve.socket.getaddrinfo", look_up)
    monkeypatch.setattr("eagle3_client.resolve.socket.AF_INET6", 30)
    return known


def urls_of(members: Members) -> list[str]:
    return [member.connection.url for member in members.all]


@pytest.mark.parametrize(
    ("addresses", "expected"),
    [
        (["10.0.0.1"], [""]),
        (["10.0.0.2", "10.0.0.1", "10.0.0.1"], [" [10.0.0.1]", " [10.0.0.2]"]),
        (["10.0.0.1", "fd00::1"], [""]),
        (["fd00::2", "fd00::1"], [" [fd00::1]", " [fd00::2]"]),
        (["fd00::2", "fd00::1", "10.0.0.1"], [""]),
    ],
)
def test_a_name_of_several_addresses_is_as_many_servers(
    names: dict[str, list[str]], addresses: list[str], expected: list[str]
) -> None:
    names["targets"] = addresses
    members = members_of("http://targets:8001", is_resolved=True)
    members.resolve(is_first=True)
    assert urls_of(members) == [f"http://targets:8001{one}" for one in expected]
    assert not any(member.is_out for member in members.all)


@pytest.mark.parametrize("url", ["http://10.0.0.1:1", "http://[::1]:1", "http://localhost:1"])
def test_addresses_and_this_host_are_not_looked_up(names: dict[str, list[str]], url: str) -> None:
    members = members_of(url, is_resolved=True)
    members.resolve(is_first=True)
    assert urls_of(members) == [url]
    assert not members.is_watched


def test_servers_that_turn_up_wait_to_be_compared_and_those_that_left_finish(
    names: dict[str, list[str]],
) -> None:
    names["targets"] = ["10.0.0.1", "10.0.0.2"]
    members = members_of("http://targets:8001", is_resolved=True)
    members.resolve(is_first=True)
    busy = take(members, "http://targets:8001 [10.0.0.2]")
    names["targets"] = ["10.0.0.1", "10.0.0.3"]
    members.resolve()
    assert urls_of(members)[1:] == ["http://targets:8001 [10.0.0.3]"]
    assert members.all[1].is_out
    assert set(turns(members, 3)) == {"http://targets:8001 [10.0.0.1]"}
    assert not busy.connection.is_closed
    members.give_back(busy, None)
    assert busy.connection.is_closed


def test_a_name_that_cannot_be_looked_up_keeps_its_servers(names: dict[str, list[str]]) -> None:
    members = members_of("http://targets:8001", is_resolved=True)
    members.resolve(is_first=True)
    assert urls_of(members) == ["http://targets:8001"]
    names["targets"] = ["10.0.0.1", "10.0.0.2"]
    members.resolve(is_first=True)
    del names["targets"]
    members.resolve()
    assert len(members.all) == 2
    assert not any(member.is_out for member in members.all)

"""Addresses as users write them, and back."""

import socket
import sys
from ipaddress import IPv6Address
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork import values
from prefork.net import address
from prefork.net.address import TEMPORARY_NAME, UNIX_PATH_LIMIT, Address, parse

ports = st.integers(0, 65535)
v4 = st.ip_addresses(v=4).map(str)
numeric = st.ip_addresses(v=6)
v6 = numeric.filter(lambda ip: not ip.is_link_local).map(str) | st.ip_addresses(v=6, network="fe80::/10").map("{}%eth0".format)
LONGEST = UNIX_PATH_LIMIT - TEMPORARY_NAME


def collides(one: Address, other: Address) -> bool:
    """Whether both can't be listened on at once (socket(7), ipv6(7) with IPV6_V6ONLY but for all hosts)."""
    if {address.INHERITED, socket.AF_UNIX} & {one.family, other.family}:
        return one.place == other.place
    if one.port != other.port or one.port == 0:
        return False
    if "" in (one.host, other.host):
        return True
    return one.family == other.family and (one.host == other.host or bool({"0.0.0.0", "::"} & {one.host, other.host}))


few = ("127.0.0.1", "127.0.0.2", "0.0.0.0", "[::1]", "[::2]", "[::]", "")
written = st.builds("{}:{}".format, st.sampled_from(few), st.integers(0, 2)) | st.sampled_from(
    ["unix:/1", "unix:/2", "fd:3", "fd:4"]
)


@given(st.lists(written, max_size=12))
def test_an_address_collides_as_if_it_was_held_against_each(texts: list[str]) -> None:
    claims, found = address.Claims(), list[Address]()
    for text in texts:
        parsed = parse(text)
        colliding = [other for other in found if collides(parsed, other)]
        other = claims.add(parsed)
        if other is None:
            assert colliding == []
            found.append(parsed)
        else:
            assert other in colliding


def test_as_many_addresses_as_there_may_be_are_read_in_linear_time() -> None:
    def calls(count: int) -> int:
        """Of Python's and C's functions: what time would say on an idle machine."""
        texts, found = [f"127.0.{n // 250}.{n % 250}:7000" for n in range(count)], [0]

        def count_it(_frame: FrameType, event: str, _argument: object) -> None:
            found[0] += event in ("call", "c_call")

        sys.setprofile(count_it)
        try:
            values.addresses(texts)
        finally:
            sys.setprofile(None)
        return found[0]

    assert calls(values.ADDRESSES_LIMIT) < 2.2 * calls(values.ADDRESSES_LIMIT // 2)
    with pytest.raises(ValueError, match="8000 addresses: at most 1024"):
        values.addresses([f":{port}" for port in range(1, 8001)])


@given(host=v4, port=ports)
def test_an_ipv4_address_is_shown_as_it_is_written(host: str, port: int) -> None:
    assert parse(f"{host}:{port}") == Address(socket.AF_INET, host, port)
    assert str(parse(f"{host}:{port}")) == f"{host}:{port}"


@given(host=v6, port=ports)
def test_an_ipv6_address_is_shown_as_it_is_written(host: str, port: int) -> None:
    assert parse(f"[{host}]:{port}").family == socket.AF_INET6
    assert str(parse(f"[{host}]:{port}")) == f"[{host}]:{port}"


@given(host=numeric.filter(lambda ip: not ip.is_link_local), port=ports)
def test_two_spellings_of_one_ipv6_address_are_equal(host: IPv6Address, port: int) -> None:
    assert parse(f"[{host.exploded.upper()}]:{port}") == parse(f"[{host}]:{port}")


@given(port=ports)
def test_a_port_alone_is_every_address_of_both_families(port: int) -> None:
    assert parse(f":{port}") == Address(socket.AF_INET6, "", port)
    assert str(parse(f":{port}")) == f":{port}"
    assert parse(f"[::]:{port}") != parse(f":{port}")


def test_localhost_is_not_looked_up() -> None:
    assert parse("localhost:80") == parse("127.0.0.1:80")


@given(st.text(st.characters(exclude_characters="?\0", exclude_categories=["Cs"]), max_size=25))
def test_a_unix_path_is_taken_literally(name: str) -> None:
    assert parse(f"unix:/{name}") == Address(socket.AF_UNIX, f"/{name}", mode=0o600)
    assert str(parse(f"unix:/{name}")) == f"unix:/{name}"


@given(st.integers(0, 0o777))
def test_a_unix_mode_is_octal(mode: int) -> None:
    assert parse(f"unix:/a?mode={mode:o}").mode == mode
    assert parse(f"unix:/a?mode=0{mode:o}").mode == mode


@pytest.mark.parametrize("character", ["a", "é", "😀"])
def test_a_unix_path_is_measured_in_bytes(character: str) -> None:
    size = len(character.encode())
    path = "/" + character * ((LONGEST - 1) // size)
    assert parse(f"unix:{path}").host == path
    with pytest.raises(ValueError, match=f"at most {LONGEST} bytes"):
        parse(f"unix:{path}{character}")


def test_the_longest_unix_path_can_be_bound_under_its_temporary_name() -> None:
    # sun_path holds 108 bytes with the NUL.
    assert len(parse("unix:/" + "a" * (LONGEST - 1)).host) + TEMPORARY_NAME + 1 <= 108


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", r"HOST:PORT, :PORT, \[IPV6\]:PORT, unix:/path, fd:N or systemd:NAME"),
        ("7000", r"HOST:PORT, :PORT, \[IPV6\]:PORT, unix:/path, fd:N or systemd:NAME"),
        ("127.0.0.1:", "port must be a number from 0 to 65535, not ''"),
        ("127.0.0.1:65536", "port must be a number from 0 to 65535, not '65536'"),
        ("127.0.0.1:-1", "port must be a number from 0 to 65535, not '-1'"),
        ("127.0.0.1:٨٠", "port must be a number from 0 to 65535"),
        ("127.0.0.1:8_0", "port must be a number from 0 to 65535"),
        ("127.0.0.1: 80", "port must be a number from 0 to 65535"),
        ("*:7000", "written :7000, without the \\*"),
        ("example.org:80", "numeric address or localhost, not 'example.org'"),
        ("127.1:80", "numeric address or localhost, not '127.1'"),
        ("127.0.0.01:80", "numeric address or localhost, not '127.0.0.01'"),
        ("[]:80", "numeric address or localhost, not ''"),
        ("::1:80", r"in brackets: \[::1\]"),
        ("[127.0.0.1]:80", "not IPv6: 127.0.0.1"),
        ("[fe80::1]:80", r"a link-local address needs its interface: \[fe80::1%eth0\]"),
        ("[::1%lo]:80", r"only a link-local address \(fe80::\) has an interface: \[::1\]"),
        ("[fe80::1%]:80", "numeric address or localhost, not 'fe80::1%'"),
        ("[fe80::1%0123456789abcdef]:80", "an interface's name has at most 15 characters, not '0123456789abcdef'"),
        ("unix:", "has a path: unix:/path or unix:path"),
        ("unix:@name", "has a path: unix:/path or unix:path"),
        ("unix:/a\0b", f"at most {LONGEST} bytes"),
        ("unix:/a?owner=me", "unknown parameter 'owner'; there are mode, user and group"),
        ("unix:/a?user=", "user or group is a name or a number, like www-data or 33, not ''"),
        ("unix:/a?group=a b", "user or group is a name or a number, like www-data or 33, not 'a b'"),
        ("unix:/a?user=4294967295", "user or group is a name or a number"),
        ("unix:/a?group=99999999999", "user or group is a name or a number"),
        ("fd:", "a descriptor is a number from 3 on, as in fd:3"),
        ("fd:2", "a descriptor is a number from 3 on, as in fd:3"),
        ("fd:-3", "a descriptor is a number from 3 on, as in fd:3"),
        ("fd:12345678", "a descriptor is a number from 3 on, as in fd:3"),
        ("systemd:", "takes a FileDescriptorName"),
        ("systemd:a:b", "takes a FileDescriptorName"),
        ("systemd:" + "a" * 256, "takes a FileDescriptorName"),
        ("unix:/a?mode", "mode is octal, 0 to 0777, not ''"),
        ("unix:/a?mode=0888", "mode is octal, 0 to 0777, not '0888'"),
        ("unix:/a?mode=1777", "mode is octal, 0 to 0777, not '1777'"),
        ("unix:/a?mode=-1", "mode is octal, 0 to 0777, not '-1'"),
    ],
)
def test_a_refused_address_is_told_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_a_port_of_thousands_of_digits_is_refused_like_any_other() -> None:
    with pytest.raises(ValueError, match="port must be a number from 0 to 65535"):
        parse("127.0.0.1:" + "1" * 5000)


pieces = st.sampled_from([":", "[", "]", "unix:", "/", "?mode=", "%", "::", "127.0.0.1", "localhost", "٣", "\0", "&", "=", "0"])


@given(st.text() | st.lists(pieces | st.text(max_size=3)).map("".join))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        parsed = parse(text)
    except ValueError:
        return
    assert parse(str(parsed)).host == parsed.host, "what was accepted can be shown and read again"


@given(host=v4, port=ports)
def test_a_mapped_peer_is_shown_as_ipv4(host: str, port: int) -> None:
    assert address.peer_text(socket.AF_INET6, (f"::ffff:{host}", port, 0, 0)) == f"{host}:{port}"
    assert address.peer_text(socket.AF_INET, (host, port)) == f"{host}:{port}"


def test_other_peers_are_shown_by_their_family() -> None:
    assert address.peer_text(socket.AF_INET6, ("fe80::1%eth0", 5, 0, 2)) == "[fe80::1%eth0]:5"
    assert address.peer_text(socket.AF_UNIX, b"") == "unix"


@pytest.mark.parametrize(
    ("accepted", "shown"),
    [
        (("1.2.3.4", 5), ("1.2.3.4", 5)),
        (("::ffff:1.2.3.4", 5, 0, 0), ("1.2.3.4", 5)),
        (("fe80::1", 5, 6, 7), ("fe80::1", 5, 6, 7)),
        ("", ""),
        ("/run/client", "/run/client"),
        (b"\0abstract", b"\0abstract"),
    ],
)
def test_a_client_address_is_what_accept_gave_but_for_mapped_ones(accepted: object, shown: object) -> None:
    assert address.client_address(accepted) == shown

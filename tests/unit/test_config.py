"""Settings: where they come from, and what a user is told about a wrong one."""

import dataclasses
import os
import re
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefork.config import (
    FILE_LIMIT,
    OPTIONS,
    Activated,
    Config,
    Sources,
    abandoned,
    document,
    environment,
    flag,
    needs_restart,
    unknown_variables,
    variable,
    with_activated,
)
from prefork.errors import ConfigError
from prefork.net.address import TEMPORARY_NAME, UNIX_PATH_LIMIT, Address, parse

# For each option a wrong value and what the message says would be right.
WRONG = {
    "module": ("echo", "must be MODULE:ATTR, like echo:loop"),
    "bind": ("nowhere", "'nowhere': an address is HOST:PORT"),
    "workers": ("0", "must be a whole number from 1 to "),
    "max_workers": ("-1", "must be a whole number from 1 to "),
    "spare_timeout": ("0", "must be more than 0 seconds"),
    "backlog": ("many", "must be a whole number from 1 to 2147483647"),
    "max_connections": ("-1", "must be a whole number from 0 to "),
    "max_connections_jitter": ("1.5", "must be a whole number from 0 to "),
    "max_memory": ("1 GB", "must be a size in bytes: 1048576, 512K, 256M or 2G"),
    "max_lifetime": ("long", "must be a duration, 0 to 1e9 seconds"),
    "timeout": ("-1s", "must be a duration, 0 to 1e9 seconds"),
    "socket_timeout": ("-2", "must be a duration, 0 to 1e9 seconds"),
    "boot_timeout": ("1 week", "must be a duration, 0 to 1e9 seconds: 1.5, 30s, 5m or 1h"),
    "drain_timeout": ("-1", "must be a duration, 0 to 1e9 seconds"),
    "graceful_timeout": ("inf", "must be a duration, 0 to 1e9 seconds"),
    "drain": ("slowly", "must be one of finish, eof"),
    "canary": ("soon", "must be a duration, 0 to 1e9 seconds"),
    "user": ("no body", "must be a name or a number, like www-data or 33"),
    "group": ("-1", "must be a name or a number, like www-data or 33"),
    "umask": ("888", 'must be octal text, "000" to "777"'),
    "chdir": ("a\tb", "must be a path"),
    "nice": ("100", "must be a whole number from -39 to 39"),
    "scheduling": ("fifo", "must be one of batch, inherit"),
    "rlimit": ("files=3", "must be like nofile=1024,as=512M,cpu=60; there are as, "),
    "nodelay": ("maybe", "must be on or off"),
    "keepalive": ("2", "must be on or off"),
    "shared_connections": ("on", "must be one of refuse, allow"),
    "on_boot": ("boot", "must be MODULE:ATTR"),
    "on_worker_start": ("a:", "must be MODULE:ATTR"),
    "on_worker_exit": (":b", "must be MODULE:ATTR"),
    "name": ("a b", "must be letters, digits, '.', '_' and '-', at most 64"),
    "control": ("here", "must be a path with a / in it (/run/control, ./control), or off"),
    "pid_file": ("a\tb", "must be a path"),
    "log_level": ("loud", "must be one of debug, info, warning, error"),
    "log_format": ("xml", "must be one of text, json"),
    "log_file": ("stdout", "must be a path with a / in it (/log, ./log) or stderr"),
    "access_log": ("log", "must be a path with a / in it (/log, ./log) or off or -"),
}
# For each option a right value other than its default.
OTHER = {
    "module": "echo:other",
    "bind": "127.0.0.1:0",
    "workers": "3",
    "max_workers": "100",
    "spare_timeout": "1",
    "backlog": "5",
    "max_connections": "1000",
    "max_connections_jitter": "100",
    "max_memory": "256M",
    "max_lifetime": "1h",
    "timeout": "30",
    "socket_timeout": "5",
    "boot_timeout": "1",
    "drain_timeout": "1",
    "graceful_timeout": "1",
    "drain": "eof",
    "canary": "10",
    "user": "nobody",
    "group": "33",
    "umask": "027",
    "chdir": "/",
    "nice": "5",
    "scheduling": "inherit",
    "rlimit": "nofile=1024,as=512M,cpu=unlimited",
    "nodelay": "off",
    "keepalive": "on",
    "shared_connections": "allow",
    "on_boot": "hooks:boot",
    "on_worker_start": "hooks:start",
    "on_worker_exit": "hooks:exit",
    "name": "other",
    "control": "off",
    "pid_file": "/run/prefork.pid",
    "log_level": "debug",
    "log_format": "json",
    "log_file": "/var/log/prefork.log",
    "access_log": "-",
}
# What an option needs beside it.
WITH: dict[str, dict[str, str]] = {"max_connections_jitter": {"max_connections": "1000"}}


def load(**command_line: object) -> Config:
    return Sources({"module": "echo:loop", **command_line}).load()


def refusal(sources: Sources) -> str:
    with pytest.raises(ConfigError) as caught:
        sources.load()
    return str(caught.value)


def written(folder: Path, text: str) -> str:
    path = folder / "prefork.toml"
    path.write_text(text)
    return str(path)


# -- wrong values


@pytest.mark.parametrize("before", ["", "[", "[[", "a = {"])
@pytest.mark.parametrize("part", ["a.", '"a" . ', "'a'."])
def test_a_key_of_thousands_of_parts_is_refused_before_it_costs_seconds(before: str, part: str, tmp_path: Path) -> None:
    begun = time.process_time()
    assert "a key of more than 20 parts" in refusal(Sources(file=written(tmp_path, before + part * 10_000 + "a = 1")))
    assert time.process_time() - begun < 1.0


def test_dots_in_values_and_comments_are_no_keys(tmp_path: Path) -> None:
    addresses = [f"127.0.0.1:{port}" for port in range(1000, 2000)]
    text = f"# a.b.c.d.e.f.g.h.i.j\n# don't. \nmodule = 'echo:loop'\nmax_workers = 20000\nbind = {addresses}\n"
    assert len(Sources(file=written(tmp_path, text)).load().bind) == 1000


def test_the_tables_of_this_file_know_every_option() -> None:
    assert set(WRONG) == set(OTHER) == set(OPTIONS)


@pytest.mark.parametrize("key", OPTIONS)
def test_a_wrong_value_is_told_with_its_key_its_place_and_what_would_be_right(key: str, tmp_path: Path) -> None:
    value, right = WRONG[key]
    path = written(tmp_path, f"{key} = '{value}'")
    for sources, place in [
        (Sources(file=path), f"in {path}"),
        (Sources(environment={variable(key): value}), f"in the environment ({variable(key)})"),
        (Sources({key: value}), "on the command line" if key == "module" else f"on the command line ({flag(key)})"),
    ]:
        message = refusal(sources)
        assert message.startswith(f"{key} = {value!r} {place}: ")
        assert right in message


@pytest.mark.parametrize("key", OPTIONS)
def test_an_empty_value_is_refused_and_not_the_default(key: str) -> None:
    assert refusal(Sources(environment={variable(key): ""})).startswith(f"{key} = ''")


def test_a_long_wrong_value_does_not_fill_the_screen() -> None:
    assert len(refusal(Sources({"module": "x" * 100_000}))) < 500


def test_an_unknown_key_is_told_with_the_nearest_known_one(tmp_path: Path) -> None:
    path = written(tmp_path, "module = 'echo:loop'\nmax_worker = 3")
    assert refusal(Sources(file=path)) == f"unknown option 'max_worker' in {path}: did you mean 'max_workers'?"


def test_an_unknown_key_like_no_other_is_told_with_all_known_ones(tmp_path: Path) -> None:
    message = refusal(Sources(file=written(tmp_path, "qqq = 3")))
    assert "unknown option 'qqq'" in message
    assert ", ".join(OPTIONS) in message


def test_a_table_is_told_that_the_file_is_flat(tmp_path: Path) -> None:
    message = refusal(Sources(file=written(tmp_path, "[server]\nport = 3")))
    assert "unknown option 'server'" in message
    assert "the file is flat, without [tables]" in message


def test_without_a_handler_the_user_is_told_how_to_name_one() -> None:
    given = "no handler: give MODULE:ATTR, like echo:loop, or module in the configuration file"
    assert refusal(Sources()) == given


def test_without_a_handler_beside_a_configuration_its_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, "workers = 3")
    assert refusal(Sources(folder=str(tmp_path))) == (
        "no handler: give --config prefork.toml, which is here, or MODULE:ATTR, like echo:loop"
    )
    assert "or module in the configuration file" in refusal(Sources(file=path, folder=str(tmp_path))), "it has none"


def test_all_mistakes_are_told_at_once_and_none_that_follows_from_another(tmp_path: Path) -> None:
    text = "workers = 0\nmax_workers = 1\nmax_worker = 3\ndrain = 'eof'\nbind = ['unix:/a']\nlog_level = 'loud'\n"
    path = written(tmp_path, text)
    told = refusal(Sources({"nice": "100"}, {"PREFORK_PID_FILE": "/a"}, path)).splitlines()
    assert [line.partition(":")[0] for line in told] == [
        f"workers = 0 in {path}",
        f"unknown option 'max_worker' in {path}",
        f"log_level = 'loud' in {path}",
        "nice = '100' on the command line (--nice)",
        "no handler",
        f"drain = eof (in {path}) does not work for unix",
        "pid_file = /a (in the environment (PREFORK_PID_FILE)) is the path of bind, too",
    ]


@pytest.mark.parametrize("key", [key for key in OPTIONS if OPTIONS[key].choices])
def test_every_choice_that_a_shell_completes_is_one(key: str) -> None:
    assert [OPTIONS[key].parse(word) for word in OPTIONS[key].choices]
    with pytest.raises(ValueError, match="must be"):
        OPTIONS[key].parse("neither")


@pytest.mark.parametrize("key", [key for key in OPTIONS if OPTIONS[key].words])
def test_every_word_that_a_shell_completes_beside_paths_is_one(key: str) -> None:
    assert [OPTIONS[key].parse(word) for word in OPTIONS[key].words] == list(OPTIONS[key].words)


LINKS = {
    "SERVICE_HOST": "10.0.0.1",
    "SERVICE_PORT": "7000",
    "SERVICE_PORT_ECHO": "7000",
    "PORT": "tcp://10.0.0.1:7000",
    "PORT_7000_TCP": "tcp://10.0.0.1:7000",
    "PORT_7000_TCP_PROTO": "tcp",
    "PORT_7000_TCP_PORT": "7000",
    "PORT_7000_TCP_ADDR": "10.0.0.1",
}


def test_service_links_are_no_mistyped_options() -> None:
    """As Kubernetes makes them for services named prefork and prefork-echo."""
    links = {f"PREFORK_{service}{key}": value for service in ("", "ECHO_") for key, value in LINKS.items()}
    assert list(unknown_variables(links)) == []


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("PREFORK_WOKERS", "did you mean PREFORK_WORKERS?"),
        ("PREFORK_PORT", "did you mean PREFORK_BIND?"),
        ("PREFORK_CONFG", "did you mean PREFORK_CONFIG?"),
        ("PREFORK_SERVICE", "prefork serve --help shows all"),
        ("PREFORK_XYZZY", "prefork serve --help shows all"),
    ],
)
def test_a_mistyped_variable_is_told_with_the_nearest_if_any_is_like_it(name: str, remedy: str) -> None:
    assert list(unknown_variables({name: "7000", "PREFORK_BIND": ":1", "PREFORK_CONFIG": "a"})) == [(name, remedy)]


def test_a_ceiling_below_the_acceptors_is_refused_with_the_least_that_will_do() -> None:
    two = ["127.0.0.1:1", "127.0.0.1:2"]
    message = refusal(Sources({"module": "echo:loop", "workers": 5, "max_workers": 9, "bind": two}))
    assert "max_workers = 9 (on the command line (--max-workers))" in message
    assert "workers = 5 (on the command line (--workers)) x 2 listeners: raise max_workers to at least 10" in message
    assert load(workers=5, max_workers=10, bind=two).max_workers == 10


@pytest.mark.parametrize("number", ["4294967295", "9999999999", "-1"])
@pytest.mark.parametrize("key", ["user", "group"])
def test_a_number_that_means_nobody_is_no_user(key: str, number: str) -> None:
    # setresuid(2) takes (uid_t)-1 for "leave it", and the handler would be root.
    assert "must be a name or a number" in refusal(Sources({"module": "echo:loop", key: number}))
    assert getattr(load(**{key: "4294967294"}), key) == "4294967294"


def test_jitter_without_a_number_to_add_it_to_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "module = 'echo:loop'\nmax_connections_jitter = 5")
    assert f"max_connections_jitter = 5 (in {path}) adds to max_connections, which is not set" in refusal(Sources(file=path))


@pytest.mark.parametrize(
    ("one", "other"),
    [("control", "pid_file"), ("pid_file", "log_file"), ("control", "access_log"), ("bind", "control"), ("bind", "log_file")],
)
def test_two_things_can_not_have_one_path(one: str, other: str) -> None:
    given = {key: "unix:/run/x" if key == "bind" else "/run/x" for key in (one, other)}
    message = refusal(Sources({"module": "echo:loop"}, {variable(key): value for key, value in given.items()}))
    assert message.startswith(f"{other} = /run/x (in the environment ({variable(other)})) is the path of {one}, too")
    assert load(log_file="/x", access_log="/x").access_log == "/x", "one log for both is as good as any"


@pytest.mark.parametrize(
    ("one", "other"),
    [("0.0.0.0:80", "127.0.0.1:80"), (":80", "127.0.0.1:80"), (":80", "0.0.0.0:80"), ("[::1]:80", ":80"), ("[::]:80", "[::1]:80")],
)
def test_addresses_that_need_the_same_port_are_refused(one: str, other: str) -> None:
    for first, second in ((one, other), (other, one)):
        assert f"{second!r} needs the port of" in refusal(Sources({"bind": [first, second]}))
    assert len(load(bind=["[::]:80", "0.0.0.0:80", "127.0.0.1:81", "127.0.0.1:0", "0.0.0.0:0"]).bind) == 5


def test_an_address_named_twice_is_refused() -> None:
    assert "'localhost:80' is named twice" in refusal(Sources({"bind": ["127.0.0.1:80", "localhost:80"]}))
    assert len(load(bind=["127.0.0.1:0", "127.0.0.1:0"]).bind) == 2, "two free ports are two addresses"


# -- right values


def test_the_defaults_are_what_their_own_options_would_parse() -> None:
    config = load()
    for key in ("workers", "max_workers", "spare_timeout", "backlog", "boot_timeout", "drain_timeout", "graceful_timeout"):
        assert OPTIONS[key].parse(getattr(config, key)) == getattr(config, key)
    assert config.bind == (parse("127.0.0.1:7000"),)
    assert config.instance == "echo"


@pytest.mark.parametrize("key", OPTIONS)
def test_each_place_can_set_each_option(key: str, tmp_path: Path) -> None:
    # TOML has numbers; text is taken as well, as on the command line.
    beside = {"module": "echo:loop"} if key != "module" else {}
    beside |= WITH.get(key, {})
    lines = "".join(f"{name} = '{value}'\n" for name, value in {**beside, key: OTHER[key]}.items())
    values = [
        getattr(Sources(base, env, file).load(), key)
        for base, env, file in [
            ({**beside, key: OTHER[key]}, {}, None),
            (beside, {variable(key): OTHER[key]}, None),
            ({}, {}, written(tmp_path, lines)),
        ]
    ]
    values.append(getattr(Sources(keywords={**beside, key: OTHER[key]}).load(), key))
    assert values[0] == values[1] == values[2] == values[3] != getattr(Config(), key)


# Each option with a path, as it may be given, and what it is in a folder.
GIVEN = {
    "bind": ("unix:run/s?mode=0660,:80", (parse("unix:/srv/now/run/s?mode=0660"), parse(":80"))),
    "chdir": ("app", "/srv/now/app"),
    "control": ("./control", "/srv/now/control"),
    "pid_file": ("../pid", "/srv/now/../pid"),
    "log_file": ("log/file", "/srv/now/log/file"),
    "access_log": ("/var/log/access", "/var/log/access"),
}
WORDS = {"control": "off", "log_file": "stderr", "access_log": "-"}


def test_every_option_with_paths_is_known_here() -> None:
    assert {key for key, option in OPTIONS.items() if option.has_paths} == set(GIVEN)
    assert {key for key, option in OPTIONS.items() if option.metavar in ("PATH", "DIR")} <= set(GIVEN)


@pytest.mark.parametrize("key", GIVEN)
def test_a_path_counts_from_the_folder_wherever_it_is_given(key: str, tmp_path: Path) -> None:
    raw, right = GIVEN[key]
    module = {"module": "echo:loop"}
    (tmp_path / "prefork.toml").write_text(f"module = 'echo:loop'\n{key} = '{raw}'\n")
    for sources in (
        Sources({**module, key: raw}, folder="/srv/now"),
        Sources(module, {variable(key): raw}, folder="/srv/now"),
        Sources(file=str(tmp_path / "prefork.toml"), folder="/srv/now"),
        Sources(keywords={**module, key: raw}, folder="/srv/now"),
    ):
        assert getattr(sources.load(), key) == right
    if key in WORDS:
        assert getattr(Sources({**module, key: WORDS[key]}, folder="/srv/now").load(), key) == WORDS[key]


def test_the_file_counts_from_the_folder_too(tmp_path: Path) -> None:
    (tmp_path / "prefork.toml").write_text("module = 'echo:loop'\n")
    _, origins = Sources(file="prefork.toml", folder=str(tmp_path)).trace()
    assert origins == {"module": "in prefork.toml"}
    assert (
        refusal(Sources(file="none", folder="/nowhere")) == "/nowhere/none: can't read the configuration: No such file or directory"
    )


def test_two_options_that_name_one_path_differently_are_told() -> None:
    given = {"module": "echo:loop", "log_file": "./a", "pid_file": "/srv/now/a"}
    assert "log_file = /srv/now/a (on the command line (--log-file)) is the path of pid_file, too" in refusal(
        Sources(given, folder="/srv/now")
    )
    assert "is the path of bind, too" in refusal(Sources({"bind": ["unix:a", "unix:/srv/now/a"]} | given, folder="/srv/now"))


@pytest.mark.parametrize(("key", "text"), [("bind", "unix:{}"), ("control", "./{}")])
def test_a_sockets_path_that_is_too_long_in_its_folder_is_told(key: str, text: str) -> None:
    most = UNIX_PATH_LIMIT - TEMPORARY_NAME
    name = "n" * (most - len("/srv/now/"))
    Sources({"module": "echo:loop", key: text.format(name)}, folder="/srv/now").load()
    told = refusal(Sources({"module": "echo:loop", key: text.format(name + "n")}, folder="/srv/now"))
    assert f"a Unix socket's path has at most {most} bytes, and /srv/now/{name}n has {most + 1}" in told


def test_a_folder_whose_name_can_not_be_printed_has_no_paths_that_could_be_carried_on() -> None:
    assert "must be a path" in refusal(Sources({"module": "echo:loop", "pid_file": "pid"}, folder="/srv/n\now"))


@pytest.mark.parametrize("places", range(8))
def test_command_line_beats_environment_beats_file_beats_default(places: int, tmp_path: Path) -> None:
    command_line = {"workers": 11} if places & 4 else {}
    env = {"PREFORK_WORKERS": "12"} if places & 2 else {}
    file = written(tmp_path, "module = 'echo:loop'\n" + ("workers = 13" if places & 1 else ""))
    expected = 11 if places & 4 else 12 if places & 2 else 13 if places & 1 else Config().workers
    assert Sources(command_line, env, file).load().workers == expected


def test_a_wrong_value_is_told_even_where_a_stronger_one_hides_it() -> None:
    assert "in the environment" in refusal(Sources({"module": "echo:loop", "workers": 3}, {"PREFORK_WORKERS": "x"}))


def test_other_variables_are_none_of_our_business(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"PREFORK_WORKERS": "3", "WORKERS": "4", "prefork_workers": "5"})
    assert environment() == {"PREFORK_WORKERS": "3"}


@pytest.mark.parametrize(
    ("text", "seconds"), [("1.5", 1.5), (2, 2.0), (0.25, 0.25), ("30s", 30.0), ("5m", 300.0), ("1.5h", 5400.0), ("0", 0.0)]
)
def test_a_duration_is_seconds_or_says_its_unit(text: object, seconds: float) -> None:
    assert load(drain_timeout=text).drain_timeout == seconds


@pytest.mark.parametrize(
    "text", ["", " 5", "5 s", "5d", "1e3", "-5s", ".5", "5s\n", "NaN", True, float("nan"), float("inf"), -0.1, [5]]
)
def test_what_only_looks_like_a_duration_is_refused(text: object) -> None:
    assert "must be a duration" in refusal(Sources({"drain_timeout": text}))


# -- the file


def test_numbers_and_lists_are_written_as_toml_has_them(tmp_path: Path) -> None:
    path = written(tmp_path, "module = 'echo:loop'\nworkers = 3\nspare_timeout = 1.5\nbind = [':80', 'unix:/a?mode=0660']")
    config = Sources(file=path).load()
    assert (config.workers, config.spare_timeout, config.bind) == (3, 1.5, (parse(":80"), parse("unix:/a?mode=0660")))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"#" * (FILE_LIMIT + 1), f"larger than {FILE_LIMIT} bytes"),
        (b"name = '\xff'", "not UTF-8 (byte 8)"),
        (b"\xef\xbb\xbfname = '\xff'", "not UTF-8 (byte 11)"),
        ("module = 'echo:loop'".encode("utf-16"), "UTF-16, not UTF-8; TOML is UTF-8 text: save it as that"),
        (b"workers: 3", "not TOML"),
        (b"workers = 3\nworkers = 4", "not TOML"),
        (b"workers = " + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_an_unusable_file_is_told_with_its_name_and_what_is_wrong(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "prefork.toml"
    path.write_bytes(data)
    message = refusal(Sources(file=str(path)))
    assert message.startswith(f"{path}: ")
    assert says in message


def test_the_mark_that_some_editors_put_before_a_text_is_not_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "prefork.toml"
    path.write_bytes(b"\xef\xbb\xbfmodule = 'echo:loop'\r\nworkers = 3\r\n")
    assert Sources(file=str(path)).load().workers == 3


def test_a_file_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    text = "module = 'echo:loop'\n"
    assert Sources(file=written(tmp_path, text + "#" * (FILE_LIMIT - len(text)))).load().module == "echo:loop"


def test_a_file_that_can_not_be_read_is_told_with_the_reason(tmp_path: Path) -> None:
    assert refusal(Sources(file=f"{tmp_path}/none")) == f"{tmp_path}/none: can't read the configuration: No such file or directory"
    assert refusal(Sources(file=str(tmp_path))) == f"{tmp_path}: can't read the configuration: not a regular file"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("spare_timeout = 1" + "0" * 400, id="more than a float holds"),
        pytest.param("workers = " + "9" * 5000, id="more digits than int() takes"),
        pytest.param("workers = 0x" + "f" * 5000, id="more digits than repr() gives"),
        pytest.param("workers" + ".a" * 5000 + " = 1", id="deeper than repr() goes"),
    ],
)
def test_an_absurd_file_is_a_config_error(text: str, tmp_path: Path) -> None:
    refusal(Sources(file=written(tmp_path, text)))


# -- any value

values = st.recursive(
    st.integers() | st.floats() | st.booleans() | st.text() | st.datetimes() | st.dates() | st.times()
    | st.sampled_from([*OTHER.values(), *(wrong for wrong, _ in WRONG.values()), "unix:/", "5s", "[::1]:1"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.parametrize("key", OPTIONS)
@given(value=values)
def test_any_value_is_taken_or_refused(key: str, value: Any) -> None:
    try:
        config = Sources({"module": "echo:loop", **WITH.get(key, {}), key: value}).load()
    except ConfigError as error:
        assert key in str(error)
        return
    wanted = type(getattr(Config(), key))
    assert type(getattr(config, key)) is (int if key == "umask" else wanted), "what was taken has the option's type"
    assert OPTIONS[key].parse(OPTIONS[key].plain(getattr(config, key))) == getattr(config, key), "what is shown is taken back"


@given(
    st.text(st.characters(exclude_characters="\0?", exclude_categories=["Cs"]), max_size=20),
    st.text(),
    st.floats(0, 1e9),
)
def test_what_is_documented_is_read_back(path: str, note: str, seconds: float) -> None:
    config = load(bind=[f"unix:/a{path}"], control=f"/b{path}", drain_timeout=seconds, rlimit="as=3,cpu=unlimited", umask="007")
    written = tomllib.loads(document(config, dict.fromkeys(OPTIONS, note)))
    assert Sources(written).load() == dataclasses.replace(config, drain_timeout=float(f"{seconds:.15g}"))


@given(st.text())
def test_any_text_is_toml_or_refused(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode())
    try:
        Sources({"module": "echo:loop"}, file=str(path)).load()
    except ConfigError as error:
        assert str(path) in str(error)
    else:
        assert set(tomllib.loads(text)) <= set(OPTIONS)


# -- sockets that a service manager has passed


WHERE = [Address(2, "127.0.0.1", 7000), Address(10, "", 7001), Address(1, "/run/mine"), None]


def passed(sockets: list[tuple[str, int]]) -> list[Activated]:
    """They listen in `WHERE`, one after the other."""
    return [Activated(name, fd, WHERE[place], "a.socket") for place, (name, fd) in enumerate(sockets)]


def activated(sockets: list[tuple[str, int]], **given: Any) -> list[tuple[str, int]]:
    config, origins = Sources({"module": "echo:loop", **given}).trace()
    return [(str(address), address.port) for address in with_activated(config, origins, passed(sockets)).bind]


def test_without_a_bind_every_socket_that_was_passed_is_used() -> None:
    assert activated([("a", 3), ("b", 4), ("a", 5)]) == [("systemd:a", 3), ("systemd:a", 5), ("systemd:b", 4)]
    assert activated([]) == [("127.0.0.1:7000", 7000)]


def test_with_a_bind_only_those_that_it_names_are_used() -> None:
    sockets = [("a", 3), ("b", 4), ("a", 5)]
    assert activated(sockets, bind="127.0.0.1:1") == [("127.0.0.1:1", 1)]
    assert activated(sockets, bind=["127.0.0.1:1", "systemd:a"]) == [("127.0.0.1:1", 1), ("systemd:a", 3), ("systemd:a", 5)]
    with pytest.raises(ConfigError, match="has passed no socket of that name; it has passed a, b"):
        activated(sockets, bind="systemd:c")
    with pytest.raises(ConfigError, match="it has passed none"):
        activated([], bind="systemd:c")


def test_a_passed_socket_is_used_by_its_address() -> None:
    sockets = [("a", 3), ("a", 4), ("c", 5), ("d", 6)]
    assert activated(sockets, bind="127.0.0.1:7000") == [("systemd:a", 3)]
    assert activated(sockets, bind=["unix:/run/mine?mode=0660", ":7001"]) == [("systemd:c", 5), ("systemd:a", 4)]
    assert activated(sockets, bind=["127.0.0.1:7000", "systemd:a"]) == [("systemd:a", 3), ("systemd:a", 4)], "each once"
    assert activated(sockets, bind=["127.0.0.2:7000", "127.0.0.1:0"]) == [("127.0.0.2:7000", 7000), ("127.0.0.1:0", 0)]


@pytest.mark.parametrize(
    ("address", "held"), [(":7000", "127.0.0.1:7000"), ("0.0.0.0:7000", "127.0.0.1:7000"), ("[::1]:7001", ":7001")]
)
def test_an_address_beside_a_passed_one_of_the_same_port_is_refused_with_the_unit(address: str, held: str) -> None:
    with pytest.raises(
        ConfigError, match=f"bind = {re.escape(address)} can't be bound: {held} was passed by a.socket, .* systemd:a"
    ):
        activated([("a", 3), ("a", 4)], bind=address)


def test_a_reload_that_leaves_a_passed_socket_to_nobody_is_told() -> None:
    sockets = passed([("a", 3), ("b", 4)])
    base, origins = Sources({"module": "echo:loop"}).trace()
    both = with_activated(base, origins, sockets)
    one = dataclasses.replace(both, bind=both.bind[:1])
    assert abandoned(both, both, sockets) is None
    assert abandoned(one, both, sockets) is None
    reason = abandoned(both, one, sockets)
    assert reason is not None
    assert "bind = systemd:a leaves out :7001, which was passed by a.socket" in reason
    assert abandoned(one, one, sockets) is None, "it was not accepted from before"
    other = dataclasses.replace(both, bind=(Address(0, "fd:9", 9),))
    assert abandoned(other, base, sockets) is None, "the caller's own"


# -- the whole of it


def test_each_value_has_its_origin(tmp_path: Path) -> None:
    path = written(tmp_path, "module = 'echo:loop'\nworkers = 1\nnice = 1")
    config, origins = Sources({"backlog": "3"}, {"PREFORK_WORKERS": "2"}, path).trace()
    assert (config.workers, config.backlog, config.nice) == (2, 3, 1)
    assert origins == {
        "module": f"in {path}",
        "nice": f"in {path}",
        "workers": "in the environment (PREFORK_WORKERS)",
        "backlog": "on the command line (--backlog)",
    }


@given(st.data())
def test_a_configuration_that_was_written_out_is_read_back(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.sampled_from(sorted(OPTIONS))))
    given = {"module": "echo:loop", **{key: OTHER[key] for key in chosen}}
    for key in chosen:
        given |= WITH.get(key, {})
    config = Sources(given).load()
    path = tmp_path_factory.getbasetemp() / "document.toml"
    path.write_text(document(config, dict.fromkeys(OPTIONS, "a note")))
    assert Sources(file=str(path)).load() == config


# -- reload


@pytest.mark.parametrize("key", OPTIONS)
def test_only_who_and_where_the_daemon_is_needs_a_restart(key: str) -> None:
    old = load(**WITH.get(key, {}))
    new = load(**WITH.get(key, {}), **{key: OTHER[key]})
    assert dataclasses.asdict(old) != dataclasses.asdict(new)
    told = needs_restart(old, new)
    if key in ("name", "control", "pid_file", "user", "group"):
        assert told == f"{key} = {OTHER[key]!r} was {getattr(old, key)!r} at the start: that needs a restart"
    else:
        assert told is None


def test_a_reload_reads_the_same_places_again(tmp_path: Path) -> None:
    sources = Sources(file=written(tmp_path, "module = 'echo:loop'\nworkers = 1"))
    assert sources.load().workers == 1
    written(tmp_path, "module = 'echo:loop'\nworkers = 2")
    assert sources.load().workers == 2

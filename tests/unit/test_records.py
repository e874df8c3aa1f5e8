"""The handler of `logging`, and what is as if there were none: each in a fresh interpreter, which has one root logger only."""

import subprocess
import sys

import pytest

START = """
import logging, sys
from prefork import log
from prefork.log import Level, prints, records

def told():
    return [type(handler).__name__.strip("_") for handler in logging.root.handlers], int(logging.root.level)

def begin():
    prints.install(log._output.printed)
    records.install(Level.INFO)
"""


def run(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


@pytest.mark.parametrize(
    ("setup", "expected"),
    [
        ("", "['Default'], 20"),
        ("logging.basicConfig()", "['Default'], 20"),
        ("logging.info('x')", "['Default'], 20"),
        ("logging.basicConfig(level='ERROR')", "['Default'], 40"),
        ("logging.basicConfig(level='ERROR', force=True, encoding='utf-8')", "['Default'], 40"),
        ("logging.root.setLevel('DEBUG')", "['Default'], 10"),
        ("logging.basicConfig(format='%(message)s')", "['StreamHandler'], 30"),
        ("logging.basicConfig(stream=sys.stdout, level=20)", "['StreamHandler'], 20"),
        ("logging.basicConfig(handlers=[records.LogHandler()])", "['LogHandler'], 30"),
        ("logging.info('x'); logging.basicConfig(format='%(name)s', force=True)", "['StreamHandler'], 30"),
        ("logging.root.addHandler(logging.StreamHandler())", "['StreamHandler'], 30"),
        ("logging.root.addHandler(logging.StreamHandler()); logging.root.setLevel(20)", "['StreamHandler'], 20"),
        ("logging.root.handlers.clear()", "[], 30"),
        ("import logging.config; logging.config.dictConfig({'version': 1})", "['Default'], 20"),
        ("import logging.config; logging.config.dictConfig({'version': 1, 'root': {'level': 'DEBUG'}})", "[], 10"),
    ],
)
def test_what_a_module_configures_is_so_and_what_it_does_not_is_ours(setup: str, expected: str) -> None:
    assert run(f"records.install(Level.INFO)\n{setup}\nrecords.give_way(); print(told())")[0] == f"({expected})"


def test_what_the_program_has_configured_that_has_made_the_daemon_stays() -> None:
    script = "logging.basicConfig(level='ERROR'); records.install(Level.INFO); records.give_way(); print(told())"
    assert run(script) == ["(['StreamHandler'], 40)"]
    assert run("logging.root.setLevel('DEBUG'); records.install(Level.INFO); print(told())") == ["(['Default'], 10)"]


def test_a_record_that_another_handler_takes_is_that_ones() -> None:
    script = """
begin()
own = logging.StreamHandler(sys.__stdout__)
logging.getLogger("mine").addHandler(own)
logging.getLogger("library").addHandler(logging.NullHandler())
for name in ("mine.part", "library", "", "mine"):
    logging.getLogger(name).warning("to %s", name)
apart = logging.getLogger("apart")
apart.propagate = False
apart.warning("to nobody")
apart.info("nor this")
"""
    assert [line.partition("]: ")[2] for line in run(script)] == [
        "stdout: to mine.part",
        "library: to library",
        "root: to ",
        "stdout: to mine",
        "apart: to nobody",
    ]


def test_a_record_that_can_not_be_formatted_is_told_and_raises_nothing() -> None:
    script = """
class Odd:
    def __str__(self): raise RuntimeError("odd")
    __repr__ = __str__

class Worse(logging.Formatter):
    def format(self, record): return Odd()

begin()
log = logging.getLogger("mine")
log.error("%d", "x")
log.error(Odd())
log.error("%s", Odd())
log.handle(logging.makeLogRecord({"name": Odd(), "levelno": 40}))
log.handle(logging.makeLogRecord({"name": [], "levelno": 40}))
handler = records.LogHandler()
handler.setFormatter(Worse())
log.addHandler(handler)
log.error("x")
try:
    raise RuntimeError(Odd())
except RuntimeError:
    log.exception("x", stack_info=True)
"""
    heads = [line for line in run(script) if not line.startswith("    ")]
    assert len(heads) == 7
    assert all("]: logging: a record of " in line and line.endswith(" can't be formatted") for line in heads)


def test_outside_of_a_daemon_records_go_to_standard_error() -> None:
    script = "logging.basicConfig(handlers=[records.LogHandler()], level=10); logging.debug('said %s', 'so')"
    assert run(script) == ["said so"]


def test_the_package_offers_it_by_the_name_that_dict_config_takes() -> None:
    script = """
import logging.config
handlers = {"log": {"class": "prefork.LogHandler", "level": 40}}
logging.config.dictConfig({"version": 1, "root": {"handlers": ["log"]}, "handlers": handlers})
print(told(), logging.root.handlers[0].level)
"""
    assert run(script) == ["(['LogHandler'], 30) 40"]

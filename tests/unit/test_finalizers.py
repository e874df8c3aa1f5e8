"""What a process finishes at its end, and what is its parent's: each in a fresh interpreter, because it has one registry only."""

import resource
import subprocess
import sys
from pathlib import Path

from prefork.system import finalizers

START = """
import atexit, functools, os, sys, tempfile, threading
from prefork.system import finalizers

failures = []

def fork(function):
    sys.stdout.flush()
    if os.fork() == 0:
        function()
        os._exit(0)
    os.wait()

def finish():
    finalizers.finish(lambda what: failures.append((what, type(sys.exc_info()[1]).__name__)))
"""


def run(folder: Path, script: str) -> list[str]:
    command = [sys.executable, "-c", START + script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_what_was_there_before_is_the_parents(tmp_path: Path) -> None:
    script = """
import logging.handlers
file = open("file", "w")
file.write("once")
directory, named = tempfile.TemporaryDirectory(dir="."), tempfile.NamedTemporaryFile(dir=".")
logging.getLogger().addHandler(logging.handlers.MemoryHandler(9, target=logging.FileHandler("log")))
logging.warning("once")
atexit.register(print, "parent")

def child():
    finalizers.begin()
    aside = finalizers.set_aside(print)
    print(aside.registered)
    finish()
    finalizers.put_back(aside, lambda pid: True)
    finish()
    sys.stdout.flush()

fork(child)
print(os.path.exists(directory.name), os.path.exists(named.name))
"""
    assert run(tmp_path, script) == ["[]", "True True", "parent"]
    assert (tmp_path / "file").read_text() == "once"
    assert (tmp_path / "log").read_text() == "once\n"


def test_what_was_registered_is_named(tmp_path: Path) -> None:
    script = """
import concurrent.futures.process, concurrent.futures.thread, logging, multiprocessing.util, unittest.mock, weakref

class Odd:
    def method(self): pass
    def __eq__(self, other): raise RuntimeError
    __hash__ = object.__hash__

def function(): pass

class Raising:
    def __getattribute__(self, name): raise RuntimeError
    def __call__(self): pass

odd = Odd()
print(finalizers.set_aside(print).registered)
for registered in (function, odd.method, functools.partial(function, 1), unittest.mock.Mock(), Raising()):
    atexit.register(registered)
threading._register_atexit(function)
weakref.finalize(odd, function)
weakref.finalize(odd, function).atexit = False
multiprocessing.util.Finalize(None, function, exitpriority=1)
multiprocessing.util.Finalize(odd, function)
named = tempfile.NamedTemporaryFile(dir=".", delete=False)
for name in finalizers.set_aside(print).registered:
    print(name)
os._exit(sys.stdout.flush() or 0)
"""
    assert run(tmp_path, script) == [
        "[]",
        "atexit __main__.function",
        "atexit __main__.Odd.method",
        "atexit __main__.function",
        "atexit unittest.mock.Mock",
        "atexit Raising",
        "weakref.finalize __main__.function of Odd",
        "multiprocessing __main__.function",
        "threading __main__.function",
    ]


def test_each_side_runs_its_own_and_a_failure_does_not_keep_the_rest_from_running(tmp_path: Path) -> None:
    script = """
import weakref, zipfile

class Thing: pass

things = []

def make(word):
    things.append(Thing())
    weakref.finalize(things[-1], print, word, "finalizer")
    atexit.register(print, word, "atexit")
    threading._register_atexit(lambda: print(word, "threading") or 1 / 0)

def child():
    atexit._clear()
    make("child")
    archive = zipfile.ZipFile("archive.zip", "w")
    archive.fp.close()
    finish()
    print(failures, flush=True)

finalizers.begin()
make("parent")
aside = finalizers.set_aside(print)
fork(child)
finalizers.put_back(aside, lambda pid: True)
finish()
sys.stdout.flush()
os._exit(0)
"""
    assert run(tmp_path, script) == [
        "child threading",
        "child atexit",
        "child finalizer",
        "[('threading', 'ZeroDivisionError'), ('files', 'ValueError')]",
        "parent threading",
        "parent atexit",
        "parent finalizer",
    ]


def test_what_the_disk_does_not_take_is_told(tmp_path: Path) -> None:
    failed: list[str] = []
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (tmp_path / "file").open("wb") as file:
        file.write(b"lost")
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            finalizers._flush(file, failed.append)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    finalizers._flush(file, failed.append)
    assert failed == ["files"]

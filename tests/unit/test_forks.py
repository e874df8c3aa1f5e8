"""Fork hooks that are spared at a worker's birth: each in a fresh interpreter, because there is no way to take one back."""

import subprocess
import sys

import pytest

START = """
import logging, os, sys, threading, time
from prefork.system import forks

said = []
os.register_at_fork(after_in_child=lambda: said.append("user"))
before = threading._active_limbo_lock

def who(name):
    return lambda: said.append(name)

forks.in_child(who("ours"))

def fork(function):
    if os.fork() == 0:
        function()
        os._exit(0)
    os.wait()

def tell():
    fresh = threading._active_limbo_lock is not before
    free = []

    def ask():
        free.append(logging._lock.acquire(timeout=5))
        if free[0]:
            logging._lock.release()

    asking = threading.Thread(target=ask)
    asking.start()
    asking.join()
    print(*said, "fresh" if fresh else "spared", "free" if free == [True] else "taken", flush=True)
"""


def run(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_birth_spares_what_renews_locks_and_its_forks_spare_nothing() -> None:
    assert run("forks.prepare_to_spare(); forks.spare(everything=True); fork(lambda: (tell(), fork(tell)))") == [
        "user spared free",
        "user ours user fresh free",
    ]


@pytest.mark.parametrize(
    "script",
    [
        "forks.prepare_to_spare(); fork(tell)",
        "forks.prepare_to_spare(); forks.spare(everything=True); forks.spare(everything=False); fork(tell)",
        "forks.spare(everything=True); fork(tell)",
    ],
)
def test_nothing_is_spared_that_was_not_asked_for(script: str) -> None:
    [line] = run(script)
    assert set(line.split()) == {"user", "ours", "fresh", "free"}


def test_a_process_with_a_second_thread_spares_nothing() -> None:
    thread = "import _thread; _thread.start_new_thread(time.sleep, (60,)); "
    [line] = run(thread + "forks.prepare_to_spare(); forks.spare(everything=True); fork(tell)")
    assert set(line.split()) == {"user", "ours", "fresh", "free"}


def test_the_lock_that_logging_has_now_is_given_back_whoever_put_it_there() -> None:
    assert run("logging._lock = threading.RLock(); forks.prepare_to_spare(); forks.spare(everything=True); fork(tell)") == [
        "user spared free"
    ]


def test_a_function_that_raises_keeps_none_of_the_others_from_running() -> None:
    script = "forks.in_child(lambda: 1 / 0); forks.in_child(who('late')); forks.prepare_to_spare(); fork(tell)"
    [line] = run(script)
    assert {"ours", "late", "fresh"} <= set(line.split())

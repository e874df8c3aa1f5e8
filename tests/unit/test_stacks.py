"""What the pipe for stacks holds: whose is which, and how much of it is kept."""

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import prefork
from prefork.system.stacks import LIMIT, Stacks

WORKER = Path(prefork.__file__).parent / "worker.py"
SEGV, ABRT = int(signal.SIGSEGV), int(signal.SIGABRT)


@pytest.fixture
def stacks() -> Iterator[Stacks]:
    made = Stacks()
    yield made
    made.close()


def fill(pipe: int) -> None:
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b"\xff" * 4096)


def crash(name: str, number: int = 1) -> bytes:
    return f"Fatal Python error: {name}\n\nCurrent thread {number}\n\nExtension modules: x\n".encode()


def test_crashes_are_told_apart_by_their_signal_and_taken_once(stacks: Stacks) -> None:
    os.write(stacks.write_end, crash("Aborted") + crash("Segmentation fault", 1) + crash("Segmentation fault", 2))
    assert stacks.take_crash(SEGV) == crash("Segmentation fault", 1).decode().strip()
    assert stacks.take_crash(ABRT) == crash("Aborted").decode().strip()
    assert "thread 2" in stacks.take_crash(SEGV)
    assert stacks.take_crash(SEGV) == ""


@pytest.mark.parametrize("status", [int(signal.SIGKILL), int(signal.SIGTERM), 3 << 8, 0])
def test_other_ends_have_no_stack(stacks: Stacks, status: int) -> None:
    os.write(stacks.write_end, crash("Aborted"))
    assert stacks.take_crash(status) == ""
    assert stacks.take_crash(ABRT) != ""


def test_a_crash_that_is_still_being_written_when_another_end_is_told_is_whole_later(stacks: Stacks) -> None:
    whole = crash("Aborted")
    os.write(stacks.write_end, crash("Segmentation fault") + whole[:40])
    assert stacks.take_crash(SEGV) == crash("Segmentation fault").decode().strip()
    os.write(stacks.write_end, whole[40:])
    assert stacks.take_crash(ABRT) == whole.decode().strip()


def test_a_dump_is_not_mixed_up_with_crashes_before_and_during_it(stacks: Stacks) -> None:
    os.write(stacks.write_end, crash("Aborted"))
    stacks.begin_dump()
    os.write(stacks.write_end, b"Current thread 7\n")
    assert stacks.look()
    assert not stacks.look()
    os.write(stacks.write_end, crash("Segmentation fault"))
    assert stacks.take_dump() == "Current thread 7"
    assert stacks.take_crash(ABRT) == crash("Aborted").decode().strip()
    assert stacks.take_crash(SEGV) == crash("Segmentation fault").decode().strip()
    os.write(stacks.write_end, b"too late\n")
    assert stacks.take_dump() == "too late"


def test_the_frames_below_the_handlers_are_left_out_for_each_thread(stacks: Stacks) -> None:
    frames = b'  File "mine.py", line 7 in loop\n'
    ours = f'  File "{WORKER}", line 230 in serve\n  File "{WORKER}", line 150 in run\n'.encode()
    other = f'\nCurrent thread 2\n  File "{WORKER}", line 9 in start\n'.encode()
    stacks.begin_dump()
    os.write(stacks.write_end, b"Thread 1\n" + frames + ours + other)
    assert stacks.take_dump() == ("Thread 1\n" + frames.decode() + other.decode()).strip()


def test_a_flood_neither_holds_the_reader_nor_grows(stacks: Stacks) -> None:
    stacks.begin_dump()
    for _ in range(8):
        fill(stacks.write_end)
        assert stacks.look()
    os.write(stacks.write_end, b"the end\n")
    text = stacks.take_dump()
    assert len(text) <= LIMIT
    assert text.endswith("\N{REPLACEMENT CHARACTER}the end")

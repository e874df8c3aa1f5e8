"""Planted bugs, one for each promise, and the test that must fail with it: a test of the tests."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import prefork
from tests import watch


@dataclass(frozen=True, slots=True)
class Mutant:
    """In ``file`` of the package ``old`` (found once) becomes ``new``; then the tests that ``check`` names must fail."""

    name: str
    file: str
    old: str
    new: str
    check: tuple[str, ...]


MUTANTS = [
    Mutant(
        "a record that comes twice where the module has a handler of its own",
        "log/records.py",
        "            if any(other is not self and",
        "            if any(other is not other and",
        ("tests/integration/test_records.py::test_dict_config_names_the_handler_and_no_record_comes_twice",),
    ),
    Mutant(
        "a basicConfig that does nothing because the root logger has our handler",
        "log/records.py",
        "        else:\n            _withdraw()\n",
        "",
        ("tests/integration/test_records.py::test_a_worker_that_configures_logging_is_obeyed",),
    ),
    Mutant(
        "a root logger that keeps our level under a handler of user code's",
        "log/records.py",
        "    if isinstance(logging.root.level, Level):",
        "    if False:",
        ("tests/integration/test_records.py::test_a_handler_of_the_modules_own_is_left_alone",),
    ),
    Mutant(
        "a record that raises into user code when it can't be formatted",
        "log/records.py",
        "        except Exception:  # whatever",
        "        except ArithmeticError:  # whatever",
        ("tests/unit/test_records.py::test_a_record_that_can_not_be_formatted_is_told_and_raises_nothing",),
    ),
    Mutant(
        "requests of http.server that are warnings",
        "forkserver.py",
        "        records.take_http_messages()\n",
        "",
        ("tests/integration/test_records.py::test_http_servers_own_messages_are_no_warnings",),
    ),
    Mutant(
        "a long line whose second piece looks like a line of the log",
        "log/formats.py",
        '        yield from ("    " + piece for piece in more)\n',
        "        yield from more\n",
        ("tests/unit/test_log.py::test_no_part_of_a_record_makes_a_line_of_its_own[text-x-text]",),
    ),
    Mutant(
        "a user's home that an upgrade carries under another name",
        "system/credentials.py",
        '    home: str = ""\n',
        '    house: str = ""\n',
        ("tests/unit/test_carried.py::test_what_is_written_is_read_back",),
    ),
    Mutant(
        "the begin of a listener's end that an upgrade carries under another name",
        "carried.py",
        "    begins: float\n",
        "    starts: float\n",
        ("tests/unit/test_carried.py::test_what_is_written_is_read_back",),
    ),
    Mutant(
        "a link-local address that is bound without its interface",
        "net/listener.py",
        "            sock.bind(socket_address(wanted))\n",
        "            sock.bind((wanted.host, wanted.port))\n",
        ("tests/integration/test_remedies.py::test_an_interface_that_is_not_there_is_told_with_where_to_look",),
    ),
    Mutant(
        "a user that may find out by itself that Python is closed to it",
        "forkserver.py",
        "    if who is not None and (refusal := ",
        "    if who is None and (refusal := ",
        ("tests/integration/test_credentials.py::test_a_user_that_can_not_read_python_is_told_at_the_start_and_by_check",),
    ),
    Mutant(
        "a remedy that is the same for every errno",
        "errors.py",
        "    remedy = REMEDIES.get(error.errno)\n",
        "    remedy = REMEDIES[errno.EAGAIN]\n",
        ("tests/integration/test_remedies.py::test_the_remedy_of_a_failed_start_is_that_of_its_errno",),
    ),
    Mutant(
        "a reload that trusts what the master has found on the path",
        "handler.py",
        "    sys.path_importer_cache.clear()\n",
        "    pass\n",
        ("tests/integration/test_reload.py::test_a_reload_finds_on_the_path_what_a_fresh_start_would_find[_folder-_folder]",),
    ),
    Mutant(
        "a reload that trusts what an archive had",
        "handler.py",
        "    zipimport._zip_directory_cache.clear()",
        "    pass",
        ("tests/integration/test_reload.py::test_a_reload_finds_on_the_path_what_a_fresh_start_would_find[_archive-_archive]",),
    ),
    Mutant(
        "a configuration that stays in the old release",
        "config.py",
        "_read_file(os.path.join(self.folder, self.file), named)",
        "_read_file(self.file, named)",
        (
            "tests/integration/test_releases.py"
            "::test_a_reload_and_an_upgrade_take_code_and_configuration_of_one_release[variable-False]",
        ),
    ),
    Mutant(
        "an upgrade that forgets the folder's name",
        "master.py",
        "        self._enter(state.wiring.folder)\n",
        "",
        (
            "tests/integration/test_releases.py"
            "::test_a_reload_and_an_upgrade_take_code_and_configuration_of_one_release[variable-False]",
        ),
    ),
    Mutant(
        "a daemon that outlives the test that has started it",
        "testing.py",
        "        fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC)\n",
        "        pass\n",
        ("tests/integration/test_testing.py::test_the_daemon_ends_with_the_process_that_has_started_it[True-False]",),
    ),
    Mutant(
        "memory of processes that have a worker's number elsewhere",
        "ops/instances.py",
        '        return known.get("NSpid", known["Pid"]) == str(pid)\n',
        "        return True\n",
        ("tests/integration/test_container.py::test_memory_and_cpu_are_shown_where_the_pids_are_the_daemons_and_nowhere_else",),
    ),
    Mutant(
        "a client that verify_request has refused and that counts as served",
        "request.py",
        "            raise RejectedError\n",
        "            return\n",
        ("tests/integration/test_socketserver.py::test_what_verify_request_refuses_is_rejected",),
    ),
    Mutant(
        "an error that a server's handle_error has swallowed",
        "request.py",
        "                server.handle_error(request, client)\n            raise\n",
        "                server.handle_error(request, client)\n",
        ("tests/integration/test_socketserver.py::test_what_handle_error_swallows_is_an_error_with_its_traceback",),
    ),
    Mutant(
        "a client that has gone, looked for when its connection is closed already",
        "request.py",
        "            note(error, fd)\n",
        "",
        ("tests/integration/test_socketserver.py::test_a_client_that_has_gone_is_no_error_of_a_server",),
    ),
    Mutant(
        "a server that says at each listener that it is at the last one",
        "forkserver.py",
        ", loaded, bound.get(place), users)",
        ", loaded, bound.get(len(bound) - 1), users)",
        ("tests/integration/test_socketserver.py::test_each_listeners_workers_have_its_address",),
    ),
    Mutant(
        "an error of a backend that passes for the client's end",
        "net/peer.py",
        "[0] == _TCP_CLOSE\n",
        "[0] >= _TCP_CLOSE\n",
        ("tests/integration/test_peer.py::test_the_same_error_while_the_client_lives_is_the_handlers",),
    ),
    Mutant(
        "another connection at the descriptor that is taken for the client's",
        "net/peer.py",
        "        if name[2:4] != port.to_bytes(2) or name[packed] != socket.inet_pton(family, host):\n",
        "        if name[packed] != socket.inet_pton(family, host):\n",
        ("tests/integration/test_peer.py::test_only_the_connections_own_descriptor_tells_that_its_client_has_gone",),
    ),
    Mutant(
        "a client's end that is told by its name alone",
        "net/peer.py",
        "    return type(number) is int and number in GONE_ERRORS\n",
        "    return False\n",
        ("tests/integration/test_peer.py::test_every_error_of_a_client_that_has_gone_is_its_end",),
    ),
    Mutant(
        "a signal to leave that ends what a handler has become",
        "system/signals.py",
        "RETIRE = signal.SIGURG\n",
        "RETIRE = signal.SIGTERM\n",
        ("tests/integration/test_exec.py::test_a_program_that_a_handler_has_become_finishes_its_connection[reload-eof]",),
    ),
    Mutant(
        "a parent's death that ends what a handler has become",
        "system/signals.py",
        "PARENT_DIED = signal.SIGWINCH\n",
        "PARENT_DIED = signal.SIGRTMIN + 2\n",
        ("tests/integration/test_exec.py::test_a_program_that_a_handler_has_become_finishes_its_connection[reload-finish]",),
    ),
    Mutant(
        "a signal mask that is inherited and stays",
        "master.py",
        "        self._let_signals_in()  # whoever has started us may have blocked some\n",
        "",
        ("tests/integration/test_signals.py::test_signals_that_whoever_started_the_daemon_has_blocked_are_heard[serve]",),
    ),
    Mutant(
        "a fork server that is interrupted",
        "system/signals.py",
        "    return dict.fromkeys((*MASTERS, *more), _note)\n",
        "    return dict.fromkeys(more, _note)\n",
        ("tests/integration/test_signals.py::test_what_a_process_manager_sends_to_all_but_the_master_costs_no_connection[2]",),
    ),
    Mutant(
        "handlers of the import that are undone",
        "forkserver.py",
        "for signo, action in users.items() if signo not in worker.SIGNALS}\n",
        "for signo, action in users.items() if signo == 0}\n",
        ("tests/integration/test_signals.py::test_signal_handlers_of_the_import_stay_where_workers_do_not_need_the_signal",),
    ),
    Mutant(
        "a hang-up that is a reload",
        "system/hangups.py",
        "        if not self._had_terminal:\n",
        "        if True:\n",
        ("tests/integration/test_terminal.py::test_closing_the_terminal_stops_the_daemon[background]",),
    ),
    Mutant(
        "a signal of anybody's that is taken for a hang-up",
        "system/hangups.py",
        "sender != 0 and sender == os.getsid(0) and not",
        "sender != 0 and not",
        ("tests/integration/test_terminal.py::test_a_daemon_that_no_hang_up_reaches_goes_on_and_reloads[disown]",),
    ),
    Mutant(
        "a shell's signal that is taken for a hang-up",
        "system/hangups.py",
        " and not _has_terminal())\n",
        ")\n",
        ("tests/integration/test_terminal.py::test_a_signal_that_is_typed_in_the_daemons_own_shell_reloads",),
    ),
    Mutant(
        "a holder that is not named for want of its parent",
        "net/listener.py",
        "    except (OSError, psutil.Error):  # it has gone, or",
        "    except OSError:  # it has gone, or",
        ("tests/unit/test_listeners.py::test_who_holds_a_port_is_named_though_its_parent_can_not_be_read",),
    ),
    Mutant(
        "a scoreboard that may be any file",
        "ops/status.py",
        "            _refuse_strange(fd)\n",
        "            pass\n",
        ("tests/unit/test_answers.py::test_what_is_no_board_is_not_read",),
    ),
    Mutant(
        "functions that user code has replaced",
        "forkserver.py",
        "        originals.keep()  # with what was just put there to watch user code\n",
        "",
        ("tests/integration/test_replaced_functions.py::test_workers_are_served_watched_replaced_and_stopped[no-poll]",),
    ),
    Mutant(
        "a worker that serves once and waits for its replacement",
        "worker.py",
        "        if self.brief.config.max_connections == 1:\n            return True\n",
        "",
        (
            "tests/integration/test_recycling.py"
            "::test_a_worker_that_serves_once_serves_nobody_else_though_nothing_can_take_its_place",
        ),
    ),
    Mutant(
        "recycled workers that wait for idle acceptors",
        "pool/policy.py",
        "    replaced = max(view.come, ready + tired.waiting + tired.busy - view.target)\n",
        "    replaced = max(0, ready + tired.waiting + tired.busy - view.target)\n",
        ("tests/unit/test_policy.py::test_tired_workers_leave_as_others_come_in_their_place",),
    ),
    Mutant(
        "a worker that has served its number and does not wait",
        "worker.py",
        "        board.states[self.slot] = PAUSED\n        end =",
        "        return self._asked_to_leave()\n        end =",
        ("tests/integration/test_recycling.py::test_under_load_no_worker_serves_more",),
    ),
    Mutant(
        "a cut that leaves the client to the handler's child",
        "forkserver.py",
        "    process.kill_child(pid, group=board.states[slot] == scoreboard.BUSY)\n",
        "    process.kill_child(pid, group=False)\n",
        ("tests/integration/test_cut.py::test_a_handlers_child_ends_with_the_connection[a-time-out-alive]",),
    ),
    Mutant(
        "a cut that ends helpers of idle workers",
        "forkserver.py",
        "    process.kill_child(pid, group=board.states[slot] == scoreboard.BUSY)\n",
        "    process.kill_child(pid, group=True)\n",
        ("tests/integration/test_cut.py::test_a_helper_is_left_alone_by_an_orderly_end",),
    ),
    Mutant(
        "a long text that is copied again for each piece",
        "log/formats.py",
        "        yield text[at : at + size]\n        at += size\n",
        "        yield text[at : at + size]\n        text, at = text[at + size :], 0\n",
        ("tests/unit/test_log.py::test_a_long_text_is_cut_without_copying_what_is_left_of_it",),
    ),
    Mutant(
        "a reload that looks through all processes",
        "listeners.py",
        "find_holder=not self.current",
        "find_holder=True",
        ("tests/integration/test_reload.py::test_a_reload_looks_through_no_processes_for_who_holds_an_address",),
    ),
    Mutant(
        "a reader's lock on the pid file that is taken for a daemon's",
        "system/pidfile.py",
        "_FLOCK.pack(fcntl.F_RDLCK,",
        "_FLOCK.pack(fcntl.F_WRLCK,",
        ("tests/unit/test_pidfile.py::test_no_lock_of_a_reader_is_a_daemons",),
    ),
    Mutant(
        "a stale file's name that is taken from whatever has it by now",
        "system/replacing.py",
        "    if (found.st_dev, found.st_ino) == stale:\n",
        "    if True:\n",
        ("tests/unit/test_unix.py::test_of_two_that_find_the_same_stale_socket_one_has_the_path",),
    ),
    Mutant(
        "an answer that may be of any length",
        "ops/instances.py",
        "                if len(data) > ANSWER_LIMIT:\n",
        "                if False:\n",
        ("tests/integration/test_control.py::test_an_answer_that_never_ends_is_given_up",),
    ),
    Mutant(
        "a peer's name that reaches the terminal as it is",
        "ops/status.py",
        "        return one_line(value)\n",
        "        return value\n",
        ("tests/unit/test_printable.py::test_the_table_shows_whatever_a_daemon_answers_as_text",),
    ),
    Mutant(
        "a refusal that reaches the terminal as it is",
        "cli.py",
        " {printable(str(error))}",
        " {error}",
        ("tests/integration/test_commands.py::test_a_refused_reload_and_a_start_show_no_control_character_of_the_handlers",),
    ),
    Mutant(
        "a SIGTERM handler that raises",
        "worker.py",
        "            self._unplug(self.brief.listener.sock.fileno(), self.brief.listener_stat)\n",
        "            raise OSError(88, 'told to leave')\n",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[held_accepts]",),
    ),
    Mutant(
        "no repeat of the signal",
        "retiring.py",
        "            self._link.signal(self._pool.workers[slot], Order.RETIRE)\n",
        "            pass\n",
        ("tests/unit/test_generation.py::test_a_worker_that_waits_in_accept_is_signalled_until_it_has_seen_it",),
    ),
    Mutant(
        "a slot that is forgotten when its worker is reaped",
        "pool/state.py",
        "        self.live[worker.listener] -= 1\n",
        "",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[killed_workers]",),
    ),
    Mutant(
        "a connection's object that is used again though its handler has kept it",
        "worker.py",
        "references(sock) == known and ",
        "",
        ("tests/integration/test_handlers.py::test_nothing_that_a_handler_did_to_a_connections_object_is_the_next_clients",),
    ),
    Mutant(
        "a fork too few for those who block",
        "pool/policy.py",
        "    fork = min(wanted, max(0, view.room))\n",
        "    fork = min(wanted - 1, max(0, view.room))\n",
        ("tests/integration/test_pool.py::test_a_worker_whose_handler_blocks_is_replaced",),
    ),
    Mutant(
        "a fork too few for the dead",
        "pool/policy.py",
        "        return memory, replace(decision, fork=missing)\n",
        "        return memory, replace(decision, fork=missing - 1)\n",
        ("tests/integration/test_pool.py::test_a_worker_that_is_killed_is_replaced_at_once",),
    ),
    Mutant(
        "a reload that serves before it is committed",
        "worker.py",
        "                read(gate, 1)\n",
        "",
        ("tests/integration/test_reload.py::test_new_code_serves_nobody_before_all_its_workers_are_ready",),
    ),
    Mutant(
        "a listener that is closed before its queue was served",
        "listeners.py",
        "            if not served and farewell.deadline > now:\n",
        "            if False:\n",
        ("tests/unit/test_listeners.py::test_who_waits_in_the_queue_has_all_of_its_time_after_the_handshakes",),
    ),
    Mutant(
        "a listener that is closed under handshakes",
        "listeners.py",
        "            if not settled:\n",
        "            if False:\n",
        ("tests/unit/test_listeners.py::test_handshakes_under_way_keep_it_open_whatever_the_deadline_says",),
    ),
    Mutant(
        "a refused reload that changes the queue",
        "listeners.py",
        "self._listens(kept, in_force)",
        "self._listens(kept, conf)",
        ("tests/unit/test_listeners.py::test_a_queue_has_its_new_limit_when_the_reload_is_for_good",),
    ),
    Mutant(
        "a stop that a handler ends by connecting the listener elsewhere",
        "net/listener.py",
        "            if error.errno != errno.EINVAL:",
        "            if True:",
        ("tests/unit/test_listeners.py::test_one_that_is_connected_elsewhere_while_it_turns_clients_away_is_closed_too",),
    ),
    Mutant(
        "a stop that waits for the handshakes of a listener that was shut down",
        "net/listener.py",
        "        if not self.accepts():  # a handler has shut",
        "        if False:  # a handler has shut",
        ("tests/unit/test_listeners.py::test_one_that_a_handler_has_connected_elsewhere_is_closed_like_any_other",),
    ),
    Mutant(
        "a listener that is closed between a handshake's end and the queue",
        "net/listener.py",
        "        self.empty_looks = min(self.empty_looks, 1)\n",
        "",
        ("tests/unit/test_listeners.py::test_the_queue_is_looked_at_after_the_last_handshake_and_not_once_only",),
    ),
    Mutant(
        "half-open handshakes that are waited for until the kernel gives them up",
        "net/handshakes.py",
        " else request.retransmissions < LATE\n",
        " else True\n",
        ("tests/unit/test_handshakes.py::test_late_ones_and_those_of_another_address_are_not_waited_for",),
    ),
    Mutant(
        "a look in pieces that waits for all of them after each",
        "net/handshakes.py",
        "PAUSE_RATIO * used",
        "PAUSE_RATIO * time.thread_time()",
        ("tests/unit/test_handshakes.py::test_a_look_in_pieces_takes_ten_times_its_cpu_in_all",),
    ),
    Mutant(
        "a look that failed once for want of a descriptor and is never tried again",
        "net/handshakes.py",
        "                if error.errno in NOT_HERE:\n",
        "                if True:\n",
        ("tests/unit/test_handshakes.py::test_where_nothing_can_be_seen_for_a_moment_it_is_looked_again",),
    ),
    Mutant(
        "a look that stays open after the last listener was closed",
        "listeners.py",
        "        self.looks.rest()\n",
        "",
        ("tests/unit/test_listeners.py::test_a_stop_that_becomes_a_quick_one_leaves_no_look_open",),
    ),
    Mutant(
        "a look at one listener that goes through all",
        "mending.py",
        "        if self._current is not daemon.listeners.current:\n",
        "        if True:\n",
        ("tests/unit/test_mending.py::test_a_look_at_one_goes_through_no_others",),
    ),
    Mutant(
        "a handler's fork that gets no fresh locks",
        "system/forks.py",
        "        _sparing = False\n",
        "",
        ("tests/integration/test_handlers.py::test_locks_are_free_in_a_worker_and_in_what_its_handler_forks",),
    ),
    Mutant(
        "a worker that is born with a lock",
        "system/forks.py",
        "            _logging_lock.release()",
        "            pass",
        ("tests/integration/test_handlers.py::test_locks_are_free_in_a_worker_and_in_what_its_handler_forks",),
    ),
    Mutant(
        "a child from before that is never reaped",
        "master.py",
        "            self._reap()  # children from before",
        "            # children from before",
        ("tests/integration/test_addresses.py::test_a_child_from_before_that_has_ended_is_no_zombie",),
    ),
    Mutant(
        "events that a stopped master does not see",
        "master.py",
        "            events = daemon.selector.select(0)\n",
        "            events = events or daemon.selector.select(0)\n",
        ("tests/unit/test_master.py",),
    ),
    Mutant(
        "a reload that is ready, but found so late",
        "changeover.py",
        "        if generation.failure is None and generation.parked:\n",
        "        if generation.failure is None and generation.parked and generation.boot_deadline > self.daemon.now:\n",
        ("tests/integration/test_reload.py::test_a_master_that_was_stopped_hears_what_has_come_before_it_finds_a_reload_late",),
    ),
    Mutant(
        "workers to be recycled that are told apart by a second look",
        "generation.py",
        "            kinds.get(row[slot - acceptors.first], []).append(slot)",
        "            kinds.get(self.board.states[slot], []).append(slot)",
        (
            "tests/unit/test_generation.py::"
            "test_a_worker_to_be_recycled_that_changes_between_two_reads_of_the_board_is_asked_to_leave_all_the_same",
        ),
    ),
    Mutant(
        "workers that leave with their fork server",
        "worker.py",
        "        if not self._is_orphan():\n            return  # user code has sent it\n",
        "",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[killed_fork_server]",),
    ),
    Mutant(
        "workers that stay when the master is dead",
        "worker.py",
        "            self._tie_to_parent,\n",
        "",
        ("tests/faults/test_faults.py::test_a_worker_outlives_neither_its_master_nor_its_fork_server",),
    ),
    Mutant(
        "a descriptor that leaks at each reload",
        "link.py",
        "        keep.callback(os.close, self.orders_fd)\n",
        "",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[reloads]",),
    ),
    Mutant(
        "a recycled worker that leaves before its replacement is there",
        "pool/policy.py",
        "    idle = min(tired.idle, max(0, ready + tired.idle - view.target))\n",
        "    idle = tired.idle\n",
        ("tests/integration/test_recycling.py::test_an_old_worker_serves_on_until_its_replacement_is_ready",),
    ),
    Mutant(
        "an address that is closed before the reload that drops it is committed",
        "listeners.py",
        "        return Plan(tuple(places), tuple(opened), tuple(owners))\n",
        "        [listener.turn_away(0.0, self.looks, cookies=False) for listener in self.current if listener not in places]\n"
        "        return Plan(tuple(places), tuple(opened), tuple(owners))\n",
        ("tests/integration/test_reload.py::test_a_refused_reload_that_drops_an_address_has_not_touched_it",),
    ),
    Mutant(
        "a saved user id that leads back to root",
        "system/credentials.py",
        "    os.setresuid(who.uid, who.uid, who.uid)\n",
        "    os.setresuid(who.uid, who.uid, 0)\n",
        ("tests/integration/test_credentials.py::test_handlers_give_up_root_for_good_and_the_master_keeps_it",),
    ),
    Mutant(
        "a service manager's socket that is shut down at the end",
        "net/listener.py",
        "        return Listener(wanted, _name_of(sock), sock, ours=False)\n",
        "        return Listener(wanted, _name_of(sock), sock)\n",
        ("tests/integration/test_addresses.py::test_an_inherited_socket_is_served_and_left_to_its_owner",),
    ),
    Mutant(
        "a resume that nobody hears",
        "generation.py",
        "        self.suspended = False\n        for acceptors",
        "        for acceptors",
        ("tests/integration/test_suspend.py::test_while_suspended_clients_wait_and_after_it_they_are_served",),
    ),
    Mutant(
        "an ignored signal",
        "system/signals.py",
        "    signal.SIGTTIN,\n",
        "",
        ("tests/integration/test_signals.py::test_ttin_and_ttou_are_one_acceptor_more_and_one_fewer",),
    ),
    Mutant(
        "a line that is glued to what another process could not end",
        "log/sink.py",
        "                    _torn[self._place] = 1\n",
        "                    pass\n",
        ("tests/unit/test_log.py::test_a_line_that_another_process_tore_is_ended_too",),
    ),
    Mutant(
        "workers that wait for a disk that hangs at each line",
        "log/pipe.py",
        "            if time.monotonic() > end:\n                _stuck[self._place] = 1\n",
        "            if time.monotonic() > end:\n                raise BlockingIOError\n",
        ("tests/integration/test_log_files.py::test_who_may_wait_waits_once_for_a_disk_that_hangs",),
    ),
    Mutant(
        "a burst that is taken for a disk that hangs",
        "log/pipe.py",
        "            if not self._patience or _stuck[self._place]:\n",
        "            _stuck[self._place] = 1\n            if not self._patience or _stuck[self._place]:\n",
        ("tests/integration/test_log_files.py::test_a_burst_of_who_may_wait_is_written_whole",),
    ),
    Mutant(
        "half a line that goes with who has read it",
        "log/writer.py",
        "        while not (self.leaving and not self.begun):\n",
        "        while not self.leaving:\n",
        ("tests/integration/test_log_files.py::test_what_has_begun_and_what_is_missing_outlive_who_leaves",),
    ),
    Mutant(
        "a log that ends with a master that has not heard it",
        "log/writer.py",
        '        except ConnectionResetError:  # it has gone, with something unread that we told it\n            asked = b""\n',
        "        except ConnectionResetError:  # it has gone, with something unread that we told it\n            raise\n",
        ("tests/integration/test_log_files.py::test_a_master_that_goes_with_something_unheard_does_not_end_it",),
    ),
    Mutant(
        "a stop that leaves lines in a pipe that nobody reads",
        "log/files.py",
        "        self._ensure()\n        self.ask(Ask.FLUSH)\n",
        "        self.ask(Ask.FLUSH)\n",
        ("tests/integration/test_log_files.py::test_a_stop_starts_another_one_for_what_waits",),
    ),
    Mutant(
        "log files that nobody opens again",
        "log/writer.py",
        "            case Ask.REOPEN.value:\n                self._end_line()\n                self._open()\n",
        "            case Ask.REOPEN.value:\n                self._end_line()\n",
        ("tests/integration/test_log_files.py::test_a_file_is_opened_again_by_who_writes_it_or_who_comes_next",),
    ),
    Mutant(
        "a writer of a log that anybody's SIGTERM ends",
        "log/writer.py",
        "            signal.signal(signo, signal.SIG_IGN)\n",
        "            pass\n",
        ("tests/integration/test_log_files.py::test_what_is_sent_to_everybody_does_not_end_it",),
    ),
    Mutant(
        "a writer of a log that is not replaced",
        "log/files.py",
        "            self._again_at += policy.backoff(self._failures)\n",
        "            self._again_at = None\n",
        ("tests/integration/test_log_files.py::test_one_that_is_killed_is_replaced_and_what_waited_is_written",),
    ),
    Mutant(
        "a stop that does not wait for its last lines",
        "log/__init__.py",
        "        file.flushed(deadline)\n",
        "        pass\n",
        ("tests/integration/test_log_files.py::test_the_last_line_is_in_the_file_when_all_is_finished",),
    ),
    Mutant(
        "an upgrade that gives up the only way to a log file",
        "log/writer.py",
        "                self.leaving = self._can_be_opened_again()\n",
        "                self.leaving = True\n",
        ("tests/integration/test_log_files.py::test_one_that_nobody_could_take_the_place_of_does_not_leave",),
    ),
    Mutant(
        "lines that a full disk has not taken and nobody counts",
        "log/writer.py",
        "        self.dropped += lost\n",
        "",
        ("tests/integration/test_log_files.py::test_what_the_disk_does_not_take_is_counted_and_told",),
    ),
    Mutant(
        "a print that every fork tells again",
        "log/prints.py",
        "        forks.in_child(lines.forget)\n",
        "",
        ("tests/unit/test_log.py::test_a_fork_does_not_tell_again_what_its_parent_has_begun",),
    ),
    Mutant(
        "workers that end when they are ready, and are replaced at once for ever",
        "pool/lives.py",
        "        self._ends.append((now, acceptors == 0))\n",
        "        self._ends = deque([(now, acceptors == 0)])\n",
        ("tests/unit/test_generation.py::test_workers_that_end_when_they_were_ready_are_one_failure",),
    ),
    Mutant(
        "a doorbell that is answered as often as it rings",
        "pool/throttle.py",
        "        self.until = now + (self._spent - self.burst) / self.rate\n",
        "",
        ("tests/unit/test_floods.py::test_a_doorbell_that_rings_without_end_is_heard_so_often_and_told_once[one]",),
    ),
    Mutant(
        "a look at everything that costs what any turn does",
        "floods.py",
        "            self._spend(now, max(0.0, cost / TURN - 1))\n",
        "",
        ("tests/unit/test_floods.py::test_a_look_that_costs_more_comes_more_seldom_and_is_told_once",),
    ),
    Mutant(
        "ends that wait behind stops",
        "system/process.py",
        "            if not changes:\n                options = os.WNOHANG\n",
        "            if not changes:\n                break\n",
        ("tests/unit/test_floods.py::test_ends_do_not_wait_behind_the_stops_of_older_children",),
    ),
    Mutant(
        "a channel at its end that is heard again and again",
        "generation.py",
        "        return self._deaf_until is None and not self.link.hung_up\n",
        "        return self._deaf_until is None\n",
        ("tests/unit/test_floods.py::test_a_channel_at_its_end_is_not_heard_again",),
    ),
    Mutant(
        "a look at surplus acceptors as often as a microsecond is over",
        "pool/policy.py",
        "    window = max(spare_timeout, SHORTEST_WINDOW)\n",
        "    window = spare_timeout\n",
        ("tests/unit/test_policy.py::test_surplus_is_not_looked_for_without_a_pause_however_short_the_time_is",),
    ),
    Mutant(
        "acceptors that exist on the board only",
        "generation.py",
        "        row = acceptors.true_row()\n",
        "        row = acceptors.row()\n",
        ("tests/unit/test_generation.py::test_acceptors_that_do_not_exist_are_struck_off",),
    ),
    Mutant(
        "a fork that fails and is forgotten",
        "generation.py",
        "                self.look_soon(worker.listener, now)\n            case Kind.EXITED",
        "            case Kind.EXITED",
        ("tests/unit/test_generation.py::test_a_fork_that_fails_late_is_tried_again_too",),
    ),
    Mutant(
        "a want of memory that is retried at once",
        "net/listener.py",
        "    **dict.fromkeys([errno.ENFILE, errno.ENOBUFS, errno.ENOMEM], Verdict.PAUSE),\n",
        "    **dict.fromkeys([errno.ENFILE, errno.ENOBUFS], Verdict.PAUSE), errno.ENOMEM: Verdict.RETRY,\n",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[accept_errors]",),
    ),
    Mutant(
        "an uptime that the wall clock tells",
        "commands.py",
        "time.monotonic() - daemon.began,",
        "time.time() - daemon.started,",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[clock]",),
    ),
    Mutant(
        "a board that nobody can read once its first word is spoilt",
        "pool/scoreboard.py",
        "        if access is not Access.MASTER and os.pread(orders_fd, _WORD, 0)",
        "        if access is not Access.MASTER and os.pread(board_fd, _WORD, 0)",
        ("tests/faults/test_faults.py::test_one_instance_of_each_fault[garbage_on_the_board]",),
    ),
    Mutant(
        "a worker that waits for descriptors which it will never have",
        "net/listener.py",
        "    errno.EMFILE: Verdict.LEAVE,\n",
        "    errno.EMFILE: Verdict.PAUSE,\n",
        ("tests/faults/test_accepting.py::test_a_handler_that_leaks_descriptors_costs_a_fork_whenever_its_worker_is_full",),
    ),
    Mutant(
        "a worker that is deaf where nothing can be put in the listener's place",
        "worker.py",
        "            os.close(fd)\n\n    def _clean_up",
        "\n    def _clean_up",
        ("tests/faults/test_accepting.py::test_a_worker_in_accept_is_retired_although_nothing_can_be_put_in_the_listeners_place",),
    ),
    Mutant(
        "a listener that was shut down and that nobody opens again",
        "floods.py",
        " and ring.why is wire.Ring.LISTENER:",
        " and ring.why is wire.Ring.READY:",
        ("tests/faults/test_accepting.py::test_a_tcp_listener_that_a_handler_shuts_down_is_opened_again",),
    ),
    Mutant(
        "a report that raises in who reads it",
        "pool/wire.py",
        "        return Report(Kind(kind), *fields)\n    except ValueError:\n",
        "        return Report(Kind(kind), *fields)\n    except KeyError:\n",
        ("tests/faults/test_fuzz.py::test_a_reader_takes_whatever_there_is[reports]",),
    ),
    Mutant(
        "a configuration that takes an hour to read",
        "config.py",
        "        if _DEEP_KEY.search(",
        "        if False and _DEEP_KEY.search(",
        ("tests/unit/test_config.py::test_a_key_of_thousands_of_parts_is_refused_before_it_costs_seconds",),
    ),
    Mutant(
        "forks that are tried again as seldom as boots",
        "generation.py",
        ", wait=policy.fork_backoff)",
        ")",
        ("tests/unit/test_generation.py::test_a_fork_that_fails_backs_off_and_says_when",),
    ),
    Mutant(
        "a program that changes with signals let in",
        "master.py",
        "        signals.block()\n        late = self.inbox.take()\n",
        "        late = self.inbox.take()\n",
        ("tests/integration/test_upgrade.py::test_signals_that_come_while_the_program_changes_are_obeyed_by_the_next",),
    ),
    Mutant(
        "an upgrade that leaves the log files behind",
        "upgrading.py",
        "logs=tuple(log.carry())",
        "logs=()",
        ("tests/integration/test_upgrade.py::test_log_files_go_on_whatever_has_become_of_their_folders",),
    ),
    Mutant(
        "an upgrade whose check proves nothing",
        "upgrading.py",
        "            if trial.status == 0 and proved:\n",
        "            if trial.status == 0:\n",
        ("tests/integration/test_way_back.py::test_what_does_not_prove_that_it_has_read_the_state_is_refused[empty]",),
    ),
    Mutant(
        "an upgrade without a dead man's switch",
        "system/program.py",
        "        guard.arm(SWITCH)\n",
        "",
        ("tests/integration/test_way_back.py::test_a_successor_that_does_not_go_on_gives_way_to_the_program_that_was[status 0]",),
    ),
    Mutant(
        "a time without a master that counts against connections",
        "hung.py",
        "        self._lost -= seconds\n",
        "        self._lost += seconds\n",
        ("tests/unit/test_hung.py::test_what_was_lost_to_an_upgrade_counts_against_no_connection_that_it_found",),
    ),
    Mutant(
        "a root that opens every file",
        "log/sink.py",
        "            fd = _open_the_owners(self.path, flags, owner)\n",
        "            raise\n",
        ("tests/integration/test_credentials.py::test_a_master_with_four_capabilities_gives_files_away_and_finds_them_again",),
    ),
    Mutant(
        "an upgrade that forgets who serves",
        "generation.py",
        "                workers=tuple(self.pool.workers.values()),\n",
        "                workers=tuple(worker for worker in self.pool.workers.values() if not worker.retiring),\n",
        ("tests/integration/test_upgrade.py::test_an_upgrade_under_load_loses_nobody_and_keeps_pid_counters_and_connections",),
    ),
    Mutant(
        "a canary without a way back",
        "changeover.py",
        "            old.kept = True\n",
        "            old.kept = False\n",
        ("tests/integration/test_canary.py::test_new_code_that_crashes_is_taken_back_and_who_asked_is_told",),
    ),
    Mutant(
        "a hung worker that may begin another client's connection",
        "hung.py",
        "        self._link.board.retire[worker.slot] = 1\n",
        "",
        ("tests/unit/test_hung.py::test_whoever_is_cut_has_had_its_time",),
    ),
    Mutant(
        "an age that any handler can write",
        "hung.py",
        "        return now if said < unseen - SCAN else min(now, max(said, unseen))\n",
        "        return min(now, said)\n",
        ("tests/unit/test_hung.py::test_what_a_handler_writes_into_another_slot_makes_no_connection_older",),
    ),
    Mutant(
        "a hung worker that is killed whomever it serves",
        "hung.py",
        " or board.words[board.record(worker.slot) + BEGUN] != case.begun:\n",
        ":\n",
        ("tests/unit/test_hung.py::test_whoever_is_cut_has_had_its_time",),
    ),
    Mutant(
        "a worker that is killed though it may wait in accept",
        "retiring.py",
        "    return heard and is_in_call_on(pid, listener) is False\n",
        "    return True\n",
        ("tests/unit/test_retiring.py",),
    ),
    Mutant(
        "a healthy acceptor that is taken for one that hangs because it computes",
        "computing.py",
        "        if held == []:\n",
        "        if not computes:\n",
        ("tests/unit/test_computing.py",),
    ),
    Mutant(
        "a kill that is not tried again",
        "killing.py",
        "            self._link.signal(kill.worker, Order.KILL)\n            kill.wait",
        "            kill.wait",
        ("tests/unit/test_killing.py",),
    ),
    Mutant(
        "a process of another parent's that is taken for a worker",
        "link.py",
        "        if found.parent != os.getpid() or not self._has_ended():\n            return False\n",
        "",
        ("tests/unit/test_generation.py::test_a_process_that_another_one_has_forked_is_no_worker",),
    ),
    Mutant(
        "an orphan that is taken for what a dead fork server has forked",
        "link.py",
        "        return started is None or started > ",
        "        return True or started > ",
        ("tests/unit/test_generation.py::test_an_orphan_that_is_older_than_the_order_is_not_what_a_dead_fork_server_has_forked",),
    ),
    Mutant(
        "a worker that has ended because its fork server says so",
        "generation.py",
        " or self.link.still_runs(report.pid):\n",
        ":\n",
        ("tests/unit/test_generation.py::test_a_worker_that_lives_has_not_ended_whatever_its_fork_server_says",),
    ),
    Mutant(
        "a worker that counts on from what stands on the board",
        "worker.py",
        "                words[bucket_at] = words[bucket_at] + 1 & mask\n",
        "                words[bucket_at] += 1\n",
        ("tests/unit/test_worker_loop.py::test_a_worker_survives_any_content_of_its_board_and_counts_right",),
    ),
    Mutant(
        "orders that workers can make writable",
        "link.py",
        "            return scoreboard.opened_read_only(self.orders_fd)\n",
        "            return os.dup(self.orders_fd)\n",
        ("tests/faults/test_trust.py::test_a_handler_has_no_way_to_write_the_orders",),
    ),
    Mutant(
        "a fork server whose descriptors its workers can take",
        "forkserver.py",
        "user code may have changed credentials\n        process.become_private()\n",
        "user code may have changed credentials\n        process.prctl(4, 1)\n",
        ("tests/faults/test_trust.py::test_master_and_fork_server_keep_memory_and_descriptors_to_themselves",),
    ),
    Mutant(
        "finalizers that a worker's libraries take for registered",
        "system/finalizers.py",
        "    _FINALIZE._registered_with_atexit = False\n",
        "",
        ("tests/integration/test_finalizers.py::test_a_worker_finishes_what_it_has_made_whatever_was_imported",),
    ),
    Mutant(
        "the import's finalizers that each worker runs",
        "system/finalizers.py",
        "        finalizer.atexit = False\n",
        "        pass\n",
        ("tests/integration/test_finalizers.py::test_nothing_is_removed_that_other_workers_use",),
    ),
    Mutant(
        "functions of the import that each worker runs",
        "forkserver.py",
        "(atexit._clear,) if atexit._ncallbacks() else ()",
        "()",
        (
            "tests/integration/test_finalizers.py::test_what_the_import_registered_runs_once_after_the_last_worker_of_its_generation",
        ),
    ),
    Mutant(
        "the import's buffers that each worker writes",
        "system/finalizers.py",
        "    for file in files:\n        _flush(file)  # else",
        "    for file in ():\n        _flush(file)  # else",
        ("tests/integration/test_finalizers.py::test_what_import_and_workers_write_to_one_open_file_is_written_once",),
    ),
    Mutant(
        "a log that waits for the thread of a handler",
        "system/finalizers.py",
        "not lock.acquire(blocking=False)",
        "not lock.acquire()",
        ("tests/integration/test_finalizers.py::test_threads_that_a_handler_left_behind_are_not_waited_for",),
    ),
    Mutant(
        "a fork server that leaves before its workers have ended with what the import has registered",
        "generation.py",
        "        if self.registered and self.pool.workers:\n            return\n",
        "",
        ("tests/unit/test_generation.py::test_a_fork_server_whose_import_registered_something_leaves_after_its_last_worker",),
    ),
    Mutant(
        "an upgrade that forgets what the import has registered",
        "generation.py",
        "            registered=self.registered,\n",
        "",
        ("tests/unit/test_generation.py::test_an_upgrade_knows_that_a_fork_server_stays",),
    ),
    Mutant(
        "processes of the import that outlive it",
        "forkserver.py",
        "    process.end_children(started, STARTED_MAY_TAKE)\n",
        "",
        ("tests/integration/test_finalizers.py::test_processes_that_the_import_started_end_with_their_generation",),
    ),
]


def kills(mutant: Mutant, folder: Path) -> bool:
    """Whether the tests notice: a copy of package and tests, the bug in it, and the tests that should fail."""
    copy(folder)
    file = folder / "prefork" / mutant.file
    source = file.read_text()
    if source.count(mutant.old) != 1:
        raise AssertionError(f"{mutant.name}: {mutant.old!r} is {source.count(mutant.old)} times in {mutant.file}, not once")
    file.write_text(source.replace(mutant.old, mutant.new))
    return run(mutant.check, folder) != ""


def copy(folder: Path) -> None:
    """Package and tests, to be changed."""
    shutil.copytree(Path(prefork.__file__).parent, folder / "prefork", ignore=shutil.ignore_patterns("__pycache__"))
    here = Path(__file__).parents[1]
    shutil.copytree(here, folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(here.parent / "pyproject.toml", folder)


def run(checks: Iterable[str], folder: Path) -> str:
    """Run these tests on the copy. Returns what they print if any fails, else nothing."""
    settings = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST", "PREFORK"))}
    # A short name: a Unix socket's path has at most 107 bytes, and a test that can't make one would notice every bug.
    with tempfile.TemporaryDirectory(prefix="m-", dir="/tmp") as scratch:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", *checks],
            cwd=folder,
            env={**settings, "PYTHONPATH": str(folder), "TMPDIR": scratch},
            capture_output=True,
            text=True,
            check=False,
        )
    # Some bugs leave processes behind, which have become ours (tests/conftest.py makes us the subreaper).
    for child in watch.children():
        child.kill()
        child.wait()
    if done.returncode not in (0, 1):
        raise AssertionError(f"the tests did not run:\n{done.stdout}{done.stderr}")
    return done.stdout if done.returncode == 1 else ""

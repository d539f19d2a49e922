"""The command line without a server: usage, targets, words; the verdict read from files that a test writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from gracehooks import cli, instances
from gracehooks.cli import Watch, jobs_in_words, lost_in_lines, main, phases_in_words, seconds_in_words
from gracehooks.instances import Instance, NoSuchInstance, find


class Fake:
    """An instance's files, and a process that stands for its master."""

    def __init__(self, directory):
        self.directory = directory
        directory.mkdir(mode=0o700)
        # Not with handlers: a signal that comes just before a sleep begins is handled after the sleep.
        code = (
            "import signal, sys\n"
            "wanted = {signal.SIGTERM, signal.SIGUSR2}\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, wanted)\n"
            "print('up', flush=True)\n"
            "while (got := signal.sigtimedwait(wanted, 300)) and got.si_signo == signal.SIGUSR2:\n"
            "    print('usr2', flush=True)\n"
            "try: open('history.jsonl', 'a').write(open('at-the-end.jsonl').read())\n"
            "finally: sys.exit()\n"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", code],
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout.readline() == "up\n"
        self.status(state="serving")

    def status(self, **changes):
        found = {"generation": 1, "master_pid": self.process.pid, "state": "serving", "at": time.time(), "workers": []}
        path = self.directory / "status.json"
        new = path.with_suffix(".new")
        new.write_text(json.dumps({**found, "draining": [], "upgrade": None, **changes}))
        new.replace(path)

    def record(self, **record):
        with open(self.directory / "history.jsonl", "a") as file:
            file.write(json.dumps({"at": time.time(), **record}) + "\n")

    def when_asked(self, then):
        """Do `then` once the signal has come, as a master would."""

        def wait():
            self.process.stdout.readline()
            then()

        threading.Thread(target=wait, daemon=True).start()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def fake(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(run))
    monkeypatch.setattr(instances.tempfile, "gettempdir", lambda: str(run))
    made = Fake(tmp_path / "gunicorn.gracehooks")
    yield made
    made.close()


def register(fake, run_dir):
    index = run_dir / "gracehooks" / "instances"
    index.mkdir(parents=True, mode=0o700)
    (index / str(fake.process.pid)).write_text(str(fake.directory))


UPGRADE = {
    "id": "new",
    "kind": "upgrade",
    "state": "booting",
    "reason": "",
    "phases": {},
    "workers": 2,
    "workers_ready": 1,
}


# -- usage -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["deploy"],
        ["upgrade", "--pid", "x"],
        ["upgrade", "--timeout", "-1"],
        ["upgrade", "--pid", "1", "--pidfile", "x"],
        ["upgrade", "now"],
        ["history", "--last", "-1"],
        ["stop", "--no-wait"],
    ],
)
def test_wrong_usage_is_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gracehooks" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["upgrade", "reload", "stop", "status", "history"])
def test_no_such_instance_is_2_and_says_which(command, tmp_path, capsys):
    assert main([command, "--pidfile", str(tmp_path / "none.pid")]) == 2
    assert "none.pid" in capsys.readouterr().err
    assert main([command, "--state-dir", str(tmp_path), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2


def test_every_command_tells_its_exit_codes(capsys):
    for command in ("upgrade", "reload", "stop", "status", "history"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for code, meaning in cli.EXITS[command].items():
            assert f"{code}  {meaning}" in text
    assert set(cli.EXITS) == set(cli.COMMANDS)


# -- targets -----------------------------------------------------------------------------------------------------------
def test_found_by_state_directory_pidfile_pid_and_as_the_only_one(fake, tmp_path):
    assert find(state_dir=str(fake.directory)).directory == fake.directory
    pidfile = tmp_path / "gunicorn.pid"
    pidfile.write_text(f"{fake.process.pid}\n")
    assert find(pidfile=str(pidfile)).directory == fake.directory
    with pytest.raises(NoSuchInstance, match="no instance is running"):
        find()
    with pytest.raises(NoSuchInstance, match="no master that gracehooks knows"):
        find(pid=fake.process.pid)
    register(fake, tmp_path / "run")
    assert find().directory == find(pid=fake.process.pid).directory == fake.directory
    pidfile.unlink()
    assert find(pidfile=str(pidfile)).directory == fake.directory, "its files are still there"


def test_of_two_running_ones_none_is_chosen(fake, tmp_path):
    register(fake, tmp_path / "run")
    other = Fake(tmp_path / "other.gracehooks")
    try:
        (tmp_path / "run/gracehooks/instances" / str(other.process.pid)).write_text(str(other.directory))
        with pytest.raises(NoSuchInstance, match="2 instances are running"):
            find()
        other.close()
        assert find().directory == fake.directory
    finally:
        other.close()


def test_a_pid_that_belongs_to_somebody_else_now_gets_no_signal(fake, capsys):
    fake.status(at=time.time() - 3600)  # written long before this process began
    assert Instance(fake.directory).master() is None
    assert main(["upgrade", "--state-dir", str(fake.directory)]) == 2
    assert "no master is running" in capsys.readouterr().err
    assert fake.process.poll() is None


def test_an_index_that_others_may_write_is_not_believed(fake, tmp_path):
    register(fake, tmp_path / "run")
    (tmp_path / "run/gracehooks/instances").chmod(0o777)
    with pytest.raises(NoSuchInstance):
        find()


def test_half_written_and_broken_history_lines_are_left_out(fake):
    fake.record(id="a", kind="stop", outcome="completed")
    with open(fake.directory / "history.jsonl", "a") as file:
        file.write('not json\n[]\n{"id": "half')
    assert [each["id"] for each in Instance(fake.directory).history()] == ["a"]


# -- the verdict -------------------------------------------------------------------------------------------------------
def upgrade(fake, *arguments):
    return main(["upgrade", "--state-dir", str(fake.directory), "--json", *arguments])


def test_completed_is_0(fake, capsys):
    def then():
        fake.status(upgrade=UPGRADE)
        fake.status(generation=2, upgrade={**UPGRADE, "state": "completed", "phases": {"booting": 0.2}})

    fake.when_asked(then)
    assert upgrade(fake) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["outcome"], said["generation"], said["phases"], said["id"]) == (
        "completed",
        2,
        {"booting": 0.2},
        "new",
    )


def test_rolled_back_is_1_with_the_reason(fake, capsys):
    def then():
        fake.status(upgrade={**UPGRADE, "state": "rolled_back", "reason": "ImportError: no"})

    fake.when_asked(then)
    assert main(["upgrade", "--state-dir", str(fake.directory)]) == 1
    assert capsys.readouterr().out == "upgrade rolled back, the old generation serves on: ImportError: no\n"


def test_refused_is_3_with_the_reason(fake, capsys):
    fake.status(upgrade={**UPGRADE, "id": "earlier"})
    fake.when_asked(lambda: fake.record(id="mine", kind="upgrade", outcome="refused", reason="one is under way"))
    assert upgrade(fake) == 3
    assert json.loads(capsys.readouterr().out)["reason"] == "one is under way"


def test_somebody_elses_refusal_is_not_ours(fake):
    def then():
        fake.status(upgrade=UPGRADE)
        time.sleep(0.2)
        fake.record(id="other", kind="upgrade", outcome="refused", reason="one is under way")
        time.sleep(0.2)
        fake.status(upgrade={**UPGRADE, "state": "completed"})

    fake.when_asked(then)
    assert upgrade(fake) == 0


def test_a_refusal_that_is_written_between_two_looks_is_not_ours(fake, monkeypatch):
    watch = Watch.begin(Instance(fake.directory), "upgrade", {})
    status, fake_status = Instance.status, fake.status

    def slowly(instance):
        found = status(instance)
        fake_status(upgrade=UPGRADE)
        fake.record(id="other", kind="upgrade", outcome="refused", reason="one is under way")
        return found

    monkeypatch.setattr(Instance, "status", slowly)
    assert watch.look()[0] == ""
    assert watch.look()[0] == ""


def test_what_a_worker_loses_meanwhile_is_no_verdict(fake):
    def then():
        fake.record(id="w", kind="worker", outcome="forced", reason="worker 7: killed by SIGKILL")
        fake.record(id="u2", kind="upgrade", outcome="completed")

    fake.when_asked(then)
    assert upgrade(fake) == 0


def test_an_earlier_verdict_is_not_ours(fake):
    fake.status(upgrade={**UPGRADE, "id": "earlier", "state": "completed"})
    fake.record(id="before", kind="upgrade", outcome="rolled_back", reason="no")
    assert upgrade(fake, "--timeout", "0.3") == 4


def test_a_second_command_is_refused_while_one_waits(fake):
    with Instance(fake.directory).alone() as alone:
        assert alone
        assert upgrade(fake) == 3


def test_no_wait_returns_at_once(fake):
    assert upgrade(fake, "--no-wait") == 0
    assert fake.process.stdout.readline() == "usr2\n"


def test_a_server_that_is_gone_is_4(fake, monkeypatch, capsys):
    monkeypatch.setattr(cli, "GONE_FOR", 0.1)

    def then():
        fake.process.send_signal(signal.SIGKILL)
        fake.process.wait()

    fake.when_asked(then)
    assert upgrade(fake) == 4
    assert "ended without a verdict" in json.loads(capsys.readouterr().out)["reason"]


def test_drained_waits_for_the_end_of_the_old_generation_and_tells_its_losses(fake, capsys):
    lost = {"requests": [{"method": "GET", "path": "/slow", "age": 30.2, "reason": "drain timeout"}], "jobs": []}

    def then():
        fake.status(
            upgrade={**UPGRADE, "state": "completed"}, draining=[{"generation": 1, "master_pid": 1, "workers": 2}]
        )
        time.sleep(0.2)
        fake.record(id="new", kind="upgrade", outcome="completed", phases={"retiring": 1.5}, lost=lost)

    fake.when_asked(then)
    assert main(["upgrade", "--state-dir", str(fake.directory), "--drained"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "the old generation left after 1.50 s, 1 lost",
        "lost request GET /slow after 30 s: drain timeout",
    ]


def test_a_return_to_the_old_generation_while_it_drained_is_1(fake):
    def then():
        fake.status(upgrade={**UPGRADE, "state": "completed"})
        time.sleep(0.2)
        fake.record(id="new", kind="upgrade", outcome="rolled_back", reason="the new generation died")

    fake.when_asked(then)
    assert upgrade(fake, "--drained") == 1


def test_watch_needs_no_status_where_the_history_tells(fake):
    watch = Watch.begin(Instance(fake.directory), "upgrade", {})
    fake.record(id="x", kind="upgrade", outcome="completed", phases={})
    assert watch.look()[0] == "completed"


# -- stop, status, history ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [0, 2])
def test_stop_waits_for_the_end_and_tells_what_was_lost(fake, lost, capsys):
    jobs = [{"id": n, "name": "mail", "kind": "thread", "age": 2.0, "reason": "told to stop", "where": "a.py:1\nb.py:2"}
            for n in range(lost)]  # fmt: skip
    fake.record(
        id="s", kind="stop", outcome="forced" if lost else "completed", phases={"stopping": 1.0}, lost={"jobs": jobs},
        jobs={"accepted": 3, "succeeded": 3 - lost, "abandoned": lost}, requests_answered=12,
    )  # fmt: skip
    (fake.directory / "history.jsonl").rename(fake.directory / "at-the-end.jsonl")
    assert main(["stop", "--state-dir", str(fake.directory)]) == (1 if lost else 0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("stopped after 1.00 s, by force, 2 lost" if lost else "stopped after 1.00 s, nothing lost")
    assert ("lost job 0 mail (thread) after 2.00 s: told to stop" in lines) == bool(lost)
    assert ("    b.py:2" in lines) == bool(lost)
    assert lines[-1].startswith("12 requests answered; 3 jobs")


def test_a_master_that_ends_without_a_report_is_4(fake):
    assert main(["stop", "--state-dir", str(fake.directory)]) == 4


def test_status_tells_workers_requests_jobs_and_is_1_where_nothing_serves(fake, capsys):
    worker = {
        "pid": 7,
        "phase": "lame_duck",
        "requests": [{"method": "GET", "path": "/a", "age": 1.0}, {"method": "GET", "path": "/b", "age": 3.0}],
        "jobs": [{"id": 1, "name": "mail", "kind": "thread", "age": 2.5}],
    }
    draining = [{"generation": 1, "master_pid": 5, "workers": 1}]
    upgrade = {**UPGRADE, "state": "rolled_back", "reason": "ImportError: no", "started_at": time.time() - 7200}
    fake.status(generation=2, workers=[worker], draining=draining, upgrade=upgrade)
    assert main(["status", "--state-dir", str(fake.directory)]) == 0
    text = capsys.readouterr().out
    assert "generation 2, master" in text
    assert "worker 7  lame duck  2 requests (oldest GET /b, 3." in text
    assert "1 job (oldest mail (thread), 2." in text
    assert "generation 1 (master 5) is still draining, 1 worker" in text
    assert "last upgrade: rolled back, begun 2 h ago: ImportError: no" in text
    fake.status(state="booting")
    assert main(["status", "--state-dir", str(fake.directory)]) == 1
    fake.status(state="stopped")
    assert main(["status", "--state-dir", str(fake.directory), "--json"]) == 1
    fake.status()
    fake.close()
    assert main(["status", "--state-dir", str(fake.directory)]) == 1
    assert "gone" in capsys.readouterr().out


def test_history_tells_each_record(fake, capsys):
    target = ["--state-dir", str(fake.directory)]
    assert main(["history", *target]) == 0
    assert "no upgrade, reload or stop yet" in capsys.readouterr().out
    fake.record(id="1", kind="upgrade", outcome="completed", phases={"booting": 0.5}, lost={})
    fake.record(id="2", kind="upgrade", outcome="rolled_back", reason="ImportError: no", phases={}, lost={})
    fake.record(id="3", kind="stop", outcome="forced", phases={}, lost={"requests": [{}], "jobs": [{}]})
    assert main(["history", *target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "upgrade  completed    booting 0.50 s; nothing lost" in lines[0]
    assert "rolled back  ImportError: no" in lines[1]
    assert lines[2].endswith("stop     forced       lost 2")
    assert main(["history", "--last", "1", "--json", *target]) == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == ["3"]


# -- words -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.414, "0.41 s"), (9.5, "9.50 s"), (12.3, "12 s"), (150, "2 min"), (7300, "2 h"), (200_000, "2 days")],
)
def test_seconds_in_words(seconds, words):
    assert seconds_in_words(seconds) == words


def test_other_words():
    assert phases_in_words({"booting": 0.5, "probation": 2}) == "booting 0.50 s, probation 2.00 s"
    assert jobs_in_words({"accepted": 0}) == ""
    assert jobs_in_words({"accepted": 1, "succeeded": 1, "failed": 0}) == "; 1 job: 1 succeeded"
    assert lost_in_lines(None) == lost_in_lines({}) == []


def test_progress_is_live_on_a_terminal_and_quiet_in_a_pipe(fake):
    command = [sys.executable, "-m", "gracehooks", "upgrade", "--state-dir", str(fake.directory), "--timeout", "0.5"]
    fake.status(upgrade=UPGRADE)
    leader, follower = os.openpty()
    try:
        done = subprocess.run(command, stderr=follower, stdout=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 4
        os.set_blocking(leader, False)
        shown = b""
        try:
            while part := os.read(leader, 65536):
                shown += part
        except OSError:
            pass
        assert b"upgrade: asked, 0." in shown
        assert shown.endswith(b"\r\x1b[K")
    finally:
        os.close(leader)
        os.close(follower)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 4

"""The readers of `gracehooks check`: command lines, units, sections, manifests, this host; and rules that need no file."""

from __future__ import annotations

import os
import pwd

import pytest

from gracehooks.check import commands, host, manifests, programs, units
from gracehooks.check.facts import Facts, Server, Settings, Unit
from gracehooks.check.rules import judge


@pytest.mark.parametrize(
    ("text", "args", "anchored", "shell"),
    [
        ("gunicorn -w 2 app:app", ("-w", "2", "app:app"), False, ""),
        ("/venv/bin/python -m gunicorn app:app", ("app:app",), False, ""),
        ("/venv/bin/gracehooks run -- /venv/bin/gunicorn app", ("app",), True, ""),
        ("tini -- gunicorn app", ("app",), False, ""),
        ("sh -c 'gunicorn app'", ("app",), False, "sh"),
        ("sh -c 'exec gunicorn app'", ("app",), False, ""),
        ("/bin/sh -ec 'cd /srv; A=1 gunicorn app'", ("app",), False, "sh"),
        ("sh -c '. venv/bin/activate && exec gunicorn app'", ("app",), False, ""),
        ("bash -c 'cd /srv && gunicorn app'", ("app",), False, ""),
        ("bash -c 'gunicorn app | tee log'", ("app",), False, "bash"),
        ("bash -c 'exec gunicorn app | tee log'", ("app",), False, "bash"),
        ("bash -c 'gunicorn app; echo gone'", ("app",), False, "bash"),
        ("gracehooks run -- sh -c 'gunicorn app'", ("app",), True, "sh"),
        ("celery worker", None, False, ""),
        ("./start.sh", None, False, ""),
        ("sh start.sh", None, False, ""),
        ("gunicorn 'unbalanced", None, False, ""),
    ],
)
def test_a_command_line_is_taken_apart(text, args, anchored, shell):
    found = commands.from_text(text)
    assert (found.args, found.anchored, found.shell) == (args, anchored, shell)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("5min 20s", 320), ("1h", 3600), ("500ms", 0.5), ("infinity", units.INFINITY), ("1m10s", 70)],
)
def test_time_spans(text, seconds):
    assert units.span(text) == pytest.approx(seconds)


def test_what_is_no_time_span():
    assert units.span("soon") is None
    assert units.span("5 fortnights") is None


def test_a_unit_is_read_as_systemd_reads_it(tmp_path):
    path = tmp_path / "app@blue.service"
    path.write_text(
        '[Unit]\nDescription=x\n[Service]\n# no\nType=simple\nEnvironment=A=1 "B=two words"\nEnvironment=C=3\n'
        "ExecStart=-/venv/bin/gunicorn \\\n  --name %i app\nExecReload=/bin/false\nRuntimeDirectory=app other\n"
    )
    drop_ins = tmp_path / "app@blue.service.d"
    drop_ins.mkdir()
    (drop_ins / "10.conf").write_text("[Service]\nType=notify\nExecReload=\nEnvironment=\nEnvironment=D=4\n")
    unit = units.read(path)
    assert unit.type == "notify"
    assert unit.notify_access == "main"
    assert unit.command.args == ("--name", "blue", "app")
    assert unit.get("ExecReload") == ""
    assert units.environment(unit) == {"D": "4"}
    assert units.managed_directories(unit) == ("/run/app", "/run/other")


def test_a_section_is_read_as_supervisord_reads_it():
    text = "[program:web]\ncommand=gunicorn\n  -w 2 app ; the site\nenvironment=A=\"1,2\",B='x y',C=3\n"
    program = programs.parse(text)
    assert program.command.args == ("-w", "2", "app")
    assert programs.environment(program) == {"A": "1,2", "B": "x y", "C": "3"}
    with pytest.raises(programs.NoSuchProgram):
        programs.parse(text, "other")


def test_only_containers_that_may_run_the_server_are_looked_at():
    pod = "kind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: a, command: [gunicorn, app]}, {name: b}]}\n"
    assert [each.container["name"] for each in manifests.parse(pod)] == ["a"]
    assert [each.container["name"] for each in manifests.parse(pod, "b")] == ["b"]
    with pytest.raises(manifests.NotRead):
        manifests.parse("kind: ConfigMap\ndata: {}\n")


def test_a_dockerfile_counts_by_its_last_stage():
    image = manifests.dockerfile(
        'FROM a AS build\nSTOPSIGNAL SIGINT\nCMD make\nFROM b\n# x\nENTRYPOINT ["gracehooks", "run", "--"]\n'
        'CMD ["gunicorn", \\\n  "app"]\n'
    )
    assert (image.command.args, image.command.anchored, image.stop_signal) == (("app",), True, "SIGTERM")
    assert manifests.dockerfile("FROM a\nENTRYPOINT gunicorn app\nCMD x").command.shell == "sh"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look for another user")
def test_a_directory_is_seen_with_the_users_rights(tmp_path):
    nobody = pwd.getpwnam("nobody")
    mine, theirs, everyone = tmp_path / "mine", tmp_path / "theirs", tmp_path / "everyone"
    for each, mode in ((mine, 0o755), (theirs, 0o755), (everyone, 0o1777)):
        each.mkdir()
        each.chmod(mode)
    os.chown(theirs, nobody.pw_uid, nobody.pw_gid)
    for directory, writable, shared in ((mine, False, False), (theirs, True, False), (everyone, True, True)):
        server = Server(pidfile=str(directory / "app.pid"), chdir="/srv", cwd="/srv")
        found = host.look(server, Settings(), "nobody", []).directory(str(directory))
        assert (found.exists, found.writable, found.shared) == (True, writable, shared)
        codes = [
            each.code
            for each in judge(Facts(server, Settings(ready_path="/"), host=host.look(server, None, "nobody", [])))
        ]
        assert codes == (["pidfile-unwritable"] if not writable else ["pidfile-shared"] if shared else [])
    assert host.look(Server(pidfile=str(mine / "x")), None, "no-such-user", []).directory(str(mine)).writable is None


def test_a_directory_that_systemd_makes_is_not_missed():
    unit = units.parse("[Service]\nType=notify\nRuntimeDirectory=app\n")
    server = Server(pidfile="/run/app/app.pid")
    seen = host.look(server, None, None, [])
    assert not seen.directory("/run/app").exists
    codes = {each.code for each in judge(Facts(server, Settings(), host=seen, unit=unit))}
    assert "pidfile-missing-directory" not in codes
    codes = {each.code for each in judge(Facts(server, Settings(), host=seen, unit=Unit("app.service")))}
    assert "pidfile-missing-directory" in codes


def test_rules_are_silent_about_what_is_not_known():
    assert judge(Facts()) == []

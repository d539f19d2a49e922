"""Real releases: a symlink that switches, dependencies that change, a virtual environment of another Python, frameworks.

The server is started as people start it, from `current`, and each upgrade finds what `current` points to by then.
"""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

import gracehooks
from tests.kit import Server, load, serve

pytestmark = pytest.mark.lab

SOURCE = Path(gracehooks.__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))


def point(link: Path, target: str) -> None:
    """What `ln -sfn` and `mv -T` do: the link is never absent."""
    new = link.with_name(link.name + ".new")
    new.symlink_to(target)
    new.replace(link)


def upgrade(server: Server) -> None:
    """An upgrade, to the end of the old generation: until then both may answer."""
    event = server.upgrade()
    assert event["event"] == "UpgradeCompleted", event
    server.wait_for("GenerationRetired", after=event)


def upgraded(server: Server, version: str) -> None:
    upgrade(server)
    assert server.get("/version").text == version


WSGI = """
    import sys
    {imports}

    def app(environ, start_response):
        body = ({body}).encode()
        start_response("200 OK", [("Content-Length", str(len(body)))])
        return [body]
"""

FLASK = """
    from flask import Flask

    app = Flask(__name__)

    @app.get("/fast")
    def fast():
        return "ok"

    @app.get("/version")
    def version():
        return {body}
"""

DJANGO = {
    "site_{n}/__init__.py": "",
    "site_{n}/settings.py": """
        SECRET_KEY = "test"
        ROOT_URLCONF = "site_{n}.urls"
        ALLOWED_HOSTS = ["*"]
        DATABASES = {{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": "{database}"}}}}
    """,
    "site_{n}/urls.py": """
        from django.db import connection
        from django.http import HttpResponse
        from django.urls import path

        def healthz(request):
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
            return HttpResponse("ok")

        urlpatterns = [
            path("fast", lambda request: HttpResponse("ok")),
            path("version", lambda request: HttpResponse("{n}")),
            path("healthz", healthz),
        ]
    """,
    "wsgi.py": """
        import os
        from django.core.wsgi import get_wsgi_application

        os.environ["DJANGO_SETTINGS_MODULE"] = "site_{n}.settings"
        app = get_wsgi_application()
    """,
}


def django(directory: Path, number: int, database: str = ":memory:") -> None:
    write(
        directory,
        {name.format(n=number): text.format(n=number, database=database) for name, text in DJANGO.items()},
    )


def gunicorn(target: str) -> list[str]:
    return [sys.executable, "-m", "gunicorn", "-c", "{directory}/gunicorn.conf.py", target]


def test_the_symlink_switches_and_dependencies_change():
    def release(directory: Path, number: int, dependency: str) -> None:
        where = directory / "releases" / str(number)
        body = f'"{number}" if environ["PATH_INFO"] == "/version" else {dependency}.NAME'
        write(where, {"app.py": WSGI.format(imports=f"import {dependency}", body=body)})
        write(where, {f"{dependency}.py": f'NAME = "{dependency}"'})

    def prepare(directory: Path) -> None:
        release(directory, 1, "first")
        release(directory, 2, "second")
        release(directory, 3, "third")
        (directory / "releases/3/third.py").unlink()
        release(directory, 4, "first")
        point(directory / "current", "releases/1")

    with serve(command=gunicorn("app:app"), cwd="current", prepare=prepare) as server:
        current = server.dir / "current"
        with load(server, kinds=("new", "keepalive"), clients=2) as traffic:
            assert server.get("/").text == "first"
            point(current, "releases/2")
            upgraded(server, "2")
            assert server.get("/").text == "second"
            shutil.rmtree(server.dir / "releases/1")  # as a deploy that keeps only some releases does
            point(current, "releases/3")  # a dependency is missing
            event = server.upgrade()
            assert event["event"] == "UpgradeRolledBack"
            assert event["reason"] == "ModuleNotFoundError: No module named 'third'"
            assert server.get("/").text == "second"
            point(current, "releases/4")
            upgraded(server, "4")
            assert os.readlink(f"/proc/{server.pid}/cwd").endswith("releases/4")
            traffic.wait(20)
        assert not traffic.lost, traffic.table()


def other_python() -> str:
    """A Python that is supported and not the running one."""
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    for version in VERSIONS:
        found = [
            shutil.which(f"python{version}"),
            *map(str, Path.home().glob(f".pyenv/versions/{version}.*/bin/python3")),
        ]
        for program in filter(None, found):
            said = subprocess.run(
                [program, "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=False
            )
            if said.returncode == 0 and said.stdout.startswith(version + ".") and version != mine:
                return program
    if os.environ.get("CI") == "true":
        pytest.fail("no second version of Python is installed, and on CI nothing may be missing")
    pytest.skip("no second version of Python is installed")


def environment(python: str, directory: Path) -> None:
    """A virtual environment that sees the packages of this one: those that are needed here are pure Python."""
    subprocess.run([python, "-m", "venv", "--without-pip", str(directory)], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    paths = [sysconfig.get_paths()["purelib"], str(SOURCE), *site.getsitepackages()]
    (packages / "tests.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
    python_in_it = directory / "bin/python"
    script = f"#!{python_in_it}\nimport sys\nfrom gunicorn.app.wsgiapp import run\nsys.exit(run())\n"
    (directory / "bin/gunicorn").write_text(script)
    (directory / "bin/gunicorn").chmod(0o755)


@pytest.mark.parametrize("layout", ["replaced in place", "one in each release"])
def test_the_virtual_environment_is_replaced_by_one_of_another_python(layout):
    """In place: `venv` is moved away and another put there. In each release: `current/venv` is another one by then."""
    other = other_python()
    in_place = layout == "replaced in place"

    def prepare(directory: Path) -> None:
        body = "'%d.%d' % sys.version_info[:2]"
        for number in (1, 2):
            write(directory / f"releases/{number}", {"app.py": WSGI.format(imports="", body=body)})
        environment(sys.executable, directory / ("venv" if in_place else "releases/1/venv"))
        environment(other, directory / ("venv.next" if in_place else "releases/2/venv"))
        if in_place:  # made for the place where it will be, as a deploy tool makes it
            script = directory / "venv.next/bin/gunicorn"
            script.write_text(script.read_text().replace("venv.next", "venv"))
        point(directory / "current", "releases/1")

    program = "{directory}/venv/bin/gunicorn" if in_place else "{directory}/current/venv/bin/gunicorn"
    command = [program, "-c", "{directory}/gunicorn.conf.py", "app:app"]
    mine = f"{sys.version_info[0]}.{sys.version_info[1]}"
    with serve(command=command, cwd="current", prepare=prepare, workers=1) as server:
        assert server.get("/").text == mine
        with load(server, kinds=("new", "keepalive"), clients=2) as traffic:
            traffic.wait(20)
            if in_place:
                (server.dir / "venv").rename(server.dir / "venv.old")
                (server.dir / "venv.next").rename(server.dir / "venv")
            else:
                point(server.dir / "current", "releases/2")
            upgrade(server)
            now = server.get("/").text
            assert now in VERSIONS
            assert now != mine
            shutil.rmtree(server.dir / ("venv.old" if in_place else "releases/1"))
            upgrade(server)
            traffic.wait(20)
        assert not traffic.lost, traffic.table()


def test_a_flask_project():
    def prepare(directory: Path) -> None:
        for number, body in ((1, '"1"'), (2, '"2"')):
            write(directory / f"releases/{number}", {"shop.py": FLASK.format(body=body)})
        write(
            directory / "releases/3",
            {"shop.py": FLASK.format(body='"3"') + "\n    app.config.from_envvar('NO_SUCH')\n"},
        )
        point(directory / "current", "releases/1")

    config = "gracehooks.configure(ready_path='/version')"
    with serve(
        command=gunicorn("shop:app"), cwd="current", prepare=prepare, config=config, answers="/version"
    ) as server:
        with load(server, kinds=("new", "keepalive"), clients=2) as traffic:
            point(server.dir / "current", "releases/2")
            upgraded(server, "2")
            point(server.dir / "current", "releases/3")
            event = server.upgrade()
            assert event["event"] == "UpgradeRolledBack"
            assert "NO_SUCH" in event["reason"]
            assert server.get("/version").text == "2"
            traffic.wait(20)
        assert not traffic.lost, traffic.table()


def test_a_django_project_whose_health_check_needs_the_database():
    def prepare(directory: Path) -> None:
        django(directory / "releases/1", 1)
        django(directory / "releases/2", 2)
        django(directory / "releases/3", 3, database="/no/such/directory/db.sqlite3")
        django(directory / "releases/4", 4)
        point(directory / "current", "releases/1")

    config = "gracehooks.configure(ready_path='/healthz')"
    with serve(
        command=gunicorn("wsgi:app"), cwd="current", prepare=prepare, config=config, answers="/version"
    ) as server:
        with load(server, kinds=("new", "keepalive"), clients=2) as traffic:
            point(server.dir / "current", "releases/2")
            upgraded(server, "2")
            point(server.dir / "current", "releases/3")
            event = server.upgrade()
            assert event["event"] == "UpgradeRolledBack"
            assert event["reason"].endswith("answered 500 on /healthz")
            assert server.get("/version").text == "2"
            point(server.dir / "current", "releases/4")
            upgraded(server, "4")
            traffic.wait(20)
        assert not traffic.lost, traffic.table()

"""What this host shows of the paths that a deployment names, as the server's user would find them. Changes nothing."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterable

from gracehooks.check.facts import Directory, Host, Server, Settings

__all__ = ["look"]

#: Names that the symlink to the release of today has, and directories that hold releases.
LINKS = ("current", "live", "latest", "active", "production", "release", "app")
SHELVES = ("releases", "versions", "builds", "deployments", "deploys")
#: A directory with more entries than this is no place for releases.
MANY = 2000


def look(server: Server | None, settings: Settings | None, user: str | None, places: Iterable[str]) -> Host:
    """The directories of pidfile, state and heartbeat, and whether one of `places` is inside a release."""
    wanted = []
    if server is not None:
        if server.pidfile:
            wanted.append(os.path.dirname(os.path.join(server.chdir, server.pidfile)))
        if server.worker_tmp_dir:
            wanted.append(server.worker_tmp_dir)
        places = [*places, server.chdir, server.config or ""]
    state = settings.state_dir if settings is not None else None
    name = user or pwd.getpwuid(os.geteuid()).pw_name
    rights = _Rights(user)
    directories = {path: _directory(path, rights) for path in wanted}
    if state:
        directories[state] = _to_be_made(state, rights)
    absolute = [path for path in places if os.path.isabs(path)]
    releases = {path: _release(path) for path in absolute}
    return Host(
        directories,
        {path: each for path, each in releases.items() if each[0]},
        frozenset(path for path in absolute if os.path.realpath(path) != os.path.normpath(path)),
        name,
    )


class _Rights:
    """What a user may do, from the permission bits; access control lists are not read."""

    def __init__(self, user: str | None) -> None:
        self.known = True
        self.uid, self.groups = os.geteuid(), {os.getegid(), *os.getgroups()}
        if user is None:
            return
        try:
            entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
        except KeyError:
            self.known = False
            return
        if entry.pw_uid != self.uid:
            self.uid, self.groups = entry.pw_uid, set(os.getgrouplist(entry.pw_name, entry.pw_gid))

    def write(self, path: str) -> bool | None:
        """Whether the user may make files in the directory; None where the user is not known here."""
        if not self.known:
            return None
        if self.uid == os.geteuid():
            return os.access(path, os.W_OK | os.X_OK)
        if self.uid == 0:
            return True
        info = os.stat(path)
        if info.st_uid == self.uid:
            needed = stat.S_IWUSR | stat.S_IXUSR
        elif info.st_gid in self.groups:
            needed = stat.S_IWGRP | stat.S_IXGRP
        else:
            needed = stat.S_IWOTH | stat.S_IXOTH
        return info.st_mode & needed == needed


def _directory(path: str, rights: _Rights) -> Directory:
    try:
        if not os.path.isdir(path):
            return Directory(exists=False, writable=False)
        mode = os.stat(path).st_mode
        return Directory(True, rights.write(path), bool(mode & stat.S_ISVTX and mode & stat.S_IWOTH))
    except OSError:
        return Directory(True, None)


def _to_be_made(path: str, rights: _Rights) -> Directory:
    """A directory that may still be made: then its nearest ancestor must be writable."""
    nearest = path
    while not os.path.exists(nearest) and os.path.dirname(nearest) != nearest:
        nearest = os.path.dirname(nearest)
    found = _directory(nearest, rights)
    return Directory(os.path.isdir(path), found.writable if os.path.isdir(nearest) else False, found.shared)


def _release(path: str) -> tuple[str, str]:
    """The release directory that the path is inside of, and the symlink that names it today."""
    at = os.path.normpath(path)
    while os.path.dirname(at) != at:
        parent = os.path.dirname(at)
        if os.path.islink(at):
            return "", ""  # the path goes by a symlink: that is resolved anew at each exec
        for shelf in (parent, os.path.dirname(parent)):
            link = _link_to(at, shelf)
            if link and (os.path.basename(link) in LINKS or os.path.basename(parent) in SHELVES):
                return at, link
        at = parent
    return "", ""


def _link_to(directory: str, shelf: str) -> str:
    try:
        with os.scandir(shelf) as entries:
            for _, entry in zip(range(MANY), entries, strict=False):
                if entry.is_symlink() and entry.name in LINKS and os.path.realpath(entry.path) == directory:
                    return entry.path
    except OSError:
        pass
    return ""

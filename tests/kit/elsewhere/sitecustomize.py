"""Takes away what only Linux has, from a whole process: on PYTHONPATH, it is imported before anything else.

What is left is what Python has on macOS, as far as gracehooks or gunicorn could meet it: no /proc and no cgroups, no prctl,
pidfd, eventfd, epoll or waitid (before 3.13), no abstract or sequenced unix sockets, no flags at a socket's creation, no
credentials of a peer, no filter before new connections. `sys.platform` stays: nobody may go by it.
"""

import builtins
import ctypes
import errno
import io
import os
import select
import selectors
import signal
import socket

HIDDEN = ("/proc", "/sys/fs/cgroup", "/dev/shm")
GONE = {
    os: (
        *(
            "eventfd",
            "eventfd_read",
            "eventfd_write",
            "memfd_create",
            "pidfd_open",
            "pipe2",
            "waitid",
            "P_PID",
            "P_PIDFD",
        ),
        *(
            "P_PGID",
            "P_ALL",
            "WEXITED",
            "WNOWAIT",
            "WSTOPPED",
            "sched_getaffinity",
            "getresuid",
            "setresuid",
            "unshare",
        ),
        *("posix_fadvise", "posix_fallocate", "splice", "setns"),
    ),
    select: ("epoll",),
    selectors: ("EpollSelector",),
    signal: ("pidfd_send_signal", "sigtimedwait", "sigwaitinfo", "SIGPWR", "SIGRTMIN", "SIGRTMAX", "SIGPOLL"),
    socket: ("SOCK_CLOEXEC", "SOCK_NONBLOCK", "MSG_CMSG_CLOEXEC", "SO_PEERCRED", "TCP_INFO", "TCP_DEFER_ACCEPT"),
}
if "gevent" in os.environ.get("WITH", ""):
    del GONE[socket]  # its Linux build asks for these
for module, names in GONE.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
selectors.DefaultSelector = selectors.PollSelector


def hidden(path: object) -> bool:
    if isinstance(path, int):
        return False
    text = os.fsdecode(path)  # type: ignore[arg-type]
    return any(text == each or text.startswith(each + "/") for each in HIDDEN)


def without_proc(function):
    def called(path=".", *args, **kwargs):
        if hidden(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(path))
        return function(path, *args, **kwargs)

    return called


for name in ("open", "listdir", "scandir", "stat", "lstat", "readlink", "access"):
    setattr(os, name, without_proc(getattr(os, name)))
builtins.open = io.open = without_proc(io.open)


class CDLL(ctypes.CDLL):
    def __getattr__(self, name):
        if name in ("prctl", "pidfd_open", "gettid"):
            raise AttributeError(name)
        return super().__getattr__(name)


ctypes.CDLL = CDLL


class Socket(socket.socket):
    def __init__(self, family=-1, type=-1, proto=-1, fileno=None):
        if fileno is None and type not in (-1, socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
        super().__init__(family, type, proto, fileno)

    def _named(self, address):
        if self.family == socket.AF_UNIX and os.fsencode(address)[:1] in (b"", b"\0"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return address

    def bind(self, address):
        super().bind(self._named(address))

    def connect(self, address):
        super().connect(self._named(address))

    def setsockopt(self, level, option, *value):
        if level == socket.SOL_SOCKET and option in (26, 27):  # SO_ATTACH_FILTER, SO_DETACH_FILTER
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        super().setsockopt(level, option, *value)


socket.socket = Socket

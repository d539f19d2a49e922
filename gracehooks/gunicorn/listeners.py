"""Ending the arrival of new connections at sockets that several processes share, without losing one that has arrived.

Closing a listening socket resets what waits in its queue, and between the last `accept` and the close one more may come.
So the door is shut first: on TCP a filter drops the packets that open a connection (SYN without ACK) while those of
connections under way pass (socket(7), SO_ATTACH_FILTER; Linux); on a unix socket the path is unlinked. What waits can then
be accepted until there is nothing left. Where the system has no filter, the small window stays.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import struct
from collections.abc import Iterable
from typing import Any

from gunicorn import sock

__all__ = ["add_own", "end_accepting", "name_of", "turn_away", "unlink_paths", "waits"]

SO_ATTACH_FILTER = 26
#: Classic BPF over the TCP header (byte 13: flags): a SYN without ACK is dropped, all else passes.
_FILTER = (
    (0x30, 0, 0, 13),  # ldb [13]
    (0x54, 0, 0, 0x12),  # and #(SYN|ACK)
    (0x15, 0, 1, 0x02),  # jeq #SYN, drop, pass
    (0x06, 0, 0, 0),  # ret #0
    (0x06, 0, 0, 0xFFFFFFFF),  # ret #-1
)


def end_accepting(listeners: Iterable[Any], *, unlink: bool) -> None:
    """No new connection gets to any of `listeners`; never raises."""
    listeners = list(listeners)
    for listener in listeners:
        if listener.family != socket.AF_UNIX:
            _drop_new(listener)
    if unlink:
        unlink_paths(listeners)


def _drop_new(listener: Any) -> None:
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in _FILTER)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HL", len(_FILTER), ctypes.addressof(buffer))
    try:
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, program)
    except OSError:
        pass  # another system: the backlog is still served, a connection of the last moment may be reset


def waits(listeners: Iterable[Any]) -> bool:
    """Whether a connection waits at one of `listeners`; never raises."""
    poll = select.poll()
    for listener in listeners:
        try:
            poll.register(listener.fileno(), select.POLLIN)
        except (OSError, ValueError):
            continue  # it is closed
    return any(event & select.POLLIN for _, event in poll.poll(0))


def turn_away(listeners: Iterable[Any]) -> int:
    """Close what still waits at `listeners`, once no worker is left; how many of them had begun to send a request.

    That is what the kernel does when the listener is closed; here it is counted. Never raises.
    """
    found = 0
    for listener in listeners:
        try:
            listener.setblocking(False)
            while True:
                client, _ = listener.accept()
                with client:
                    client.setblocking(False)
                    try:
                        found += bool(client.recv(1, socket.MSG_PEEK))
                    except OSError:
                        pass  # it has sent nothing, or has gone
        except OSError:
            continue
    return found


def unlink_paths(listeners: Iterable[Any]) -> None:
    """Unlink the paths of the unix sockets among `listeners`; one that is gone already is fine."""
    for listener in listeners:
        try:
            name = listener.getsockname()
            if isinstance(name, str) and name:
                os.unlink(name)
        except OSError:
            pass


def name_of(listener: Any) -> str:
    """The address of a listener as text; two listeners of one address have one name."""
    name = listener.getsockname()
    return name if isinstance(name, str) else f"{name[0]}:{name[1]}"


def add_own(arbiter: Any) -> list[str]:
    """Open what `bind` names beside the sockets that systemd passed; the names of those that were opened.

    gunicorn ignores `bind` where it is given sockets. A `bind` that was not set adds nothing; an address that cannot be
    bound is said and left out, since the sockets of systemd serve.
    """
    cfg, log = arbiter.cfg, arbiter.log
    setting = cfg.settings["bind"]
    if setting.get() == setting.default:
        return []
    there = {name_of(each) for each in arbiter.LISTENERS}
    opened = []
    for address in cfg.address:
        if isinstance(address, int):
            continue  # fd://N is one of those that were passed
        wanted = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        if wanted in there:
            continue
        try:
            listener = sock._sock_type(address)(address, cfg, log)
        except (OSError, ValueError) as error:
            log.error("gracehooks: cannot listen at %s beside the sockets of systemd (%s)", wanted, error)
            continue
        arbiter.LISTENERS.append(listener)
        opened.append(name_of(listener))
    if opened:
        log.info("gracehooks: also listening at %s, beside the sockets of systemd", ", ".join(opened))
    return opened

"""Mounts and a network that only the calling process and its children see; on Linux. They are made
in a `Child`, since there is no way back."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path

from tests.torture.row import NotHere

_NEW_MOUNTS, _NEW_USER, _NEW_NETWORK = 0x00020000, 0x10000000, 0x40000000
_READ_ONLY, _REMOUNT, _BIND, _RECURSIVE, _PRIVATE = 1, 32, 4096, 16384, 1 << 18
_DETACH = 2


def alone() -> None:
    """From now on this process has mounts of its own.

    Raises:
        NotHere: this system does not allow it.
    """
    libc = _libc()
    user, group = os.getuid(), os.getgid()
    flags = _NEW_MOUNTS | (0 if user == 0 else _NEW_USER)
    if libc is None or libc.unshare(flags):
        raise NotHere("this system has no mounts of one process's own")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(None, b"/", None, _RECURSIVE | _PRIVATE, None):
        raise NotHere("this system does not allow mounts")


def alone_without_network() -> None:
    """From now on this process reaches only itself, by 127.0.0.1; the kernel counts all tries to
    reach others, those of child processes too (`tries`).

    Raises:
        NotHere: this system does not allow it.
    """
    alone()
    if _libc().unshare(_NEW_NETWORK):
        raise NotHere("this system has no network of one process's own")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(any_socket, 0x8914, request)  # SIOCSIFFLAGS


def tries() -> int:
    """How often something tried to reach an address that there is no way to."""
    names, values = (
        line.split()
        for line in Path("/proc/net/snmp").read_text().splitlines()
        if line.startswith("Ip:")
    )
    ipv6 = Path("/proc/net/snmp6").read_text().split()
    count6 = ipv6[ipv6.index("Ip6OutNoRoutes") + 1] if "Ip6OutNoRoutes" in ipv6 else 0
    return int(values[names.index("OutNoRoutes")]) + int(count6)


def memory_disk(folder: Path, size_bytes: int, *, again: bool = False) -> None:
    """A file system in memory of this size; with `again` its size is changed."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"size={size_bytes}".encode()
    _mount(b"tmpfs", folder, b"tmpfs", _REMOUNT if again else 0, size)


def show(source: Path, target: Path, *, read_only: bool = False) -> None:
    """Show one folder or file in the place of another."""
    _mount(bytes(source), target, None, _BIND, None)
    if read_only:
        _mount(None, target, None, _BIND | _REMOUNT | _READ_ONLY, None)


def dead(folder: Path) -> None:
    """In place of a folder, a file system whose server is gone: whatever is done in it fails with
    ENOTCONN."""
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        raise NotHere("this system has no FUSE") from None
    folder.mkdir(parents=True, exist_ok=True)
    options = f"fd={server},rootmode=40000,user_id=0,group_id=0"
    try:
        _mount(b"dead", folder, b"fuse", 0, options.encode())
    finally:
        os.close(server)


def unmount(folder: Path) -> None:
    """Take the newest mount off a folder, in use or not."""
    if _libc().umount2(bytes(folder), _DETACH):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(folder))


def _mount(
    source: bytes | None, target: Path, kind: bytes | None, flags: int, data: bytes | None
) -> None:
    if _libc().mount(source, bytes(target), kind, flags, data):
        number = ctypes.get_errno()
        raise NotHere(f"this system does not allow mounts: {os.strerror(number)}")


def _libc() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(None, use_errno=True)
    except TypeError:
        raise NotHere("mounts are made on Linux only") from None

"""What stands between untrusted code and this machine: bubblewrap, or nothing.

bubblewrap gives a run its own user or user id, its own processes, network (none), IPC, host name
and file tree: the interpreter and /usr read-only, an empty scratch folder in memory, nothing else.
On top of it a seccomp filter takes away the system calls that reach past these walls or past the
memory limits (ptrace, shared memory, sockets other than Unix and IP, new namespaces, io_uring...).

Where this process is root, a run gets a user id of its own that nothing else on the machine has;
else a user namespace in which it is nobody. What remains: the kernel itself is shared. A hole in it
is a hole in this; for code written to attack, use a machine that you can lose.
"""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reward.sandbox.limits import Limits
from reward.sandbox.syscalls import NUMBERS, seccomp_filter

MIN_VERSION = (0, 8)
# Far above any user of the machine; one id for each run that goes on at the same time.
FIRST_UID = 1_879_048_192
NOBODY = 65534
Name = Literal["bubblewrap", "none"]


@dataclass(frozen=True)
class Isolation:
    """What isolates the runs of this process.

    Args:
        name: `bubblewrap`, or `none` where a run is an ordinary process of this user.
        missing: why it is not bubblewrap; "" if it is.
    """

    name: Name
    missing: str = ""

    def command(
        self, limits: Limits, *, uid: int | None, filter_fd: int, info_fd: int
    ) -> list[str]:
        """What stands before the interpreter's own arguments.

        Args:
            uid: the program's user id where this process is root.
            filter_fd: descriptor from which the seccomp filter is read.
            info_fd: descriptor to which the number of process 1 inside is written, as JSON.
        """
        python = [os.path.realpath(sys.executable), "-P", "-s", "-S", "-B"]
        if self.name == "none":
            return python
        user = ["--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
        if uid is not None:
            # The supervisor becomes the program's user only after its fork.
            user = ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        size = str(limits.scratch_bytes)
        return [
            *(_bubblewrap(), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"),
            *("--unshare-cgroup-try", "--die-with-parent", "--as-pid-1", "--new-session"),
            *("--cap-drop", "ALL", *user, "--seccomp", str(filter_fd), "--hostname", "sandbox"),
            *("--info-fd", str(info_fd)),
            *("--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "PATH", "/usr/bin:/bin"),
            *("--setenv", "LANG", "C.UTF-8", "--setenv", "PYTHONHASHSEED", "0"),
            *("--setenv", "MALLOC_ARENA_MAX", "1"),
            # Before the tree: the interpreter may live below /tmp.
            *("--perms", "1777", "--size", size, "--tmpfs", "/tmp"),
            *_tree(),
            *("--proc", "/proc", "--dev", "/dev"),
            *("--perms", "1777", "--size", size, "--tmpfs", "/dev/shm", "--remount-ro", "/dev"),
            *("--remount-ro", "/", "--chdir", "/tmp", "--", *python),
        ]


def find_bubblewrap() -> Isolation:
    """Bubblewrap if it is there and new enough for all that is asked of it; it is not run yet."""
    if (sys.platform, platform.machine()) not in {("linux", machine) for machine in NUMBERS}:
        return Isolation("none", f"no filter for {sys.platform} on {platform.machine()}")
    path = shutil.which("bwrap")
    if path is None:
        return Isolation("none", "bubblewrap (the command bwrap) is not installed")
    found = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    version = found.stdout.split()[-1:] or [""]
    numbers = tuple(int(part) for part in version[0].split(".")[:2] if part.isdigit())
    if numbers < MIN_VERSION:
        return Isolation("none", f"bubblewrap is {version[0] or 'unreadable'}, 0.8 is needed")
    return Isolation("bubblewrap")


def limits_processes() -> bool:
    """Whether the kernel counts a user's processes for each user namespace apart (Linux 5.14)."""
    numbers = platform.release().split(".")[:2]
    return [int(n) for n in numbers if n.isdigit()] >= [5, 14]


@functools.cache
def program_filter() -> bytes:
    """The seccomp filter of this machine."""
    return seccomp_filter(platform.machine())


def _bubblewrap() -> str:
    return shutil.which("bwrap") or "bwrap"


@functools.cache
def _tree() -> tuple[str, ...]:
    """The file tree: /usr, what the linker needs, and the interpreter if it lives elsewhere."""
    tree = ["--ro-bind", "/usr", "/usr", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        if os.path.islink(f"/{name}"):
            tree += ["--symlink", os.readlink(f"/{name}"), f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            tree += ["--ro-bind", f"/{name}", f"/{name}"]
    prefixes = {os.path.realpath(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)}
    for prefix in sorted(prefixes):
        if not f"{prefix}/".startswith("/usr/"):
            # Folders that bubblewrap makes on its way are closed to other user ids.
            for folder in reversed(list(Path(prefix).parents)[:-1]):
                tree += ["--perms", "0755", "--dir", str(folder)]
            tree += ["--ro-bind", prefix, prefix]
    return tuple(tree)

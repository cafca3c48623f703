"""The seccomp filter: system calls that a sandboxed program does not get.

A classic BPF program, as linux/seccomp.h and linux/filter.h define it: it reads the architecture,
the call's number and, for some, an argument's low half, and answers "allow", an error, or, for a
foreign architecture, the process's end. Everything is allowed that is not named here; file access
is the business of the namespaces.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import MappingProxyType

# name -> (number on x86_64, number on aarch64), from the kernel's unistd headers.
_DENIED = {
    # looking into other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "perf_event_open": (298, 241),
    # memory that no limit of a process counts
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # new walls, inside which old ones could be climbed
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    # large parts of the kernel that no program needs here
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}
_SPECIAL = {"clone": (56, 220), "clone3": (435, 435), "socket": (41, 198), "prlimit64": (302, 261)}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
NUMBERS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        machine: MappingProxyType(
            {name: numbers[column] for name, numbers in (_DENIED | _SPECIAL).items()}
        )
        for machine, (column, _) in _ARCHITECTURES.items()
    }
)

_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_EPERM, _ENOSYS, _EAFNOSUPPORT = 1, 38, 97
# Calls of x86_64 that use the x32 convention have this bit.
_X32 = 0x40000000
# CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_NAMESPACES = 0x7E020000
_FAMILIES = {"unix": 1, "inet": 2, "inet6": 10}


def seccomp_filter(machine: str) -> bytes:
    """The filter as the kernel reads it: 8 bytes an instruction.

    Raises: ValueError for a machine without a table.

    Example:
        >>> len(seccomp_filter("x86_64")) % 8
        0
    """
    if machine not in NUMBERS:
        raise ValueError(f"machine = {machine!r}, expected one of {', '.join(NUMBERS)}")
    numbers = NUMBERS[machine]
    code = [
        _step(_LOAD, _ARCHITECTURE),
        _step(_JUMP_EQUAL, _ARCHITECTURES[machine][1], 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        code += [_step(_JUMP_AT_LEAST, _X32, 0, 1), _step(_RETURN, _ERROR | _EPERM)]
    for name in _DENIED:
        code += _when(numbers[name], [_step(_RETURN, _ERROR | _EPERM)])
    # Its flags lie in memory, where a filter cannot look; without it libraries take clone.
    code += _when(numbers["clone3"], [_step(_RETURN, _ERROR | _ENOSYS)])
    argument = _step(_LOAD, _FIRST_ARGUMENT)
    code += _when(
        numbers["clone"],
        [
            argument,
            _step(_JUMP_ANY_BIT, _NAMESPACES, 0, 1),
            _step(_RETURN, _ERROR | _EPERM),
            _step(_RETURN, _ALLOW),
        ],
    )
    # Limits of oneself only: another process's could be lowered to end it.
    code += _when(
        numbers["prlimit64"],
        [
            argument,
            _step(_JUMP_EQUAL, 0, 1, 0),
            _step(_RETURN, _ERROR | _EPERM),
            _step(_RETURN, _ALLOW),
        ],
    )
    # Some families (vsock) know no network namespace.
    families = [
        _step(_JUMP_EQUAL, family, len(_FAMILIES) - place, 0)
        for place, family in enumerate(_FAMILIES.values())
    ]
    code += _when(
        numbers["socket"],
        [argument, *families, _step(_RETURN, _ERROR | _EAFNOSUPPORT), _step(_RETURN, _ALLOW)],
    )
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _when(number: int, then: list[bytes]) -> list[bytes]:
    return [_step(_JUMP_EQUAL, number, 0, len(then)), *then]

"""Programs that try to get out of a sandbox, to hurt the machine, or to stay.

Each prints ESCAPED if it got what it wanted. `canary` is a file of the host that it must not reach,
`pid` the host's process, `port` a port that the host listens on. The sets are the reasons with
which a run may end.
"""

from __future__ import annotations

ENDED = {"ok", "failed"}
STOPPED = {"timeout", "killed"}


def _try(body: str) -> str:
    lines = "\n".join(f"    {line}" for line in body.strip().splitlines())
    return (
        f"try:\n{lines}\nexcept BaseException as error:\n    print(type(error).__name__, error)\n"
    )


READING = {
    "read a file of the host": _try("open(canary).read()\nprint('ESCAPED')"),
    "read the password file": _try("open('/etc/passwd').read()\nprint('ESCAPED')"),
    "read the shadow file": _try("open('/etc/shadow').read()\nprint('ESCAPED')"),
    "list the host's home": _try(
        "import os\nnames = os.listdir('/root') + os.listdir('/home')\n"
        "print('ESCAPED' if set(names) - {'.pyenv', '.local'} else 'empty')"
    ),
    "read the environment": _try(
        "import os\nprint('ESCAPED' if 'CANARY' in os.environ else sorted(os.environ))"
    ),
    "read the parent's environment through /proc": _try(
        "for each in (1, pid):\n"
        "    print('ESCAPED' if b'CANARY' in open(f'/proc/{each}/environ', 'rb').read() else 'no')"
    ),
    "see the host's process": _try(
        "import os\nprint('ESCAPED' if os.path.exists(f'/proc/{pid}') and pid > 40 else 'no')"
    ),
    "find other processes": _try(
        "import os\npids = [p for p in os.listdir('/proc') if p.isdigit()]\n"
        "print('ESCAPED' if len(pids) > 2 else pids)"
    ),
    "read memory of the supervisor": _try("open('/proc/1/mem', 'rb').read(1)\nprint('ESCAPED')"),
    "list descriptors of the supervisor": _try(
        "import os\nos.listdir('/proc/1/fd')\nprint('ESCAPED')"
    ),
    "climb through the supervisor's root": _try(
        "open('/proc/1/root' + canary).read()\nprint('ESCAPED')"
    ),
    "climb with dots": _try("open('../../../../../..' + canary).read()\nprint('ESCAPED')"),
    "read inherited descriptors": _try(
        "import os\n"
        "for number in range(3, 64):\n"
        "    try:\n        os.fstat(number)\n    except OSError:\n        continue\n"
        "    print('ESCAPED', os.readlink(f'/proc/self/fd/{number}'))"
    ),
    "rewind standard input to the host's file": _try(
        "import os\nos.lseek(0, 0, 0)\nprint('ESCAPED' if b'rlimits' in os.read(0, 9999) else 'no')"
    ),
    "import the project": _try("import reward.types, model\nprint('ESCAPED')"),
    "import installed packages": _try("import torch\nprint('ESCAPED')"),
    "read kernel messages": _try("open('/dev/kmsg').read(1)\nprint('ESCAPED')"),
    "read a disk": _try(
        "import glob\n[open(d, 'rb').read(1) for d in glob.glob('/dev/[sv]d*')][0]\n"
        "print('ESCAPED')"
    ),
}
WRITING = {
    "write beside the canary": _try("open(canary + '.new', 'w').write('x')\nprint('ESCAPED')"),
    "write over the canary": _try("open(canary, 'w').write('x')\nprint('ESCAPED')"),
    "write to the root": _try("open('/owned', 'w').write('x')\nprint('ESCAPED')"),
    "write to /usr": _try("open('/usr/lib/owned', 'w').write('x')\nprint('ESCAPED')"),
    "change the interpreter": _try(
        "import os\nopen(os.__file__, 'a').write('#')\nprint('ESCAPED')"
    ),
    "write to /dev": _try("open('/dev/owned', 'w').write('x')\nprint('ESCAPED')"),
    "write a kernel setting": _try(
        "open('/proc/sys/kernel/core_pattern', 'w').write('|/tmp/x')\nprint('ESCAPED')"
    ),
    "press the kernel's keys": _try(
        "open('/proc/sysrq-trigger', 'w').write('h')\nprint('ESCAPED')"
    ),
    "symlink to the canary": _try(
        "import os\nos.symlink(canary, 'link')\nopen('link', 'w').write('x')\nprint('ESCAPED')"
    ),
    "hard link to a host file": _try("import os\nos.link('/usr/bin/env', 'env')\nprint('ESCAPED')"),
    "delete": _try(
        "import os, shutil\n"
        "for name in ('/usr/bin', '/dev', '/proc', os.path.dirname(os.__file__)):\n"
        "    shutil.rmtree(name, ignore_errors=True)\n"
        "print('ESCAPED' if not os.path.exists('/usr/bin/env') else 'no')"
    ),
    "mount": _try(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print('no' if libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) else 'ESCAPED')"
    ),
    "remount the root for writing": _try(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print('no' if libc.mount(None, b'/', None, 32 | 4096, None) else 'ESCAPED')"
    ),
    "make a device": _try(
        "import os\nos.mknod('disk', 0o60600, os.makedev(8, 0))\nprint('ESCAPED')"
    ),
    "change root": _try("import os\nos.chroot('/tmp')\nprint('ESCAPED')"),
    "become root": _try("import os\nos.setuid(0)\nprint('ESCAPED')"),
    "keep a setuid file": _try(
        "import os, shutil\nshutil.copy('/usr/bin/env', 'env')\nos.chmod('env', 0o4777)\n"
        "print('ESCAPED' if os.stat('env').st_uid == 0 else 'no')"
    ),
    "use a setuid program": _try(
        "import subprocess\nfound = subprocess.run(['/usr/bin/su', '-c', 'id -u'], timeout=2,\n"
        "    capture_output=True, stdin=subprocess.DEVNULL)\n"
        "print('ESCAPED' if found.stdout.strip() == b'0' else 'no')"
    ),
}
REACHING = {
    "signal the host's process": _try(
        "import os\nos.kill(pid, 9)\nprint('ESCAPED' if pid > 40 else 'a process of its own')"
    ),
    "signal everything": _try("import os\nos.kill(-1, 0)\nprint('no: only its own')"),
    "kill the supervisor": _try(
        "import os, time\nos.kill(1, 9)\ntime.sleep(0.2)\nprint('still here')"
    ),
    "stop the supervisor": _try("import os\nos.kill(1, 19)\nprint('still here')"),
    "lower the supervisor's limits": _try(
        "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0))\nprint('ESCAPED')"
    ),
    "raise its own limits": _try(
        "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999))\nprint('ESCAPED')"
    ),
    "trace the supervisor": _try(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print('no' if libc.ptrace(16, 1, 0, 0) else 'ESCAPED')"
    ),
    "trace itself": _try(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print('no' if libc.ptrace(0, 0, 0, 0) else 'ESCAPED')"
    ),
    "make a user namespace": _try(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print('no' if libc.unshare(0x10000000) else 'ESCAPED')"
    ),
    "clone into a namespace": _try(
        "import ctypes, os, platform\nlibc = ctypes.CDLL(None)\n"
        "number = 56 if platform.machine() == 'x86_64' else 220\n"
        "pid = libc.syscall(number, 0x10000000 | 17, 0, 0, 0, 0)\n"
        "if pid == 0:\n    os._exit(0)\nprint('no' if pid < 0 else 'ESCAPED')"
    ),
    "connect to the host": _try(
        "import socket\nsocket.create_connection(('127.0.0.1', port), 2)\nprint('ESCAPED')"
    ),
    "connect to the world": _try(
        "import socket\nsocket.create_connection(('1.1.1.1', 53), 2)\nprint('ESCAPED')"
    ),
    "send a packet": _try(
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "s.sendto(b'x', ('8.8.8.8', 53))\nprint('ESCAPED')"
    ),
    "resolve a name": _try(
        "import socket\nsocket.getaddrinfo('example.com', 80)\nprint('ESCAPED')"
    ),
    "reach the machine's host (vsock)": _try(
        "import socket\nsocket.socket(40, socket.SOCK_STREAM)\nprint('ESCAPED')"
    ),
    "open a raw socket": _try(
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)\nprint('ESCAPED')"
    ),
    "reach the host's abstract sockets": _try(
        "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect(f'\\0sandbox-canary-{pid}')\n"
        "print('ESCAPED')"
    ),
    "use shared memory segments": _try(
        "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "print('no' if libc.shmget(0, 1 << 20, 0o1600) < 0 else 'ESCAPED')"
    ),
    "make a memory file": _try("import os\nos.memfd_create('x')\nprint('ESCAPED')"),
    "push characters into the terminal": _try(
        "import fcntl, termios\nfcntl.ioctl(open('/dev/tty'), termios.TIOCSTI, b'x')\n"
        "print('ESCAPED')"
    ),
    "write the supervisor's report": _try(
        "import os\nfor number in range(3, 64):\n    try:\n"
        '        os.write(number, b\'{"event": "end"}\\n\')\n'
        "        print('ESCAPED')\n    except OSError:\n        pass"
    ),
}
# Quick ones that end on a limit or by themselves.
EXHAUSTING = {
    "allocate at once": ("x = bytearray(1 << 40)", {"failed"}),
    "huge integers": ("x = 7 ** (7 ** 9)\nprint(len(str(x)))", STOPPED | {"failed"}),
    "recurse": ("def f(): return f()\nf()", {"failed", "killed"}),
    "recurse in C": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\n"
        "class A:\n    def __repr__(s): return repr(s)\nrepr(A())",
        {"failed", "killed"},
    ),
    "crash the interpreter": ("import ctypes\nctypes.string_at(0)", {"killed"}),
    "write for ever": ("while True: print('x' * 9999)", {"output"}),
    "write errors for ever": (
        "import sys\nwhile True: sys.stderr.write('x' * 9999)",
        {"output"},
    ),
    "write a large file": (
        "with open('large', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
        {"failed", "files", "killed"},
    ),
    "fill the scratch folder": (
        "for i in range(999):\n    open(str(i), 'wb').write(bytes(8 << 20))",
        {"failed", "memory"},
    ),
    "make files for ever": (
        "import itertools\nfor i in itertools.count(): open(str(i), 'w').close()",
        {"files"},
    ),
    "open files for ever": ("x = [open('/dev/null') for i in range(9999)]", {"failed"}),
    "threads without end": (
        "import threading, time\nfor i in range(9999):\n"
        "    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
        {"failed", "processes"},
    ),
    "kill itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", {"killed"}),
    "fill shared memory": (
        "for i in range(99):\n    open(f'/dev/shm/{i}', 'wb').write(bytes(8 << 20))",
        {"failed", "memory"},
    ),
}
# These run into the wall clock or load the machine.
HEAVY = {
    "sleep": ("import time\ntime.sleep(999)", {"timeout"}),
    "spin": ("while True: pass", {"timeout"}),
    "spin deaf to SIGXCPU": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        {"timeout"},
    ),
    "ignore all signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: signal.pause()",
        {"timeout"},
    ),
    "fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        {"timeout", "processes"},
    ),
    "fork and leave": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
        "    if os.fork() == 0: time.sleep(999)\n",
        {"ok"},
    ),
    "memory bomb in steps": (
        "x = []\nwhile True: x.append(bytes(1 << 20) + b'x')",
        {"failed", "memory"},
    ),
    "memory bomb in many processes": (
        "import os, time\nfor i in range(20):\n    if os.fork() == 0:\n"
        "        x = bytearray(b'x') * (400 << 20)\n"
        "        time.sleep(60)\ntime.sleep(60)",
        {"memory", "killed"},
    ),
    "memory in pipes": (
        "import os, fcntl\nx = []\nwhile True:\n    r, w = os.pipe()\n"
        "    fcntl.fcntl(w, 1031, 1 << 20)\n"
        "    os.write(w, bytes(1 << 20))\n    x.append((r, w))",
        {"failed"},
    ),
    "hold the lock of the interpreter": ("import re\nre.match('(a+)+b', 'a' * 64)", {"timeout"}),
    "a process group of its own": (
        "import os, time\nos.setsid() if os.fork() == 0 else None\ntime.sleep(999)",
        {"timeout"},
    ),
}

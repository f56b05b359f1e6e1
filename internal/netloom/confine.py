"""``netloom confine``: take all that a service does not need from this process, then execute the service's program.

    netloom confine <uid> <directory> <places> <capabilities> <demanded> <data MiB> <program> [<argument>...]

It is started as root, in the network namespace of the scope. The process keeps its pid. What the program gets:

* a user and a group of its own number, that of its scope;
* a root directory of its own: the host's programs and libraries, and ``directory``, read-only; and ``/sockets``, a few
  kilobytes of memory, where it can write. With ``places`` (``hosts=/etc/dnsmasq.d``) the files and directories of these
  names are at other places, and the directory has links to them;
* of the capabilities those in ``capabilities`` (``net_raw,net_bind_service``), and no way to get others
  (PR_SET_NO_NEW_PRIVS). The program is told that it also has those in ``demanded``: it would refuse to start without
  them, but does not use them;
* a filter that refuses system calls which no service needs and which have been used to attack kernels;
* limits: memory of its own (RLIMIT_DATA), the size of a file, processes, open files; no core dump.

It runs before each start of a service, so it imports only what it needs. After the root directory has changed nothing
can be imported.

``netloom confine serve <idle seconds>`` does this in a fork of itself for each request of the agent
(agent/processes/launcher.py).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Sequence

from netloom import seccomp
from netloom.seccomp import ALLOW, Instruction, if_equal

# The name of the user and of the group in the root directory of a service. Its number is that of the scope.
USER = "netloom"
# The one directory that a service can write to, in its own root directory.
SOCKETS = "/sockets"
# The file of a service's directory that gets its output (agent/processes/files.py).
_LOG = "log"
# No file can become larger, so the log cannot. The agent shortens it long before (agent/processes/files.py).
FILE_BYTES_MAX = 1 << 20
PROCESSES_MAX = 4096
# haproxy needs two for each of at most 30,000 connections. dnsmasq closes every possible descriptor at its start, and
# each takes a system call: a million took 10 seconds on a slow machine.
FILES_MAX = 1 << 16
# Of a thread. haproxy starts one for each processor. 8 MiB each, the usual size, would use up the limit of memory.
STACK_BYTES_MAX = 1 << 20

# linux/capability.h
CAPABILITIES = {"net_bind_service": 10, "net_admin": 12, "net_raw": 13}

# linux/sched.h, linux/mount.h, linux/prctl.h
_CLONE_NEWNS, _CLONE_NEWIPC, _CLONE_NEWNET = 0x00020000, 0x08000000, 0x40000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_SLAVE = (
    0x1, 0x2, 0x4, 0x8, 0x20, 0x1000, 0x4000, 0x80000,
)  # fmt: skip
_MNT_DETACH = 2
_PR_CAPBSET_DROP, _PR_SET_KEEPCAPS, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 24, 8, 38, 47
_PR_CAP_AMBIENT_RAISE = 2
_CAPABILITIES_V3 = 0x20080522

# Programs and libraries; the symbolic links of a merged /usr stay links.
_PROGRAMS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
# dnsmasq seeds its random numbers; the MTU that it advertises is below /proc/sys/net.
_FILES = ("dev/null", "dev/urandom", "etc/ld.so.cache")
_SYSCTLS = "proc/sys/net"

# The sockets that can be opened (linux/socket.h, linux/net.h): family, type and protocol; None: any. The only raw one
# is ICMPv6, for router advertisements; the only one of netlink is rtnetlink. SOCK_PACKET would be a packet socket.
_UNIX, _INET, _INET6, _NETLINK = 1, 2, 10, 16
_STREAM, _DGRAM, _RAW = 1, 2, 3
_TYPE_MASK = 0xF
_SOCKETS: tuple[tuple[int, int | None, int | None], ...] = (
    (_UNIX, None, None),
    (_INET, _STREAM, None),
    (_INET, _DGRAM, None),
    (_INET6, _STREAM, None),
    (_INET6, _DGRAM, None),
    (_INET6, _RAW, 58),
    (_NETLINK, None, 0),
)
# clone(2) with one of these flags makes a namespace: mount, cgroup, UTS, IPC, user, PID, network.
_CLONE_NAMESPACES = 0x7E020000

# Numbers from asm/unistd_64.h and asm-generic/unistd.h.
REFUSED = {
    "x86_64": seccomp.numbers("""
        ptrace 101  syslog 103  personality 135  ustat 136  sysfs 139  pivot_root 155  adjtimex 159  chroot 161
        acct 163  settimeofday 164  mount 165  umount2 166  swapon 167  swapoff 168  reboot 169  sethostname 170
        setdomainname 171  iopl 172  ioperm 173  init_module 175  delete_module 176  quotactl 179  lookup_dcookie 212
        clock_settime 227  mbind 237  set_mempolicy 238  kexec_load 246  add_key 248  request_key 249  keyctl 250
        migrate_pages 256  unshare 272  move_pages 279  perf_event_open 298  fanotify_init 300  name_to_handle_at 303
        open_by_handle_at 304  clock_adjtime 305  setns 308  process_vm_readv 310  process_vm_writev 311  kcmp 312
        finit_module 313  kexec_file_load 320  bpf 321  userfaultfd 323  io_uring_setup 425  io_uring_enter 426
        io_uring_register 427  open_tree 428  move_mount 429  fsopen 430  fsconfig 431  fsmount 432  fspick 433
        pidfd_getfd 438  mount_setattr 442
    """),
    "aarch64": seccomp.numbers("""
        lookup_dcookie 18  umount2 39  mount 40  pivot_root 41  chroot 51  quotactl 60  acct 89  personality 92
        unshare 97  kexec_load 104  init_module 105  delete_module 106  clock_settime 112  syslog 116  ptrace 117
        reboot 142  sethostname 161  setdomainname 162  settimeofday 170  adjtimex 171  add_key 217  request_key 218
        keyctl 219  swapon 224  swapoff 225  mbind 235  set_mempolicy 237  migrate_pages 238  move_pages 239
        perf_event_open 241  fanotify_init 262  name_to_handle_at 264  open_by_handle_at 265  clock_adjtime 266
        setns 268  process_vm_readv 270  process_vm_writev 271  kcmp 272  finit_module 273  bpf 280  userfaultfd 282
        kexec_file_load 294  io_uring_setup 425  io_uring_enter 426  io_uring_register 427  open_tree 428
        move_mount 429  fsopen 430  fsconfig 431  fsmount 432  fspick 433  pidfd_getfd 438  mount_setattr 442
    """),
}
CALLS = {
    "x86_64": seccomp.numbers("clone 56  capget 125  seccomp 317  socket 41  clone3 435"),
    "aarch64": seccomp.numbers("clone 220  capget 90  seccomp 277  socket 198  clone3 435"),
}

# linux/seccomp.h: the requests to receive and to answer a notification, and the bytes of both.
_NOTIF_RECV, _NOTIF_SEND = 0xC0502100, 0xC0182101
_NOTIF_BYTES = 80
_NOTIF_S_MAX = 10.0

SERVE = "serve"
REQUEST_BYTES_MAX = 1 << 16

_USAGE = (
    "usage: netloom confine <uid> <directory> <places> <capabilities> <demanded> <data MiB> <program> [<argument>...]"
)

_libc = ctypes.CDLL(None, use_errno=True)


def main(args: Sequence[str]) -> int:
    """Execute the program. Returns only on an error, with one line on stderr: 1 for wrong arguments, else 3."""
    if args[:1] == [SERVE]:
        return _serve(socket.socket(fileno=os.dup(0)), float(args[1]))
    try:
        uid, directory, placed, capabilities, demanded, data_mib, program, *arguments = args
        user, data_bytes = int(uid), int(data_mib) << 20
        places = [_place(it) for it in placed.split(",") if it]
        kept, told = _numbered(capabilities), _numbered(demanded)
    except (ValueError, KeyError):
        os.write(2, f"netloom confine: only the agent starts it; {_USAGE}\n".encode())
        return 1
    environ = {"PATH": os.environ.get("PATH", ""), "LANG": "C"}
    try:
        _enter(user, directory, places, kept, told, data_bytes)
        os.execve(program, [program, *arguments], environ)
    except OSError as error:
        os.write(2, f"the service cannot be confined: {error}\n".encode())
    return 3


def _serve(requests: socket.socket, idle_s: float) -> int:
    """Answer each request with the pid of a new process, until there was none for ``idle_s`` seconds.

    A request is the arguments, with zero bytes between them, and two descriptors: of the network namespace, and for
    stdout and stderr. If there can be no process, the answer is the error number with a minus sign.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what the agent has started through us
    requests.settimeout(idle_s)
    while True:
        try:
            request, descriptors, _, _ = socket.recv_fds(requests, REQUEST_BYTES_MAX, 2)
        except TimeoutError:
            return 0
        if not request:  # the agent has ended
            return 0
        try:
            answer = _forked(requests, request.decode("utf-8", "surrogateescape").split("\0"), descriptors)
        except OSError as error:
            answer = -(error.errno or errno.EIO)
        for descriptor in descriptors:
            os.close(descriptor)
        requests.send(str(answer).encode())


def _forked(requests: socket.socket, args: Sequence[str], descriptors: Sequence[int]) -> int:
    """The pid of a new process that executes the program, and leads its session by now. Raises OSError."""
    leads, leading = os.pipe()
    try:
        pid = os.fork()
        if pid == 0:
            requests.close()
            os.setsid()
            os.close(leading)
            os._exit(_started(args, *descriptors))
    finally:
        os.close(leading)
    os.read(leads, 1)  # guard: a-process-has-its-group-when-it-is-known
    os.close(leads)
    return pid


def _started(args: Sequence[str], namespace: int, output: int) -> int:
    """In a new process: execute the program as ``main`` does. Returns only on an error."""
    try:
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the program may wait for its children
        _check("setns", _libc.setns(namespace, _CLONE_NEWNET))
        nothing = os.open("/dev/null", os.O_RDWR)
        os.dup2(nothing, 0)
        os.closerange(3, max(nothing, namespace, output) + 1)
        return main(args)
    except BaseException as error:  # noqa: BLE001, it must not go on as another launcher
        os.write(2, f"the service cannot be started: {error}\n".encode())
    return 3


def _numbered(names: str) -> list[int]:
    return [CAPABILITIES[it] for it in names.split(",") if it]


def _place(text: str) -> tuple[str, str]:
    name, path = text.split("=")
    return name, path


def _enter(
    uid: int, directory: str, places: list[tuple[str, str]], kept: list[int], demanded: list[int], data_bytes: int
) -> None:
    machine = os.uname().machine
    if demanded and not _tell_of(kept + demanded, machine, uid):  # guard: a-resolver-is-no-network-administrator
        os.write(
            2, b"this host does not let netloom answer system calls: the service has all capabilities it demands\n"
        )
        kept = kept + demanded
    _check("unshare", _libc.unshare(_CLONE_NEWNS | _CLONE_NEWIPC))
    _enter_root(uid, directory, places)
    for limit, most in (
        (resource.RLIMIT_DATA, data_bytes),
        (resource.RLIMIT_FSIZE, FILE_BYTES_MAX),  # guard: a-log-has-a-largest-size
        (resource.RLIMIT_NPROC, PROCESSES_MAX),
        (resource.RLIMIT_NOFILE, FILES_MAX),
        (resource.RLIMIT_STACK, STACK_BYTES_MAX),  # guard: threads-fit-into-the-limit
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        value = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (value, value))
    # A write that would exceed the size of a file fails, and does not end the process (setrlimit(2)).
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the interpreter ignores it
    for capability in range(64):
        if capability not in kept and _prctl(_PR_CAPBSET_DROP, capability) != 0:
            break  # EINVAL: the kernel has no further capabilities
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)  # guard: a-service-has-the-user-of-its-scope
    mask = sum(1 << capability for capability in kept)
    header = struct.pack("=Ii", _CAPABILITIES_V3, 0)
    _check("capset", _libc.capset(header, struct.pack("=6I", mask, mask, mask, 0, 0, 0)))
    for capability in kept:
        _check("prctl", _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, capability))
    _check("prctl", _prctl(_PR_SET_NO_NEW_PRIVS, 1))  # guard: a-service-gets-no-new-privileges
    if machine in seccomp.AUDIT_ARCHES:
        seccomp.install(_libc, call_filter(machine))  # guard: a-service-has-a-filter


def _tell_of(told: list[int], machine: str, uid: int) -> bool:
    """Start a process that answers the first capget(2) of the program: it has the capabilities ``told``.

    dnsmasq asks once at its start and refuses to run without CAP_NET_ADMIN. The answer is no capability: the kernel
    goes on refusing what needs it. The process is not our child, because the program would not expect one. It ends
    with the answer. False: such answers are not possible here.
    """
    if machine not in seccomp.AUDIT_ARCHES or not _can_write_memory_of(uid):
        return False
    try:
        listener = seccomp.install_listened(_libc, CALLS[machine]["seccomp"], _asking_filter(machine))
    except OSError:  # an old kernel, a filter of a container manager that forbids it, or one that listens already
        return False
    if os.fork() == 0:
        try:
            if os.fork() == 0:
                _tell(listener, told)
        finally:
            os._exit(0)
    os.wait()
    os.close(listener)
    return True


def _can_write_memory_of(uid: int) -> bool:
    """Whether this process may write to the memory of a process of this user.

    It needs CAP_SYS_PTRACE (proc(5)), and Yama must not forbid it (``kernel.yama.ptrace_scope`` 3).
    """
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(uid, uid, uid)
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    os.waitpid(child, os.WUNTRACED)
    try:
        os.close(os.open(f"/proc/{child}/mem", os.O_WRONLY))  # guard: answers-are-possible-before-they-are-needed
    except OSError:
        return False
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return True


def _tell(listener: int, told: list[int]) -> None:
    """Answer capget(2) until the program has read its capabilities (seccomp_unotify(2)), or ended."""
    mask = sum(1 << capability for capability in told)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while poll.poll(_NOTIF_S_MAX * 1000) == [(listener, select.POLLIN)]:
        call = bytearray(_NOTIF_BYTES)
        fcntl.ioctl(listener, _NOTIF_RECV, call)
        cookie, pid, header, data = struct.unpack_from("=QI4x4x4x8xQQ", call)
        memory = os.open(f"/proc/{pid}/mem", os.O_WRONLY)
        os.pwrite(memory, struct.pack("=I", _CAPABILITIES_V3), header)
        if data:
            os.pwrite(memory, struct.pack("=6I", mask, mask, 0, 0, 0, 0), data)
        os.close(memory)
        fcntl.ioctl(listener, _NOTIF_SEND, struct.pack("=QqiI", cookie, 0, 0, 0))
        if data:
            return


def _asking_filter(machine: str) -> bytes:
    """A filter that asks our process about capget(2), and allows the rest."""
    head = seccomp.head(seccomp.AUDIT_ARCHES[machine])
    return seccomp.assemble([*head, *if_equal(CALLS[machine]["capget"], [seccomp.ASK]), ALLOW])


def _enter_root(uid: int, directory: str, places: list[tuple[str, str]]) -> None:
    """Change to a root directory with programs, libraries and ``directory``, read-only, and nothing else."""
    # What is unmounted on the host disappears here, too: otherwise this process would keep namespaces alive.
    _mount("none", "/", _MS_REC | _MS_SLAVE)
    root = f"{directory}/root"
    os.makedirs(root, 0o700, exist_ok=True)
    _mount("tmpfs", root, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "tmpfs", "size=64k,nr_inodes=128,mode=0755")
    os.umask(0o022)
    for name in ("usr", "dev", "etc", _SYSCTLS, directory.lstrip("/")):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    _mount_read_only("/usr", f"{root}/usr")
    for name in _PROGRAMS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{root}/{name}")
        elif os.path.isdir(f"/{name}"):
            os.mkdir(f"{root}/{name}")
            _mount_read_only(f"/{name}", f"{root}/{name}")
    for name in _FILES:
        if os.path.exists(f"/{name}"):
            os.close(os.open(f"{root}/{name}", os.O_CREAT | os.O_WRONLY))
            _mount(f"/{name}", f"{root}/{name}", _MS_BIND)
    _mount_read_only(f"/{_SYSCTLS}", f"{root}/{_SYSCTLS}", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    if places:
        _put_in_place(directory, root, places)
    else:
        _mount_read_only(directory, f"{root}/{directory}", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
    _write(f"{root}/etc/passwd", f"{USER}:x:{uid}:{uid}::/:\n")
    _write(f"{root}/etc/group", f"{USER}:x:{uid}:\n")
    os.mkdir(f"{root}{SOCKETS}", 0o700)
    os.chown(f"{root}{SOCKETS}", uid, uid)
    os.chdir(root)
    _check("pivot_root", _libc.pivot_root(b".", b"."))  # pivot_root(2): stacks the old root
    _check("umount2", _libc.umount2(b".", _MNT_DETACH))
    os.chdir("/")


def _put_in_place(directory: str, root: str, places: list[tuple[str, str]]) -> None:
    """Mount files and directories of ``directory`` at their places, with links from their names to there.

    A profile of AppArmor allows a program certain paths. The kernel checks the path of the file that a link leads to.
    The process can write to none of them. A file named ``log`` is opened here as stdout and stderr: descriptors that
    were opened outside this root directory would be closed when the profile comes into force.
    """
    for name, path in places:
        source, target = f"{directory}/{name}", f"{root}{path}"
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        if name == _LOG:
            _mount(source, target, _MS_BIND)
            log = os.open(target, os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
        else:
            _mount_read_only(source, target, _MS_NOSUID | _MS_NODEV | _MS_NOEXEC)
        os.symlink(path, f"{root}{directory}/{name}")


def call_filter(machine: str) -> bytes:
    """The seccomp filter of a service as an array of struct sock_filter. Refused calls fail with EPERM.

    clone3 fails with ENOSYS, as on an old kernel: a filter cannot see its flags, and libraries use clone then.
    """
    refused = [seccomp.refuse(errno.EPERM)]
    program = seccomp.head(seccomp.AUDIT_ARCHES[machine])
    for number in REFUSED[machine].values():
        program += if_equal(number, refused)
    program += if_equal(CALLS[machine]["clone3"], [seccomp.refuse(errno.ENOSYS)])
    clone = [seccomp.argument(0), *seccomp.if_any_bit(_CLONE_NAMESPACES, refused), ALLOW]
    program += if_equal(CALLS[machine]["clone"], clone)
    sockets = [instruction for row in _SOCKETS for instruction in _if_socket(*row)]
    program += if_equal(CALLS[machine]["socket"], [*sockets, seccomp.refuse(errno.EAFNOSUPPORT)])
    return seccomp.assemble([*program, ALLOW])


def _if_socket(family: int, kind: int | None, protocol: int | None) -> list[Instruction]:
    """Allow socket(2) with these arguments; otherwise go on after these instructions."""
    body = [ALLOW]
    if protocol is not None:
        body = [seccomp.argument(2), *if_equal(protocol, body)]
    if kind is not None:
        body = [seccomp.argument(1), seccomp.masked(_TYPE_MASK), *if_equal(kind, body)]
    return [seccomp.argument(0), *if_equal(family, body)]


def _mount_read_only(source: str, target: str, flags: int = _MS_NOSUID | _MS_NODEV) -> None:
    _mount(source, target, _MS_BIND | _MS_REC)
    _mount("none", target, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | flags)


def _mount(source: str, target: str, flags: int, kind: str = "none", options: str = "") -> None:
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _check(f"mount {target}", result)


def _prctl(option: int, first: int, second: int = 0) -> int:
    zero = ctypes.c_ulong(0)
    return int(_libc.prctl(option, ctypes.c_ulong(first), ctypes.c_ulong(second), zero, zero))


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_EXCL, 0o644)
    os.write(fd, text.encode())
    os.close(fd)


def _check(what: str, result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

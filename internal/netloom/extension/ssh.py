"""SSH to one host: connect, verify the host key, log in once, and run commands.

Each failure becomes one HostUnreachable or LoginRefused that names the host and a remedy. No message contains a secret.
There are no time limits here: the caller has the one deadline of the call and cancels.
"""

from __future__ import annotations

import asyncio
import ctypes.util
import logging
import os
import random
import shlex
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from netloom.errors import BadRequest, HostUnreachable, LoginRefused, one_line
from netloom.extension.directory import home_of
from netloom.extension.hostkeys import HostKey, Trust
from netloom.secret import Secret


def _import_asyncssh() -> None:
    """Import asyncssh without its search for optional libraries.

    It searches liboqs and nettle by ctypes.util.find_library, which starts ldconfig, gcc and ld and takes 200 ms. We do
    not need either library.
    """
    found = ctypes.util.find_library
    ctypes.util.find_library = lambda name: None
    try:
        with warnings.catch_warnings():  # cryptography writes deprecation warnings to stderr
            warnings.simplefilter("ignore")
            import asyncssh  # noqa: F401
    finally:
        ctypes.util.find_library = found


_import_asyncssh()
import asyncssh  # noqa: E402  # binds the name; the module is loaded by now

for _name in ("asyncssh", "asyncio"):  # without a handler, logging would write warnings to stderr
    logging.getLogger(_name).addHandler(logging.NullHandler())
    logging.getLogger(_name).propagate = False

# The default command of the agent on a host: where deploy.py installs it. NETLOOM_AGENT names another one.
AGENT = "/usr/local/libexec/netloom/current/netloom agent"

# The remedy when an agent does not answer.
LOOK_THERE = "look at /var/log/netloom/agent.log on the host"
# The remedy when there is none.
INSTALL_IT = "install netloom there, or let NETLOOM_AGENT name its command"

# Plain keys only, best first: a host certificate would be accepted without being remembered in known_hosts.
_KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "ssh-rsa")
_ALGORITHMS = {"ssh-rsa": ["rsa-sha2-512", "rsa-sha2-256"]}

# The delay between the connection attempts to the addresses of one host name (RFC 8305 section 5).
_NEXT_ADDRESS_S = 0.25
# sshd drops connections at random while ten others have not logged in yet (MaxStartups), and CloudStack makes many
# calls at once. No login was tried then, so we try again after about this many seconds each.
_RETRY_DROPPED_S = (0.25, 0.5, 1.0)
_KEEPALIVE_S = 5.0
# What the host's kernel has not acknowledged for so long breaks the connection. A host that is overloaded acknowledges.
_UNACKNOWLEDGED_S_MAX = 4.0
_STDERR_BYTES_MAX = 4096
# Of the output of a program on a host. The answers of ``netloom agent`` have a few kilobytes.
OUTPUT_BYTES_MAX = 1 << 20
_DEFAULT_IDENTITIES = ("id_ed25519", "id_ecdsa", "id_rsa")

_SUDO_WANTS_PASSWORD = ("a password is required", "a terminal is required", "must have a tty", "no tty present")
_SUDO_REFUSES = ("is not in the sudoers", "is not allowed to", "may not run sudo", "not allowed to execute")

# sudo looks up the name of its own host, and goes on without an answer after up to 20 s.
_SUDO_LOOKS_UP = "unable to resolve host"
NAME_IN_HOSTS = "put the host's own name into its /etc/hosts: sudo looks it up each time"

# How far a connection is. "agent": logged in, and the agent was started.
Stage = Literal["own keys", "resolve", "connect", "handshake", "login", "agent"]


def agent_of(environ: Mapping[str, str]) -> str:
    """The agent's command on the hosts. Raises BadRequest when NETLOOM_AGENT is not a command."""
    agent = environ.get("NETLOOM_AGENT") or AGENT
    try:
        argv = shlex.split(agent)
    except ValueError:
        argv = []
    if not argv:
        raise BadRequest(f"NETLOOM_AGENT is not a command: {agent[:100]!r}", hint="quote it as a shell would want it")
    return agent


class ConnectionLost(HostUnreachable):
    """The connection broke during a call. It is unknown whether the call was executed; repeating it is safe."""


class NoAgent(HostUnreachable):
    """The login succeeded, but the agent did not answer: it is not installed, or does not start."""


class TooMuchOutput(Exception):
    """A program printed more than ``OUTPUT_BYTES_MAX`` bytes."""


@dataclass(frozen=True)
class CompletedCommand:
    """The result of a command on a host. ``status`` is None when a signal ended it."""

    status: int | None
    out: str
    complaint: str  # one line, never empty: its stderr, or else how it ended


@dataclass(frozen=True)
class Login:
    """How to log in to the hosts of one registration.

    One method is used: ``sshkey``, else ``password``, else the SSH agent and the keys of the calling user. Each key or
    password is tried once, because repeated failures lock accounts.
    """

    trust: Trust
    username: str = "root"
    port: int = 22
    sshkey: Secret = field(default_factory=Secret)
    password: Secret = field(default_factory=Secret)
    agent: str = AGENT
    home: str = ""  # of the calling user, whose own keys are used
    ssh_auth_sock: str = ""

    @property
    def method(self) -> Literal["sshkey", "password", "own keys"]:
        if self.sshkey:
            return "sshkey"
        return "password" if self.password else "own keys"

    @property
    def by_sudo(self) -> bool:
        return self.username != "root"

    @property
    def command(self) -> str:
        """The command line for the login shell. No part of it comes from a payload."""
        return self.as_root([*shlex.split(self.agent), "connect"])

    def as_root(self, argv: Sequence[str]) -> str:
        """The command line that runs ``argv`` as root on the host."""
        return shlex.join(["sudo", "-n", *argv] if self.by_sudo else argv)


class AgentChannel(asyncssh.SSHClientSession[bytes]):
    """The SSH channel to the stdin and stdout of the agent's command, or of the shell that installs it.

    ``received`` gets the output and must not raise.
    """

    def __init__(self, received: Callable[[bytes], None]) -> None:
        self.received = received
        self._writable = asyncio.Event()
        self._writable.set()
        self._channel: asyncssh.SSHClientChannel[bytes] | None = None
        self._stderr = bytearray()
        self.exit_status: int | None = None
        self.exit_signal = ""
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def connection_made(self, chan: asyncssh.SSHClientChannel[bytes]) -> None:
        self._channel = chan

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        if datatype == asyncssh.EXTENDED_DATA_STDERR:
            self._stderr += data[: _STDERR_BYTES_MAX - len(self._stderr)]
        else:
            self.received(data)

    def exit_status_received(self, status: int) -> None:
        self.exit_status = status

    def exit_signal_received(self, signal: str, core_dumped: bool, msg: str, lang: str) -> None:
        self.exit_signal = signal

    def eof_received(self) -> bool:
        return True  # the exit status is still to come

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        if not self.lost.done():
            self.lost.set_result(exc)

    def write(self, data: bytes) -> None:
        """Queue ``data``. Raises BrokenPipeError when the other end is gone."""
        assert self._channel is not None
        self._channel.write(data)

    async def drain(self) -> None:
        """Wait until the host has taken most of what was written, or the channel is lost."""
        await self._writable.wait()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()

    @property
    def stderr(self) -> str:
        """The stderr of the host's shell, sudo or agent, as one line, without what sudo says about the host's name."""
        return one_line(_without_lookup(self._stderr), 300)

    @property
    def sudo_looked_up(self) -> bool:
        """Whether sudo said that it cannot resolve the name of its own host."""
        return _SUDO_LOOKS_UP.encode() in self._stderr


class _Client(asyncssh.SSHClient):
    """The callbacks of asyncssh for one login."""

    def __init__(self, host: str, login: Login, at: Callable[[Stage], None]) -> None:
        self._host = host
        self._login = login
        self._at = at
        self.refused: LoginRefused | None = None
        self.asked_for_password = False
        self.password_expired = False

    def validate_host_public_key(self, host: str, addr: str, port: int, key: asyncssh.SSHKey) -> bool:
        kind, blob = key.export_public_key("openssh").decode().split()[:2]
        try:
            self._login.trust.check(self._host, self._login.port, HostKey(kind, blob))
        except LoginRefused as error:
            self.refused = error
            return False
        self._at("login")
        return True

    def password_auth_requested(self) -> str | None:
        return self._password_once()

    def kbdint_auth_requested(self) -> str | None:
        return "" if self._login.method == "password" and not self.asked_for_password else None

    def kbdint_challenge_received(
        self, name: str, instructions: str, lang: str, prompts: Sequence[tuple[str, bool]]
    ) -> list[str] | None:
        if not prompts:  # a message only
            return []
        if len(prompts) > 1 or prompts[0][1]:  # a second factor, or a question whose answer is echoed: not a password
            return None
        password = self._password_once()
        return None if password is None else [password]

    def password_change_requested(self, prompt: str, lang: str) -> tuple[str, str]:
        self.password_expired = True
        return NotImplemented  # type: ignore[no-any-return]  # asyncssh's value for "not possible"

    def _password_once(self) -> str | None:
        if self._login.method != "password" or self.asked_for_password:
            return None
        self.asked_for_password = True
        return self._login.password.reveal()


class _Dropped(Exception):  # internal: leads to another attempt
    """The server closed the connection before any login."""

    def __init__(self, error: HostUnreachable) -> None:
        super().__init__(str(error))
        self.error = error


class SshConnection:
    """One SSH connection to one host. ``stage``: how far it is."""

    def __init__(self, host: str, login: Login) -> None:
        self.host = host
        self.login = login
        self.stage: Stage = "own keys"
        self._connection: asyncssh.SSHClientConnection | None = None

    @property
    def is_silent(self) -> bool:
        """Whether the host has not answered at all. If only sshd hangs, its kernel still accepts the connection."""
        return self.stage in ("own keys", "resolve", "connect")

    @property
    def address(self) -> str:
        """The numeric address of the host at the other end; empty while there is no connection."""
        peer = None if self._connection is None else self._connection.get_extra_info("peername")
        return str(peer[0]) if peer else ""

    @property
    def is_open(self) -> bool:
        """Whether we are logged in, as far as we know."""
        return self._connection is not None and not self._connection.is_closed()

    def _at(self, stage: Stage) -> None:
        self.stage = stage

    async def open(self) -> None:
        """Connect and log in. Raises HostUnreachable or LoginRefused; BadRequest when ``sshkey`` is no private key."""
        keys: list[asyncssh.SSHKey | asyncssh.SSHKeyPair] = []
        if self.login.method == "sshkey":
            keys = [parse_key(self.login.sshkey)]
        if self.login.method == "own keys":
            keys = [*await agent_keys(self.login.ssh_auth_sock), *own_keys(self.login.home)]
            if not keys:
                raise LoginRefused(
                    f"{self.host}: nothing to log in with: no sshkey, no password, and the calling user has no key",
                    hint="register one of them; by hand: --sshkey or --ask-password",
                )
        _set_local_user()
        for pause_s in (*_RETRY_DROPPED_S, None):
            try:
                await self._log_in(keys)
                return
            except _Dropped as dropped:
                if pause_s is None:
                    raise dropped.error from dropped
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))

    async def _log_in(self, keys: Sequence[asyncssh.SSHKey | asyncssh.SSHKeyPair]) -> None:
        sock = await self._dial()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(_UNACKNOWLEDGED_S_MAX * 1000))
        self._at("handshake")
        client = _Client(self.host, self.login, self._at)
        try:
            self._connection = await asyncssh.connect(
                self.host,
                self.login.port,
                sock=sock,
                config=None,  # the registration decides, not a ~/.ssh/config on this server
                client_factory=lambda: client,
                username=self.login.username,
                client_keys=keys or None,
                agent_path=None,
                preferred_auth=_METHODS[self.login.method],
                gss_host=None,
                known_hosts=([], [], []),  # no keys known to asyncssh, so that it asks our Trust about each
                x509_trusted_certs=None,
                server_host_key_algs=self._host_key_algorithms(),
                encryption_algs="^aes256-gcm@openssh.com",  # before asyncssh's default: a fifth of its time per packet
                compression_algs=["none"],
                keepalive_interval=_KEEPALIVE_S,
                keepalive_count_max=3,
                login_timeout=0,
                connect_timeout=None,
            )
        except (asyncssh.Error, OSError, ValueError) as error:
            sock.close()
            failure = client.refused or self._failure(error, client)
            if self.stage == "handshake" and isinstance(error, asyncssh.ConnectionLost | ConnectionError):
                raise _Dropped(failure) from error
            raise failure from error

    async def run(self, received: Callable[[bytes], None], argv: Sequence[str] = ()) -> AgentChannel:
        """Start ``argv`` as root; without it, the agent's command. Its output goes to ``received``."""
        assert self._connection is not None
        # Until the host answers on a connection that is not new, it may be down.
        self._at("connect" if self.stage == "agent" else "agent")
        try:
            channel = AgentChannel(received)
            await self._connection.create_session(
                lambda: channel,
                self.login.as_root(argv) if argv else self.login.command,
                encoding=None,
                request_pty=False,
            )
            self._at("agent")
        except (asyncssh.Error, OSError) as error:
            raise HostUnreachable(
                f"{self.host}: logged in, but no command may be run: {_reason(error)}",
                hint="does sshd force another command, or limit sessions?",
            ) from error
        return channel

    async def execute(self, argv: Sequence[str]) -> CompletedCommand:
        """Run ``argv`` as root, without stdin, and wait for its end. Raises ConnectionLost."""
        assert self._connection is not None
        try:
            process = await self._connection.create_process(self.login.as_root(argv), encoding=None, request_pty=False)
            with suppress(OSError):  # the command has ended already
                process.stdin.write_eof()
            out, err = await asyncio.gather(self._read(process.stdout), self._read(process.stderr))
            await process.wait_closed()
        except TooMuchOutput:
            raise self.too_much_output() from None
        except (asyncssh.Error, OSError) as error:
            raise ConnectionLost(f"{self.host}: the connection broke: {_reason(error)}") from error
        if process.exit_status is None and not process.exit_signal:
            raise ConnectionLost(f"{self.host}: the connection broke")
        stderr = one_line(_without_lookup(err), 400)
        how = f"signal {process.exit_signal[0]}" if process.exit_signal else f"status {process.exit_status}"
        return CompletedCommand(process.exit_status, out.decode("utf-8", "replace"), stderr or f"it ended with {how}")

    async def _read(self, stream: asyncssh.SSHReader[bytes]) -> bytes:
        """All bytes of a stream. A host may print for ever: raises TooMuchOutput, and closes the connection."""
        data = bytearray()
        while piece := await stream.read(1 << 16):
            data += piece
            if len(data) > OUTPUT_BYTES_MAX:  # guard: the-output-of-a-program-ends
                self.close()
                raise TooMuchOutput
        return bytes(data)

    def too_much_output(self) -> HostUnreachable:
        """The error for a command that printed more than OUTPUT_BYTES_MAX."""
        return HostUnreachable(
            f"{self.host}: a command there printed more than {OUTPUT_BYTES_MAX >> 20} MiB", hint=LOOK_THERE
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    async def _dial(self) -> socket.socket:
        """A socket that is connected to the first address of the host that accepts."""
        loop = asyncio.get_running_loop()
        host, port = self.host, self.login.port
        self._at("resolve")
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "not a host name"
            raise HostUnreachable(
                f"{host}: the name cannot be resolved: {why}",
                hint="check the registration detail hosts, and this server's resolver",
            ) from error
        self._at("connect")
        failures: list[OSError] = []
        pending = {asyncio.ensure_future(_connect_after(n * _NEXT_ADDRESS_S, info)) for n, info in enumerate(found)}
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for attempt in done:
                    result = attempt.result()
                    if isinstance(result, socket.socket):
                        return result
                    failures.append(result)
        finally:
            for attempt in pending:
                attempt.cancel()
        # Use errno: asyncio replaces the error's text and drops the reason.
        reasons = dict.fromkeys(os.strerror(it.errno) if it.errno else str(it) for it in failures)
        raise HostUnreachable(
            f"{host}: no connection to port {port}: {', '.join(reasons)}",
            hint="is the host up, is sshd running there, and is the port right?",
        ) from failures[-1]

    def _host_key_algorithms(self) -> list[str]:
        try:
            expected = self.login.trust.expected_kinds(self.host, self.login.port)
        except OSError:
            expected = []  # Trust.check reports the same error when the host shows its key
        kinds = [*(kind for kind in expected if kind in _KEY_TYPES), *_KEY_TYPES]
        return list(dict.fromkeys(name for kind in kinds for name in _ALGORITHMS.get(kind, [kind])))

    def _failure(self, error: Exception, client: _Client) -> HostUnreachable:
        host, login = self.host, self.login
        if isinstance(error, asyncssh.PermissionDenied):
            if client.password_expired:
                return LoginRefused(
                    f"{host}: the password of {login.username} has expired", hint="set a new one on the host"
                )
            if login.method == "password" and not client.asked_for_password:
                return LoginRefused(
                    f"{host}: login as {login.username} refused: the host takes no password",
                    hint="allow PasswordAuthentication in its sshd, or register an sshkey",
                )
            return LoginRefused(
                f"{host}: login as {login.username} by {login.method} refused", hint=_LOGIN_HINTS[login.method]
            )
        if isinstance(error, asyncssh.KeyExchangeFailed):
            return HostUnreachable(
                f"{host}: no common SSH algorithm: {_reason(error)}", hint="is its sshd very old, or very strict?"
            )
        if self.stage == "handshake":
            return HostUnreachable(
                f"{host}: port {login.port} was reached, but the SSH handshake failed: {_reason(error)}",
                hint="is that an SSH server, and does it admit this machine (MaxStartups, DenyUsers, hosts.deny)?",
            )
        return LoginRefused(
            f"{host}: the connection ended during the login as {login.username}: {_reason(error)}",
            hint=_LOGIN_HINTS[login.method],
        )

    def silence(self, waited_s: float) -> HostUnreachable:
        """The error for a connection that is still at its present stage after ``waited_s`` seconds."""
        host, port = self.host, self.login.port
        what, hint = {
            "own keys": ("the SSH agent of the calling user does not answer", "check SSH_AUTH_SOCK"),
            "resolve": ("its name is not resolved", "check this server's resolver, or register an address"),
            "connect": (f"port {port} does not answer", "is the host up, and does a firewall drop the packets?"),
            "handshake": (f"port {port} is open, but no SSH answers", "is its sshd hung? look on the host's console"),
            "login": ("the login does not finish", "is its sshd hung, or waiting for a directory service?"),
            "agent": (
                "SSH is fine, but the agent does not answer",
                f"{NAME_IN_HOSTS}; or {LOOK_THERE}"
                if self.login.by_sudo  # guard: a-slow-sudo-is-told-apart
                else LOOK_THERE,
            ),
        }[self.stage]
        return HostUnreachable(f"{host}: {what} within {waited_s:.0f} s", hint=hint)


_METHODS = {
    "sshkey": ["publickey"],
    "password": ["password", "keyboard-interactive"],
    "own keys": ["publickey"],
}
_LOGIN_HINTS = {
    "sshkey": "is the public half of sshkey in the user's authorized_keys there, and is the user the right one?",
    "password": "is the registered password right, and does its sshd let that user log in?",
    "own keys": "neither sshkey nor password is registered, and no key of the calling user is accepted there",
}


def _without_lookup(stderr: bytes | bytearray) -> str:
    """The text of stderr without the line in which sudo says that it cannot resolve the name of its own host.

    It says so before every command, also before one that fails for another reason.
    """
    lines = bytes(stderr).decode("utf-8", "replace").splitlines()
    return "\n".join(it for it in lines if not (it.startswith("sudo:") and _SUDO_LOOKS_UP in it))


async def _connect_after(wait_s: float, info: tuple[int, int, int, str, tuple[object, ...]]) -> socket.socket | OSError:
    """A connected socket, or the error."""
    await asyncio.sleep(wait_s)
    family, kind, protocol, _, address = info
    try:
        sock = socket.socket(family, kind, protocol)
    except OSError as error:  # for example: no IPv6 on this machine
        return error
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, address)
    except OSError as error:
        sock.close()
        return error
    except BaseException:
        sock.close()
        raise
    return sock


def parse_key(sshkey: Secret) -> asyncssh.SSHKey:
    """Parses the registration detail ``sshkey``, in PEM or OpenSSH format; line ends that a form or a shell has changed
    are repaired. Raises BadRequest, whose message quotes no part of the key."""
    text = sshkey.reveal()
    if "\n" not in text.strip() and "\\n" in text:  # some tools escape line ends twice
        text = text.replace("\\r", "").replace("\\n", "\n")
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    clean = "\n".join(line for line in lines if line) + "\n"
    if "ENCRYPTED" in clean:  # asyncssh needs the empty line after this header, which was removed above
        raise _encrypted()
    try:
        return asyncssh.import_private_key(clean)
    except asyncssh.KeyEncryptionError as error:
        raise _encrypted() from error
    except (asyncssh.KeyImportError, ValueError) as error:
        if "passphrase" in str(error).lower():
            raise _encrypted() from None
        if clean.startswith(tuple(_KEY_TYPES)):
            raise BadRequest(
                "registration detail sshkey: that is a public key", hint="register the private half of the pair"
            ) from None
        raise BadRequest(
            f"registration detail sshkey: not a private key ({len(text)} characters)",
            hint="register the whole PEM or OpenSSH text, BEGIN and END lines included, at most 4096 characters",
        ) from None


def _encrypted() -> BadRequest:
    return BadRequest(
        "registration detail sshkey: the key is encrypted, and its passphrase cannot be entered",
        hint="register a key without one (ssh-keygen -p removes it)",
    )


async def agent_keys(path: str) -> list[asyncssh.SSHKeyPair]:
    """The keys of the calling user's SSH agent at the socket ``path``; none when it does not answer."""
    if not path:
        return []
    try:
        return list(await (await asyncssh.connect_agent(path)).get_keys())
    except (OSError, ValueError, asyncssh.Error):
        return []


def own_keys(home: str) -> list[asyncssh.SSHKey]:
    """The calling user's default keys in ``home``/.ssh that are readable and not encrypted."""
    keys = []
    for name in _DEFAULT_IDENTITIES if home else ():
        try:
            keys.append(asyncssh.read_private_key(os.path.join(home, ".ssh", name)))
        except (OSError, ValueError, asyncssh.KeyImportError, asyncssh.KeyEncryptionError):
            continue
    return keys


def _set_local_user() -> None:
    """Set HOME and LOGNAME if they are missing. asyncssh looks them up and fails without them; it does not use them."""
    uid = os.geteuid()
    os.environ.setdefault("HOME", home_of(os.environ, uid) or "/nonexistent")
    os.environ.setdefault("LOGNAME", f"uid-{uid}")


def _reason(error: Exception) -> str:
    if isinstance(error, asyncssh.Error):
        return one_line(error.reason, 200)
    return one_line(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)


def why_no_agent(host: str, login: Login, channel: AgentChannel) -> HostUnreachable:
    """The error for an agent's command that ended before its hello, derived from its exit status and stderr."""
    stderr = channel.stderr
    sudo = login.by_sudo
    if sudo and any(phrase in stderr for phrase in _SUDO_WANTS_PASSWORD):
        return LoginRefused(
            f"{host}: sudo wants a password from {login.username}",
            hint=f"allow it without: '{login.username} ALL=(root) NOPASSWD: ALL' in /etc/sudoers.d, and no requiretty",
        )
    if sudo and any(phrase in stderr for phrase in _SUDO_REFUSES):
        return LoginRefused(
            f"{host}: sudo does not let {login.username} run the agent: {stderr}",
            hint=f"put '{login.username} ALL=(root) NOPASSWD: ALL' into /etc/sudoers.d",
        )
    if sudo and channel.exit_status == 127 and "sudo" in stderr:
        return LoginRefused(f"{host}: there is no sudo for {login.username}", hint="install sudo, or log in as root")
    if channel.exit_status in (126, 127) or "command not found" in stderr:
        path = next(iter(shlex.split(login.agent)), "")
        return NoAgent(
            f"{host}: no agent at {path}" + (f": {stderr}" if stderr else ""),
            hint=INSTALL_IT,
        )
    how = f"signal {channel.exit_signal}" if channel.exit_signal else f"status {channel.exit_status}"
    if channel.exit_status is None and not channel.exit_signal:
        how = "no status: the connection was lost"
    return NoAgent(
        f"{host}: the agent did not start: it ended with {how}" + (f": {stderr}" if stderr else ""),
        hint="try it on the host: " + login.command,
    )

"""A server of shell sessions, as sshd is, over TCP and a unix socket; and clients of both inside of its tree.

    sessions.py LOG SOCKET PORT CLIENTS

Each connection has a shell of its own on two pipes, a timer, and a time limit on each line. "x N" makes the shell
compute: its answer "COUNT HASH" depends on all that this session has been told. "? WORD" is answered with "= WORD COUNT
HASH". On SIGUSR1 the server sees that its sessions, their timers and the clients inside go on.
"""

import asyncio, os, signal, sys

from report import broken, say

path, port, clients = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

SHELL = """
n=0 h=7
while read -r word value; do
    case $word in
    x) n=$((n + 1)); h=$(((h * 31 + value) % 1000003)); echo "$n $h";;
    \\?) echo "= $value $n $h";;
    esac
done
"""


class Session:
    def __init__(self):
        self.lines = self.ticks = 0

    def tick(self):
        self.ticks += 1
        self.timer = asyncio.get_running_loop().call_later(0.05, self.tick)


sessions = set()


async def serve(reader, writer):
    session = Session()
    shell = await asyncio.create_subprocess_exec(
        "sh", "-c", SHELL, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    session.tick()
    sessions.add(session)

    async def answers():
        while line := await shell.stdout.readline():
            writer.write(line)
            await writer.drain()

    answering = asyncio.create_task(answers())
    try:
        while line := await asyncio.wait_for(reader.readline(), 300):
            session.lines += 1
            shell.stdin.write(line)
            await shell.stdin.drain()
    except ConnectionError:
        pass
    sessions.discard(session)
    session.timer.cancel()
    shell.stdin.close()
    await shell.wait()
    try:
        await answering
    except ConnectionError:
        pass
    writer.close()


class Client:
    """Knows what its shell has to say."""

    def __init__(self, name):
        self.name, self.count, self.hash = name, 0, 7

    async def go(self, connection):
        try:
            reader, writer = await connection
            while True:
                value = self.count * 7919 % 1000
                writer.write(b"x %d\n" % value)
                self.count, self.hash = self.count + 1, (self.hash * 31 + value) % 1000003
                line = await asyncio.wait_for(reader.readline(), 60)
                if line != b"%d %d\n" % (self.count, self.hash):
                    broken(f"{self.name}: {line} instead of {self.count} {self.hash}")
                await asyncio.sleep(0.02)
        except BaseException as e:
            broken(f"{self.name}: {e!r}")


async def be_clients():
    """The second process: a line on its standard input asks whether all go on."""
    unix = [Client(f"unix {n}") for n in range(clients)]
    tcp = [Client(f"tcp {n}") for n in range(clients)]
    tasks = [asyncio.create_task(c.go(asyncio.open_unix_connection(path))) for c in unix]
    tasks += [asyncio.create_task(c.go(asyncio.open_connection("127.0.0.1", port))) for c in tcp]
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while await reader.readline():
        before = [c.count for c in unix + tcp]
        while any(c.count < b + 3 for c, b in zip(unix + tcp, before)):
            await asyncio.sleep(0.01)
        print("all", flush=True)
    for task in tasks:
        task.cancel()


async def main():
    await asyncio.start_unix_server(serve, path)
    await asyncio.start_server(serve, "0.0.0.0", port)
    crowd = await asyncio.create_subprocess_exec(
        sys.executable, __file__, *sys.argv[1:], "inside",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    asked = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, asked.set)
    first = True
    while True:
        crowd.stdin.write(b"\n")
        try:
            if await asyncio.wait_for(crowd.stdout.readline(), 60) != b"all\n":
                broken("clients inside have ended")
        except asyncio.TimeoutError:
            broken("clients inside stand still")
        ticks = {s: s.ticks for s in sessions}
        await asyncio.sleep(0.3)
        if any(s in sessions and s.ticks <= n for s, n in ticks.items()):
            broken("a timer stands still")
        say("ready" if first else "PASS")
        first = False
        await asked.wait()
        asked.clear()


asyncio.run(be_clients() if sys.argv[5:] else main())

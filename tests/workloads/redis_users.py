"""redis-server and a crowd of its users in one tree: the root starts the server and two processes with a thread for
each user, one process on the unix socket, one on TCP.

    redis_users.py LOG SOCKET PORT USERS

Each user counts at the server and knows the next number; now and then it has a large value stored and returned. On
SIGUSR1 the root sees that every user goes on.
"""

import mmap, os, signal, socket, struct, subprocess, sys, threading, time

from report import broken, say

path, port, users = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])


def connect(kind):
    if kind == "unix":
        s = socket.socket(socket.AF_UNIX)
        s.connect(path)
    else:
        s = socket.create_connection(("127.0.0.1", port))
    return s


counts = mmap.mmap(-1, 16 * users)  # Shared by all processes.


def user(kind, n):
    try:
        s = connect(kind)
        answers = s.makefile("rb")
        big, count = os.urandom(30000).hex().encode(), 0
        while True:
            count += 1
            s.sendall(b"INCR %s:%d\r\n" % (kind.encode(), n))
            answer = answers.readline()
            if answer != b":%d\r\n" % count:
                broken(f"{kind} {n}: {answer} instead of {count}")
            if count % 40 == n % 40:
                key = b"big:%s:%d" % (kind.encode(), n)
                s.sendall(b"*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n" % (len(key), key, len(big), big))
                s.sendall(b"GET %s\r\n" % key)
                if answers.readline() != b"+OK\r\n" or answers.readline() != b"$%d\r\n" % len(big):
                    broken(f"{kind} {n}: no large value")
                if answers.read(len(big) + 2) != big + b"\r\n":
                    broken(f"{kind} {n}: large value")
            struct.pack_into("<Q", counts, 8 * (n + (users if kind == "tcp" else 0)), count)
            time.sleep(0.01)
    except BaseException as e:
        broken(f"{kind} {n}: {e!r}")


def crowd(kind):
    pid = os.fork()
    if pid == 0:
        threads = [threading.Thread(target=user, args=(kind, n)) for n in range(users)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    return pid


asked = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: asked.set())
server = subprocess.Popen(
    ["redis-server", "--port", str(port), "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""]
    + ["--unixsocket", path, "--logfile", "redis.log"]
)
while True:
    try:
        connect("unix").close()
        connect("tcp").close()
        break
    except OSError:
        time.sleep(0.01)
children = [server.pid, crowd("unix"), crowd("tcp")]


def now():
    return struct.unpack(f"<{2 * users}Q", counts[:])


while min(now()) < 3:
    time.sleep(0.01)
say("ready")
while True:
    while not asked.wait(0.05):
        pass
    asked.clear()
    before, end = now(), time.monotonic() + 20
    while any(b - a < 3 for a, b in zip(before, now())):
        if time.monotonic() > end:
            broken(f"stand still: {before} {now()}")
        time.sleep(0.01)
    for pid in children:
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            broken(f"pid {pid} has ended")
    say("PASS")

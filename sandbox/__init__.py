"""Running programs that a model wrote: text in, text out, nothing unpickled. Imports nothing else of this project.

    from sandbox import Limits, probe, run_many, run_program
    python -m sandbox --probe

The second line prints which containment this machine allows: the strongest of three modes that works when tried.

- ``namespaces``: Linux user, mount, network, process and IPC namespaces of our own making. The program sees the
  interpreter's files, read-only, an empty scratch folder in memory, /dev/null and its own processes: no other file, no
  other process, no network. When its process namespace ends, everything it started dies.
- ``bubblewrap``: the same by the ``bwrap`` command, where only that may make namespaces. The scratch folder is on disk.
- ``limits``: for machines without either, as most containers are. The program shares processes and files with others. A
  system call filter refuses it sockets, signals (to its own children too), System V memory, namespaces and whatever
  acts on other processes. Landlock (Linux 6.2 or newer) closes the files and the memory of others. Started by root,
  programs have a user of their own, one for each jailer.

Mode limits is REFUSED where a program would run as root, because no other user may use the interpreter, and where the
kernel takes no filter; the error names the ways out. What else a mode should contain and does not on this machine is
named in ``Result.missing`` of every run and logged once. ``mode="unsafe-run-as-me"`` gives up the user of one's own,
says what that gives away, and is never chosen by itself. SECURITY.md has the table of what each mode contains and what
it does not; the tests try each of its rows.

In all modes CPU seconds, address space, the size of a file and the number of open files are limited FOR EACH PROCESS,
so a program as a whole may use ``processes`` times as much; an ordinary user's limit on processes in mode limits counts
the user's other processes as they were at the start. No mode contains faults of the kernel, or what a program can learn
from timing.

A worker is a process, jailer.py with container.py and confine.py, whose heads say how it works. The caller (run.py)
neither forks nor starts threads.
"""

from .run import MODES, STATUSES, UNSAFE, Limits, Probe, Result, probe, run_many, run_program

__all__ = ["MODES", "STATUSES", "UNSAFE", "Limits", "Probe", "Result", "probe", "run_many", "run_program"]

"""Running programs that a model wrote: text in, text out, nothing unpickled. Imports nothing else of this project.

    from sandbox import Limits, probe, run_many, run_program
    python -m sandbox --probe

The second line prints which containment this machine allows: the strongest of three modes that works when tried.

- ``namespaces``: Linux user, mount, network, process and IPC namespaces of our own making. The program sees the
  interpreter's files, read-only, an empty scratch folder in memory, /dev/null and its own processes: no other file, no
  other process, no network. When its process namespace ends, everything it started dies.
- ``bubblewrap``: the same by the ``bwrap`` command, where only that may make namespaces. The scratch folder is on disk.
- ``limits``: for machines without either, as most containers are. The limits below hold and the environment is clean.
  Set-uid programs gain nothing. A system call filter refuses sockets, signals (to the program's own children too) and
  looking into the memory of other processes. What outlives the deadline is found, setsid or not, and killed.

NOT contained by ``limits``: the program can read every file that the user may read, /proc among them and so the
environment of the user's other processes, and it can write wherever the user may write. Started as root, programs run
as user 65534, who can reach little of this. A program that forks faster than it is killed can outlive its deadline.
Where the kernel refuses the filter, the network and signals are open too, and the probe says so. Use this mode for
models whose programs you would run by hand, or inside a container that holds nothing else.

In all modes CPU seconds, address space, the size of a file and the number of open files are limited FOR EACH PROCESS,
so a program as a whole may use ``processes`` times as much. Root that cannot become user 65534 has no limit on
processes; the probe says so. No mode contains faults of the kernel, or what a program can learn from timing.

A worker is a process, jailer.py, whose head says how it works. The caller (run.py) neither forks nor starts threads.
"""

from .run import MODES, STATUSES, Limits, Probe, Result, probe, run_many, run_program

__all__ = ["MODES", "STATUSES", "Limits", "Probe", "Result", "probe", "run_many", "run_program"]

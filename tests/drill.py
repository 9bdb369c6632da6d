"""Drills: runs that are killed, stopped, starved of room or of a terminal, and what is lost by it.

    python -m tests.drill                       # 100 kills and all else; tens of minutes on two cores
    python -m tests.drill --kills 10 --only kill,lock
    python -m tests.drill --table table.md      # the table as a file too
    SCORECAST_DRILL_LIMIT=1200 python -m tests.drill  # on a machine that has other work: a child is stuck after 1200 s

Tiny runs of the three scripts, in child processes of this one. A run counts as lost where the same command with
--resume does not end it, or ends it with other metrics, weights or answers than the run that nobody disturbed, bit for
bit. Children are the drill's own; nothing else is signalled.
"""

import contextlib
import functools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # one process starts as a module, its children from another folder

import torch  # noqa: E402
from drill_runs import (  # noqa: E402
    CLOCK,
    LIMIT,
    ROOT,
    content,
    differs,
    end,
    jumping_clock,
    load_model,
    no_readers,
    no_room,
    nothing,
    slow_validation,
    start,
    write_data,
)

from model import lora, lora_hub  # noqa: E402
from runtime.folder import load_checkpoint  # noqa: E402
from schedules.commandline import Parser  # noqa: E402


class Drill:
    """What every drill needs: tiny runs, the undisturbed ones, how long they take, and a source of moments."""

    def __init__(self, place: Path, seed: int, scripts: tuple[str, ...]):
        self.place, self.random, self.count = place, random.Random(seed), 0
        self.runs = {name: run for name, run in write_data(place / "data").items() if name in scripts}
        self.whole, self.seconds = {}, {}
        for name, flags in self.runs.items():
            out, clock = place / f"whole-{name}", time.monotonic()
            code = end(start(name, [*flags, "--out", str(out)], Path(f"{out}.log")))
            assert code == 0, Path(f"{out}.log").read_text()[-2000:]
            self.seconds[name] = time.monotonic() - clock
            self.whole[name] = content(out)

    def folder(self, name: str = "run") -> Path:
        self.count += 1
        (self.place / f"{self.count}").mkdir()
        return self.place / f"{self.count}" / name

    def wait(self, name: str) -> None:
        """A random part of the time that the undisturbed run takes."""
        time.sleep(self.random.uniform(0, 1) * self.seconds[name])

    def begin(self, name: str, out: Path, before: Callable = nothing, *more: str):
        return start(name, [*self.runs[name], "--out", str(out), *more], Path(f"{out.parent}/log"), before)

    def goes_on(self, name: str, out: Path) -> str:
        """The same command, with --resume where a run has begun; what is lost, "" for nothing."""
        more = ["--resume"] if (out / "config.json").exists() else []
        if code := end(self.begin(name, out, nothing, *more)):
            return f"--resume ends with {code}: {last_line(out)}"
        return differs(out, self.whole[name])

    def one_line(self, out: Path) -> str:
        """What is wrong with the output of a child that had to fail in one line."""
        text = (out.parent / "log").read_text(errors="replace")
        if "Traceback" in text or "Exception ignored" in text:
            return f"a traceback: {last_line(out)}"
        return "" if len(re.findall(r"\berror: ", text)) == 1 else f"not one line of error: {last_line(out)}"


def last_line(out: Path) -> str:
    lines = (out.parent / "log").read_text(errors="replace").strip().splitlines()
    return lines[-1][-300:] if lines else "no output"


# -- drills: each gives what was lost, "" for nothing, once a trial --------------------------------


def kill(drill: Drill, name: str) -> str:
    """kill -9 at a random moment."""
    out = drill.folder()
    process = drill.begin(name, out)
    drill.wait(name)
    process.kill()
    end(process)
    return drill.goes_on(name, out)


def stop(drill: Drill, name: str, number: int) -> str:
    """A signal at a random moment: 128 + its number, or 0 where the run was done."""
    out = drill.folder()
    process = drill.begin(name, out)
    drill.wait(name)
    with contextlib.suppress(ProcessLookupError):  # it is done
        os.kill(process.pid, number)
    code = end(process)
    if code not in (0, -number, 128 + number):  # negative: before the command began
        return f"exit code {code}: {last_line(out)}"
    if "Traceback" in (out.parent / "log").read_text():
        return f"a traceback: {last_line(out)}"
    return drill.goes_on(name, out)


def silent(drill: Drill, name: str) -> str:
    """stdout is a pipe that nobody reads, stderr a full device: nothing happens to the run."""
    out = drill.folder()

    code = end(drill.begin(name, out, no_readers))
    return f"exit code {code}" if code else differs(out, drill.whole[name])


def full(drill: Drill, name: str) -> str:
    """No file may grow beyond a random size (RLIMIT_FSIZE): one line; with room again it goes on."""
    out, largest = drill.folder(), max(p.stat().st_size for p in (drill.place / f"whole-{name}").glob("*.pt"))
    size = int(drill.random.uniform(0.01, 0.99) * largest)
    code = end(drill.begin(name, out, functools.partial(no_room, size)))
    wrong = f"exit code {code}" if code not in (1, 2) else drill.one_line(out)
    return wrong or drill.goes_on(name, out)


def vanish(drill: Drill, name: str) -> str:
    """The folder goes away at a random moment: one line, or nothing where the run was done."""
    out = drill.folder()
    process = drill.begin(name, out)
    drill.wait(name)
    shutil.rmtree(out, ignore_errors=True)
    code = end(process)
    return f"exit code {code}" if code not in (0, 1, 2) else drill.one_line(out) if code else ""


def closed(drill: Drill, name: str) -> str:
    """Places where no run can be: one line before anything else, exit code 2."""
    out = drill.folder()
    (out.parent / "link").symlink_to(out.parent / "gone")
    for place in (
        Path("/dev/null"),
        Path("/dev/null/run"),
        Path("/proc/run"),
        out.parent / "link",
        out.parent / ("x" * 256),
    ):
        (out.parent / "log").unlink(missing_ok=True)
        code = end(start(name, [*drill.runs[name], "--out", str(place)], out.parent / "log"))
        if wrong := f"exit code {code}" if code != 2 else drill.one_line(out):
            return f"{place}: {wrong}"
    return ""


def two(drill: Drill, name: str) -> str:
    """Two processes with one --out at the same time: one of them trains, the other says so in a line."""
    out = drill.folder()
    first = drill.begin(name, out)
    drill.wait(name) if drill.random.random() < 0.5 else None
    second = drill.begin(name, out)
    codes = sorted([end(first), end(second)])
    return f"exit codes {codes}" if codes != [0, 2] else drill.one_line(out) or differs(out, drill.whole[name])


def names(drill: Drill, name: str) -> str:
    """Blanks, umlauts and 250 characters in the name of the folder, with a kill."""
    out = drill.folder("ü ß  " + "n" * 243)
    process = drill.begin(name, out)
    drill.wait(name)
    process.kill()
    end(process)
    return drill.goes_on(name, out)


def adapter(drill: Drill) -> str:
    """kill -9 while an adapter is saved again and again: what is there can be loaded, or nothing is."""
    folder, flags = drill.folder("adapter"), drill.runs["finetune_gsm8k"]
    place = flags[flags.index("--model") + 1]
    process = start("save_again", [str(folder), place], folder.parent / "log")
    time.sleep(drill.random.uniform(0, 1))
    process.kill()
    end(process)
    model = load_model(place)
    if folder.exists():
        lora_hub.load_adapter(model, folder, place)
    else:
        lora.add_lora(model, lora.LoRAConfig(4, 8.0))
    lora_hub.save_adapter(model, folder, place)
    return "" if {p.name for p in folder.iterdir()} == {lora_hub.ADAPTER, lora_hub.ADAPTER_CONFIG} else "is not whole"


def campaign_of(drill: Drill, out: Path, jobs: int, seeds: int) -> tuple[list[str], dict]:
    """(command line, arguments of Popen but for its streams) of a campaign of tiny runs of train_lm.py in ``out``."""
    flags = drill.runs["train_lm"]
    lines = "\n".join(
        f"{f[2:].replace('-', '_')} = {json.dumps(v)}" for f, v in zip(flags[::2], flags[1::2], strict=True)
    )
    recipe, numbers = out.parent / "r.toml", list(range(1, seeds + 1))
    recipe.write_text(f'script = "train_lm.py"\nout = "{out}"\n[flags]\n{lines}\n[grid]\nseed = {numbers}\n')
    line = [sys.executable, "-m", "eval.campaign", str(recipe), "--jobs", str(jobs)]
    return line, dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


def grid(drill: Drill, jobs: int) -> str:
    """kill -9 of a campaign: its runs save and end, and the same command ends them as if nothing had been. What had
    finished is left as it is."""
    out = drill.folder("runs")
    line, how = campaign_of(drill, out, jobs, 2)
    with open(out.parent / "log", "w") as log:
        how |= dict(stdout=log, stderr=log)
        killed = subprocess.Popen(line, **how)
        time.sleep(drill.random.uniform(0.2, 1) * (2 * drill.seconds["train_lm"] + 15))
        killed.kill()
        killed.wait()
        finished = {file: file.stat().st_mtime_ns for file in out.glob("seed*/summary.json")}
        if code := subprocess.run(line, **how, timeout=LIMIT).returncode:
            return f"the same command ends with {code}: {last_line(out)}"
    if repeated := [str(file) for file, at in finished.items() if file.stat().st_mtime_ns != at]:
        return f"written again: {', '.join(repeated)}"
    states = [run["state"] for run in json.loads((out / "campaign.json").read_text())["runs"].values()]
    return differs(out / "seed1", drill.whole["train_lm"]) if states == ["finished"] * 2 else f"states: {states}"


def final_table(out: Path) -> list[str]:
    """Rows of a campaign's results.csv without the folders, and without what a clock or the memory says."""
    rows = [line.split(",", 1)[1] for line in (out / "report" / "results.csv").read_text().splitlines()]
    return [row for row in rows if not CLOCK.search(row)]


def runs_of_grid(drill: Drill, kills: int) -> str:
    """kill -9 of single runs of a campaign, each at a random moment of its own; the campaign tells them and goes on,
    the same command ends them, and the final table is that of a campaign that nobody disturbed."""
    out = drill.folder("runs")
    calm = out.parent / "calm"
    with open(out.parent / "log", "w") as log:
        line, how = campaign_of(drill, calm, 2, kills + 1)
        if code := subprocess.run(line, **how, stdout=log, stderr=log).returncode:
            return f"undisturbed it ends with {code}"
        ends = [[(calm / f"seed{seed}" / name).stat().st_mtime for name in ("lock", "summary.json")] for seed in (1, 2)]
        took = min(end - begin for begin, end in ends)  # of a run, from its lock on
        moments = {f"seed{seed}": drill.random.uniform(0, 1) * took for seed in range(1, kills + 1)}
        line, how = campaign_of(drill, out, 2, kills + 1)
        campaign, began, killed = subprocess.Popen(line, **how, stdout=log, stderr=log), {}, []
        while campaign.poll() is None:
            for name in moments.keys() - set(killed):
                with contextlib.suppress(OSError, ValueError):  # it has not begun, or has ended
                    began.setdefault(name, ((out / name / "lock").stat(), time.monotonic())[1])
                    if time.monotonic() - began[name] > moments[name]:
                        os.kill(json.loads((out / name / "lock").read_text())["process"], signal.SIGKILL)
                        killed.append(name)
            time.sleep(0.01)
        states = {name: run["state"] for name, run in json.loads((out / "campaign.json").read_text())["runs"].items()}
        finished = {file: file.stat().st_mtime_ns for file in out.glob("seed*/summary.json")}
        if {file.parent.name for file in finished} != {name for name, state in states.items() if state == "finished"}:
            return f"states: {states}"
        print(f"{len(killed)} of {kills} were killed, {len(finished)} had finished", file=sys.stderr, flush=True)
        if code := subprocess.run(line, **how, stdout=log, stderr=log).returncode:
            return f"the same command ends with {code}: {last_line(out)}"
    if repeated := [str(file) for file, at in finished.items() if file.stat().st_mtime_ns != at]:
        return f"written again: {', '.join(repeated)}"
    wrong = [differs(out / f"seed{seed}", content(calm / f"seed{seed}")) for seed in range(1, kills + 2)]
    return next(filter(None, wrong), "" if final_table(out) == final_table(calm) else "the final table differs")


def ranks(drill: Drill, how: str) -> str:
    """Two ranks under torchrun: one gets SIGTERM alone, one is killed, or torchrun is. Nothing is left running, and
    one process goes on to a run of all steps."""
    out, flags = drill.folder(), drill.runs["train_lm"]
    torchrun = launch(out, [*flags, "--steps", "2000", "--log-every", "2000", "--eval-every", "20"], 2)
    until = time.monotonic() + LIMIT
    while not (out / "last.pt").exists() and time.monotonic() < until:
        time.sleep(0.1)
    children = children_of(torchrun.pid)
    time.sleep(drill.random.uniform(0, 2))
    step = load_checkpoint(out / "last.pt")["step"]
    os.kill(
        torchrun.pid if how == "torchrun -9" else children[1], signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL
    )
    torchrun.wait(LIMIT)
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > until:
            return f"{len(left)} ranks live on"
        time.sleep(0.1)
    saved = load_checkpoint(out / "last.pt")["step"]
    if saved < step or (how != "-9" and saved % 20 == 0 and saved == step):
        return f"saved at {saved}, after {step}"
    return ""


def clock(drill: Drill, name: str) -> str:
    """The time of day jumps: nothing but the figures of speed may know."""
    out = drill.folder()
    code = end(drill.begin(name, out, jumping_clock))
    return f"exit code {code}: {last_line(out)}" if code else differs(out, drill.whole[name])


def long_validation(drill: Drill) -> str:
    """SIGTERM while a validation takes long: saved and ended after the batch in hand, and the validation comes first
    when it goes on."""
    out = drill.folder()
    process, until = drill.begin("train_lm", out, slow_validation), time.monotonic() + LIMIT
    while not (out / "metrics.jsonl").exists() or '"step": 3' not in (out / "metrics.jsonl").read_text():
        if time.monotonic() > until:
            return "began no validation"
        time.sleep(0.05)
    process.terminate()
    code = end(process, 20)
    state = load_checkpoint(out / "last.pt") if code == 143 else {}
    if not state.get("owed") or state["step"] != 3:
        return f"exit code {code}, saved at step {state.get('step')}: {last_line(out)}"
    return drill.goes_on("train_lm", out)


def launch(out: Path, flags: list[str], ranks: int, *how: str) -> subprocess.Popen:
    """train_lm.py on as many ranks, under torchrun with the arguments ``how`` but for one alone."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *how]
    line = [*(line if ranks > 1 else [sys.executable]), "train_lm.py", *flags, "--out", str(out)]
    with open(out.parent / "log", "a") as log:
        return subprocess.Popen(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)


def children_of(pid: int) -> list[int]:
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def undisturbed(drill: Drill, name: str, ranks: int, flags: list[str]) -> tuple[dict, float]:
    """The content of a run of train_lm.py on as many ranks, and its seconds; made once."""
    out, began = drill.place / f"whole-{name}", time.monotonic()
    if name not in drill.whole:
        (drill.place / name).mkdir()
        if code := launch(drill.place / name / "run", flags, ranks).wait(LIMIT):
            raise OSError(f"the undisturbed run on {ranks} ranks ends with {code}")
        (drill.place / name / "run").rename(out)
        drill.whole[name], drill.seconds[name] = content(out), time.monotonic() - began
    return drill.whole[name], drill.seconds[name]


def restarts(drill: Drill) -> str:
    """torchrun --max-restarts, a rank of two killed at a random moment: it goes on by itself, to the same run."""
    out, flags = drill.folder(), drill.runs["train_lm"]
    whole, seconds = undisturbed(drill, "two-ranks", 2, flags)
    torchrun = launch(out, flags, 2, "--max-restarts=3")
    time.sleep(drill.random.uniform(0.4, 1) * seconds)
    with contextlib.suppress(OSError, IndexError):  # it is done
        os.kill(children_of(torchrun.pid)[1], signal.SIGKILL)
    code = torchrun.wait(LIMIT)
    return f"torchrun ends with {code}: {last_line(out)}" if code else differs(out, whole)


def elsewhere(drill: Drill, first: str, then: str) -> str:
    """Killed on some ranks, DDP or FSDP2, and continued on others: the losses of one process, to fp32's rounding."""
    out, flags = drill.folder(), [*drill.runs["train_lm"], "--dropout", "0"]
    whole, seconds = undisturbed(drill, "no-dropout", 1, flags)
    numbers = {"1": 1, "2": 2, "4": 4, "2 FSDP": 2}
    sharded = {how: ["--fsdp"] if "FSDP" in how else [] for how in numbers}
    killed = launch(out, [*flags, *sharded[first]], numbers[first])
    time.sleep(drill.random.uniform(0.5, 1.5) * seconds)
    killed.kill()
    killed.wait()
    until = time.monotonic() + LIMIT
    for code in (2, 2, 2, 0):  # its ranks end a little later than torchrun, and hold the lock until then
        more = ["--resume"] if (out / "config.json").exists() else []
        if (code := launch(out, [*flags, *sharded[then], *more], numbers[then]).wait(until - time.monotonic())) == 0:
            break
        time.sleep(5)
    if code:
        return f"on {then} ranks it ends with {code}: {last_line(out)}"
    found = content(out)
    for kind, key in (("train", "loss"), ("val", "nll"), ("val", "ece10")):
        pairs = list(zip([r[key] for r in found[kind]], [r[key] for r in whole[kind]], strict=True))
        if not all(abs(a - b) <= 1e-3 * abs(b) + 1e-4 for a, b in pairs):
            return f"{kind} {key} differs"
    return ""


def planned(kills: int, rest: int, scripts: tuple[str, ...], campaigns: int) -> Iterator[tuple[str, str, Callable]]:
    """(kind, name, drill), once for each trial."""
    share = {"train_lm": 0.4, "finetune_seq2seq": 0.2, "finetune_gsm8k": 0.2}
    for name in scripts:
        for _ in range(round(kills * share[name])):
            yield "kill", f"kill -9, {name}", lambda d, n=name: kill(d, n)
    if "finetune_gsm8k" in scripts:
        for _ in range(kills - round(0.8 * kills) - campaigns):
            yield "kill", "kill -9 while an adapter is saved", adapter
    for trial in range(campaigns):
        jobs = 1 + trial % 2
        yield "kill", f"kill -9 of a campaign, --jobs {jobs}", lambda d, j=jobs: grid(d, j)
    if campaigns:
        yield "runs", f"kill -9 of {rest} single runs of a campaign", lambda d: runs_of_grid(d, rest)
    for trial in range(rest):
        name = scripts[trial % len(scripts)]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            yield "signal", number.name, lambda d, n=name, s=number: stop(d, n, s)
        yield "stream", "stdout closed, stderr full", lambda d, n=name: silent(d, n)
        yield "disk", "no room (RLIMIT_FSIZE)", lambda d, n=name: full(d, n)
        yield "disk", "the folder vanishes", lambda d, n=name: vanish(d, n)
        yield "lock", "two processes, one --out", lambda d, n=name: two(d, n)
        yield "name", "250 characters, blanks, umlauts, kill -9", lambda d, n=name: names(d, n)
    for name in scripts if rest else ():
        yield "place", "places that cannot be written", lambda d, n=name: closed(d, n)
        yield "clock", "the time of day jumps", lambda d, n=name: clock(d, n)
    for trial in range(rest if campaigns else 0):
        yield "validation", "SIGTERM in a long validation", long_validation
        yield "restart", "2 ranks, one killed, torchrun --max-restarts", restarts
        first, then = (("2", "1"), ("1", "2 FSDP"), ("2 FSDP", "4"), ("4", "1"), ("2 FSDP", "1"), ("1", "2"))[trial % 6]
        yield "elsewhere", "killed, and continued on other ranks", lambda d, a=first, b=then: elsewhere(d, a, b)
    for how in ("SIGTERM", "-9", "torchrun -9") if campaigns else ():
        yield "ranks", f"2 ranks: {how}", lambda d, h=how: ranks(d, h)


def drills(
    kills: int, rest: int, scripts, campaigns: int, seed: int, only: set[str], place: Path, file: Path | None = None
) -> dict[str, list]:
    """name -> [tried, what was lost each time]. ``file``: for the table so far, after each trial."""
    torch.set_num_threads(1)
    drill, table = Drill(place, seed, scripts), {}
    for kind, name, run in planned(kills, rest, scripts, campaigns):
        if only and kind not in only:
            continue
        row = table.setdefault(name, [0, []])
        row[0] += 1
        try:
            lost = run(drill)
        except (OSError, ValueError, subprocess.SubprocessError) as e:
            lost = f"{type(e).__name__}: {e}"
        if lost:
            row[1].append(lost)
            print(f"{name}: {lost} (in {place / str(drill.count)})", file=sys.stderr, flush=True)
        else:
            shutil.rmtree(place / str(drill.count), ignore_errors=True)
        if file:
            file.write_text(as_table(table) + "\n")
    return table


def as_table(table: dict[str, list]) -> str:
    lines = ["| drill | tried | lost |", "|---|---|---|"]
    lines += [f"| {name} | {tried} | {len(lost)} |" for name, (tried, lost) in table.items()]
    return "\n".join(
        [*lines, f"| all | {sum(t for t, _ in table.values())} | {sum(len(x) for _, x in table.values())} |"]
    )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m tests.drill", usage=None, description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="kill -9 in all (default: %(default)s)")
    parser.add_argument("--rest", type=int, default=6, help="trials of each other drill (default: %(default)s)")
    parser.add_argument("--campaigns", type=int, default=8, help="of the kills, those of a campaign (default: 8)")
    parser.add_argument(
        "--only",
        default="",
        help="kinds, by commas: kill, runs, signal, stream, disk, lock, name, clock, place, validation, restart, "
        "elsewhere, ranks",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", type=Path, help="file for the table")
    args = parser.parse_args(argv)
    place, scripts = Path(tempfile.mkdtemp(prefix="drill-")), ("train_lm", "finetune_seq2seq", "finetune_gsm8k")
    only = set(args.only.split(",")) - {""}
    table = drills(args.kills, args.rest, scripts, args.campaigns, args.seed, only, place, args.table)
    print(as_table(table))
    lost = sum(len(lost) for _, lost in table.values())
    if not lost:
        shutil.rmtree(place)
    return min(lost, 1)


if __name__ == "__main__":
    sys.exit(main())

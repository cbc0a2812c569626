"""Memory and open files of a long run, from start to end (Linux).

    python results/soak.py --out runs/soak.jsonl -- --env point --preset small --minutes 130

Starts python cmil.py with the flags behind --, and every ten seconds writes a line: seconds, memory
(MB, proportional share of pages that are shared) and open file handles of the run and of its
workers, and how many processes they are. At the end one JSON line: the means of the first and of
the last quarter after `warm-up` seconds, and the growth an hour by a straight line through them.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent.parent


def family(pid):
    """The process and all that descend from it -> list of pids."""
    children = (pathlib.Path("/proc") / str(pid) / "task" / str(pid) / "children").read_text()
    return [pid] + [one for child in children.split() for one in family(int(child))]


def usage(pid):
    """Memory and file handles of a process and its descendants, now. OSError if one has ended."""
    memory, handles, processes = 0, 0, 0
    for one in family(pid):
        folder = pathlib.Path("/proc") / str(one)
        rollup = (folder / "smaps_rollup").read_text().split()
        memory += int(rollup[rollup.index("Pss:") + 1]) / 1024
        handles += len(list((folder / "fd").iterdir()))
        processes += 1
    return {"memory_mb": round(memory, 1), "handles": handles, "processes": processes}


def growth(lines, warm_up):
    """Lines of usage -> what they say of the time after warm_up seconds; {} if it never came."""
    lines = [line for line in lines if line["seconds"] >= warm_up]
    if len(lines) < 2:
        return {}
    hours = np.array([line["seconds"] for line in lines]) / 3600
    summary = {"hours": round(float(hours[-1] - hours[0]), 2), "lines": len(lines)}
    for key in ("memory_mb", "handles", "processes"):
        values, quarter = np.array([line[key] for line in lines]), max(1, len(lines) // 4)
        summary[key] = {"first": round(float(values[:quarter].mean()), 1),
                        "last": round(float(values[-quarter:].mean()), 1),
                        "most": round(float(values.max()), 1),
                        "an_hour": round(float(np.polyfit(hours, values, 1)[0]), 2)}
    return summary


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="where the lines go")
    parser.add_argument("--every", type=float, default=10, help="seconds between two lines (10)")
    parser.add_argument("--warm-up", type=float, default=900, help="seconds left out (900)")
    parser.add_argument("flags", nargs="*", help="behind --: flags of cmil.py")
    args = parser.parse_args()
    lines = []
    with open(args.out, "w") as file:
        began, run = time.time(), subprocess.Popen([sys.executable, HERE / "cmil.py", *args.flags])
        while run.poll() is None:
            try:
                lines.append({"seconds": round(time.time() - began, 1), **usage(run.pid)})
            except (OSError, ValueError):  # a process ended while it was looked at
                pass
            else:
                file.write(json.dumps(lines[-1]) + "\n")
                file.flush()
            time.sleep(args.every)
    print(json.dumps({"exit": run.returncode, **growth(lines, args.warm_up)}))


if __name__ == "__main__":
    main()

"""A table of methods from finished runs, in Markdown: what each reached, and at what price.

    python results/compare.py RUN [RUN ...] [--final eval-sampled.json]

RUN: folders as sweep.py leaves them, with the final evaluation beside metrics.jsonl (--final: its
name). Runs that differ in nothing but the seed are one row: the mean of the final successes over
seeds, with the 95% bootstrap interval of that mean (of three seeds it is hardly narrower than
their range), each seed's, the mean over seeds of the best evaluation while training, which has
been chosen among many and so flatters, and the mean minutes of a run.
"""
import argparse
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import figures  # noqa: E402
from cmil import bootstrap_ci, die  # noqa: E402

HEAD = ("| environment | method | final success: mean (95% interval) | seeds | best while training "
        "| tasks | updates | environment steps | minutes |")


def final_of(run, name):
    """The final evaluation of a run -> dict of --eval's line."""
    path = pathlib.Path(run) / name
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        die(f"{path} is missing or damaged: evaluate the run with --eval, or choose with --final")


def rows(runs, final):
    """-> lines of Markdown, one for each environment and method, in the order of the runs."""
    for env, methods in figures.grouped(runs).items():
        for method, seeds in methods.items():
            ends = [final_of(run, final) for run, _, _ in seeds]
            success = [end["success"] for end in ends]
            best = np.mean([max(e["eval/success"] for e in log if "eval/success" in e)
                            for _, _, log in seeds])
            last = [log[-1] for _, _, log in seeds]
            steps = [0 if config.get("offline") else line["step"]
                     for (_, config, _), line in zip(seeds, last)]
            updates, minutes = ([line[key] for line in last] for key in ("update", "time"))
            low, high = bootstrap_ci(success)
            yield (f"| {env} | {method} | {np.mean(success):.2f} ({low:.2f}-{high:.2f}) | "
                   f"{', '.join(f'{x:.2f}' for x in success)} | {best:.2f} | "
                   f"{np.mean([end['tasks'] for end in ends]):.2f} | {np.mean(updates):,.0f} | "
                   f"{np.mean(steps):,.0f} | {np.mean(minutes) / 60:.1f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--final", default="eval.json", help="the final evaluation (eval.json)")
    args = parser.parse_args()
    lines = [*rows(args.runs, args.final)]
    print("\n".join([HEAD, "|---" * HEAD.count(" |") + "|", *lines]))


if __name__ == "__main__":
    main()

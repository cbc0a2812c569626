"""Learning curves of runs, the paper's Figure 2: mean over seeds with a 95% bootstrap interval.

    python cmil.py --plot RUN [RUN ...] --out curves.png          the same thing
    python results/figures.py RUN [RUN ...] --out curves.pdf [--x time]

A run is a folder with config.json and metrics.jsonl. Runs of one method in one environment are its
seeds and become one curve. One column an environment; above success, below what the environment
counts beside it. Methods differ in line style and marker too, so a copy in grey can be read.
Only this file needs matplotlib.
"""
import argparse
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from cmil import bootstrap_ci, die  # noqa: E402  (the project's one file, one folder up)

# What is drawn: name in metrics.jsonl -> label of the axis.
MEASURES = {"eval/success": "success rate", "eval/tasks": "tasks completed",
            "eval/rotation": "rotation"}
# An offline run takes no environment steps: its log says which online run learned as much.
X_LABELS = {"step": "environment steps\n(offline: steps of an online run with as many updates)",
            "update": "gradient updates", "time": "hours"}
STYLES = [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (5, 1)), "v"), ((0, (1, 1)), "P"),
          ((0, (3, 1, 1, 1, 1, 1)), "X")]


def read_run(run):
    """A run's folder -> its config (dict) and its evaluations (list of dicts, in order)."""
    run = pathlib.Path(run)
    try:
        config = json.loads((run / "config.json").read_text())["config"]
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]   # else half written
    except OSError as error:
        die(f"--plot {run}: cannot read {error.filename} ({error.strerror}); give folders of runs")
    except (ValueError, KeyError, TypeError) as error:
        die(f"--plot {run}: config.json or metrics.jsonl is damaged ({error})")
    evaluations = [entry for entry in entries if "eval/success" in entry]
    if not evaluations:
        die(f"--plot {run}: metrics.jsonl holds no evaluation yet")
    return config, evaluations


def curve(seeds, key, x):
    """Evaluations of several seeds -> x (P,), mean (P,), low (P,), high (P,); None without `key`.

    A point for each x at which any of the seeds was evaluated, as long as all of them have got that
    far; the others are interpolated there. low and high are None for a single seed.
    """
    lines = [[(e[x], e[key]) for e in seed if key in e] for seed in seeds]
    lines = [np.array(sorted(line), float).T for line in lines if line]     # each (2, evaluations)
    if not lines:
        return None
    begin, end = max(line[0, 0] for line in lines), min(line[0, -1] for line in lines)
    grid = np.unique(np.concatenate([line[0] for line in lines]))
    grid = grid[(grid >= begin) & (grid <= end)]
    values = np.stack([np.interp(grid, *line) for line in lines])           # (seeds, P)
    if len(lines) == 1:
        return grid, values[0], None, None
    low, high = np.array([bootstrap_ci(column) for column in values.T]).reshape(-1, 2).T
    return grid, values.mean(0), low, high


def plot(runs, out, x="step"):
    """Draw the learning curves of `runs` (folders) into the picture `out`; x: see X_LABELS."""
    groups = {}                                 # environment -> method -> evaluations of each seed
    for run in runs:
        config, evaluations = read_run(run)
        groups.setdefault(config["env"], {}).setdefault(config["algo"], []).append(evaluations)
    try:
        import matplotlib
    except ImportError:
        die("--plot needs matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    entries = [entry for methods in groups.values() for seeds in methods.values() for seed in seeds
               for entry in seed]
    measures = ["eval/success"] + [  # where there is one task, its count is the success again
        key for key in list(MEASURES)[1:]
        if any(key in e and e[key] != e["eval/success"] for e in entries)]
    algos = sorted({algo for methods in groups.values() for algo in methods})
    figure, axes = plt.subplots(len(measures), len(groups), squeeze=False, sharex="col",
                                layout="constrained",
                                figsize=(5 * len(groups), 3 * len(measures) + 0.5))
    for column, (env, methods) in enumerate(groups.items()):
        for row, key in enumerate(measures):
            axis = axes[row, column]
            for algo, seeds in sorted(methods.items()):
                points = curve(seeds, key, x)
                if points is None:
                    continue
                index, (at, mean, low, high) = algos.index(algo), points
                line, marker = STYLES[index % len(STYLES)]
                colour, unit = f"C{index}", 3600 if x == "time" else 1
                axis.plot(at / unit, mean, color=colour, ls=line, marker=marker, ms=4,
                          markevery=max(1, len(at) // 12),
                          label=f"{algo} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})")
                if low is not None:
                    axis.fill_between(at / unit, low, high, color=colour, alpha=0.2, lw=0)
            axis.set_ylabel(MEASURES[key])
            axis.grid(alpha=0.3)
            if key == "eval/success":
                axis.set_ylim(-0.03, 1.03)      # always all of 0..1, with room for the markers
                axis.legend(loc="best", fontsize=8, handlelength=3.5)
            elif key == "eval/tasks":
                axis.set_ylim(bottom=-0.1, top=max(1.1, axis.get_ylim()[1]))
        axes[0, column].set_title(env)
        axes[-1, column].set_xlabel(X_LABELS[x])
    try:
        figure.savefig(out, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        die(f"--out {out}: cannot write the picture ({error})")
    finally:
        plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: die(f"{message}; see python results/figures.py --help")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--out", default="curves.png", help="the picture (.png, .pdf, .svg)")
    parser.add_argument("--x", default="step", choices=list(X_LABELS), help="the horizontal axis")
    args = parser.parse_args()
    plot(args.runs, args.out, args.x)


if __name__ == "__main__":
    main()

"""Learning curves of runs, the paper's Figure 2: mean over seeds with a 95% bootstrap interval; and
the parts of the paper's bound for one run, its Figure 3.

    python cmil.py --plot RUN [RUN ...] --out curves.png          the same thing
    python results/figures.py RUN [RUN ...] --out curves.pdf [--x time]
    python cmil.py --plot-bound RUN --out bound.png               Figure 3

A run is a folder with config.json and metrics.jsonl. Runs of one method in one environment are its
seeds and become one curve; where they differ in more than the seed, a curve for each setting, with
that in its name. One column an environment; above success, below what the environment
counts beside it; a thin line is what its demonstrations reach. Methods differ in line style and
marker too, so a copy in grey can be read.
Only this file needs matplotlib.
"""
import argparse
import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from cmil import RESUME_MAY_CHANGE, bootstrap_ci, die  # noqa: E402  (one folder up)

# What is drawn: name in metrics.jsonl -> label of the axis.
MEASURES = {"eval/success": "success rate", "eval/tasks": "tasks completed",
            "eval/rotation": "rotation (turns)"}
# What the demonstrations that ship with an environment reach (each of them succeeds).
EXPERT = {"kitchen": {"eval/success": 1, "eval/tasks": 4}, "point": {"eval/success": 1},
          "baoding": {"eval/success": 1, "eval/rotation": 1.26}}
# An offline run takes no environment steps: its log says which online run learned as much.
X_LABELS = {"step": "environment steps\n(offline: steps of an online run with as many updates)",
            "update": "gradient updates", "time": "hours"}
STYLES = [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D"), ((0, (5, 1)), "v"), ((0, (1, 1)), "P"),
          ((0, (3, 1, 1, 1, 1, 1)), "X")]


def read_run(run):
    """A run's folder -> its config (dict) and its log (list of dicts, in order)."""
    run = pathlib.Path(run)
    try:
        config = json.loads((run / "config.json").read_text())["config"]
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        entries = [json.loads(line) for line in lines if line.endswith("\n")]   # else half written
    except OSError as error:
        die(f"{run}: cannot read {error.filename} ({error.strerror}); give folders of runs")
    except (ValueError, KeyError, TypeError) as error:
        die(f"{run}: config.json or metrics.jsonl is damaged ({error})")
    if not any("eval/success" in entry for entry in entries):
        die(f"{run}: metrics.jsonl holds no evaluation yet")
    return config, entries


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


def settings(configs):
    """Names for the curves of one method's runs: what they differ in beside the seed -> strings."""
    shared = set.intersection(*(set(config) for config in configs))
    apart = sorted(key for key in shared - {"seed", "device", "precision", *RESUME_MAY_CHANGE}
                   if len({config[key] for config in configs}) > 1)
    return [", ".join([config["algo"], *(f"{key} {config[key]}" for key in apart)])
            for config in configs]


def grouped(runs):
    """Folders of runs -> {environment: {name of the curve: [(run, config, log) of each seed]}}."""
    groups, methods, seen = {}, {}, {}
    for run in runs:
        config, log = read_run(run)
        env = " ".join(filter(None, (config["env"], config.get("tasks"))))
        methods.setdefault((env, config["algo"]), []).append((run, config, log))
    for (env, _), found in methods.items():
        for name, (run, config, log) in zip(settings([c for _, c, _ in found]), found):
            key = env, name, config.get("seed")
            if key in seen:
                die(f"{run}: {seen[key]} has the same settings and seed")
            seen[key] = run
            groups.setdefault(env, {}).setdefault(name, []).append((run, config, log))
    return groups


def plot(runs, out, x="step"):
    """Draw the learning curves of `runs` (folders) into the picture `out`; x: see X_LABELS."""
    groups, plt = grouped(runs), pyplot()
    entries = {env: [entry for seeds in methods.values() for _, _, log in seeds for entry in log]
               for env, methods in groups.items()}
    own = {env for env, methods in groups.items() for seeds in methods.values()  # not of EXPERT
           for _, config, _ in seeds if config.get("demos")
           or env == "baoding" and config.get("episode_steps", 0) not in (0, 75)}
    tells = {env: [key for key in MEASURES if key == "eval/success" or any(
        key in e and e[key] != e["eval/success"] for e in found)]  # of one task it is the same
        for env, found in entries.items()}
    measures = [key for key in MEASURES if any(key in keys for keys in tells.values())]
    algos = sorted({algo for methods in groups.values() for algo in methods})
    crowded = {env for env, methods in groups.items() if len(methods) > 4}  # legend at the side
    figure, axes = plt.subplots(len(measures), len(groups), squeeze=False, sharex="col",
                                layout="constrained",
                                figsize=(5 * len(groups) + 2 * len(crowded),
                                         3 * len(measures) + 0.5))
    for column, (env, methods) in enumerate(groups.items()):
        for row, key in enumerate(measures):
            axis = axes[row, column]
            if key not in tells[env]:
                axis.set_visible(False)
                continue
            for algo, seeds in sorted(methods.items()):
                points = curve([log for _, _, log in seeds], key, x)
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
            best = EXPERT.get(env.split()[0], {}).get(key)
            if key == "eval/tasks" and " " in env:
                best = env.count("+") + 1
            if best and env not in own:
                axis.axhline(best, color="0.4", lw=0.8, ls=(0, (6, 2)), label="demonstrations")
            axis.set_ylabel(MEASURES[key])
            axis.grid(alpha=0.3)
            if key == "eval/success":
                axis.set_ylim(-0.03, 1.03)      # always all of 0..1, with room for the markers
                place = dict(loc="upper left", bbox_to_anchor=(1, 1)) if env in crowded else {}
                axis.legend(fontsize=8, handlelength=3.5, **place)
            elif key == "eval/tasks":
                axis.set_ylim(bottom=-0.1, top=max(1.1, axis.get_ylim()[1]))
        axes[0, column].set_title(env)
        lowest = axes[measures.index(tells[env][-1]), column]
        lowest.set_xlabel(X_LABELS[x])
        lowest.tick_params(labelbottom=True)
    save(figure, out)


def pyplot():
    """matplotlib.pyplot, without a window."""
    try:
        import matplotlib
    except ImportError:
        die("drawing needs matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    return plt


def save(figure, out):
    try:
        figure.savefig(out, dpi=150, bbox_inches="tight")
    except (OSError, ValueError) as error:
        die(f"--out {out}: cannot write the picture ({error})")
    finally:
        pyplot().close(figure)


# Figure 3: name in metrics.jsonl -> what it estimates. In the paper's words, the distribution
# mismatch, the model mismatch under the policy and under the expert, and what they bound.
BOUND = {"disc/gap": "discriminator gap: D(expert) - D(policy)",
         "uncertainty": "disagreement, policy in the model",
         "uncertainty_expert": "disagreement, along expert actions",
         "eval/return": "performance gap to the best evaluation (task's own reward)"}


def normalised(values):
    """Scaled to [0, 1] from least to most; zeros if all are equal."""
    values = np.asarray(values, float)
    spread = values.max() - values.min()
    return (values - values.min()) / (spread or 1)


def smoothed(values, width):
    """Mean of the `width` values around each, fewer at both ends."""
    total = np.concatenate([[0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - width // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def bound_parts(entries):
    """A run's log -> {name of BOUND: environment steps (P,), values in [0, 1] (P,)}.

    The return becomes a gap: how far it is below the best. (The gap to the expert differs from
    that by a constant, which is lost when a curve is scaled to [0, 1].) Curves of training begin
    where the adversary does, and are means over a tenth of their points.
    """
    parts = {}
    for key in BOUND:
        points = [(entry["step"], entry[key]) for entry in entries
                  if key in entry and ("disc/gap" in entry or key == "eval/return")]
        if not points or len(points) > 1 and len({value for _, value in points}) == 1:
            continue  # it is not logged, or says nothing: a single prior, never a reward
        step, values = np.array(points, float).T
        if key == "eval/return":
            values = values.max() - values
        else:
            values = smoothed(values, max(1, len(values) // 10))
        parts[key] = step, normalised(values)
    return parts


def plot_bound(run, out):
    """Draw Figure 3 for one run (a folder) into the picture `out`."""
    config, entries = read_run(run)
    parts = bound_parts(entries)
    if "disc/gap" not in parts:
        die(f"--plot-bound {run}: {config['algo']} has no discriminator, or its run has not begun")
    figure, axis = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for (key, (step, values)), (line, marker) in zip(parts.items(), STYLES):
        axis.plot(step, values, ls=line, marker=marker, ms=4, label=BOUND[key],
                  markevery=max(1, len(step) // 12))
    label = X_LABELS["step"] if config.get("offline") else X_LABELS["step"].split("\n")[0]
    axis.set(xlabel=label, ylabel="scaled to [0, 1]",
             title=f"{config['algo']}, {config['env']}", ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, handlelength=3.5)
    save(figure, out)


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

"""Draw learning curves and print tables from the folders of runs.

    python experiments/figures.py RUN ... --out curve.png [--x step|update|time]
    python experiments/figures.py --bound RUN --out bound.png
    python experiments/figures.py --table RUN ...
    python experiments/figures.py --open-loop RUN --out openloop.png
    python experiments/figures.py --weights RUN --out checkpoint.pt

1: the paper's Figure 2, a curve for the seeds of a method: mean and 95% bootstrap interval. 2: its
Figure 3. 3: Markdown. 4: a demonstration as a run's model predicts it. 5: half-precision weights.
"""
import argparse
import json
import pathlib
import sys
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cmil  # noqa: E402
import demonstrations  # noqa: E402
from experiments import baselines  # noqa: E402, F401  its methods' runs can be loaded too

# One colour, line and width per method, the same in every picture.
STYLES = {
    "cmil": ("#0072B2", "-", 2.8),
    "vmail": ("#D55E00", "--", 1.7),
    "dgail": ("#CC79A7", "-.", 1.7),
    "dbc": ("#009E73", (0, (6, 1.5)), 1.7),
    "bc": ("#B8860B", ":", 2.0),
    "ditto": ("#56B4E9", (0, (3, 1, 1, 1, 1, 1)), 1.7),
    "pdac": ("#555555", (0, (1, 1)), 1.7),
}
SPARE = ["#882255", "#44AA99", "#999933", "#AA4499", "#332288", "#661100", "#117733", "#DDAA33"]
LABELS = {"tasks": "tasks completed", "rotation": "turns", "dropped": "a ball dropped"}
KINDS = ("modes", "sampled")   # of evaluations
HIDDEN = {"success", "success_ci95", "return", "error"}
# What the built-in demonstrations reach. All of them succeed.
DEMONSTRATIONS = {"kitchen": {"success": 1, "tasks": 4}, "point": {"success": 1},
                  "baoding": {"success": 1, "rotation": 1.26}}
# --x -> (key in metrics.jsonl, divisor, label)
X_AXES = {"step": ("step", 1, "environment steps"), "update": ("update", 1, "updates"),
          "time": ("time", 60, "minutes")}
LOOK = {"axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "savefig.dpi": 130,
        "axes.spines.right": False, "figure.constrained_layout.use": True,
        "legend.fontsize": 8.5, "legend.handlelength": 3.2, "legend.frameon": False}

class Run(NamedTuple):
    """The contents of a run's folder."""
    folder: str
    algo: str
    seed: int
    env: str      # with its tasks, if some were chosen
    config: dict
    log: list     # the lines of metrics.jsonl
    final: dict   # eval.json, or {} before the evaluation

def read_run(folder):
    """Read the folder of a run -> Run."""
    path = pathlib.Path(folder)
    try:
        config = json.loads((path / "config.json").read_text())["config"]
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        # A run that is still going may have written half of its last line.
        log = [json.loads(line) for line in lines if line.endswith("\n")]
        final = path / "eval.json"
        final = json.loads(final.read_text()) if final.exists() else {}
        if final and "success_ci95" not in final.get("modes", final.get("sampled", {})):
            raise ValueError("eval.json holds neither modes nor sampled")
        if not [entry for entry in log if "eval/return" in entry]:
            cmil.die(f"{folder}: metrics.jsonl holds no evaluation yet")
        env = ", ".join(name for name in (config["env"], config.get("tasks")) if name)
        return Run(str(folder), config["algo"], config["seed"], env, config, log, final)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cmil.die(f"{folder}: cannot read config.json, metrics.jsonl or eval.json ({error})")

def read_runs(folders):
    """Read runs of one environment -> {label: its runs, one for each seed}, methods in order."""
    runs = [read_run(folder) for folder in folders]
    found = sorted({run.env for run in runs})
    if len(found) > 1:
        cmil.die(f"these are runs of {' and of '.join(found)}; name runs of one environment")
    curves = {}
    for algo in [*STYLES, *sorted({run.algo for run in runs} - set(STYLES))]:
        same = [run for run in runs if run.algo == algo]
        for run in same:
            seeds = curves.setdefault(label_of(run, same), [])
            if run.seed in [other.seed for other in seeds]:
                cmil.die(f"{run.folder}: another run has its settings and seed; drop one")
            seeds.append(run)
    return curves

def label_of(run, same_method):
    """Name a run's method, and the settings in which the runs of that method differ."""
    ignored = {"seed", "device", "precision", *cmil.RESUME_MAY_CHANGE}
    shared = set.intersection(*(set(other.config) for other in same_method)) - ignored
    differ = [key for key in sorted(shared)
              if len({str(other.config[key]) for other in same_method}) > 1]
    return ", ".join([run.algo, *(f"{key} {run.config[key]}" for key in differ)])

def measures(curves):
    """Choose what to draw: success and the environment's own measures, else the return."""
    lines = [entry for seeds in curves.values() for run in seeds for entry in run.log
             if "eval/return" in entry]
    shared = set.intersection(*(set(line) for line in lines))
    own = [key.removeprefix("eval/") for key in sorted(shared) if key.startswith("eval/")
           and any(line[key] != line["eval/success"] for line in lines)]
    own = [name for name in own if name not in HIDDEN | {"dropped"}]
    reported = own or any(line["eval/success"] for line in lines)
    return ["success", *own] if reported else ["return"]

def curve(seeds, key, x):
    """Average the evaluations of several seeds -> x, mean, low, high, each (P,).
    There is a point wherever one of the seeds was evaluated, within the range that all of them
    cover; the other seeds are interpolated there."""
    lines = [[(entry[x], entry[key]) for entry in run.log if key in entry] for run in seeds]
    lines = [np.array(line, float).T for line in lines]   # each (2, evaluations)
    first = max(at[0] for at, _ in lines)
    last = min(at[-1] for at, _ in lines)
    grid = np.unique(np.concatenate([at for at, _ in lines]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.stack([np.interp(grid, *line) for line in lines])   # (seeds, P)
    low, high = np.array([cmil.bootstrap_ci(column) for column in values.T]).reshape(-1, 2).T
    return grid, values.mean(0), low, high

def plot_curves(folders, out, x):
    """Draw the learning curves of runs into the picture `out`, one panel for each measure."""
    curves = read_runs(folders)
    runs = [run for seeds in curves.values() for run in seeds]
    names = measures(curves)
    size = (3.4 + 2.7 * len(names), 3.3)
    figure, axes = pyplot().subplots(1, len(names), squeeze=False, figsize=size)
    for axis, name in zip(axes[0], names, strict=True):
        draw_panel(axis, curves, name, x)
    label = X_AXES[x][2]
    if x == "step" and any(run.config.get("offline") for run in runs):
        label += "\n(offline methods: steps of an online run with as many updates)"
    figure.supxlabel(label, fontsize=9)
    figure.suptitle(runs[0].env, fontsize=11)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(out)

def draw_panel(axis, curves, name, x):
    """Draw every method's `name` over `x`, and the level of the demonstrations."""
    key, divisor, _ = X_AXES[x]
    own = dict(STYLES)
    spare = iter(SPARE * len(curves))
    for depth, (label, seeds) in enumerate(curves.items()):
        at, mean, low, high = curve(seeds, f"eval/{name}", key)
        # A method's own style goes to its first setting.
        colour, line, width = own.pop(seeds[0].algo, None) or (next(spare), "-", 1.7)
        text = f"{label} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
        axis.plot(at / divisor, mean, color=colour, ls=line, lw=width, marker="o", ms=width + 1,
                  markevery=max(1, len(at) // 15), zorder=99 - depth, label=text)
        axis.fill_between(at / divisor, low, high, color=colour, alpha=0.14, lw=0)
    config = seeds[0].config
    level = DEMONSTRATIONS.get(config["env"], {}).get(name)
    if name == "tasks" and config.get("tasks"):
        level = config["tasks"].count("+") + 1
    if level and not config.get("demos"):
        axis.axhline(level, color="0.3", lw=0.9, ls=(0, (6, 3)), label="demonstrations")
    axis.set_ylabel(LABELS.get(name, name))
    axis.locator_params(axis="x", nbins=6)
    if name == "success":
        axis.set_ylim(-0.04, 1.04)

def pyplot():
    """Import matplotlib.pyplot, for pictures in files only."""
    try:
        import matplotlib
    except ImportError:
        cmil.die("drawing needs matplotlib, which is not installed: pip install matplotlib")
    matplotlib.use("Agg")
    matplotlib.rcParams.update(LOOK)
    from matplotlib import pyplot
    return pyplot

# The paper's Figure 3: key in metrics.jsonl -> (what it estimates, colour, line).
BOUND = {
    "disc/gap": ("discriminator: D(expert) - D(policy)", "#D55E00", "--"),
    "uncertainty": ("disagreement under the policy", "#0072B2", "-."),
    "uncertainty_expert": ("disagreement along expert actions", "#009E73", ":"),
    "eval/return": ("return: gap to the best evaluation", "#000000", "-"),
}

def bound_term(log, key):
    """Read a term of the bound from a run's log -> steps, values scaled to [0, 1].
    The return becomes a gap: how far it lies below the run's best evaluation. The other terms
    begin where the discriminator does, and are running means over a tenth of their points."""
    points = [(entry["step"], entry[key]) for entry in log
              if key in entry and ("disc/gap" in entry or key == "eval/return")]
    step, values = np.array(points, float).T
    if key == "eval/return":
        values = values.max() - values
    else:
        half = len(values) // 20
        values = np.array([values[max(0, i - half):i + half + 1].mean()
                           for i in range(len(values))])
    return step, (values - values.min()) / (np.ptp(values) or 1)

def plot_bound(folder, out):
    """Draw the terms of the bound along one run into the picture `out`."""
    run = read_run(folder)
    if not any("disc/gap" in entry for entry in run.log):
        cmil.die(f"{folder}: {run.algo} has logged no disc/gap; give another run")
    figure, axis = pyplot().subplots(figsize=(6.5, 3.6))
    for key, (label, colour, line) in BOUND.items():
        if any(entry.get(key) for entry in run.log):   # the disagreement of a single prior is 0
            axis.plot(*bound_term(run.log, key), color=colour, ls=line, label=label)
    axis.set(xlabel="environment steps", ylabel="scaled to [0, 1]", ylim=(-0.04, 1.04))
    axis.set_title(f"{run.algo}, {run.env}, seed {run.seed}", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(out)

def plot_open_loop(folder, out, columns=10, scale=3):
    """Draw a demonstration, the model's prediction from five frames on, and their difference."""
    import imageio
    agent = cmil.load_policy(folder)
    c = agent.c
    demo = demonstrations.load_demos(c.demos, c.env, 1, **cmil.env_options(c))[0]
    image = torch.as_tensor(demo["image"][:c.length, None])  # (L, 1, 64, 64, 3)
    predicted, _ = agent.open_loop(image, torch.as_tensor(demo["action"][:c.length, None]))
    truth, predicted = image[:, 0].numpy(), predicted[:, 0].cpu().numpy()
    error = np.abs(truth.astype(int) - predicted).astype(np.uint8)
    pick = np.linspace(0, len(truth) - 1, min(columns, len(truth))).astype(int)
    rows = [np.concatenate(x[pick], 1) for x in (truth, predicted, error)]
    imageio.imwrite(out, np.concatenate(rows).repeat(scale, 0).repeat(scale, 1))

def write_weights(folder, out):
    """Write the weights of a run's last checkpoint in half precision."""
    path = pathlib.Path(folder) / "checkpoint.pt"
    state = torch.load(path, weights_only=True, map_location="cpu")["agent"]
    weights = {name: weight.half() for name, weight in state["modules"].items()}
    torch.save({"agent": {**state, "modules": weights, "optimizers": {}}}, out)

def print_table(folders):
    """Print a Markdown table: one row for each method and setting."""
    curves = read_runs(folders)
    runs = [run for seeds in curves.values() for run in seeds]
    for run in runs:
        if not run.final:
            cmil.die(f"{run.folder}: no eval.json; save --eval's output there")
    results = [run.final[kind] for run in runs for kind in KINDS if kind in run.final]
    own = dict.fromkeys(name for result in results for name in result
                        if name not in HIDDEN and result[name] != result["success"])
    names = ["success", *own] if own or any(x["success"] for x in results) else ["return"]
    head = ["method", *(f"{LABELS.get(name, name)}: modes / sampled" for name in names),
            "seeds", "episodes", "steps", "updates", "minutes"]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for label, seeds in curves.items():
        cells = [" / ".join(mean_cell(seeds, kind, name) for kind in KINDS) for name in names]
        print(f"| {' | '.join([label, *cells, *costs(seeds)])} |")

def mean_cell(seeds, kind, name):
    """Format the mean over seeds; success with its 95% interval (one seed: over episodes)."""
    results = [run.final[kind] for run in seeds if kind in run.final]
    values = [result[name] for result in results if name in result]
    if len(values) < len(seeds):
        return "-"
    low, high = results[0]["success_ci95"]
    if len(values) > 1:
        low, high = cmil.bootstrap_ci(values)
    # Formatting alone would round some halves down: the float 0.575 is below 0.575.
    mean, low, high = (f"{number + 1e-9:.2f}" for number in (np.mean(values), low, high))
    return f"{mean} ({low}-{high})" if name == "success" else mean

def costs(seeds):
    """Format seeds, evaluation episodes, environment steps, updates and minutes."""
    last = [run.log[-1] for run in seeds]
    columns = [[run.final["episodes"] for run in seeds],
               [0 if run.config.get("offline") else run.log[-1]["step"] for run in seeds],
               [entry["update"] for entry in last], [round(entry["time"] / 60) for entry in last]]
    return [", ".join(str(run.seed) for run in seeds),
            *(f"{min(x):,}" if min(x) == max(x) else f"{min(x):,}-{max(x):,}" for x in columns)]

def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = lambda message: cmil.die(f"{message}; see experiments/figures.py --help")
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs")
    parser.add_argument("--table", action="store_true", help="print a table")
    makers = {"bound": plot_bound, "open-loop": plot_open_loop, "weights": write_weights}
    for name, make in makers.items():
        parser.add_argument(f"--{name}", dest="make", action="store_const", const=make,
                            help=make.__doc__.split("\n")[0])
    parser.add_argument("--out", default="curve.png", help="the file: .png, .pdf, .svg or .pt")
    parser.add_argument("--x", default="step", choices=list(X_AXES), help="the horizontal axis")
    args = parser.parse_args()
    try:
        if args.table:
            print_table(args.runs)
        elif args.make:
            args.make(args.runs[0], args.out)
        else:
            plot_curves(args.runs, args.out, args.x)
    except (OSError, ValueError) as error:
        cmil.die(f"--out {args.out}: cannot write it ({error})")

if __name__ == "__main__":
    main()

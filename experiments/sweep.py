"""Train and evaluate variants of the flags over seeds, one run after another, and print a table.

    python experiments/sweep.py --out runs/sweep --seeds 0 1 --variants "" "--beta 1" "--algo bc" \\
        -- --env point --threads 1 [any flag of cmil.py, for all runs]

A variant adds its flags to those after --; its runs are --out/<method>[-flags]-s<seed>. The
same command resumes a sweep: it skips runs with an eval.json and continues interrupted ones.
--dry-run prints a command for each run, for an array job. A stopped sweep exits with code 3.
"""
import argparse
import itertools
import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import cmil  # noqa: E402
from experiments import figures  # noqa: E402

HERE = pathlib.Path(__file__).resolve().parent

def commands(args, flags, variant, seed):
    """Return a run's folder, its training command and its evaluation command."""
    flags = [*flags, *shlex.split(variant)]
    algo = flags[flags.index("--algo") + 1] if "--algo" in flags else "cmil"
    settings = re.sub(r"--algo\s+\S+", "", variant)
    name = re.sub(r"[^\w.]+", "-", f"{algo} {settings}").strip("-")
    run = pathlib.Path(args.out) / f"{name}-s{seed}"
    program = HERE.parent / "cmil.py" if algo in cmil.METHODS else HERE / "baselines.py"
    start = [sys.executable, str(program)]
    train = [*start, *flags, "--seed", str(seed), "--logdir", str(run)]
    evaluate = [*start, "--eval", str(run), "--episodes", str(args.episodes),
                "--seed", str(args.eval_seed)]
    return run, train, evaluate

def train_and_evaluate(run, train, evaluate):
    """Make one run and write its eval.json."""
    print(shlex.join(train), flush=True)
    done = subprocess.run(train)
    if done.returncode == 0 and finished(run):
        done = subprocess.run(evaluate, stdout=subprocess.PIPE, text=True)
        if done.returncode == 0:
            (run / "eval.json").write_text(done.stdout.splitlines()[-1] + "\n")
            return
    if done.returncode > 0:
        cmil.die(f"{run} failed (see above)")
    # A signal (returncode < 0 where it came before cmil.py was ready) or --minutes ended it.
    cmil.say(f"{run} was stopped; the same command continues the sweep", sys.stderr)
    raise SystemExit(3)

def finished(run):
    """Return whether a run has made all of its steps."""
    steps = json.loads((run / "config.json").read_text())["config"]["steps"]
    log = (run / "metrics.jsonl").read_text().splitlines()
    return bool(log) and json.loads(log[-1])["step"] >= steps

def parse(argv):
    """Split the command line at "--" -> this program's arguments, the flags of all runs."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: cmil.die(f"{message}; see experiments/sweep.py --help")
    parser.add_argument("--out", required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=[""])
    parser.add_argument("--episodes", type=int, default=100, help="of each evaluation")
    parser.add_argument("--eval-seed", type=int, default=2000, help="of each evaluation")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    cut = argv.index("--") if "--" in argv else len(argv)
    options = {"-h", *(text for action in parser._actions for text in action.option_strings)}
    # argparse takes "--no-data-critic" for an option of its own, but not with a space after it.
    words = [f"{word} " if word.startswith("-") and word not in options else word
             for word in argv[:cut]]
    return parser.parse_args(words), argv[cut + 1:]

def main():
    args, flags = parse(sys.argv[1:])
    for number in (signal.SIGINT, signal.SIGUSR1):  # they are for the run, which then stops
        signal.signal(number, lambda *_: None)
    runs = []
    for variant, seed in itertools.product(args.variants, args.seeds):
        run, train, evaluate = commands(args, flags, variant, seed)
        runs.append(run)
        if args.dry_run:
            print(shlex.join([sys.executable, sys.argv[0], "--out", args.out, "--seeds",
                              str(seed), "--variants", variant, "--episodes", str(args.episodes),
                              "--eval-seed", str(args.eval_seed), "--", *flags]))
        elif not (run / "eval.json").exists():
            train_and_evaluate(run, train, evaluate)
    if not args.dry_run:
        figures.print_table(runs)

if __name__ == "__main__":
    main()

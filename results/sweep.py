"""One factor at a time: a run (of drift.py) for every variant and seed, and one table of them.

    python results/sweep.py --out runs/sweep --seeds 0 1 --variants "" "--sigma 0.5" "--alpha 1" \\
        -- --env kitchen --tasks microwave --threads 1 [any flag of cmil.py, for all of them]

A variant is what it adds to the flags after --. Runs that have been evaluated are not made again,
an interrupted one goes on, so that the same command resumes a sweep; --table only prints. The tasks
of training episodes, which act with samples, tell settings apart sooner than evaluations: their
mean over the last fifth of the rounds, and with --until N over the rounds that learned, up to
update N. Every ingredient of the method, left out or weakened:

    --variants "" "--alpha 0" "--beta 1" "--sigma 0" "--members 1 --alpha 0" "--reward sigmoid" \\
        "--no-data-critic" "--pretrain 0"
"""
import argparse
import concurrent.futures
import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np

HERE = pathlib.Path(__file__).parent
# Learning signals shown beside the outcome: the mean over the last fifth of a run's metrics.
SHOWN = ("recon", "kl", "bc", "reward", "reward_std", "entropy", "critic/model",
         "uncertainty_expert", *(f"watch/{name}" for name in (
             "logit_expert", "logit_expert_std", "logit_replay", "logit_dream", "logit_dream_std",
             "u_expert", "u_dream", "grad_reward", "grad_penalty", "grad_value", "grad_bc")))


def folder_of(out, variant, seed):
    name = re.sub(r"[^\w.]+", "-", variant).strip("-") or "base"
    return pathlib.Path(out) / f"{name}-s{seed}"


# Final evaluations: with the modes of policy and latents, and with samples.
EVALUATIONS = {"eval.json": ["--no-eval-sample"], "eval-sampled.json": ["--eval-sample"]}


def train_and_evaluate(out, variant, seed, flags, episodes):
    """One run to its end, then its final evaluations, kept beside its metrics."""
    run = folder_of(out, variant, seed)
    run.mkdir(parents=True, exist_ok=True)
    missing = [name for name in EVALUATIONS if not (run / name).exists()]
    flags, kept = [*flags, *shlex.split(variant)], run / "flags.txt"
    if not kept.exists():
        kept.write_text(shlex.join(flags))
    elif kept.read_text() != shlex.join(flags):
        sys.exit(f"sweep: {run} was made with {kept.read_text()}; give another --out")
    with open(run / "log.txt", "a") as log:
        if missing:  # a run that a signal stops ends with exit code 1
            subprocess.run([sys.executable, str(HERE / "drift.py"), *flags,
                            "--seed", str(seed), "--logdir", str(run)],
                           stdout=log, stderr=log, check=True)
        for name in missing:
            answer = subprocess.run([
                sys.executable, str(HERE.parent / "cmil.py"), "--eval", str(run),
                "--episodes", str(episodes), *EVALUATIONS[name]],
                stdout=subprocess.PIPE, stderr=log, text=True, check=True)
            (run / name).write_text(answer.stdout)


def make(args, flags):
    """Every variant with every seed. A run that fails or is stopped ends the sweep."""
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(train_and_evaluate, args.out, variant, seed, flags, args.episodes)
                for variant in args.variants for seed in args.seeds]
        try:
            for job in concurrent.futures.as_completed(jobs):
                job.result()
        except (subprocess.CalledProcessError, KeyboardInterrupt, SystemExit) as error:
            pool.shutdown(cancel_futures=True)  # runs in hand come to their end first
            if isinstance(error, SystemExit):
                raise
            sys.exit(f"sweep: stopped ({error or 'Ctrl-C'}; see log.txt in the run's folder); "
                     "the same command goes on")


def last_fifth(lines, key):
    lines = [line for line in lines if key in line]
    return lines[-max(1, len(lines) // 5):] if lines else []


def row(run, until=None):
    """A run's evaluations in order, its final ones, and its learning signals -> dict."""
    lines = [json.loads(line) for line in open(run / "metrics.jsonl")]
    curve = [line["eval/tasks"] for line in lines if "eval/tasks" in line]
    last = last_fifth(lines, "ups")
    out = {"run": run.name, "tasks": curve}
    for name in EVALUATIONS:
        if (run / name).exists():
            final = json.loads((run / name).read_text())
            out[name[:-5]] = {"success": final["success"], "tasks": final["tasks"]}
    if played := [line["train/tasks"] for line in last_fifth(lines, "train/tasks")]:
        out["training_tasks"] = round(float(np.mean(played)), 3)
    rounds = [(line["update"], line["train/tasks"]) for line in lines if "train/tasks" in line]
    if early := [tasks for update, tasks in rounds if rounds[0][0] < update <= (until or 0)]:
        out[f"training_tasks_until_{until}"] = round(float(np.mean(early)), 3)
    out["update"] = lines[-1]["update"]
    out["minutes"] = round(lines[-1]["time"] / 60, 1)
    return {**out, **{key: round(float(np.mean([line[key] for line in last])), 3)
                      for key in SHOWN if key in last[-1]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=[""])
    parser.add_argument("--episodes", type=int, default=20, help="of each final evaluation")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--until", type=int, help="see above")
    argv = sys.argv[1:]
    cut = argv.index("--") if "--" in argv else len(argv)
    own = {option for action in parser._actions for option in action.option_strings}
    words = [w + " " if w.startswith("--") and w not in own else w for w in argv[:cut]]
    args, flags = parser.parse_args(words), argv[cut + 1:]  # with a blank it can be a value
    if not args.table:
        make(args, flags)
    for metrics in sorted(pathlib.Path(args.out).glob("*/metrics.jsonl")):
        print(json.dumps(row(metrics.parent, args.until)))


if __name__ == "__main__":
    main()

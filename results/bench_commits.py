"""`python cmil.py --bench` at several commits, one after the other on the same machine; JSON lines.

    python results/bench_commits.py b3a1b44,HEAD --env point [any other flag of cmil.py]

Run it with nothing else on the machine. Each line is --bench's own, with its commit and flags.
"""
import json
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parents[1]


def git(*words):
    return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True,
                          check=True).stdout.strip()


def main():
    commits, *flags = sys.argv[1:]
    for name in commits.split(","):
        commit = git("rev-parse", "--short=7", name)
        with tempfile.TemporaryDirectory() as folder:
            git("worktree", "add", "--detach", folder, commit)
            try:
                out = subprocess.run([sys.executable, "cmil.py", "--bench", *flags], cwd=folder,
                                     stdout=subprocess.PIPE, text=True, check=True).stdout
            finally:
                git("worktree", "remove", "--force", folder)
        line = json.loads(out.splitlines()[-1])
        print(json.dumps({"commit": commit, "flags": " ".join(flags), **line}),
              flush=True)


if __name__ == "__main__":
    main()

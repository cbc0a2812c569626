"""What the experts share: playing an episode, checking that it replays, writing the file."""
import argparse
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs  # noqa: E402  one folder up


def fail(message):
    """Print one line and exit with code 2."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


def arguments(name, n, **more):
    """Read and check the command line of the expert for `name`: --n (default `n`), --seed, --out.

    more: further options for whole numbers of at least 1, as name=(default, help).
    """
    parser = argparse.ArgumentParser(description=f"Make demonstrations for {name}.")
    parser.error = fail  # one line, no usage text
    counts = {"n": (n, "number of demonstrations"), **more}
    for option, (default, text) in counts.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first attempt")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name(f"{name}.npz"))
    args = parser.parse_args()
    for option in counts:
        if getattr(args, option) < 1:
            fail(f"--{option} is {getattr(args, option)}: expected at least 1")
    if not 0 <= args.seed < 2**31 - 10_000:
        fail(f"--seed is {args.seed}: expected 0 to 2^31 - 10,001")
    if args.out.suffix != ".npz":
        fail(f"--out is {args.out}: expected a name that ends in .npz")
    if not os.access(args.out.parent, os.W_OK):
        fail(f"--out is {args.out}: there is no writable folder {args.out.parent}")
    return args


def undrawn(name):
    """Make an environment that draws nothing, to save time."""
    try:
        env = envs.make_env(name)
    except envs.UserError as error:
        fail(str(error))
    blank = np.zeros((64, 64, 3), np.uint8)
    env.draw = lambda qpos: blank
    return env


def full_state(env, kind=None):
    """Return the full state, float64, of mujoco (default kind: for replays) or of Point."""
    if isinstance(env, envs.Point):
        return np.concatenate([env.qpos, env.velocity])
    import mujoco
    kind = kind or mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(env.model, kind))
    mujoco.mj_getState(env.model, env.data, state, kind)
    return state


def roll(env, seed, policy):
    """Play an episode of policy(t) -> the demonstration's arrays, and the infos of all steps.

        row t      0         1         2      ...     T
        qpos      q0   ->   q1   ->   q2      ...    qT        (T+1, nq)  q0: just after reset
        action         a0        a1           ...              (T, A)     a_t led to q_t+1
    """
    env.reset(seed=seed)
    start = full_state(env)
    qpos = [env.qpos]
    actions = []
    infos = []
    for t in range(env.episode_steps):
        actions.append(policy(t))
        infos.append(env.step(actions[-1])[4])
        qpos.append(env.qpos)
    demo = {
        "seed": seed,
        "start": start,
        "qpos": np.array(qpos, np.float32),
        "action": np.array(actions, np.float32),
    }
    return demo, infos


def save(path, name, env, demos):
    """Write demonstrations of `env`, called `name`, to `path`; first replay each from its seed.

    Seed and actions alone must reproduce the same states, or the file is worthless.
    """
    for demo in demos:
        again, _ = roll(env, demo["seed"], lambda t, demo=demo: demo["action"][t])
        if not np.array_equal(again["qpos"], demo["qpos"]):
            fail(f"seed {demo['seed']} does not replay: the simulator is not deterministic here")
    version = "" if isinstance(env, envs.Point) else metadata.version("mujoco")
    arrays = {key: np.stack([demo[key] for demo in demos]) for key in demos[0]}
    temporary = path.with_name(path.name + ".tmp")  # leave no half file
    with open(temporary, "wb") as file:
        np.savez_compressed(file, env=name, mujoco=version, **arrays)
    os.replace(temporary, path)

"""What the experts share: playing an episode, checking that it replays, writing the file."""
import argparse
import os
import sys
from pathlib import Path

import mujoco
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import envs                                               # noqa: E402  one folder up


def fail(message):
    """Print one line and exit with code 2."""
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


def arguments(name, n, **more):
    """The command line of the expert for `name`: --n (default `n`), --seed, --out, checked.

    more: further options for whole numbers of at least 1, as name=(default, help).
    """
    parser = argparse.ArgumentParser(description=f"Make demonstrations for {name}.")
    parser.error = fail                                                    # one line, no usage text
    counts = {"n": (n, "number of demonstrations"), **more}
    for option, (default, text) in counts.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=text)
    parser.add_argument("--seed", type=int, default=0, help="reset seed of the first attempt")
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


def undrawn(environment):
    """An environment of one of the project's own classes, without the time that drawing takes."""
    try:
        return type(f"Undrawn{environment.__name__}", (environment,),
                    {"_frame": lambda self: np.zeros((64, 64, 3), np.uint8)})()
    except envs.UserError as error:
        fail(str(error))


def full_state(model, data, kind=mujoco.mjtState.mjSTATE_INTEGRATION):
    state = np.empty(mujoco.mj_stateSize(model, kind))
    mujoco.mj_getState(model, data, state, kind)
    return state


def roll(env, seed, policy):
    """An episode of policy(t, data) -> the demo's arrays, and the infos of all steps.

        row t      0         1         2      ...     T
        qpos      q0   ->   q1   ->   q2      ...    qT        (T+1, nq)  q0: just after reset
        action         a0        a1           ...              (T, A)     a_t led to q_t+1
    """
    env.reset(seed=seed)
    start, qpos, actions, infos = full_state(env.model, env.data), [env.data.qpos.copy()], [], []
    for t in range(env.episode_steps):
        actions.append(policy(t, env.data))
        infos.append(env.step(actions[-1])[4])
        qpos.append(env.data.qpos.copy())
    return {"seed": seed, "start": start, "qpos": np.array(qpos, np.float32),
            "action": np.array(actions, np.float32)}, infos


def save(path, name, env, demos):
    """Write demos of `env`, called `name`, to `path`; first replay each from its seed.

    The file is worth nothing unless seed and actions alone bring the same states back.
    """
    for demo in demos:
        again, _ = roll(env, demo["seed"], lambda t, data: demo["action"][t])
        if not np.array_equal(again["qpos"], demo["qpos"]):
            fail(f"seed {demo['seed']} does not replay: the simulator is not deterministic here")
    arrays = {key: np.stack([demo[key] for demo in demos]) for key in demos[0]}
    temporary = path.with_name(path.name + ".tmp")                         # no half file is left
    with open(temporary, "wb") as file:
        np.savez_compressed(file, env=name, mujoco=mujoco.__version__, **arrays)
    os.replace(temporary, path)

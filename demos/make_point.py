"""Scripted expert that makes the demonstrations for the point robot.

    python demos/make_point.py --n 10 --seed 0 --out demos/point.npz

It steers to the next way point: before the gap, behind the gap, the goal. Each episode has its own
speed; only successful ones are kept. Follow this example for an expert of your own.
"""
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recording import arguments, fail, roll, save, undrawn  # noqa: E402  beside this file

import envs  # noqa: E402  one folder up

SPEED = (0.7, 0.9)  # of the top speed, one draw an episode
MARGIN = 8.0  # pixels from the wall's centre to the way points before and behind the gap


def waypoint(position):
    """Return the point (2,) to steer to from here."""
    x, y = position
    middle = (envs.WALL_LEFT + envs.WALL_RIGHT) / 2
    if x >= middle + MARGIN - 2:  # the wall is behind
        return np.array(envs.GOAL)
    lined_up = abs(y - envs.GAP_Y) < 0.5 * (envs.GAP - envs.ROBOT_RADIUS)
    inside = abs(x - middle) < MARGIN - 2
    side = 1 if lined_up or inside else -1
    return np.array([middle + side * MARGIN, envs.GAP_Y])


def expert(env, speed):
    """Return the action (2,) in the present state of Point. speed: pixels a step.

    It depends only on position and velocity, so any state will do.
    """
    offset = waypoint(env.position) - env.position
    distance = np.hypot(*offset)
    wanted = offset / (distance + 1e-9) * min(speed, 0.5 * distance)
    push = (wanted - envs.INERTIA * env.velocity) / envs.GAIN
    return np.clip(push, -1, 1).astype(np.float32)


def collect(env, n, seed):
    """Return `n` successful episodes: `seed` fixes their speeds and reset seeds."""
    rng = np.random.default_rng(seed)
    demos = []
    for _ in range(10 * n + 10):
        speed = rng.uniform(*SPEED) * envs.GAIN / (1 - envs.INERTIA)
        reset_seed = int(rng.integers(2**31))
        demo, infos = roll(env, reset_seed, lambda t, speed=speed: expert(env, speed))
        if infos[-1]["success"]:
            demos.append(demo)
        if len(demos) == n:
            return demos
    fail(f"the expert succeeded only {len(demos)} times in {10 * n + 10} attempts")


def main():
    args = arguments("point", 10)
    env = undrawn("point")
    save(args.out, "point", env, collect(env, args.n, args.seed))
    print(f"{args.n} demonstrations in {args.out}, {args.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

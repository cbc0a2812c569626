"""Milliseconds a frame: this project's kitchen renderer against FrankaKitchen's own, in one run.

    python results/render_speed.py [--frames 20] [--env baoding]

One JSON line. Baoding's has our physics and frame alone: there is no other renderer for it. Both
draw 64x64 pixels, each in a process of its own: two off-screen renderers in one process would draw
into whichever OpenGL context was made current last. The action is zero. Linux: on one core.
"""
import argparse
import json
import multiprocessing
import os
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))


def median_ms(call, frames):
    """Median wall time of `frames` calls, in ms; one call before them builds what is built once."""
    times = []
    for _ in range(frames + 1):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return round(float(np.median(times[1:])), 2)


def measure_ours(name, frames):
    import envs
    env = envs.make_env(name)
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape)
    return {"physics_ms": median_ms(lambda: env._step(action), frames),
            "ours_ms": median_ms(lambda: env.draw(env.data), frames),
            "gl_renderer": env.gl_renderer}


def measure_default(_, frames):
    import envs
    envs.choose_gl()                            # before mujoco is imported: it picks EGL or OSMesa
    import gymnasium as gym
    import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    env = gym.make("FrankaKitchen-v1", render_mode="rgb_array", width=64, height=64)
    env.reset(seed=0)
    shape = env.render().shape
    return {"default_ms": median_ms(env.render, frames), "default_shape": shape}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=20, help="frames of each renderer")
    parser.add_argument("--env", default="kitchen", choices=("kitchen", "baoding"))
    args, result = parser.parse_args(), {}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})             # workers inherit it
    for measure in (measure_ours, measure_default) if args.env == "kitchen" else (measure_ours,):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result |= pool.apply(measure, (args.env, args.frames))
    if "default_ms" in result:
        result["times_faster"] = round(result["default_ms"] / result["ours_ms"], 1)
    print(json.dumps({"env": args.env, **result, "frames": args.frames}))


if __name__ == "__main__":
    main()

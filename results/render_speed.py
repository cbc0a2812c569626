"""Milliseconds a frame: this project's kitchen renderer against FrankaKitchen's own, in one run.

    python results/render_speed.py [--frames 20]

One JSON line. Both draw 64x64 pixels of the same states, in turn, in this process.
"""
import argparse
import json
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--frames", type=int, default=20, help="frames of each renderer")
    frames = parser.parse_args().frames
    import envs
    ours = envs.make_env("kitchen")             # chooses the GL library, so it comes first
    ours.reset(seed=0)
    import gymnasium as gym
    default = gym.make("FrankaKitchen-v1", render_mode="rgb_array", width=64, height=64)
    default.reset(seed=0)
    default.render()                            # the first frame also builds its renderer
    times = {"physics": [], "ours": [], "default": []}
    for _ in range(frames):
        action = ours.unwrapped.action_space.sample()
        for name, call in (("physics", lambda: ours._step(action.astype(np.float64))),
                           ("ours", lambda: ours.draw(ours.data)), ("default", default.render)):
            start = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - start))
    medians = {f"{name}_ms": round(float(np.median(t)), 2) for name, t in times.items()}
    faster = round(medians["default_ms"] / medians["ours_ms"], 1)
    print(json.dumps({**medians, "times_faster": faster,
                      "frames": frames, "gl_renderer": ours.gl_renderer}))


if __name__ == "__main__":
    main()

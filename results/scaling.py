"""How the cost of one update grows with K, H, B, L and deter, each alone, as numbers and a plot.

    python results/scaling.py --out results/scaling.png [--preset small ... any flag of cmil.py]

One JSON line a point: its time, the time of the unchanged preset measured just before (a shared
machine drifts), and their ratio, which is what the picture shows.
"""
import json
import pathlib
import sys

import numpy as np

sys.path[:0] = map(str, pathlib.Path(__file__).parents[:2])
import bench  # noqa: E402
import cmil  # noqa: E402

VALUES = {"members": (2, 5, 10, 20, 40), "horizon": (4, 8, 16, 32), "batch": (4, 8, 16, 32),
          "length": (8, 16, 32, 64), "deter": (64, 128, 256, 512, 1024)}


def draw(points, out):
    """Cost over each field's value, both on logarithmic axes; grey: in proportion to the value.
    Above each: what every doubling costs, as a power of the value (1 is linear)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, len(VALUES), figsize=(15, 3.2), sharey=True)
    for ax, (field, values) in zip(axes, VALUES.items()):
        cost = np.array([points[field, v] for v in values])
        ax.loglog(values, cost, "ko-")
        ax.loglog(values, cost[0] * np.array(values) / values[0], color="0.7", linestyle="--")
        powers = np.diff(np.log(cost)) / np.diff(np.log(values))
        ax.set(xlabel=field, title="powers " + " ".join(f"{p:.1f}" for p in powers))
        ax.set_xticks(values, map(str, values))
        ax.minorticks_off()
    axes[0].set_ylabel("cost of an update / small preset's")
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def main():
    flags = sys.argv[1:]
    out = flags.pop(flags.index("--out") + 1) if "--out" in flags else "scaling.png"
    explicit, _ = cmil.parse([f for f in flags if f != "--out"])
    base, points = {"preset": "small", "logdir": "unused", **explicit}, {}

    def measure(**change):
        agent, replay = bench.agent_on_noise(cmil.make_config({**base, **change}))
        return 1000 * bench.median_seconds(agent, replay, updates=9)
    for field, values in VALUES.items():
        for value in values:
            unchanged, ms = measure(), measure(**{field: value})
            points[field, value] = ms / unchanged
            print(json.dumps({field: value, "ms": round(ms, 1), "preset_ms": round(unchanged, 1),
                              "ratio": round(ms / unchanged, 3)}), flush=True)
    draw(points, out)


if __name__ == "__main__":
    main()

"""Load demonstrations for the environments of envs.py.

    episodes = load_demos("", "kitchen")                        the environment's own
    episodes = load_demos("reacher.npz", "Reacher-v5", n=10)    a file, a folder, "minari:DATASET"

A STATE file (demos/kitchen.npz) holds positions and actions; load_demos draws it. A PIXEL file
holds images and actions in one of two orders, as their numbers show. demos/README.md describes
both. The result is always

    row t     0     1     2    ...   T
    image    x0 -> x1 -> x2   ...   xT     (T+1, 64, 64, 3) uint8
    action    0    a0    a1   ... aT-1     (T+1, A) float32 in [-1, 1]: action[t] led to image[t]
"""
import contextlib
import sys
from pathlib import Path

import numpy as np

import envs

STATE_KEYS = ("env", "mujoco", "seed", "start", "qpos", "action")
ROUNDING = 1e-3  # share of the range by which an action may be outside its bounds

def load_demos(path, name, n=0, min_steps=1, **options):
    """Load demonstrations of the environment `name` -> list of dicts: image, action (as above) and
    success (bool, or None if not known).

    path: a file, a folder of files, "minari:DATASET", or "" for the environment's own. n: how many
    (0: all). options: as for make_env. Raise UserError, naming the file, for bad input and for an
    episode of fewer than `min_steps` steps. Print a line for what is guessed or lost."""
    path = path or Path(__file__).parent / "demos" / f"{name}.npz"
    episodes = []
    notes = []
    with contextlib.closing(envs.make_env(name, **options)) as env:
        for source in _sources(path):
            left = n - len(episodes) if n else None
            if left == 0:
                break
            try:
                episodes += _load(source, env, name, left, notes)
            except envs.UserError as error:
                raise envs.UserError(f"{source}: {error}") from error
    count = len(episodes)
    _expect(count >= n, f"{path}: holds {count} demonstrations: --num-demos is {n}")
    steps = min(len(episode["action"]) for episode in episodes) - 1
    found = f"{path}: an episode has {steps} steps"
    _expect(steps >= min_steps, f"{found}: expected {min_steps} or more")
    for note in sorted(set(notes)):
        _say(f"{path}: {notes.count(note)} of {count} demonstrations {note}")
    return episodes

def _say(text):
    print(f"demonstrations: {text}", file=sys.stderr, flush=True)

def _expect(good, otherwise):
    if not good:
        raise envs.UserError(otherwise)

def _sources(path):
    """List what to read: files, or the name of a Minari dataset."""
    if str(path).startswith("minari:"):
        return [path]
    path = Path(path).expanduser()
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    good = path.exists() and files
    _expect(good, f"{path}: not there; give --demos an .npz file or a folder of them")
    return files

def _load(source, env, name, limit, notes):
    """Load up to `limit` episodes of one source."""
    if str(source).startswith("minari:"):
        arrays = _read_minari(source, limit)
    else:
        arrays = _read_npz(source)
    if "qpos" in arrays:
        return _state_episodes(arrays, env, name, limit, notes)
    recorded = _split(env, **arrays)[:limit]
    return [_pixel_episode(env, *episode, notes) for episode in recorded]

def _read_npz(file):
    """Read the arrays of a file by name."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            wanted = STATE_KEYS if "qpos" in stored.files else ("image", "action")
            missing = [key for key in wanted if key not in stored.files]
            known = (*wanted, "episode_ends", "terminated")
            if stored.zip.testzip():  # numpy misses some damage
                raise ValueError("checksum")
            arrays = {key: stored[key] for key in known if key in stored.files}
    except Exception as error:  # damaged files raise many kinds
        text = " ".join(str(error).split())
        raise envs.UserError(f"not a readable .npz file ({text})") from error
    _expect(not missing, f"has no {', '.join(missing)}: expected {', '.join(wanted)}")
    return arrays

def _in_bounds(action, low, high):
    """Return actions as float64 if they are finite and within their bounds, up to rounding."""
    _expect(np.isfinite(action).all(), "action has NaN or infinity: fix it")
    low = np.broadcast_to(low, action.shape)
    high = np.broadcast_to(high, action.shape)
    outside = np.maximum(low - action, action - high) / (high - low)
    i = np.unravel_index(outside.argmax(), outside.shape)
    bounds = f"[{low[i]:.6g}, {high[i]:.6g}]"
    found = f"an action is {action[i]:.6g}, outside its bounds {bounds}"
    _expect(outside[i] <= ROUNDING, f"{found}: record it in these units, or clip it")
    return np.clip(action, low, high, dtype=np.float64)

def _form(name, array):
    return f"{name} is {array.dtype} {array.shape}"

def _state_episodes(arrays, env, name, limit, notes):
    """Draw up to `limit` episodes of a state file."""
    made_for = str(arrays["env"])
    good = made_for == name and name in envs.BUILT_IN
    _expect(good, f"was made for {made_for}, not {name}")
    env.reset(seed=0)
    qpos = arrays["qpos"]
    action = arrays["action"]
    nq = len(env.qpos)
    good = qpos.dtype.kind == action.dtype.kind == "f"
    good = good and qpos.ndim == 3 and qpos.shape[2] == nq and action.size
    good = good and action.shape == (len(qpos), qpos.shape[1] - 1, env.action_dim)
    found = f"{_form('qpos', qpos)} and {_form('action', action)}"
    _expect(good, f"{found}: expected floats (N, T+1, {nq}) and (N, T, {env.action_dim})")
    _expect(np.isfinite(qpos).all(), "qpos has NaN or infinity: fix it")
    qpos = qpos[:limit, : env.episode_steps + 1]
    action = _in_bounds(action, -1, 1)[:limit]
    if isinstance(env, envs.Simulated):
        _say(f"drawing {len(action)} demonstrations")  # takes seconds without a GPU
    episodes = []
    for positions, actions in zip(qpos, action, strict=True):
        image = np.stack([env.draw(row) for row in positions])
        success = len(env.tasks_in(positions)) == len(env.tasks)
        if not success:
            notes.append(f"do not complete the task within {env.episode_steps} steps")
        episodes.append(_fit(image, actions, False, success, env, notes))
    return episodes

def _split(env, image, action, episode_ends=None, terminated=None):
    """Split recorded pixels into episodes -> list of (image, action, terminated or None)."""
    A = env.action_dim
    good = image.dtype == np.uint8 and action.dtype.kind == "f"
    good = good and image.ndim in (4, 5) and action.ndim == image.ndim - 2
    good = good and image.shape[-1] == 3 and action.shape[-1] == A
    found = f"{_form('image', image)} and {_form('action', action)}"
    _expect(good, f"{found}: expected uint8 pictures (T+1, height, width, 3) from 0 to 255 "
            f"and floats (T, {A})")
    if image.ndim == 5:  # (N, T+1, height, width, 3)
        episode_ends = image.shape[1] * np.arange(1, len(image) + 1)
        image = image.reshape(-1, *image.shape[2:])
        action = action.reshape(-1, A)
    rows = len(image)
    ends = np.atleast_1d(rows if episode_ends is None else episode_ends)
    good = ends.dtype.kind in "iu" and ends.size and ends[-1] == rows
    good = good and (np.diff(ends, prepend=0) > 1).all()
    _expect(good, f"episode_ends is {ends}: expected the number of images up to each "
            f"episode's end, {rows} at the last")
    fewer = (rows - len(action)) / len(ends)  # 1: Gymnasium's order, 0: Dreamer's
    found = f"{len(ends)} episode(s) have {rows} images and {len(action)} actions"
    _expect(fewer in (0, 1), f"{found}: expected one action fewer than images in each "
            "(Gymnasium's order) or as many (Dreamer's)")
    cuts = ends[:-1]
    action_cuts = cuts - int(fewer) * np.arange(1, len(ends))
    images = np.split(image, cuts)
    actions = np.split(action, action_cuts)
    if terminated is None:
        flags = [None] * len(ends)
    elif terminated.size == len(ends):
        flags = terminated.reshape(-1).astype(bool).tolist()
    else:  # one an action
        found = f"terminated has {terminated.size} entries"
        _expect(terminated.size == len(action), f"{found}: expected {len(ends)}")
        parts = np.split(terminated.reshape(-1).astype(bool), action_cuts)
        flags = [bool(part.any()) for part in parts]
    return list(zip(images, actions, flags, strict=True))

def _read_minari(source, limit):
    """Read up to `limit` episodes of a Minari dataset -> arrays as in a pixel file."""
    try:
        import minari
        dataset = minari.load_dataset(source.removeprefix("minari:"))
    except ImportError as error:
        raise envs.UserError(f'{error}: pip install "minari[all]"') from error
    except FileNotFoundError as error:
        raise envs.UserError("not here; minari download it, or correct its name") from error
    if getattr(dataset.storage, "jpeg_encoding", False):
        _say(f"{source}: holds lossy JPEG: a discriminator can separate it from frames")
    arrays = {"image": [], "action": [], "terminated": []}
    for episode in dataset.iterate_episodes(range(dataset.total_episodes)[:limit]):
        seen = episode.observations
        parts = list(seen.values()) if isinstance(seen, dict) else [seen]
        pictures = [part for part in parts if np.ndim(part) == 4]
        _expect(len(pictures) == 1, f"observes {len(pictures)} pictures: expected one")
        arrays["image"].append(pictures[0])
        arrays["action"].append(episode.actions)
        arrays["terminated"].append(episode.terminations)
    ends = np.cumsum([len(image) for image in arrays["image"]])
    joined = {key: np.concatenate(parts) for key, parts in arrays.items()}
    return {"episode_ends": ends, **joined}

def _pixel_episode(env, image, action, terminated, notes):
    """Bring one recorded episode, of either order, into the learner's units and length."""
    low = np.array(env.action_low)
    high = np.array(env.action_high)
    if len(action) == len(image):
        _expect(not action[0].any(), "row 0 of action is not zero, though it led to no image; "
                "if action[t] was chosen at image[t], drop each episode's last action "
                "and give the environment's own units")
        action = _in_bounds(action[1:], -1, 1)
        if (low != -1).any() or (high != 1).any():
            notes.append("are in Dreamer's order: actions are read as scaled to [-1, 1]")
    else:
        action = _in_bounds(action, low, high)
        action = (action - (low + high) / 2) / ((high - low) / 2)
    if isinstance(env, envs.Simulated):
        notes.append("hold another renderer's pixels: a discriminator can separate them")
    ended = isinstance(env, envs.Generic) and terminated is not False
    if ended and terminated is None and len(action) < env.episode_steps:
        notes.append("are short, without `terminated`: taken as ended by the environment")
    image = image[: env.episode_steps + 1]
    image = np.stack([envs.resize(frame) for frame in image])
    return _fit(image, action, ended, None, env, notes)

def _fit(image, action, ended, success, env, notes):
    """Fit images (t+1, 64, 64, 3) and actions (t, A) to the environment's length T.
    An episode that the environment `ended` goes on as Generic continues one: with its last frame
    and no action. A shorter recording stays short."""
    steps = env.episode_steps
    if len(action) > steps and success is None:
        notes.append(f"are cut to {steps} steps, and may lose their success")
    if len(action) < steps and not ended:
        notes.append(f"stop before step {steps}: only the policy shows the rest")
    action = np.pad(action[:steps], ((1, 0), (0, 0)))
    missing = steps + 1 - len(action)
    if missing and ended:
        image = np.pad(image, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
        action = np.pad(action, ((0, missing), (0, 0)))
    return {"image": image, "action": action.astype(np.float32), "success": success}

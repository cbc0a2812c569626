"""Environments that are seen through 64x64 pixels, and the demonstrations that go with them.

    env = make_env("point")                    "kitchen", "point", any Gymnasium id or "module:Id"
    obs, info = env.reset(seed=0)              obs (64, 64, 3) uint8
    obs, reward, _, over, info = env.step(a)   a (A,) in [-1, 1];  over is True exactly at step T
    vec = make_vec("kitchen", 5)               the same, five times, each in a process of its own
    episodes = load_demos("", "kitchen")       images and actions of the demonstrations

All environments are FIXED-LENGTH: T steps an episode, whatever happens in it. An episode that ended
with success or failure would tell adversarial imitation how long an expert episode is, which is a
reward by itself. `info` says how the task goes: `success`, `tasks`, `n_tasks`, `padded`.

Reading order: the fixed-length base class; Point, the smallest environment, and its expert (the
example to follow for an environment of one's own); rendering and the Kitchen; any other Gymnasium
environment; making them, alone or in worker processes; loading demonstrations.
This file never imports torch, and mujoco only when an environment needs it: MUJOCO_GL, the choice
of the OpenGL library, must be made before mujoco's first import.
"""

import atexit
import contextlib
import copy
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from importlib import metadata
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import _async_worker

IMAGE = 64  # pixels: width and height of every observation


class UserError(ValueError):
    """A mistake that the user can repair: one line saying what is wrong, where, and what to do."""


def trouble(error):
    """An exception in one line with a remedy. Raises it again if it is a mistake of the code."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return (f"{error.filename or 'a file'}: {error.strerror or error}; mend that, or give "
                "another folder")
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    lacks = "out of memory", "allocate", "alloc_failed", "overflow"  # torch has no name for it
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and (
            any(words in repr(error).lower() for words in lacks)):
        return (f"out of memory ({str(error)[:200]}); take fewer --steps or --num-envs, a smaller "
                "--batch or a smaller --preset, in another --logdir")
    raise error


class WorkerDied(UserError):
    """An environment's process was killed, failed or hangs. Its vector is closed; make another."""


def _say(text):
    print(f"envs: {text}", file=sys.stderr, flush=True)


def say(text):
    """Print at once. A reader that has gone away (tee, head) is no reason to end a run."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ------------------------------------------------------------------------ the fixed-length base


class PixelEnv(gym.Env):
    """What all environments here share: pixels, checked actions, episodes of exactly T steps.

    A subclass gives `action_dim` and four small methods: `_reset(seed)` starts an episode,
    `_step(action)` returns the task's own reward, `_frame()` draws the (64, 64, 3) uint8 picture of
    the present state, and `_tasks()` names the tasks that were completed so far.
    Attributes: `episode_steps` (T), `action_dim` (A), `gl_renderer` (str, "" where none is used).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    gl_renderer = ""

    def __init__(self, action_dim, episode_steps, n_goals=1, render_mode="rgb_array"):
        if not isinstance(episode_steps, (int, np.integer)) or episode_steps < 1:
            raise UserError(f"episode_steps is {episode_steps!r}: expected a whole number >= 1")
        self.action_dim, self.episode_steps = int(action_dim), int(episode_steps)
        self.n_goals, self.render_mode = n_goals, render_mode
        self.observation_space = gym.spaces.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (self.action_dim,), np.float32)
        self._t, self._image = None, None  # no episode yet

    def reset(self, *, seed=None, options=None):
        """Start an episode -> (image (64, 64, 3) uint8, info). The seed decides all of it."""
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2 ** 31))
        self._t = 0
        self._reset(seed)
        self._image = self._frame()
        return self._image.copy(), self._info()

    def step(self, action):
        """One step with action (A,) in [-1, 1] -> (image, reward, False, t == T, info).

        Raises UserError for an action of another shape, outside [-1, 1] or not finite, and for a
        step outside an episode: simulators take such things silently and break much later.
        """
        if self._t is None or self._t >= self.episode_steps:
            raise UserError(f"step() after the {self.episode_steps} steps of an episode, or before "
                            "the first: call reset()")
        reward = self._step(self._checked(action))
        self._t += 1
        self._image = self._frame()
        return (self._image.copy(), float(reward), False, self._t == self.episode_steps,
                self._info())

    def render(self):
        """The present observation, (64, 64, 3) uint8."""
        return self._image.copy()

    def _checked(self, action):
        # float32 first: a recorded action (float32) then replays to exactly the same state.
        action = np.asarray(action, np.float32)
        if action.shape != (self.action_dim,):
            raise UserError(f"action has shape {action.shape}: expected ({self.action_dim},)")
        if not np.isfinite(action).all():
            raise UserError(f"action is not finite: {action}")
        if np.abs(action).max() > 1 + 1e-6:
            raise UserError(f"action is outside [-1, 1]: {action}")
        return np.clip(action, -1, 1).astype(np.float64)

    def _info(self):
        tasks = tuple(self._tasks())
        return {"success": len(tasks) == self.n_goals, "tasks": tasks, "n_tasks": len(tasks),
                "padded": False}


# ------------------------------------------------------------------------------- Point
#
# A disc in a walled room, seen from above, drawn with numpy. Lengths are in pixels, y points down.
# Everything that decides how hard the task is stands here.

POINT_STEPS = 50
ROBOT_RADIUS, GOAL_RADIUS = 3.5, 4.0
START_X, START_Y = (8.0, 28.0), (8.0, 56.0)  # uniform: most of the left chamber
BORDER = 2.0  # thickness of the outer wall
WALLS = ((36.0, 40.0, 20.0),)  # of each dividing wall: x from, x to, gap centre y
GAP = 7.0  # half-width of a gap; the robot passes with GAP - ROBOT_RADIUS to spare on either side
GOAL = (52.0, 46.0)
INERTIA, GAIN = 0.7, 1.25  # v' = INERTIA v + GAIN a; top speed GAIN / (1 - INERTIA) pixels a step
PROCESS_NOISE = 0.05  # std of the random part of v', pixels a step
EXPERT_SPEED = (0.7, 0.9)  # of the top speed, one draw an episode
EXPERT_MARGIN = 8.0  # the expert lines up with a gap this far before and after the wall's centre

FLOOR, WALL, GREEN, ORANGE = (30, 34, 48), (170, 174, 186), (70, 220, 90), (255, 150, 30)


def _wall_boxes():
    """The dividing walls as boxes (2 x walls, 4): x0, y0, x1, y1 of the parts beside the gaps."""
    parts = [((x0, 0.0, x1, y - GAP), (x0, y + GAP, x1, float(IMAGE))) for x0, x1, y in WALLS]
    return np.array(parts).reshape(-1, 4)


def _draw_disc(image, centre, radius, colour):
    """Draw a disc with soft edges into `image` (H, W, 3) uint8: a shift of .1 pixel is visible."""
    x, y = centre
    x0, y0 = max(int(x - radius - 1), 0), max(int(y - radius - 1), 0)
    patch = image[y0:int(y + radius + 2), x0:int(x + radius + 2)]
    rows = np.arange(y0, y0 + patch.shape[0])[:, None] + 0.5 - y
    columns = np.arange(x0, x0 + patch.shape[1])[None] + 0.5 - x
    cover = np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1)[..., None]
    patch[:] = np.round(patch * (1 - cover) + np.array(colour) * cover)


class Point(PixelEnv):
    """A point robot must pass a gap and turn to the goal, never touching a wall.

    Two actions: the push along x and y. The robot has inertia, so one frame does not tell its
    velocity. Touching a wall stops the robot there and fails the episode, which goes on. Success is
    final: at the goal with no touch before. info also has `touched` (bool).
    `position` and `velocity` (2,) float64 are the state, in pixels and pixels a step.
    """

    BOXES = _wall_boxes()

    def __init__(self, tasks=None, episode_steps=None, render_mode="rgb_array"):
        _choose_tasks(tasks, ("goal",), "point")
        super().__init__(2, episode_steps or POINT_STEPS, 1, render_mode)
        self._room = np.empty((IMAGE, IMAGE, 3), np.uint8)
        self._room[:] = WALL
        inner = int(BORDER)
        self._room[inner:-inner, inner:-inner] = FLOOR
        for x0, y0, x1, y1 in self.BOXES.round().astype(int):
            self._room[y0:y1, x0:x1] = WALL
        _draw_disc(self._room, GOAL, GOAL_RADIUS, GREEN)

    def _reset(self, seed):
        self.position = self.np_random.uniform(*zip(START_X, START_Y))
        self.velocity = np.zeros(2)
        self.touched = self.arrived = False

    def _step(self, action):
        noise = PROCESS_NOISE * self.np_random.normal(size=2)
        self.velocity = INERTIA * self.velocity + GAIN * action + noise
        for _ in range(4):  # small substeps: no jumping across a wall, and sliding along it
            for axis in range(2):
                moved = self.position.copy()
                moved[axis] += self.velocity[axis] / 4
                if self._touches(moved):
                    self.velocity[axis], self.touched = 0.0, True
                else:
                    self.position = moved
        at_goal = np.hypot(*(self.position - GOAL)) < GOAL_RADIUS
        self.arrived = self.arrived or bool(at_goal and not self.touched)
        return float(self.arrived)

    def _touches(self, position):
        low, high = BORDER + ROBOT_RADIUS, IMAGE - BORDER - ROBOT_RADIUS
        if position.min() < low or position.max() > high:
            return True
        nearest = np.clip(position, self.BOXES[:, :2], self.BOXES[:, 2:])  # (walls, 2)
        return bool((((nearest - position) ** 2).sum(1) < ROBOT_RADIUS ** 2).any())

    def _frame(self):
        image = self._room.copy()
        _draw_disc(image, self.position, ROBOT_RADIUS, ORANGE)
        return image

    def _tasks(self):
        return ("goal",) if self.arrived else ()

    def _info(self):
        return {**super()._info(), "touched": self.touched}


def point_expert(env, speed):
    """The expert's action (2,) in the present state of Point: steer to the next way point.

    It looks at position and velocity only, so it can be asked in any state. `speed`: pixels a step.
    """
    (x, y), target = env.position, np.array(GOAL)
    for x0, x1, gap in WALLS:
        middle = (x0 + x1) / 2
        if x < middle + EXPERT_MARGIN - 2:  # this wall is still ahead
            lined_up = abs(y - gap) < 0.5 * (GAP - ROBOT_RADIUS)
            ahead = lined_up or abs(x - middle) < EXPERT_MARGIN - 2
            target = np.array([middle + EXPERT_MARGIN * (1 if ahead else -1), gap])
            break
    offset = target - env.position
    distance = np.hypot(*offset)
    wanted = offset / (distance + 1e-9) * min(speed, 0.5 * distance)
    return np.clip((wanted - INERTIA * env.velocity) / GAIN, -1, 1).astype(np.float32)


def point_demos(n, seed=0, **options):
    """`n` successful expert episodes of Point (see load_demos for their form), always the same."""
    env, rng, episodes = make_env("point", **options), np.random.default_rng(seed), []
    for _ in range(10 * n + 10):
        if len(episodes) == n:
            return episodes
        speed = rng.uniform(*EXPERT_SPEED) * GAIN / (1 - INERTIA)
        image, info = env.reset(seed=int(rng.integers(2 ** 31)))
        images, actions, over = [image], [np.zeros(2, np.float32)], False
        while not over:
            actions.append(point_expert(env, speed))
            image, _, _, over, info = env.step(actions[-1])
            images.append(image)
        if info["success"]:
            episodes.append({"image": np.stack(images), "action": np.stack(actions),
                             "tasks": info["tasks"], "success": True})
    raise UserError(f"point: the expert hardly ever arrives within {env.episode_steps} steps; "
                    f"give at least {POINT_STEPS} episode steps")


# ------------------------------------------------------------------------------- rendering
#
# ONE function, render_state, draws the agent's frames and the demonstrations': a discriminator
# would soon tell two renderers apart, and learn that instead of the task.
# What makes it fast without a GPU: no shadow maps, reflections or multisampling, and shapes no
# finer than 64 pixels can show (a pixel is 2 cm wide in the kitchen). 2x2 samples a pixel cost
# little, for the time goes into the shapes' corners, and keep the thin gripper clear.

SUPERSAMPLE = 2
FINE_MESH = 2000    # only meshes of more faces are simplified
GL_TRIAL = 60       # seconds after which a trial of an OpenGL library has failed
RENDER_STYLE = (f"{SUPERSAMPLE}x{SUPERSAMPLE} samples, no shadows or reflections, float32 qpos, "
                f"lamp, of {FINE_MESH}, one light above the hand")

_screens = {}  # one Screen for each model and camera in this process


@functools.lru_cache(maxsize=None)
def _overlap(size):
    """(IMAGE, size): how much of output pixel i is covered by input pixel j; rows sum to 1."""
    edge = np.linspace(0, size, IMAGE + 1)[:, None]
    pixel = np.arange(size)
    cover = np.clip(np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel), 0, None)
    return (cover / cover.sum(1, keepdims=True)).astype(np.float32)


def resize(images):
    """Area-resize images (..., H, W, 3) uint8 to (..., 64, 64, 3) uint8."""
    *lead, height, width, _ = images.shape
    if (height, width) == (IMAGE, IMAGE):
        return images
    if height % IMAGE == width % IMAGE == 0:  # whole blocks: sums, far faster than matrices
        blocks = images.reshape(*lead, IMAGE, height // IMAGE, IMAGE, width // IMAGE, 3)
        area = height // IMAGE * (width // IMAGE)
        total = blocks.sum(-4, dtype=np.uint32).sum(-2, dtype=np.uint32)
        return ((total + area // 2) // area).astype(np.uint8)
    rows = _overlap(height) @ images.reshape(*lead, height, width * 3).astype(np.float32)
    both = _overlap(width) @ rows.reshape(*lead, IMAGE, width, 3)
    return np.rint(both).astype(np.uint8)


@functools.lru_cache(maxsize=None)
def choose_gl(required=True):
    """Set MUJOCO_GL to EGL or else OSMesa, by trying them, unless it is set; workers inherit it.

    Raises UserError if rendering is `required` and does not work. The trial is a process of its
    own: an OpenGL library that failed to load would spoil the next choice in this one.
    """
    given, worker = os.environ.get("MUJOCO_GL"), multiprocessing.current_process().daemon
    if not sys.platform.startswith("linux") or (given and (worker or not required)):
        return
    trial = "from mujoco import *; Renderer(MjModel.from_xml_string('<mujoco/>'), 64, 64).render()"
    for backend in [given] if given else ["egl", "osmesa"]:
        with contextlib.suppress(subprocess.TimeoutExpired):               # a driver that hangs
            answer = subprocess.run([sys.executable, "-c", trial], capture_output=True,
                                    env={**os.environ, "MUJOCO_GL": backend}, timeout=GL_TRIAL)
            if answer.returncode == 0:
                os.environ["MUJOCO_GL"] = backend
                return
    if required:
        tried = f"MUJOCO_GL={given} (unset it?) fails" if given else "EGL and OSMesa both fail"
        raise UserError(f"cannot render: {tried} on this machine; install an OpenGL library "
                        "(Debian: apt install libegl1 libgl1 libosmesa6)")


def simplify_meshes(model, cell, least):
    """Merge a mesh's corners within cubes of `cell` metres, in place, to draw it faster.

    Only meshes of more than `least` faces and without a texture. Of each cube's corners the first
    stands for all. Faces that lose their area this way, and second copies of a face, go. (The
    robot's nine links have 134,000 of the kitchen's 140,000 faces.)
    """
    for mesh in np.flatnonzero((model.mesh_facenum > least) & (model.mesh_texcoordadr < 0)):
        first, number = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        start, corners = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
        cube = np.floor(model.mesh_vert[start:start + corners] / cell)
        _, representative, member = np.unique(cube, axis=0, return_index=True, return_inverse=True)
        face = representative[member.reshape(-1)][model.mesh_face[first:first + number]]  # (n, 3)
        _, kept = np.unique(np.sort(face, 1), axis=0, return_index=True)
        kept = kept[[len(set(corner)) == 3 for corner in face[kept].tolist()]]
        for array, rows in ((model.mesh_face, face[kept]), (
                model.mesh_facenormal, model.mesh_facenormal[first + kept])):
            array[first:first + len(kept)] = rows
        model.mesh_facenum[mesh] = len(kept)


class Screen:
    """An off-screen renderer for one model, camera and detail; `name`: which OpenGL draws."""

    def __init__(self, model, camera, detail):
        import mujoco
        size, model = IMAGE * SUPERSAMPLE, copy.copy(model)  # the simulation keeps its own shapes
        simplify_meshes(model, detail["mesh"], FINE_MESH)
        quality = model.vis.quality
        quality.offsamples = quality.shadowsize = 0
        quality.numslices, quality.numstacks, quality.numquads = detail["round"]
        model.vis.global_.offwidth = model.vis.global_.offheight = size
        backend = os.environ.get("MUJOCO_GL")
        if backend in ("egl", "osmesa"):  # mujoco may have been imported before this was chosen
            mujoco.gl_context.GLContext = importlib.import_module(f"mujoco.{backend}").GLContext
        self.model, self.renderer = model, mujoco.Renderer(model, size, size)
        from OpenGL import GL
        self.name = b"; ".join(map(GL.glGetString, (GL.GL_RENDERER, GL.GL_VERSION))).decode()
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[int(flag)] = 0
        self.camera = mujoco.MjvCamera()
        for key, value in camera.items():
            setattr(self.camera, key, value)
        self.users = set()  # id of each model that was drawn: the last one to go closes the screen


def _screen(model, camera, detail):
    """The screen for this model, shared by all equal models of this process."""
    key = bytes(model.names), model.nq, repr((camera, detail))
    if key not in _screens:
        _screens[key] = Screen(model, camera, detail)
        atexit.register(_release)  # later than the OpenGL library's own handler, so it runs before
    _screens[key].users.add(id(model))
    return _screens[key]


def _release(model=None):
    """Close the screens that only `model` uses; all of them if it is None."""
    for key, screen in list(_screens.items()):
        screen.users.discard(id(model))
        if model is None or not screen.users:
            _screens.pop(key).renderer.close()


def render_state(model, data, camera, detail, lights_off=()):
    """Draw the positions `data.qpos` of a mujoco model -> (64, 64, 3) uint8.

    camera: dict of distance (m), lookat (m), azimuth and elevation (degrees). detail: dict of mesh
    (m: corners nearer than about this become one) and round (into how many slices, stacks and quads
    other shapes go). lights_off: names.
    After a step the bodies lag a substep behind qpos, so their places are computed anew: with
    mj_kinematics, which leaves the physics as it is (mj_forward would not). They are computed from
    qpos as float32, the form in which demonstrations are stored, so that both look the same to the
    last bit.
    """
    import mujoco
    screen, exact = _screen(model, camera, detail), data.qpos.copy()
    data.qpos[:] = exact.astype(np.float32)
    mujoco.mj_kinematics(model, data)
    mujoco.mj_camlight(model, data)
    screen.model.light_active[:] = 1
    for name in lights_off:
        screen.model.light(name).active = 0
    screen.renderer.update_scene(data, screen.camera)
    data.qpos[:] = exact
    return resize(screen.renderer.render())


# ------------------------------------------------------------------------------- Kitchen


class Simulated(PixelEnv):
    """A PixelEnv drawn from a mujoco simulation.

    `model` and `data` are mujoco's own, live objects. A subclass sets them, its `CAMERA` and
    `DETAIL` (see render_state), and says with `tasks_in(qpos)` which tasks an episode with these
    positions (rows, nq) completes; row 0 is that of the reset.
    """

    CAMERA, DETAIL = {}, {}

    def draw(self, data):
        """Picture (64, 64, 3) uint8 of the positions in `data`, an mjData of this model."""
        return render_state(self.model, data, self.CAMERA, self.DETAIL)

    def _frame(self):
        return self.draw(self.data)

    @property
    def gl_renderer(self):
        """Which OpenGL draws the frames: "llvmpipe (...); 4.5 ... Mesa 22.3.6"."""
        return _screen(self.model, self.CAMERA, self.DETAIL).name

    def close(self):
        _release(self.model)


def _import_robotics():
    """Register FrankaKitchen-v1; UserError without mujoco or a way to render."""
    for package in ("mujoco", "gymnasium_robotics"):
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is not installed: pip install -r requirements.txt")
    choose_gl()
    with contextlib.redirect_stderr(io.StringIO()):  # a notice about environments not used here
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)


class Kitchen(Simulated):
    """FrankaKitchen-v1 seen through pixels: nine joint velocities, four tasks, 280 steps of 0.08 s.

    tasks: "microwave+kettle" and so on; None means all four. With a single task an episode has 75
    steps. Success: all chosen tasks were completed at some step of the episode; a task is completed
    when its joints are within 0.3 of its goal. reward: how many are so now.
    robot_noise_ratio: the noise of the measured joints, which enters the servo. v1's default is
    0.01; the paper's authors used 0.1.
    """

    TASKS = ("microwave", "kettle", "light switch", "slide cabinet")
    CAMERA = {"distance": 1.86, "lookat": (-0.3, 0.5, 2.0), "azimuth": 90, "elevation": -60}
    DETAIL = {"mesh": 0.01, "round": (12, 2, 1)}
    LAMP_FREE = -0.018  # m: at this position of the block its shadow leaves the stove

    def __init__(self, tasks=None, episode_steps=None, robot_noise_ratio=0.01,
                 render_mode="rgb_array"):
        self.chosen = _choose_tasks(tasks, self.TASKS, "kitchen")
        steps = episode_steps or (75 if len(self.chosen) == 1 else 280)
        super().__init__(9, steps, len(self.chosen), render_mode)
        if not 0 <= robot_noise_ratio < np.inf:
            raise UserError(f"robot_noise_ratio is {robot_noise_ratio}: expected a number >= 0")
        _import_robotics()
        self._kitchen = gym.make(
            "FrankaKitchen-v1", tasks_to_complete=list(self.chosen),
            terminate_on_tasks_completed=False, remove_task_when_completed=False,
            disable_env_checker=True, robot_noise_ratio=robot_noise_ratio).unwrapped
        self.model, self.data = self._kitchen.model, self._kitchen.data

    def draw(self, data):
        """Picture (64, 64, 3) uint8 of the positions in `data`, an mjData of this model."""
        # The lamp in the oven's hood always burns, behind a block that the light switch slides
        # away. Without shadows a block hides nothing, so the lamp itself is switched instead.
        dark = data.joint("light_joint").qpos[0] > self.LAMP_FREE
        lights_off = ["ovenlight"] if dark else []
        return render_state(self.model, data, self.CAMERA, self.DETAIL, lights_off)

    def _reset(self, seed):
        self._kitchen.reset(seed=seed)
        self._completed = []

    def _step(self, action):
        _, reward, _, _, info = self._kitchen.step(action)
        now = info["step_task_completions"]  # in an order that depends on Python's hash seed
        self._completed += [t for t in self.chosen if t in now and t not in self._completed]
        return reward

    def _tasks(self):
        return self._completed

    def tasks_in(self, qpos):
        """Names of the chosen tasks that are completed at any row of qpos (rows, nq)."""
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env as v1
        return tuple(task for task in self.chosen if (np.linalg.norm(
            qpos[:, v1.OBS_ELEMENT_INDICES[task]] - v1.OBS_ELEMENT_GOALS[task], axis=1)
            < v1.BONUS_THRESH).any())


# ------------------------------------------------------------------------------- Baoding
#
# Two balls in the palm of gymnasium-robotics' Shadow Hand, to be turned about each other. The
# package's own files are read where they are installed; nothing of them is copied. World frame:
# the palm looks up (+z), the fingers point along +y, the thumb is at +x.

HAND_POSE = {  # rad: where action zero sends the joints, a flat bowl; the wrist tilts the fingers
    "WRJ1": 0.0126, "WRJ0": -0.398, "FFJ3": 0.30, "FFJ2": 0.056, "FFJ1": 0.75, "FFJ0": 0.85,
    "MFJ3": 0.20, "MFJ2": 0.0, "MFJ1": 0.75, "MFJ0": 0.85, "RFJ3": 0.07, "RFJ2": 0.1, "RFJ1": 0.75,
    "RFJ0": 0.85, "LFJ4": 0.0, "LFJ3": -0.34, "LFJ2": 0.0, "LFJ1": 0.8, "LFJ0": 0.9, "THJ4": -0.02,
    "THJ3": 0.374, "THJ2": 0.094, "THJ1": -0.126, "THJ0": -0.536}
BALL_RADIUS = 0.028  # m
BAODING_XML = """
<mujoco model="baoding">
  <compiler angle="radian" meshdir="{assets}/stls/hand" texturedir="{assets}/textures"/>
  <visual><headlight active="0"/></visual>
  <option timestep="0.005" integrator="implicitfast" iterations="20" ls_iterations="10"/>
  <include file="{assets}/hand/shared.xml"/>
  <asset><include file="{assets}/hand/shared_asset.xml"/></asset>
  <worldbody>
    <light directional="true" castshadow="false" dir="0 0.3 -1" pos="0 0 1"
           ambient="0.45 0.45 0.45" diffuse="0.7 0.7 0.7" specular="0.1 0.1 0.1"/>
    <include file="{assets}/hand/robot.xml"/>
    <body name="ball1" pos="0.03 0 0.195">
      <freejoint name="ball1"/>
      <geom type="sphere" size="{radius}" mass="0.043" condim="4" friction="1 0.005 0.0001"
            rgba="1 0.8 0.31 1"/>
    </body>
    <body name="ball2" pos="-0.03 0 0.195">
      <freejoint name="ball2"/>
      <geom type="sphere" size="{radius}" mass="0.043" condim="4" friction="1 0.005 0.0001"
            rgba="0.84 0.49 0.43 1"/>
    </body>
  </worldbody>
</mujoco>"""


def baoding_model():
    """Compile the hand and the balls from the installed package's files -> mujoco.MjModel."""
    _import_robotics()
    import gymnasium_robotics
    import mujoco
    assets = Path(gymnasium_robotics.__file__).parent / "envs" / "assets"
    spec = mujoco.MjSpec.from_string(BAODING_XML.format(assets=assets, radius=BALL_RADIUS))
    mount = spec.body("robot0:hand mount")
    mount.pos, mount.alt.euler = (0, -0.4, 0.2), (-np.pi / 2, 0, 0)        # palm up
    # Of the tendons only those count that couple each finger's last two joints; touch sensors are
    # not used; forearm and wrist touch nothing here. Without them a step costs half.
    unused = [t for t in spec.tendons if not t.name.endswith("J1c")] + list(spec.sensors)
    unused += [site for site in spec.sites if site.name.startswith("robot0:Tch")]
    unused += [spec.geom("robot0:C_forearm"), spec.geom("robot0:C_wrist")]
    for element in unused:
        spec.delete(element)
    skin = spec.material("robot0:MatViz")
    skin.rgba, skin.specular = (0.45, 0.46, 0.5, 1), 0                     # stock white saturates
    return spec.compile()


class Baoding(Simulated):
    """Turn two balls about each other in the palm: 20 joint targets, 75 steps of 0.1 s.

    Each ball has an invisible target on an ellipse above the palm. The targets start at the angle
    of the line through the balls (which lie some 23 mm away) and go round clockwise, seen from
    above, once in 60 steps. Success, known at the end of the episode: no ball was dropped, the pair
    turned by at least 88% of what was commanded (1.1 turns in 75 steps), and balls were at most 20
    mm from their targets on average. info also has `rotation` (net turns in the commanded
    direction, up to a drop), `error` (m: mean distance of balls and targets so far, seen from
    above, at most 0.1 each) and `dropped`.
    reward: 1 where both balls are within 25 mm of their targets and none was dropped.
    The hand adds noise to every action, so that less can be done blindly: without it, the actions
    of a demonstration succeed from other starts more than twice as often.
    """

    metadata = {**PixelEnv.metadata, "render_fps": 10}

    CAMERA = {"distance": 0.27, "lookat": (0.01, -0.015, 0.17), "azimuth": 90, "elevation": -80}
    DETAIL = {"mesh": 0.0015, "round": (16, 10, 1)}
    SUBSTEPS = 20               # of 0.005 s
    PERIOD = 60                 # steps in which the targets go round
    CENTRE, AXES = np.array([0.005, -0.005]), np.array([0.02, 0.036])      # the ellipse: m, x and y
    TURNED, NEAR, CLOSE = 0.88, 0.020, 0.025  # share of the turns; mean error, error of a step (m)
    DROPPED = 0.10              # m: a ball whose centre is below this has left the hand
    LOST = 0.1                  # m: no distance to a target counts as more
    NOISE = 0.05                # std of what is added to an action
    REACH = 0.9                 # action +-1 goes so far from the pose towards the joint's limit

    def __init__(self, tasks=None, episode_steps=None, render_mode="rgb_array"):
        _choose_tasks(tasks, ("turn",), "baoding")
        super().__init__(20, episode_steps or 75, 1, render_mode)
        import mujoco
        self.model = baoding_model()
        self.data = mujoco.MjData(self.model)
        joints = [self.model.joint(f"robot0:{name}") for name in HAND_POSE]
        self._hand = np.array([joint.qposadr[0] for joint in joints])
        self._pose = np.array(list(HAND_POSE.values()))
        actuated = self.model.actuator_trnid[:, 0]                         # joint of each actuator
        pose = dict(zip((joint.id for joint in joints), self._pose))
        self._middle = np.array([pose[joint] for joint in actuated])
        self._low, self._high = self.model.actuator_ctrlrange.T
        self._balls = [self.model.joint(f"ball{i}").qposadr[0] for i in (1, 2)]

    def control(self, action):
        """Actions (..., 20) in [-1, 1] -> joint targets (..., 20), rad; 0 is HAND_POSE."""
        room = np.where(action > 0, self._high - self._middle, self._middle - self._low)
        return self._middle + self.REACH * action * room

    def balls_in(self, qpos):
        """Centres of the balls in positions (..., nq) -> (..., 2, 3), m."""
        return np.stack([qpos[..., i:i + 3] for i in self._balls], -2)

    def targets(self, step):
        """Where the balls should be after `step` (...) steps -> (..., 2, 2): ball, x and y, m."""
        angle = self.phase - 2 * np.pi * np.asarray(step)[..., None] / self.PERIOD + [0, np.pi]
        return self.CENTRE + self.AXES * np.stack([np.cos(angle), np.sin(angle)], -1)

    def commanded(self, steps):
        """Turns of the line through targets that begin along x, as they do but for some degrees."""
        angle = 2 * np.pi * np.arange(steps + 1) / self.PERIOD
        x, y = self.AXES[:, None] * (np.cos(angle), np.sin(angle))         # not at an even pace
        return np.unwrap(np.arctan2(y, x))[-1] / (2 * np.pi)

    def _simulate(self, action):
        import mujoco
        self.data.ctrl[:] = self.control(action)
        mujoco.mj_step(self.model, self.data, self.SUBSTEPS)

    def _reset(self, seed):
        """A wide start: settling would undo noise on the joints, so a random action holds them."""
        import mujoco
        rng = self.np_random
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[self._hand] = self._pose + rng.uniform(-0.01, 0.01, len(self._pose))
        for i, side in zip(self._balls, (1, -1)):
            self.data.qpos[i:i + 2] = self.CENTRE + (side * BALL_RADIUS, 0)
            self.data.qpos[i:i + 2] += rng.uniform(-0.004, 0.004, 2)
        action = 0.1 * rng.uniform(-1, 1, self.action_dim)
        for _ in range(8):
            self._simulate(action)
        self._begin(self.data.qpos)

    def _begin(self, qpos):
        """Row 0 of an episode: the targets begin at the angle of the line through the balls."""
        balls = self.balls_in(qpos)[:, :2]                                 # (2, 2)
        self.phase = np.arctan2(*((balls[0] - balls[1]) / self.AXES)[::-1])
        self._line, self._turned, self._errors = balls[0] - balls[1], 0.0, []
        self.dropped = False

    def _follow(self, qpos):
        """Account for the positions (nq,) after a step -> (2,) distances to the targets, m."""
        balls = self.balls_in(qpos)
        line, (x, y) = balls[0, :2] - balls[1, :2], self._line
        angle = np.arctan2(x * line[1] - y * line[0], x * line[0] + y * line[1])
        self.dropped |= bool(balls[:, 2].min() < self.DROPPED)
        self._turned -= 0 if self.dropped else angle / (2 * np.pi)         # clockwise counts
        self._line = line
        distance = np.linalg.norm(balls[:, :2] - self.targets(len(self._errors) + 1), axis=1)
        self._errors.append(np.minimum(distance, self.LOST).mean())
        return distance

    def _step(self, action):
        noise = self.NOISE * self.np_random.normal(size=self.action_dim)
        self._simulate(np.clip(action + noise, -1, 1))
        return float(self._follow(self.data.qpos).max() <= self.CLOSE and not self.dropped)

    def _tasks(self):
        steps = len(self._errors)
        done = steps == self.episode_steps and not self.dropped and (
            self._turned >= self.TURNED * self.commanded(steps)
            and np.mean(self._errors) <= self.NEAR)
        return ("turn",) if done else ()

    def _info(self):
        return {**super()._info(), "rotation": self._turned, "dropped": self.dropped,
                "error": float(np.mean(self._errors)) if self._errors else 0.0}

    def tasks_in(self, qpos):
        """What an episode with these positions (rows, nq), row 0 included, has completed."""
        other = copy.copy(self)                                            # self may be at work
        other._begin(qpos[0])
        for row in qpos[1:]:
            other._follow(row)
        return other._tasks()


# --------------------------------------------------------------------- any other environment


class Generic(PixelEnv):
    """Any Gymnasium environment with bounded, continuous actions, seen through 64x64 pixels.

    Frames: the observation if that is an RGB picture, else render(); area-resized. Actions in
    [-1, 1] are scaled to the environment's bounds. An episode that ends early stays on its last
    frame, without reward, until step T (`padded` in info). Success: info["success"] or
    info["is_success"] was true at any step. T: `episode_steps`, else the environment's own limit.
    """

    _said = False  # that episodes are padded: once a process

    def __init__(self, name, episode_steps=None, render_mode="rgb_array"):
        inner, self._pixels = _make_inner(name, episode_steps)
        steps = episode_steps or (inner.spec and inner.spec.max_episode_steps)
        if not steps:
            raise UserError(f"{name} has no episode length of its own: give episode_steps")
        box = inner.action_space
        if not (isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.is_bounded()):
            raise UserError(f"{name} has actions {box}: only a bounded Box with one axis will do")
        super().__init__(box.shape[0], steps, 1, render_mode)
        self.name, self._inner = name, inner

    def _reset(self, seed):
        observation, info = self._inner.reset(seed=seed)
        self._over = self._padded = self._succeeded = False
        self._look(observation, info)

    def _step(self, action):
        self._padded = self._over
        if self._over:
            return 0.0
        box = self._inner.action_space
        action = (box.low + (action + 1) / 2 * (box.high.astype(float) - box.low)).astype(box.dtype)
        observation, reward, ended, cut, info = self._inner.step(np.clip(action, box.low, box.high))
        self._over = bool(ended or cut)
        self._look(observation, info)
        if self._over and self._t + 1 < self.episode_steps and not Generic._said:
            Generic._said = True
            _say(f"{self.name}: an episode ended at step {self._t + 1} and is padded to "
                 f"{self.episode_steps} with its last frame")
        return reward

    def _look(self, observation, info):
        self._succeeded |= bool(info.get("success", False)) or bool(info.get("is_success", False))
        frame = np.asarray(observation if self._pixels else self._inner.render())
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
            raise UserError(f"{self.name} renders {frame.dtype} {frame.shape}: expected uint8 RGB")
        self._last_frame = resize(frame)

    def _frame(self):
        return self._last_frame.copy()

    def _tasks(self):
        return ("goal",) if self._succeeded else ()

    def _info(self):
        return {**super()._info(), "padded": self._padded}

    def close(self):
        self._inner.close()


def _make_inner(name, episode_steps):
    """gym.make(name), with rgb_array rendering unless it observes pixels -> env, whether it does"""
    if importlib.util.find_spec("mujoco"):
        choose_gl(required=False)  # in case it is a mujoco environment
    limit = {"max_episode_steps": episode_steps} if episode_steps else {}
    try:
        env = gym.make(name, **limit)
        space = env.observation_space
        if space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3:
            return env, True
        env.close()
        return gym.make(name, render_mode="rgb_array", **limit), False
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot make environment {name!r} ({reason}): give kitchen, baoding, "
                        "point, or a Gymnasium id, as module:Id if its module must be imported"
                        ) from error


# ------------------------------------------------------------------------- making environments

BUILT_IN = {"kitchen": Kitchen, "baoding": Baoding, "point": Point}
for _id, _class in BUILT_IN.items():
    if f"cmil/{_id.capitalize()}-v0" not in gym.registry:
        gym.register(f"cmil/{_id.capitalize()}-v0", f"{__name__}:{_class.__name__}")


def _choose_tasks(tasks, valid, name):
    """"a+b" -> ("a", "b"), each one of `valid`; None or "" -> all. Raises UserError otherwise."""
    chosen = tuple(task.strip() for task in tasks.split("+")) if tasks else tuple(valid)
    if not set(chosen) <= set(valid) or len(set(chosen)) < len(chosen):
        raise UserError(f"tasks {tasks!r}: {name} has {', '.join(valid)}; join several with +")
    return chosen


def make_env(name, seed=None, **options):
    """Make the environment `name`: "kitchen", "baoding", "point", a Gymnasium id or "module:Id".

    options, where None means the environment's own: `tasks` (str, "microwave+kettle"),
    `episode_steps` (int, 0 as None), `robot_noise_ratio` (kitchen). `seed` seeds the action space
    and the first reset without a seed of its own. Raises UserError for an unknown name or an
    option that the environment does not have.
    """
    made = BUILT_IN.get(name) or functools.partial(Generic, name)
    options = {key: value for key, value in options.items() if value is not None}
    known = [key for key in inspect.signature(made).parameters if key != "render_mode"]
    for key in options:
        if key not in known:
            raise UserError(f"{key} does not apply to {name}, which has {', '.join(known)}")
    with _explained():
        env = made(**options)
    if seed is not None:
        env.action_space.seed(seed)
        env.np_random = np.random.default_rng(seed)
    return env


def _in_a_line(error):
    """Kind: text (file:line) of an exception that was caught."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text} ({last.filename}:{last.lineno})"


@contextlib.contextmanager
def _explained():
    """What goes wrong inside an environment, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the environment failed with {_in_a_line(error)}") from error


class _Errors:
    """gymnasium's queue of what failed in a worker, with texts: not every exception can be sent."""

    def __init__(self, queue):
        self.queue = queue

    def put(self, failure):
        index, kind, value, _ = failure
        mine, error = issubclass(kind, UserError), sys.exc_info()[1]
        self.queue.put((index, UserError if mine else RuntimeError,
                        str(value) if mine else _in_a_line(error), ""))
        self.queue.close()
        self.queue.join_thread()  # it must be under way before anything else can fail


def _worker(index, make, pipe, other, memory, errors, *rest):
    """gymnasium's worker process, which prints no tracebacks."""
    os.setpgrp()  # a scheduler's SIGTERM to the group is the learner's business
    try:
        _async_worker(index, make, pipe, other, memory, _Errors(errors), *rest)
    except (EOFError, ConnectionError):  # the learner is gone
        os._exit(1)
    except Exception as error:  # while it was made, before gymnasium catches anything
        _say(f"worker {index}: {error if isinstance(error, UserError) else _in_a_line(error)}")
        os._exit(1)


@contextlib.contextmanager
def _sigint_blocked():
    """Ctrl-C waits until the end of the block, or until what this yields is called."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield lambda: None
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    lift = functools.partial(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    try:
        yield lift
    finally:
        lift()


def _watched(name):
    """AsyncVectorEnv's method `name`, which ends all workers and says why if one of them fails."""
    def method(self, *args, **kwargs):
        if name.endswith("_wait"):
            kwargs.setdefault("timeout", self.TIMEOUT)
        level, gym.logger.min_level = gym.logger.min_level, gym.logger.ERROR + 1  # no tracebacks
        try:
            return getattr(super(Workers, self), name)(*args, **kwargs)
        except Exception as error:
            cause = self._end(error)
            if cause and not isinstance(error, UserError):
                raise WorkerDied(cause) from error
            raise
        except KeyboardInterrupt:
            self.close(terminate=True)
            raise
        finally:
            gym.logger.min_level = level
    return method


class Workers(AsyncVectorEnv):
    """gymnasium's worker processes. WorkerDied if one is killed, fails or does not answer."""
    TIMEOUT = 300  # seconds

    _start = _watched("__init__")
    reset_async, reset_wait = _watched("reset_async"), _watched("reset_wait")
    step_async, step_wait = _watched("step_async"), _watched("step_wait")
    call_async, call_wait = _watched("call_async"), _watched("call_wait")

    def __init__(self, *args, **kwargs):
        """Ctrl-C is the learner's business: workers inherit that it is blocked while they start."""
        multiprocessing.resource_tracker.ensure_running()  # its own start would lift the block
        with _sigint_blocked() as self._lift:
            self._start(*args, **kwargs)

    def _check_spaces(self):
        """Wait until all have started; gymnasium's own check has no timeout."""
        self._lift()
        self.call("episode_steps")

    def _started(self):
        """The processes that there are: too few file handles, and one may not have started."""
        return [process for process in getattr(self, "processes", []) if process.pid]

    def _end(self, error):
        """End all workers, because of `error` -> which of them failed and how; "" if none has."""
        causes, processes = [], self._started()
        lost, late = (isinstance(error, kinds) for kinds in (
            (EOFError, ConnectionError), multiprocessing.TimeoutError))
        if lost:  # its pipe is closed: it is about to end
            ended = multiprocessing.connection.wait([p.sentinel for p in processes], 5)
            for process in processes:
                process.join(5 if process.sentinel in ended else 0)
        for index, process in enumerate(processes):
            who, pipe = f"environment worker {index}", self.parent_pipes[index]
            if lost and process.exitcode is not None:
                killed = " (killed: by lack of memory? then use fewer environments)"
                causes.append(f"{who} died with exit code {process.exitcode}"
                              f"{killed * (process.exitcode == -9)}")
            elif late and not pipe.poll():
                causes.append(f"{who} did not answer within {self.TIMEOUT} s")
            elif pipe is None:  # gymnasium's mark for a worker that sent an exception
                causes.append(f"{who} failed with {error}")
        self.close(terminate=True)
        return causes[0] if causes else "an environment worker is gone" if lost or late else ""

    def close_extras(self, timeout=5, terminate=False):
        """End the workers: ask them to, wait `timeout` seconds, kill those that are left.

        A step may be pending and a worker dead; terminate: do not ask."""
        end, processes = time.monotonic() + timeout, self._started()
        pipes = [pipe for pipe in getattr(self, "parent_pipes", []) if pipe and not pipe.closed]
        for pipe in [] if terminate else pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        for process in processes:
            process.join(0 if terminate else max(0, end - time.monotonic()))
            process.kill()  # terminate would wait for one that is stopped
            process.join()
        for pipe in pipes:
            pipe.close()


class InProcess(SyncVectorEnv):
    """An environment in this process with the calls of Workers; step_wait does all the work."""

    def reset(self, **options):
        with _explained():
            return super().reset(**options)

    def step(self, actions):
        with _explained():
            return super().step(actions)

    def step_async(self, actions):
        self._pending = actions

    def step_wait(self):
        return self.step(self._pending)


def make_vec(name, n, **options):
    """`n` environments in lockstep, without autoreset: one process each, or in this one if n is 1.

    -> gymnasium.vector.VectorEnv. With n > 1 the calling script needs the usual
    `if __name__ == "__main__":`, since the workers are spawned.
    """
    makers = [functools.partial(make_env, name, **options)] * n
    if n == 1:
        return InProcess(makers, autoreset_mode=AutoresetMode.DISABLED)
    return Workers(makers, shared_memory=True, context="spawn", worker=_worker,
                   autoreset_mode=AutoresetMode.DISABLED)


def env_facts(vec):
    """Ask the workers of make_vec -> {"episode_steps": T, "action_dim": A, "gl_renderer": str}."""
    return {key: vec.call(key)[0] for key in ("episode_steps", "action_dim", "gl_renderer")}


# ------------------------------------------------------------------------- demonstrations
#
# Two kinds of file. A STATE file (demos/kitchen.npz) holds N episodes as positions and actions, and
# is drawn here, by render_state. A PIXEL file holds one episode in the form of Dreamer.

STATE_KEYS = ("env", "mujoco", "seed", "start", "qpos", "action")


def load_demos(path, name, n=0, vec_or_none=None, min_steps=1, **options):
    """Demonstrations of the environment `name`: a list of episodes, each a dict of

    image (T+1, 64, 64, 3) uint8; action (T+1, A) float32, where action[t] led to image[t] and row 0
    is zero; tasks (tuple of those completed, or None if not known); success (bool, or None).

    path: a file, a folder of files, or "" for the environment's own. n: how many (0: all; of the
    scripted expert of point: 10). vec: the workers, if there are any. options: as for make_env.
    Episodes are cut to the environment's T. Raises UserError, naming the file, for bad input,
    and for an episode of fewer than `min_steps` steps.
    """
    if name == "point" and not path:
        return point_demos(n or 10, **options)
    path = Path(path) if path else Path(__file__).parent / "demos" / f"{name}.npz"
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise UserError(f"{path}: no demonstrations here; give an .npz file or a folder of them")
    env, episodes, pixels = make_env(name, **options), [], False
    gl = env_facts(vec_or_none)["gl_renderer"] if vec_or_none else ""
    try:
        for file in files[:n or None]:
            arrays = read_npz(file)
            if "qpos" in arrays:
                limit = n - len(episodes) if n else len(arrays["qpos"])
                episodes += _state_episodes(file, arrays, env, name, limit, gl)
            else:
                episodes.append(_pixel_episode(file, arrays, env))
                pixels = True
    finally:
        env.close()
    _expect(len(episodes) >= n, path, f"holds {len(episodes)} demonstrations: {n} were asked for")
    shortest = min(len(episode["action"]) for episode in episodes) - 1
    _expect(shortest >= min_steps, path,
            f"an episode has {shortest} steps: expected at least {min_steps}")
    if pixels:
        _say(f"{path} holds pixels of another renderer: a discriminator may tell these from the "
             "agent's own frames, whatever the robot does")
    failed = sum(episode["success"] is False for episode in episodes)
    if failed:
        _say(f"{failed} of the {len(episodes)} demonstrations of {path} do not complete "
             f"{options.get('tasks') or 'all tasks'} within {env.episode_steps} steps")
    return episodes


def _expect(true, file, otherwise):
    if not true:
        raise UserError(f"{file}: {otherwise}")


def read_npz(file):
    """The arrays of an episodes' file by name; UserError if it is damaged or of neither kind."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            wanted = STATE_KEYS if "qpos" in stored.files else ("image", "action")
            missing = [key for key in wanted if key not in stored.files]
            if not missing:
                if stored.zip.testzip():  # numpy stops before the checksum if its own header lies
                    raise ValueError("checksum")
                return {key: stored[key] for key in wanted}
    except Exception as error:  # of as many kinds as a file can be damaged
        text = " ".join(str(error).split())
        raise UserError(f"{file}: not a readable .npz file without pickles ({text})") from error
    raise UserError(f"{file}: has no {' and no '.join(missing)}: expected {', '.join(wanted)}")


def read_episode(file, steps, action_dim):
    """An episode of `steps` steps that a run has stored -> image, action; UserError if damaged."""
    arrays = read_npz(file)
    image, action = arrays["image"], arrays["action"]
    _expect(image.dtype == np.uint8 and image.shape == (steps + 1, IMAGE, IMAGE, 3), file,
            f"image is {image.dtype} {image.shape}: expected uint8 {(steps + 1, IMAGE, IMAGE, 3)}")
    return {"image": image, "action": _checked_actions(file, action, (steps + 1, action_dim))}


def _checked_actions(file, action, shape):
    """Demonstrated actions as float32, if they have this shape, are finite and in [-1, 1]."""
    _expect(action.shape == shape and action.dtype.kind == "f", file,
            f"action is {action.dtype} {action.shape}: expected floats {shape}")
    _expect(np.isfinite(action).all(), file, "action has NaN or infinite entries")
    largest = np.abs(action).max(initial=0)
    _expect(largest <= 1 + 1e-6, file, f"actions reach {largest:.3g}: expected [-1, 1]")
    return np.clip(action, -1, 1).astype(np.float32)


def _pixel_episode(file, arrays, env):
    image, action = arrays["image"], arrays["action"]
    _expect(image.dtype == np.uint8 and image.ndim == 4 and len(image) > 1
            and image.shape[1:] in ((64, 64, 3), (128, 128, 3)), file,
            f"image is {image.dtype} {image.shape}: expected uint8 (T+1, 64, 64, 3) or 128x128")
    action = _checked_actions(file, action, (len(image), env.action_dim))
    action[0] = 0
    rows = env.episode_steps + 1
    return {"image": resize(image[:rows]), "action": action[:rows], "tasks": None, "success": None}


def _state_episodes(file, arrays, env, name, limit, gl):
    """Up to `limit` episodes of a state file, drawn (or from the cache). gl: drawn by which GL."""
    made_for, qpos = str(arrays["env"]), arrays["qpos"]
    _expect(made_for == name and isinstance(env, Simulated), file,
            f"was made for {made_for}: expected {name}")
    _expect(qpos.dtype.kind == "f" and qpos.ndim == 3 and len(qpos) and qpos.shape[1] > 1
            and qpos.shape[2] == env.model.nq, file,
            f"qpos is {qpos.dtype} {qpos.shape}: expected floats (N, T+1, {env.model.nq})")
    _expect(np.isfinite(qpos).all(), file, "qpos has NaN or infinite entries")
    shape = len(qpos), qpos.shape[1] - 1, env.action_dim
    action = _checked_actions(file, arrays["action"], shape)
    digest, started = _digest(file, env.model), time.monotonic()
    episodes, rows, count = [], env.episode_steps + 1, min(limit, len(qpos))
    for i in range(count):
        image = _cached_images(qpos[i, :rows], env, (digest, i, gl or env.gl_renderer))
        tasks = env.tasks_in(qpos[i, :rows])
        row0 = np.zeros((1, env.action_dim), np.float32)
        episodes.append({"image": image, "action": np.concatenate([row0, action[i, :rows - 1]]),
                         "tasks": tasks, "success": len(tasks) == env.n_goals})
        if time.monotonic() - started > 4:
            _say(f"drawing the demonstrations of {file}: {i + 1} of {count} "
                 "(kept in the cache for the next time)")
    return episodes


def _digest(file, model):
    """A hash of the file and of all that the model says about what is drawn."""
    import mujoco
    drawn = np.empty(mujoco.mj_sizeModel(model), np.uint8)
    mujoco.mj_saveModel(model, None, drawn)
    return hashlib.sha256(Path(file).read_bytes() + drawn.tobytes()).hexdigest()


def _cached_images(qpos, env, key):
    """Pictures (rows, 64, 64, 3) of positions (rows, nq), from ~/.cache/cmil if they are there."""
    import mujoco
    key = repr((key, len(qpos), env.CAMERA, env.DETAIL, RENDER_STYLE, mujoco.__version__))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cmil"
    cached = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
    try:
        with np.load(cached, allow_pickle=False) as stored:
            image = stored["image"]
        if image.shape == (len(qpos), IMAGE, IMAGE, 3) and image.dtype == np.uint8:
            return image
    except Exception:  # not there, or damaged in one of many ways: it is simply drawn again
        pass
    data, image = mujoco.MjData(env.model), []
    for row in qpos:
        data.qpos[:] = row
        image.append(env.draw(data))
    image = np.stack(image)
    unfinished = cached.with_suffix(f".{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as handle:
            np.savez_compressed(handle, image=image)
        os.replace(unfinished, cached)
    except OSError as error:  # a cache that cannot be written only costs time
        _say(f"cannot keep the pictures in {folder} ({error})")
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return image


# ------------------------------------------------------------------------------- a run's files


def outcome(info):
    """What an episode's last info says of the task -> dict of float arrays (environments,)."""
    names = {"success": "success", "n_tasks": "tasks", "rotation": "rotation", "error": "error",
             "dropped": "dropped"}
    return {name: np.asarray(info[key], np.float64) for key, name in names.items() if key in info}


def open_log(path):
    """Open a run's log for appending, and lock it: a run has one writer. UserError if another
    process holds it."""
    file = open(path, "a")
    with contextlib.suppress(ImportError, OSError):  # Windows; file systems without locks
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path} is being written by another process: end that one, or give "
                            "another --logdir") from None
    return file


def append(file, text):
    """Write text to an open log, at once. An OSError names the file."""
    try:
        file.write(text)
        file.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, file.name) from error


def cut(file, size):
    """Shorten an open log to `size` bytes, a whole number of lines; one that has lost more than
    that (the power failed) to its last whole line, with a remark."""
    data = Path(file.name).read_bytes()[:size]
    if len(data) < size:
        _say(f"{file.name} has lost its last lines; going on without them")
    file.seek(file.truncate(data.rfind(b"\n") + 1))


def save_atomically(path, write, old=None):
    """write(file) into a temporary file beside `path`, sync it to the disk, then rename.

    old: what the file that it replaces is called from then on. An OSError names `path`; what was
    there is then still there, under one of its two names."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if old and path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        if os.name == "posix":  # the folder's new entry too, or a later file may outlive this one
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save's
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def save_config(path, config, resumed, facts):
    """Write a run's config.json: the dict `config`, and what the run depends on beside it: `facts`,
    versions, commit, command. When a run is `resumed` (with more steps, elsewhere, from new code)
    the first start's stay as they are, and today's are added to a list of that name."""
    packages = "torch", "numpy", "gymnasium", "mujoco", "gymnasium-robotics"
    found = reversed([*metadata.distributions()])  # of two copies on the path the first counts
    git, commit = ["git", "--git-dir", Path(__file__).with_name(".git")], ""
    with contextlib.suppress(OSError):  # no git here
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True,
                                text=True).stdout.strip()
    told = now = {"versions": {d.name: d.version for d in found if d.name in packages},
                  "commit": commit, "python": platform.python_version(),
                  "command": " ".join(["python", *sys.argv]), **facts}
    if resumed:
        told = json.loads(path.read_text())
        told.setdefault("resumed", []).append(now)
    text = json.dumps({**told, "config": config}, indent=1)
    save_atomically(path, lambda f: f.write(text.encode()))


def save_gif(path, frames, env, scale=4):
    """frames uint8 (T, 64, 64, 3) -> an endless GIF at env's pace, `scale` times as large."""
    import imageio
    large = np.asarray(frames).repeat(scale, 1).repeat(scale, 2)
    save_atomically(path, lambda file: imageio.mimsave(
        file, list(large), format="GIF", duration=1000 / env.metadata["render_fps"], loop=0))


def save_errors(path, truth, predicted, columns=10, scale=2):
    """A picture of frames, uint8 (T, 64, 64, 3) twice, in rows: truth, prediction, their error."""
    import imageio
    error = np.abs(truth.astype(int) - predicted).astype(np.uint8)
    pick = np.linspace(0, len(truth) - 1, min(columns, len(truth))).astype(int)
    rows = [np.concatenate(x[pick], 1) for x in (truth, predicted, error)]
    large = np.concatenate(rows).repeat(scale, 0).repeat(scale, 1)
    save_atomically(path, lambda file: imageio.imwrite(file, large, format="PNG"))

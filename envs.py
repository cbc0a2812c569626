"""Environments seen through 64x64 pixels, and the demonstrations that go with them.

    env = make_env("point")              also "kitchen", "baoding", a Gymnasium id, "module:Id"
    image, info = env.reset(seed=0)      image (64, 64, 3) uint8
    image, reward, _, over, info = env.step(action)    action (A,) in [-1, 1]; over at step T
    vec = make_vec("kitchen", 5)         five of them, each in a process of its own
    episodes = load_demos("", "kitchen") images and actions of the demonstrations

All environments are FIXED-LENGTH: an episode has T steps, whatever happens in it. An episode that
ended at success or failure would tell adversarial imitation how long an expert's episode is, and
that is a reward by itself. `info` has `success` (bool), `padded` (bool: the episode was over before
this step) and an environment's own measures as `log/<name>` (float). This file never imports torch,
and mujoco only when an environment needs it: MUJOCO_GL must be chosen before.
"""

import atexit
import contextlib
import copy
import functools
import importlib.util
import inspect
import io
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

IMAGE = 64  # pixels: width and height of every observation


class UserError(ValueError):
    """Report a user's mistake in one line: what is wrong, where, and what to do."""


def _say(text):
    with contextlib.suppress(OSError, ValueError):  # a broken stderr is no reason to stop
        print(f"envs: {text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------- the fixed-length base class


class PixelEnv(gym.Env):
    """Give an environment pixels, checked actions and episodes of exactly T steps.

    A subclass writes `_reset(seed)` and `_step(action)`, which returns the task's own reward, and
    notes in `completed` which of its `tasks` are done: all of them are a success. It also gives
    `qpos`, the present positions (nq,), and `draw(qpos)`, the picture of some positions, so that
    demonstrations can be stored as positions; `tasks_in(qpos)` returns the tasks that an episode
    with the positions (rows, nq) completes. `action_low` and `action_high` (A) are the bounds in
    the environment's own units; `gl_renderer` says which OpenGL draws ("": none).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    render_mode = "rgb_array"
    gl_renderer = ""
    tasks = ("goal",)

    def __init__(self, action_dim, episode_steps):
        if not isinstance(episode_steps, int) or episode_steps < 1:
            raise UserError(f"episode_steps is {episode_steps!r}: expected a whole number >= 1")
        self.action_dim = action_dim
        self.episode_steps = episode_steps
        self.action_low = [-1.0] * action_dim
        self.action_high = [1.0] * action_dim
        self.observation_space = gym.spaces.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self._t = episode_steps  # no step before the first reset

    def reset(self, *, seed=None, options=None):
        """Start an episode -> image (64, 64, 3) uint8, info. The seed decides all of it."""
        super().reset(seed=seed)
        self._t = 0
        self.completed = []
        self.padded = False
        self._reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self.render(), self._info()

    def step(self, action):
        """Do one step with action (A,) in [-1, 1] -> image, reward, False, t == T, info.

        Refuses an action of another shape, outside [-1, 1] or not finite, and a step outside an
        episode: simulators accept those and break much later.
        """
        if self._t >= self.episode_steps:
            raise UserError(f"step() outside an episode of {self.episode_steps}: call reset()")
        # float32 first: a recorded action (float32) then replays to exactly the same state.
        action = np.asarray(action, np.float32)
        if action.shape != (self.action_dim,):
            raise UserError(f"action has shape {action.shape}: expected ({self.action_dim},)")
        if not np.abs(action).max() <= 1 + 1e-6:  # NaN too
            raise UserError(f"action is outside [-1, 1] or not finite: {action}")
        reward = self._step(np.clip(action, -1, 1).astype(np.float64))
        self._t += 1
        over = self._t == self.episode_steps
        return self.render(), float(reward), False, over, self._info()

    def render(self):
        """Draw the present state -> (64, 64, 3) uint8."""
        return self.draw(self.qpos)

    def _info(self):
        return {"success": len(self.completed) == len(self.tasks), "padded": self.padded}


# ------------------------------------------------------------------------------------- Point
#
# A disc in a walled room, seen from above, drawn with numpy. Lengths are in pixels, y points down.
# All that decides how hard the task is stands here.

ROBOT_RADIUS = 3.5
GOAL_RADIUS = 4.0
GOAL = (52.0, 46.0)
START = ((8.0, 8.0), (28.0, 56.0))  # uniform between these: most of the left chamber
BORDER = 2.0  # thickness of the outer wall
WALL_LEFT = 36.0  # the dividing wall: from, to
WALL_RIGHT = 40.0
GAP_Y = 20.0  # centre of the gap in it
GAP = 7.0  # half-width of the gap; the robot has GAP - ROBOT_RADIUS to spare on either side
WALL_PARTS = np.array([  # x0, y0, x1, y1
    (WALL_LEFT, 0.0, WALL_RIGHT, GAP_Y - GAP), (WALL_LEFT, GAP_Y + GAP, WALL_RIGHT, IMAGE)])
INERTIA = 0.7  # v' = INERTIA v + GAIN a
GAIN = 1.25  # top speed: GAIN / (1 - INERTIA) pixels a step
PROCESS_NOISE = 0.05  # std of the random part of v', pixels a step


def _draw_disc(image, centre, radius, colour):
    """Draw a disc with soft edges into `image` (H, W, 3): a shift of 0.1 pixels is visible."""
    x, y = centre
    x0 = max(int(x - radius - 1), 0)
    y0 = max(int(y - radius - 1), 0)
    patch = image[y0 : int(y + radius + 2), x0 : int(x + radius + 2)]
    rows = np.arange(y0, y0 + patch.shape[0])[:, None] + 0.5 - y
    columns = np.arange(x0, x0 + patch.shape[1])[None] + 0.5 - x
    cover = np.clip(radius + 0.5 - np.hypot(rows, columns), 0, 1)[..., None]
    patch[:] = np.round(patch * (1 - cover) + np.array(colour) * cover)


class Point(PixelEnv):
    """Move a point robot through a gap and to the goal, without touching a wall.

    Two actions push along x and y. The robot has inertia, so one frame does not show its velocity.
    A wall stops the robot and fails the episode, which goes on. Success is final: at the goal, and
    no touch before. State: `position`, `velocity` (2,), `touched` (bool); qpos is (x, y, touched).
    """

    def __init__(self, episode_steps=None):
        super().__init__(2, episode_steps or 50)
        self._room = np.full((IMAGE, IMAGE, 3), (170, 174, 186), np.uint8)
        self._room[2:-2, 2:-2] = (30, 34, 48)
        for x0, y0, x1, y1 in WALL_PARTS.astype(int):
            self._room[y0:y1, x0:x1] = (170, 174, 186)
        _draw_disc(self._room, GOAL, GOAL_RADIUS, (70, 220, 90))

    def _reset(self, seed):
        self.position = self.np_random.uniform(*START)
        self.velocity = np.zeros(2)
        self.touched = False

    def _step(self, action):
        noise = PROCESS_NOISE * self.np_random.normal(size=2)
        self.velocity = INERTIA * self.velocity + GAIN * action + noise
        for _ in range(4):  # small substeps: no jumping across a wall, and sliding along it
            for axis in range(2):
                moved = self.position.copy()
                moved[axis] += self.velocity[axis] / 4
                if self._touches(moved):
                    self.velocity[axis] = 0.0
                    self.touched = True
                else:
                    self.position = moved
        self.completed = self.completed or self.tasks_in(self.qpos[None])
        return len(self.completed)

    def _touches(self, position):
        low = BORDER + ROBOT_RADIUS
        if position.min() < low or position.max() > IMAGE - low:
            return True
        nearest = np.clip(position, WALL_PARTS[:, :2], WALL_PARTS[:, 2:])  # (parts, 2)
        return (((nearest - position) ** 2).sum(1) < ROBOT_RADIUS**2).any()

    @property
    def qpos(self):
        """Return the present x, y and whether a wall was touched, (3,)."""
        return np.append(self.position, self.touched)

    def draw(self, qpos):
        """Draw the positions (3,) -> (64, 64, 3) uint8."""
        image = self._room.copy()
        position = np.float64(np.float32(qpos[:2]))  # float32, as stored in demonstrations
        _draw_disc(image, position, ROBOT_RADIUS, (255, 150, 30))
        return image

    def tasks_in(self, qpos):
        """Return the tasks that an episode with the positions (rows, 3) completes."""
        distance = np.hypot(*(qpos[:, :2] - GOAL).T)
        return ("goal",) if ((distance < GOAL_RADIUS) & (qpos[:, 2] == 0)).any() else ()


# --------------------------------------------------------------------------------- rendering
#
# `Simulated.draw` draws the agent's frames and the demonstrations alike: a discriminator would soon
# separate two renderers, and learn that instead of the task. What makes it fast without a GPU: no
# shadow maps, reflections or multisampling, and shapes no finer than 64 pixels can show. 2x2
# samples a pixel keep the thin gripper clear and cost little: corners take the time, not pixels.

SUPERSAMPLE = 2
FINE_MESH = 2000  # only meshes of more faces are simplified
GL_TIMEOUT = 60  # seconds after which the trial of an OpenGL library has failed
GL_TRIAL = "from mujoco import *; Renderer(MjModel.from_xml_string('<mujoco/>'), 64, 64).render()"


@functools.cache
def choose_gl(required=True):
    """Set MUJOCO_GL to EGL or else OSMesa, by trying them, unless it is set. Workers inherit it.

    Raises UserError if rendering is `required` and does not work. A trial needs its own process:
    an OpenGL library that failed to load would spoil the next choice in this one.
    """
    given = os.environ.get("MUJOCO_GL")
    worker = multiprocessing.current_process().daemon
    if not sys.platform.startswith("linux") or (given and (worker or not required)):
        return
    names = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID")
    text = ", ".join(f"{key}={os.environ[key]}" for key in names if key in os.environ)
    if not given:  # a left-over of another program
        os.environ.pop("PYOPENGL_PLATFORM", None)
    backends = [given] if given else ["egl", "osmesa"]
    command = [sys.executable, "-c", GL_TRIAL]
    for backend in backends:
        setting = {"env": {**os.environ, "MUJOCO_GL": backend}, "timeout": GL_TIMEOUT}
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, **setting)
            os.environ["MUJOCO_GL"] = backend
            return
        except subprocess.SubprocessError as error:
            # What follows the traceback comes from objects that were never finished.
            words = str(error.stderr or error).split("Exception ignored")[0].strip()
            text += "; " + words.split("\n")[-1]
    if required:
        raise UserError(
            f"cannot render with {' or '.join(backends)} ({text.strip('; ')}): install an OpenGL "
            f"library (apt install libegl1 libgl1 libosmesa6) and unset {', '.join(names)}")


@functools.cache
def _overlap(size):
    """Return (IMAGE, size): the share of output pixel i that input pixel j covers."""
    edge = np.linspace(0, size, IMAGE + 1)[:, None]
    pixel = np.arange(size)
    cover = np.clip(np.minimum(edge[1:], pixel + 1) - np.maximum(edge[:-1], pixel), 0, None)
    return (cover / cover.sum(1, keepdims=True)).astype(np.float32)


def resize(images):
    """Area-resize images (..., H, W, 3) uint8 to (..., 64, 64, 3) uint8."""
    *lead, height, width, _ = images.shape
    if (height, width) == (IMAGE, IMAGE):
        return images
    pixels = images.reshape(*lead, height, width * 3).astype(np.float32)
    rows = (_overlap(height) @ pixels).reshape(*lead, IMAGE, width, 3)
    return np.floor(_overlap(width) @ rows + 0.5).astype(np.uint8)


def simplify_meshes(model, cell):
    """Merge a mesh's corners within cubes of `cell` metres, in place, to draw it faster.

    Only meshes of more than FINE_MESH faces and without a texture. The first corner of each cube
    stands for all; faces that lose their area this way, and second copies of a face, go. (The
    robot's nine links have 134,000 of the kitchen's 140,000 faces.)
    """
    fine = (model.mesh_facenum > FINE_MESH) & (model.mesh_texcoordadr < 0)
    for mesh in np.flatnonzero(fine):
        faces = model.mesh_faceadr[mesh] + np.arange(model.mesh_facenum[mesh])
        corners = model.mesh_vertadr[mesh] + np.arange(model.mesh_vertnum[mesh])
        cube = np.floor(model.mesh_vert[corners] / cell)
        _, representative, member = np.unique(cube, axis=0, return_index=True, return_inverse=True)
        merged = representative[member.reshape(-1)][model.mesh_face[faces]]  # (faces, 3)
        _, kept = np.unique(np.sort(merged, 1), axis=0, return_index=True)
        kept = kept[[len(set(corner)) == 3 for corner in merged[kept].tolist()]]
        normals = model.mesh_facenormal[faces[kept]]
        model.mesh_face[faces[: len(kept)]] = merged[kept]
        model.mesh_facenormal[faces[: len(kept)]] = normals
        model.mesh_facenum[mesh] = len(kept)


class Simulated(PixelEnv):
    """Draw a mujoco simulation, the subclass's `model` and `data`.

    CAMERA: in metres and degrees. MESH (metres): corners of a mesh nearer than about this become
    one. ROUND: slices, stacks and quads of other shapes.
    """

    @property
    def qpos(self):
        """Return the present positions, (nq,)."""
        return self.data.qpos.copy()

    def draw(self, qpos):
        """Draw the positions (nq,) -> (64, 64, 3) uint8.

        The bodies are placed on a private mjData: drawing cannot disturb the physics. Positions are
        rounded to float32, as demonstrations store them: both look the same to the last bit.
        """
        import mujoco
        model = self._renderer.model
        self._shown.qpos[:] = np.float32(qpos)
        mujoco.mj_kinematics(model, self._shown)
        mujoco.mj_camlight(model, self._shown)
        self._renderer.update_scene(self._shown, self._camera)
        return resize(self._renderer.render())

    @functools.cached_property
    def _renderer(self):  # made at the first draw: in the worker's process
        import mujoco
        model = copy.copy(self.model)  # the simulation keeps its own shapes
        simplify_meshes(model, self.MESH)
        quality = model.vis.quality
        quality.offsamples = 0
        quality.shadowsize = 0
        quality.numslices, quality.numstacks, quality.numquads = self.ROUND
        size = IMAGE * SUPERSAMPLE
        model.vis.global_.offwidth = size
        model.vis.global_.offheight = size
        backend = os.environ.get("MUJOCO_GL")
        if backend in ("egl", "osmesa"):  # mujoco may have been imported before this was chosen
            library = importlib.import_module(f"mujoco.{backend}")
            mujoco.gl_context.GLContext = library.GLContext
        renderer = mujoco.Renderer(model, size, size)
        renderer.scene.flags[int(mujoco.mjtRndFlag.mjRND_REFLECTION)] = 0
        self._shown = mujoco.MjData(model)
        self._camera = mujoco.MjvCamera()
        self._camera.azimuth = 90
        self._camera.distance = self.CAMERA["distance"]
        self._camera.lookat = self.CAMERA["lookat"]
        self._camera.elevation = self.CAMERA["elevation"]
        atexit.register(self.close)  # after the OpenGL library's own handler: it runs before that
        return renderer

    @property
    def gl_renderer(self):
        """Return which OpenGL draws: "llvmpipe (...); 4.5 ... Mesa 22.3.6"."""
        self._renderer.render()  # makes its context the current one
        from OpenGL import GL
        parts = [GL.glGetString(GL.GL_RENDERER), GL.glGetString(GL.GL_VERSION)]
        return b"; ".join(parts).decode()

    def close(self):
        """Free the renderer; a later draw makes another."""
        if "_renderer" in vars(self):
            self._renderer.render()  # makes its context the current one: the one that is freed
            self._renderer.close()
            del self._renderer
            atexit.unregister(self.close)


# ----------------------------------------------------------------------------------- Kitchen


def _import_robotics():
    """Register FrankaKitchen-v1. Raises UserError without mujoco or a way to render."""
    for package in ("mujoco", "gymnasium_robotics"):
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is not installed: pip install -r requirements.txt")
    choose_gl()
    with contextlib.redirect_stderr(io.StringIO()):  # a notice about environments not used here
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    return gymnasium_robotics


class Kitchen(Simulated):
    """Use FrankaKitchen-v1 through pixels: nine joint velocities, four tasks, 280 steps of 0.08 s.

    tasks: "microwave+kettle" and so on; None means all four. With a single task an episode has 75
    steps. A task is completed when its joints are within 0.3 of its goal at some step. Success: all
    chosen tasks were completed. Reward: how many are so now. `log/tasks`: how many were so far.
    robot_noise_ratio: noise of the measured joints, which enters the servo (the paper's authors
    used 0.1).
    """

    TASKS = ("microwave", "kettle", "light switch", "slide cabinet")
    CAMERA = {"distance": 1.86, "lookat": (-0.3, 0.5, 2.0), "elevation": -60}
    MESH = 0.01
    ROUND = (12, 2, 1)
    LAMP_FREE = -0.018  # m: at this position of the block its shadow leaves the stove

    def __init__(self, tasks=None, episode_steps=None, robot_noise_ratio=0.01):
        chosen = tasks.split("+") if tasks else self.TASKS
        self.tasks = tuple(task.strip() for task in chosen)
        if not set(self.tasks) <= set(self.TASKS) or len(set(self.tasks)) < len(self.tasks):
            valid = ", ".join(self.TASKS)
            raise UserError(f"tasks {tasks!r}: kitchen has {valid}; join several with +")
        if not 0 <= robot_noise_ratio < np.inf:
            raise UserError(f"robot_noise_ratio is {robot_noise_ratio}: expected a number >= 0")
        super().__init__(9, episode_steps or (75 if len(self.tasks) == 1 else 280))
        _import_robotics()
        self._kitchen = gym.make(
            "FrankaKitchen-v1", tasks_to_complete=list(self.tasks),
            terminate_on_tasks_completed=False, remove_task_when_completed=False,
            robot_noise_ratio=robot_noise_ratio, disable_env_checker=True).unwrapped
        self.model = self._kitchen.model
        self.data = self._kitchen.data

    def _reset(self, seed):
        self._kitchen.reset(seed=seed)

    def _step(self, action):
        _, reward, _, _, info = self._kitchen.step(action)
        now = info["step_task_completions"]  # in an order that depends on Python's hash seed
        self.completed += [t for t in self.tasks if t in now and t not in self.completed]
        return reward

    def _info(self):
        return {**super()._info(), "log/tasks": float(len(self.completed))}

    def draw(self, qpos):
        """Draw the positions (nq,) -> (64, 64, 3) uint8."""
        # The lamp in the oven's hood always burns, behind a block that the light switch slides
        # away. Without shadows a block hides nothing, so the lamp itself is switched instead.
        block = qpos[self.model.joint("light_joint").qposadr[0]]
        self._renderer.model.light("ovenlight").active = np.float32(block) <= self.LAMP_FREE
        return super().draw(qpos)

    def tasks_in(self, qpos):
        """Return the tasks that are completed at any row of the positions (rows, nq)."""
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env as v1
        done = []
        for task in self.tasks:
            offset = qpos[:, v1.OBS_ELEMENT_INDICES[task]] - v1.OBS_ELEMENT_GOALS[task]
            if (np.linalg.norm(offset, axis=1) < v1.BONUS_THRESH).any():
                done.append(task)
        return tuple(done)


# ----------------------------------------------------------------------------------- Baoding
#
# Two balls in the palm of gymnasium-robotics' Shadow Hand, to be turned about each other. The
# package's own files are read where they are installed; nothing of them is copied. World frame:
# the palm looks up (+z), the fingers point along +y, the thumb is at +x.

# rad: where action zero sends the joints, a flat bowl; the wrist (WR) tilts the fingers
HAND_POSE = {
    "WRJ1": 0.0126, "WRJ0": -0.398,
    "FFJ3": 0.30, "FFJ2": 0.056, "FFJ1": 0.75, "FFJ0": 0.85,
    "MFJ3": 0.20, "MFJ2": 0.0, "MFJ1": 0.75, "MFJ0": 0.85,
    "RFJ3": 0.07, "RFJ2": 0.1, "RFJ1": 0.75, "RFJ0": 0.85,
    "LFJ4": 0.0, "LFJ3": -0.34, "LFJ2": 0.0, "LFJ1": 0.8, "LFJ0": 0.9,
    "THJ4": -0.02, "THJ3": 0.374, "THJ2": 0.094, "THJ1": -0.126, "THJ0": -0.536,
}
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
    <body name="ball1" pos="0.03 0 0.195"><freejoint name="ball1"/>
      <geom type="sphere" size="{radius}" mass="0.043" condim="4" friction="1 0.005 0.0001"
            rgba="1 0.8 0.31 1"/></body>
    <body name="ball2" pos="-0.03 0 0.195"><freejoint name="ball2"/>
      <geom type="sphere" size="{radius}" mass="0.043" condim="4" friction="1 0.005 0.0001"
            rgba="0.84 0.49 0.43 1"/></body>
  </worldbody>
</mujoco>"""


def baoding_model():
    """Compile the hand and the balls from the installed package's files -> mujoco.MjModel."""
    assets = Path(_import_robotics().__file__).parent / "envs" / "assets"
    import mujoco
    spec = mujoco.MjSpec.from_string(BAODING_XML.format(assets=assets, radius=BALL_RADIUS))
    mount = spec.body("robot0:hand mount")
    mount.pos = (0, -0.4, 0.2)
    mount.alt.euler = (-np.pi / 2, 0, 0)  # palm up
    # Of the tendons only those count that couple each finger's last two joints; touch sensors are
    # not used; forearm and wrist touch nothing here. Without them a step costs half.
    unused = [tendon for tendon in spec.tendons if not tendon.name.endswith("J1c")]
    unused += list(spec.sensors)
    unused += [site for site in spec.sites if site.name.startswith("robot0:Tch")]
    unused += [spec.geom("robot0:C_forearm"), spec.geom("robot0:C_wrist")]
    for element in unused:
        spec.delete(element)
    skin = spec.material("robot0:MatViz")
    skin.rgba = (0.45, 0.46, 0.5, 1)  # stock white saturates
    skin.specular = 0
    return spec.compile()


class Baoding(Simulated):
    """Turn two balls about each other in the palm: 20 joint targets, 75 steps of 0.1 s.

    Each ball has an invisible target on an ellipse above the palm. The targets start at the angle
    of the line through the balls (which lie some 23 mm away) and go round clockwise, seen from
    above, once in 60 steps. Success, known at the end of the episode: no ball was dropped, the pair
    turned by at least 88% of what was commanded (1.1 turns in 75 steps), and balls were at most 20
    mm from their targets on average. Reward: 1 where both balls are within 25 mm of their targets
    and none was dropped. The hand adds noise to every action, so that less can be done blindly:
    without it, actions of a demonstration succeed from other starts more than twice as often.

    `log/rotation`: net turns in the commanded direction, up to a drop; `log/error`: mean distance
    of balls and targets so far, seen from above (m, at most 0.1 each); `log/dropped`: 0 or 1.
    """

    metadata = {**PixelEnv.metadata, "render_fps": 10}
    tasks = ("turn",)

    CAMERA = {"distance": 0.27, "lookat": (0.01, -0.015, 0.17), "elevation": -80}
    MESH = 0.0015
    ROUND = (16, 10, 1)
    SUBSTEPS = 20  # of 0.005 s
    PERIOD = 60  # steps in which the targets go round
    CENTRE = np.array([0.005, -0.005])  # of the ellipse: m, x and y
    AXES = np.array([0.02, 0.036])
    TURNED = 0.88  # success: share of the commanded turns
    NEAR = 0.020  # success: m, mean error
    CLOSE = 0.025  # reward: m, error of a step
    DROPPED = 0.10  # m: a ball whose centre is below this has left the hand
    LOST = 0.1  # m: no distance to a target counts as more
    NOISE = 0.05  # std of what is added to an action
    REACH = 0.9  # action +-1 goes so far from the pose towards the joint's limit

    def __init__(self, episode_steps=None):
        super().__init__(20, episode_steps or 75)
        self.model = baoding_model()
        import mujoco
        self.data = mujoco.MjData(self.model)
        joints = [self.model.joint(f"robot0:{name}") for name in HAND_POSE]
        pose = {joint.id: angle for joint, angle in zip(joints, HAND_POSE.values(), strict=True)}
        self._hand = [joint.qposadr[0] for joint in joints]
        self._middle = np.array([pose[joint] for joint in self.model.actuator_trnid[:, 0]])
        self._low, self._high = self.model.actuator_ctrlrange.T
        self._balls = [self.model.joint(f"ball{i}").qposadr[0] for i in (1, 2)]

    def control(self, action):
        """Return the joint targets (..., 20), rad, of actions in [-1, 1]; 0 is HAND_POSE."""
        room = np.where(action > 0, self._high - self._middle, self._middle - self._low)
        return self._middle + self.REACH * action * room

    def balls_in(self, qpos):
        """Return the centres of the balls in positions (..., nq): (..., 2, 3), m."""
        return np.stack([qpos[..., i : i + 3] for i in self._balls], -2)

    def targets(self, step):
        """Return where the balls should be after `step` (...) steps: (..., 2 balls, x and y), m."""
        angle = self.phase - 2 * np.pi * np.asarray(step)[..., None] / self.PERIOD + [0, np.pi]
        return self.CENTRE + self.AXES * np.stack([np.cos(angle), np.sin(angle)], -1)

    def commanded(self, steps):
        """Return the turns of the line through targets that begin along x, as they nearly do."""
        angle = 2 * np.pi * np.arange(steps + 1) / self.PERIOD
        x, y = self.AXES[:, None] * (np.cos(angle), np.sin(angle))  # not at an even pace
        return np.unwrap(np.arctan2(y, x))[-1] / (2 * np.pi)

    def _simulate(self, action):
        import mujoco
        self.data.ctrl[:] = self.control(action)
        mujoco.mj_step(self.model, self.data, self.SUBSTEPS)

    def _reset(self, seed):
        """Start widely: settling would undo noise on the joints, so a random action holds them."""
        import mujoco
        rng = self.np_random
        qpos = self.data.qpos
        mujoco.mj_resetData(self.model, self.data)
        qpos[self._hand] = list(HAND_POSE.values()) + rng.uniform(-0.01, 0.01, len(HAND_POSE))
        for i, side in zip(self._balls, (1, -1), strict=True):
            qpos[i : i + 2] = self.CENTRE + (side * BALL_RADIUS, 0)
            qpos[i : i + 2] += rng.uniform(-0.004, 0.004, 2)
        action = 0.1 * rng.uniform(-1, 1, self.action_dim)
        for _ in range(8):
            self._simulate(action)
        self._begin(qpos)

    def _begin(self, qpos):
        """Start the account of an episode: the targets begin at the angle of the balls' line."""
        balls = self.balls_in(qpos)[:, :2]  # (2, 2)
        self._line = balls[0] - balls[1]
        x, y = self._line / self.AXES
        self.phase = np.arctan2(y, x)
        self._turned = 0.0
        self._errors = []
        self._dropped = False

    def _follow(self, qpos):
        """Account for the positions (nq,) after a step -> (2,) distances to the targets, m."""
        balls = self.balls_in(qpos)
        line = balls[0, :2] - balls[1, :2]
        x, y = self._line
        angle = np.arctan2(x * line[1] - y * line[0], x * line[0] + y * line[1])
        self._dropped |= bool(balls[:, 2].min() < self.DROPPED)
        if not self._dropped:
            self._turned -= angle / (2 * np.pi)  # clockwise counts
        self._line = line
        distance = np.linalg.norm(balls[:, :2] - self.targets(len(self._errors) + 1), axis=1)
        self._errors.append(np.minimum(distance, self.LOST).mean())
        return distance

    def _step(self, action):
        noise = self.NOISE * self.np_random.normal(size=self.action_dim)
        self._simulate(np.clip(action + noise, -1, 1))
        distance = self._follow(self.data.qpos)
        self.completed = self._result()
        return distance.max() <= self.CLOSE and not self._dropped

    def _result(self):
        steps = len(self._errors)
        if steps < self.episode_steps or self._dropped or np.mean(self._errors) > self.NEAR:
            return ()
        return self.tasks if self._turned >= self.TURNED * self.commanded(steps) else ()

    def _info(self):
        return {
            **super()._info(),
            "log/rotation": float(self._turned),
            "log/error": float(np.mean(self._errors or 0)),
            "log/dropped": float(self._dropped),
        }

    def tasks_in(self, qpos):
        """Return the tasks that an episode with the positions (rows, nq) completes."""
        account = copy.copy(self)  # self may be in an episode of its own
        account._begin(qpos[0])
        for row in qpos[1:]:
            account._follow(row)
        return account._result()


# ----------------------------------------------------------------- any Gymnasium environment


class Generic(PixelEnv):
    """Show any Gymnasium environment with bounded, continuous actions through 64x64 pixels.

    Frames: the observation if that is an RGB picture, else render(); area-resized. Actions in
    [-1, 1] are scaled to the environment's bounds. An episode that ends early stays on its last
    frame, without reward, until step T (`padded` in info). Success: info["success"] or
    info["is_success"] was true at any step. T: `episode_steps`, else the environment's own limit.
    """

    def __init__(self, name, episode_steps=None):
        inner = _make_inner(name, episode_steps)
        steps = episode_steps or (inner.spec and inner.spec.max_episode_steps)
        if not steps:
            raise UserError(f"{name} has no episode length of its own: give episode_steps")
        box = inner.action_space
        if not (isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.is_bounded()):
            raise UserError(f"{name} has actions {box}: only a bounded Box with one axis will do")
        super().__init__(box.shape[0], steps)
        self.action_low = box.low.tolist()
        self.action_high = box.high.tolist()
        self.inner = inner

    def own_action(self, action):
        """Scale an action (A,) in [-1, 1] to the environment's own units."""
        box = self.inner.action_space
        own = box.low + (action + 1) / 2 * (box.high.astype(np.float64) - box.low)
        return np.clip(own.astype(box.dtype), box.low, box.high)

    def _reset(self, seed):
        self._over = False
        self._look(*self.inner.reset(seed=seed))

    def _step(self, action):
        self.padded = self._over
        if self._over:
            return 0.0
        observation, reward, ended, cut, info = self.inner.step(self.own_action(action))
        self._over = ended or cut
        self._look(observation, info)
        return reward

    def _look(self, observation, info):
        if info.get("success", False) or info.get("is_success", False):
            self.completed = ["goal"]
        self._frame = _picture(self.inner, observation)

    def render(self):
        """Return the last frame, (64, 64, 3) uint8."""
        return self._frame.copy()

    def close(self):
        """Close the environment inside."""
        self.inner.close()


def _shows_pictures(env):
    space = env.observation_space
    return space.dtype == np.uint8 and len(space.shape) == 3 and space.shape[2] == 3


def _picture(env, observation):
    """Return an environment's observation if that is a picture, else render(); at 64x64."""
    frame = np.asarray(observation if _shows_pictures(env) else env.render())
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        found = f"{env} renders {frame.dtype} {frame.shape}"
        raise UserError(f'{found}: expected uint8 RGB; make it with render_mode="rgb_array"')
    return resize(frame)


def _make_inner(name, episode_steps):
    """Make a Gymnasium environment, with rgb_array rendering unless it observes pictures."""
    choose_gl(required=False)  # in case it is a mujoco environment
    limit = {"max_episode_steps": episode_steps} if episode_steps else {}
    try:
        env = gym.make(name, **limit)
        if _shows_pictures(env):
            return env
        env.close()
        return gym.make(name, render_mode="rgb_array", **limit)
    except (gym.error.Error, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot make environment {name!r} ({reason}): give kitchen, baoding, point, or a "
            "Gymnasium id, as module:Id if its module must be imported") from error


# ----------------------------------------------------------------------- making environments

BUILT_IN = {"kitchen": Kitchen, "baoding": Baoding, "point": Point}

# What AsyncVectorEnv raises when a worker's process is gone or hangs.
WORKER_GONE = (EOFError, ConnectionError, multiprocessing.TimeoutError)


def make_env(name, **options):
    """Make an environment: "kitchen", "baoding", "point", a Gymnasium id or "module:Id".

    options: `episode_steps` (int); the kitchen's `tasks` ("microwave+kettle") and
    `robot_noise_ratio`. None means the environment's own. Refuses what does not apply.
    """
    made = BUILT_IN.get(name) or functools.partial(Generic, name)
    known = [key for key in inspect.signature(made).parameters if key != "name"]
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if key not in known:
            raise UserError(f"{key} does not apply to {name}, which has {', '.join(known)}")
    return made(**options)


class InProcess(SyncVectorEnv):
    """Keep an environment in this process, with AsyncVectorEnv's calls."""

    def step_async(self, actions):
        """Remember the actions."""
        self._actions = actions

    def step_wait(self, timeout=None):
        """Do the step."""
        return self.step(self._actions)


def make_vec(name, n, **options):
    """Make `n` environments in lockstep, without autoreset -> gymnasium.vector.VectorEnv.

    n > 1: a process each (a script then needs `if __name__ == "__main__":`, since they are
    spawned). A worker's exception is raised here; see WORKER_GONE for a worker that is killed.
    """
    makers = [functools.partial(make_env, name, **options)] * n
    if n == 1:
        return InProcess(makers, autoreset_mode=AutoresetMode.DISABLED)
    return AsyncVectorEnv(makers, context="spawn", autoreset_mode=AutoresetMode.DISABLED)


def env_info(vec):
    """Ask the environments of make_vec for their length, actions and renderer -> dict."""
    names = ("episode_steps", "action_dim", "gl_renderer", "action_low", "action_high")
    return {name: vec.call(name)[0] for name in names}


# ---------------------------------------------------------------------------- demonstrations
#
# A STATE file (demos/kitchen.npz) holds positions and actions, and is drawn here. A PIXEL file
# holds images and actions in one of two orders, told apart by their shapes. demos/README.md
# describes them. What comes out is always
#
#     row t     0     1     2    ...   T
#     image    x0 -> x1 -> x2   ...   xT     (T+1, 64, 64, 3) uint8
#     action    0    a0    a1   ... aT-1     (T+1, A) float32 in [-1, 1]: action[t] led to image[t]

STATE_KEYS = ("env", "mujoco", "seed", "start", "qpos", "action")
ROUNDING = 1e-3  # share of the range by which an action may be outside its bounds


def load_demos(path, name, n=0, min_steps=1, **options):
    """Load demonstrations of the environment `name` -> list of episodes, each a dict of

    image (T+1, 64, 64, 3) uint8; action (T+1, A) float32, where action[t] led to image[t] and row 0
    is zero; success (bool, or None if not known).

    path: a file, a folder of files, "minari:DATASET", or "" for the environment's own. n: how many
    (0: all). options: as for make_env. Raises UserError, naming the file, for bad input and for an
    episode of fewer than `min_steps` steps. Prints one line for what is guessed or lost.
    """
    path = path or Path(__file__).parent / "demos" / f"{name}.npz"
    episodes = []
    remarks = []
    with contextlib.closing(make_env(name, **options)) as env:
        for source in _sources(path):
            left = n - len(episodes) if n else None
            if left != 0:
                episodes += _load(source, env, name, left, remarks)
    _expect(len(episodes) >= n, path, f"holds {len(episodes)} demonstrations: {n} were asked for")
    steps = min(len(episode["action"]) for episode in episodes) - 1
    _expect(steps >= min_steps, path, f"an episode has {steps} steps: expected {min_steps} or more")
    for remark in sorted(set(remarks)):
        _say(f"{path}: {remarks.count(remark)} of {len(episodes)} demonstrations {remark}")
    return episodes


def _expect(true, source, otherwise):
    if not true:
        raise UserError(f"{source}: {otherwise}")


def _sources(path):
    """List what to read: files, or the name of a Minari dataset."""
    if str(path).startswith("minari:"):
        return [path]
    path = Path(path).expanduser()
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    _expect(path.exists() and files, path, "not there; give an .npz file or a folder of them")
    return files


def _load(source, env, name, limit, remarks):
    """Load up to `limit` episodes of one source."""
    minari = str(source).startswith("minari:")
    arrays = _read_minari(source, limit) if minari else _read_npz(source)
    if "qpos" in arrays:
        return _state_episodes(source, arrays, env, name, limit, remarks)
    recorded = _split(source, env, **arrays)[:limit]
    return [_pixel_episode(source, env, *episode, remarks) for episode in recorded]


def _read_npz(file):
    """Read the arrays of a demonstrations' file by name."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            wanted = STATE_KEYS if "qpos" in stored.files else ("image", "action")
            missing = [key for key in wanted if key not in stored.files]
            known = (*wanted, "episode_ends", "terminated")
            if stored.zip.testzip():  # numpy stops before the checksum if its own header lies
                raise ValueError("checksum")
            arrays = {key: stored[key] for key in known if key in stored.files}
    except Exception as error:  # of as many kinds as a file can be damaged
        text = " ".join(str(error).split())
        raise UserError(f"{file}: not a readable .npz file without pickles ({text})") from error
    _expect(not missing, file, f"has no {', '.join(missing)}: expected {', '.join(wanted)}")
    return arrays


def _in_bounds(source, action, low, high):
    """Return actions as float64 if they are finite and within their bounds, but for rounding."""
    _expect(np.isfinite(action).all(), source, "action has NaN or infinite entries")
    low = np.broadcast_to(low, action.shape)
    high = np.broadcast_to(high, action.shape)
    outside = np.maximum(low - action, action - high) / (high - low)
    i = np.unravel_index(outside.argmax(), outside.shape)
    found = f"an action is {action[i]:.6g}, outside its bounds [{low[i]:.6g}, {high[i]:.6g}]"
    _expect(outside[i] <= ROUNDING, source, f"{found}: record it in these units, or clip it")
    return np.clip(action, low, high, dtype=np.float64)


def _state_episodes(file, arrays, env, name, limit, remarks):
    """Draw up to `limit` episodes of a state file."""
    made_for = str(arrays["env"])
    _expect(made_for == name and name in BUILT_IN, file, f"was made for {made_for}, not {name}")
    env.reset(seed=0)
    qpos = arrays["qpos"]
    action = arrays["action"]
    good = qpos.dtype.kind == action.dtype.kind == "f" and qpos.ndim == 3
    good = good and qpos.shape[2] == len(env.qpos) and action.size
    good = good and action.shape == (len(qpos), qpos.shape[1] - 1, env.action_dim)
    found = f"qpos is {qpos.dtype} {qpos.shape} and action is {action.dtype} {action.shape}"
    form = f"floats (N, T+1, {len(env.qpos)}) and (N, T, {env.action_dim})"
    _expect(good, file, f"{found}: expected {form}")
    _expect(np.isfinite(qpos).all(), file, "qpos has NaN or infinite entries")
    action = _in_bounds(file, action, -1, 1)[:limit]
    if isinstance(env, Simulated):
        _say(f"drawing {len(action)} demonstrations")  # takes seconds without a GPU
    episodes = []
    for positions, actions in zip(qpos[:limit, : env.episode_steps + 1], action, strict=True):
        image = np.stack([env.draw(row) for row in positions])
        success = len(env.tasks_in(positions)) == len(env.tasks)
        if not success:
            remarks.append(f"do not complete the task within {env.episode_steps} steps")
        episodes.append(_fit(image, actions, False, success, env, remarks))
    return episodes


def _split(source, env, image, action, episode_ends=None, terminated=None):
    """Split recorded pixels into episodes -> list of (image, action, terminated or None)."""
    found = f"image is {image.dtype} {image.shape} and action is {action.dtype} {action.shape}"
    form = f"uint8 pictures (T+1, height, width, 3) from 0 to 255 and floats (T, {env.action_dim})"
    good = image.dtype == np.uint8 and image.ndim in (4, 5) and image.shape[-1] == 3
    good = good and action.dtype.kind == "f" and action.ndim == image.ndim - 2
    good = good and action.shape[-1] == env.action_dim
    _expect(good, source, f"{found}: expected {form}")
    if image.ndim == 5:  # (N, T+1, height, width, 3)
        episode_ends = image.shape[1] * np.arange(1, len(image) + 1)
        image = image.reshape(-1, *image.shape[2:])
        action = action.reshape(-1, env.action_dim)
    ends = np.atleast_1d(len(image) if episode_ends is None else episode_ends)
    good = ends.dtype.kind in "iu" and ends.size and ends[-1] == len(image)
    good = good and (np.diff(ends, prepend=0) > 1).all()
    form = f"the number of images up to each episode's end, {len(image)} at the last"
    _expect(good, source, f"episode_ends is {ends}: expected {form}")
    fewer = (len(image) - len(action)) / len(ends)  # 1: Gymnasium's order, 0: Dreamer's
    form = "one action fewer than images in each (Gymnasium's order) or as many (Dreamer's)"
    found = f"{len(ends)} episodes have {len(image)} images and {len(action)} actions"
    _expect(fewer in (0, 1), source, f"{found}: expected {form}")
    action_ends = ends - int(fewer) * np.arange(1, len(ends) + 1)
    images = np.split(image, ends[:-1])
    actions = np.split(action, action_ends[:-1])
    if terminated is None:
        return [(*pair, None) for pair in zip(images, actions, strict=True)]
    flags = terminated.reshape(-1).astype(bool)
    if len(flags) != len(ends):  # one an action
        good = len(flags) == len(action)
        _expect(good, source, f"terminated has {len(flags)} entries: expected {len(ends)}")
        flags = np.array([part.any() for part in np.split(flags, action_ends[:-1])])
    return list(zip(images, actions, flags.tolist(), strict=True))


def _read_minari(source, limit):
    """Read up to `limit` episodes of a Minari dataset -> arrays as in a pixel file."""
    try:
        import minari
        dataset = minari.load_dataset(source.removeprefix("minari:"))
    except ImportError as error:
        raise UserError(f"{source}: needs the package minari: pip install minari") from error
    except FileNotFoundError as error:
        raise UserError(f"{source}: not here; minari download it, or correct its name") from error
    if getattr(dataset.storage, "jpeg_encoding", False):
        _say(f"{source}: holds lossy JPEG pictures: a discriminator can separate them from frames")
    arrays = {"image": [], "action": [], "terminated": []}
    for episode in dataset.iterate_episodes(range(dataset.total_episodes)[:limit]):
        seen = episode.observations
        parts = list(seen.values()) if isinstance(seen, dict) else [seen]
        pictures = [part for part in parts if np.ndim(part) == 4]
        _expect(len(pictures) == 1, source, f"observes {len(pictures)} pictures: expected one")
        arrays["image"].append(pictures[0])
        arrays["action"].append(episode.actions)
        arrays["terminated"].append(episode.terminations)
    ends = np.cumsum([len(image) for image in arrays["image"]])
    return {"episode_ends": ends, **{key: np.concatenate(x) for key, x in arrays.items()}}


def _pixel_episode(source, env, image, action, terminated, remarks):
    """Bring one recorded episode, of either order, into the learner's units and length."""
    low = np.array(env.action_low)
    high = np.array(env.action_high)
    if len(action) > len(image) - 1:
        _expect(not action[0].any(), source, "row 0 of action is not zero, though it led to no "
                "image; if action[t] was chosen at image[t], drop each episode's last action")
        action = _in_bounds(source, action[1:], -1, 1)
        if (low != -1).any() or (high != 1).any():
            remarks.append("are in Dreamer's order: actions are read as shares of the bounds")
    else:
        action = _in_bounds(source, action, low, high)
        action = (action - (low + high) / 2) / ((high - low) / 2)
    if isinstance(env, Simulated):
        remarks.append("hold another renderer's pixels: a discriminator can separate them")
    ended = isinstance(env, Generic) and terminated is not False
    if ended and terminated is None and len(action) < env.episode_steps:
        remarks.append("are short, without `terminated`: taken as ended by the environment")
    image = np.stack([resize(frame) for frame in image[: env.episode_steps + 1]])
    return _fit(image, action, ended, None, env, remarks)


def _fit(image, action, ended, success, env, remarks):
    """Fit images (t+1, 64, 64, 3) and actions (t, A) to the environment's length T.

    An episode that the environment `ended` goes on as Generic continues one: with its last frame
    and no action. What a shorter recording did not see stays unseen.
    """
    steps = env.episode_steps
    if len(action) > steps and success is None:
        remarks.append(f"are cut to {steps} steps, and perhaps lose their success")
    if len(action) < steps and not ended:
        remarks.append(f"stop before step {steps}: the rest is seen only from the policy")
    action = np.pad(action[:steps], ((1, 0), (0, 0)))
    missing = steps + 1 - len(action)
    if missing and ended:
        image = np.pad(image, ((0, missing), (0, 0), (0, 0), (0, 0)), mode="edge")
        action = np.pad(action, ((0, missing), (0, 0)))
    return {"image": image, "action": action.astype(np.float32), "success": success}


def record(env, policy, path, episodes, seed=0):
    """Record demonstrations in an environment to a pixel file, in Gymnasium's order.

    policy(observation, info) -> action in the units of env.action_space (clipped to its bounds).
    env: from gym.make(..., render_mode="rgb_array") or make_env. Images are its observations if
    those are pictures, else render(). Episode i starts from reset(seed=seed + i).
    """
    path = Path(path)
    good = path.suffix == ".npz" and path.parent.is_dir()
    _expect(good, path, "give a name that ends in .npz, in a folder that exists")
    choose_gl(required=False)
    box = env.action_space
    stored = {"image": [], "action": [], "episode_ends": [], "terminated": []}
    for i in range(episodes):
        observation, info = env.reset(seed=seed + i)
        stored["image"].append(_picture(env, observation))
        over = False
        while not over:
            action = np.clip(policy(observation, info), box.low, box.high).astype(box.dtype)
            observation, _, ended, cut, info = env.step(action)
            padded = info.get("padded", False)  # make_env's environments go on after the end
            ended = ended or padded
            over = ended or cut
            if not padded:
                own = env.own_action(action) if isinstance(env, Generic) else action
                stored["image"].append(_picture(env, observation))
                stored["action"].append(own)
        stored["episode_ends"].append(len(stored["image"]))
        stored["terminated"].append(ended)
    np.savez_compressed(path, **stored)
    _say(f"{path}: {episodes} episodes, {len(stored['action'])} steps")

"""Environments seen through 64x64 pixels.

    env = make_env("point")             also "kitchen", "baoding", a Gymnasium id, "module:Id"
    image, info = env.reset(seed=0)     image (64, 64, 3) uint8
    image, reward, _, over, info = env.step(action)    action (A,) in [-1, 1]; over at step T
    vec = make_vec("kitchen", 5)        five of them, each in a process of its own

All environments are FIXED-LENGTH: an episode has T steps, whatever happens in it. An episode that
ended at success or failure would show the discriminator how long an expert's is, and that is a
reward by itself. `info` has `success` (bool), `padded` (bool: the episode was over before
this step) and an environment's own measures as `log/<name>` (float). This file never imports torch,
and mujoco only when an environment needs it: MUJOCO_GL must be set before.
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
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.async_vector_env import AsyncState

IMAGE = 64  # pixels: width and height of every observation

class UserError(ValueError):
    """Report a user's mistake in one line: what is wrong, where, and what to do."""

# === The fixed-length base class ==================================================================

class PixelEnv(gym.Env):
    """Give an environment pixels, checked actions and episodes of exactly T steps.
    A subclass defines `_reset(seed)` and `_step(action)`, which returns the task's own reward and
    lists in `completed` which `tasks` are done; success is all of them. It also defines `qpos`, the
    positions (nq,); `draw(qpos)`, their picture; `tasks_in(qpos)`, what (T+1, nq) complete."""
    metadata = {"render_modes": ["rgb_array"], "render_fps": 12}
    render_mode = "rgb_array"
    gl_renderer = ""  # which OpenGL draws
    tasks = ("goal",)

    def __init__(self, action_dim, episode_steps):
        if not isinstance(episode_steps, int) or episode_steps < 1:
            raise UserError(f"episode_steps is {episode_steps!r}: expected a whole number >= 1")
        self.action_dim = action_dim
        self.episode_steps = episode_steps
        self.action_low = [-1.0] * action_dim  # bounds in the environment's own units
        self.action_high = [1.0] * action_dim
        self.observation_space = gym.spaces.Box(0, 255, (IMAGE, IMAGE, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self._t = episode_steps  # no step before the first reset
        self.completed = []
        self.padded = False

    def reset(self, *, seed=None, options=None):
        """Start an episode -> image (64, 64, 3) uint8, info. The seed fixes all of it."""
        super().reset(seed=seed)
        self._t = 0
        self.completed = []
        self.padded = False
        self._reset(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self.render(), self._info()

    def step(self, action):
        """Do one step with action (A,) in [-1, 1] -> image, reward, False, t == T, info."""
        if self._t >= self.episode_steps:
            raise UserError(f"step() outside an episode of {self.episode_steps}: call reset()")
        action = np.asarray(action, np.float32)  # as it is recorded: it then replays exactly
        if action.shape != (self.action_dim,):
            raise UserError(f"action has shape {action.shape}: expected ({self.action_dim},)")
        if not np.abs(action).max() <= 1 + 1e-6:  # NaN too
            raise UserError(f"action is outside [-1, 1] or not finite: {action}")
        reward = self._step(np.clip(action, -1, 1).astype(np.float64))
        self._t += 1
        return self.render(), float(reward), False, self._t == self.episode_steps, self._info()

    def render(self):
        """Draw the present state -> (64, 64, 3) uint8."""
        return self.draw(self.qpos)

    def _info(self):
        return {"success": len(self.completed) == len(self.tasks), "padded": self.padded}

# === Point ========================================================================================
# A disc in a walled room, seen from above, drawn with numpy. Lengths are in pixels, y points down.

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
    A wall stops the robot and fails the episode, which goes on. Success is final: goal reached,
    no wall touched. qpos: x, y and whether a wall was touched."""
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
        return np.append(self.position, self.touched)

    def draw(self, qpos):
        image = self._room.copy()
        position = np.float64(np.float32(qpos[:2]))  # float32, as stored in demonstrations
        _draw_disc(image, position, ROBOT_RADIUS, (255, 150, 30))
        return image

    def tasks_in(self, qpos):
        distance = np.hypot(*(qpos[:, :2] - GOAL).T)
        return ("goal",) if ((distance < GOAL_RADIUS) & (qpos[:, 2] == 0)).any() else ()

# === Rendering ====================================================================================
# `Simulated.draw` draws the agent's frames and the demonstrations alike: a discriminator would soon
# separate two renderers, and learn that instead of the task. To be fast without a GPU, it leaves
# out shadow maps, reflections, multisampling, and detail too fine for 64 pixels.

FINE_MESH = 2000  # only meshes of more faces are simplified
GL_TIMEOUT = 60  # seconds after which the trial of an OpenGL library has failed

@functools.cache
def choose_gl(required=True):
    """Set MUJOCO_GL, if unset, to EGL or else OSMesa. Raise UserError if `required` and all fail.
    Each is tried in its own process: a failed load would spoil this process for the next."""
    given = os.environ.get("MUJOCO_GL")
    worker = multiprocessing.current_process().daemon
    if not sys.platform.startswith("linux") or (given and (worker or not required)):
        return
    names = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID")
    reasons = [f"{key}={os.environ[key]}" for key in names if key in os.environ]
    if not given:  # a left-over of another program
        os.environ.pop("PYOPENGL_PLATFORM", None)
    backends = [given] if given else ["egl", "osmesa"]
    trial = "from mujoco import *; Renderer(MjModel.from_xml_string('<mujoco/>'), 64, 64).render()"
    for backend in backends:
        try:
            subprocess.run(
                [sys.executable, "-c", trial], env={**os.environ, "MUJOCO_GL": backend},
                timeout=GL_TIMEOUT, check=True, capture_output=True, text=True)
            os.environ["MUJOCO_GL"] = backend
            return
        except subprocess.SubprocessError as error:
            # Errors after the traceback come from half-made objects.
            words = str(error.stderr or error).split("Exception ignored")[0].strip()
            reasons.append(words.split("\n")[-1])
    if required:
        raise UserError(
            f"cannot render with {' or '.join(backends)} ({'; '.join(reasons)}): install an OpenGL "
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
    if height % IMAGE == width % IMAGE == 0:  # whole blocks: sums, far faster than matrices
        area = height // IMAGE * (width // IMAGE)
        blocks = images.reshape(*lead, IMAGE, height // IMAGE, IMAGE, width // IMAGE, 3)
        total = blocks.sum(-4, dtype=np.uint32).sum(-2, dtype=np.uint32)
        return ((total + area // 2) // area).astype(np.uint8)
    pixels = images.reshape(*lead, height, width * 3).astype(np.float32)
    rows = (_overlap(height) @ pixels).reshape(*lead, IMAGE, width, 3)
    return np.rint(_overlap(width) @ rows).astype(np.uint8)

def simplify_meshes(model, cell):
    """Merge corners within cubes of `cell` metres, in place, in large meshes without a texture.
    The first corner of a cube replaces all others; faces without area and duplicate faces are
    removed. (The robot's links have 134,000 of the kitchen's 140,000 faces.)"""
    for mesh in np.flatnonzero((model.mesh_facenum > FINE_MESH) & (model.mesh_texcoordadr < 0)):
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

    CAMERA: distance, point looked at, elevation (m, degrees). ROUND: slices, stacks, quads."""
    @property
    def qpos(self):
        return self.data.qpos.copy()

    def draw(self, qpos):
        import mujoco
        model = self._renderer.model
        self._shown.qpos[:] = np.float32(qpos)  # as demonstrations store it: the same pixels
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
        size = 2 * IMAGE  # keeps the thin gripper clear, costs little: corners take the time
        model.vis.global_.offwidth = size
        model.vis.global_.offheight = size
        backend = os.environ.get("MUJOCO_GL")
        if backend in ("egl", "osmesa"):  # mujoco may have been imported before this was chosen
            library = importlib.import_module(f"mujoco.{backend}")
            mujoco.gl_context.GLContext = library.GLContext
        renderer = mujoco.Renderer(model, size, size)
        renderer.scene.flags[int(mujoco.mjtRndFlag.mjRND_REFLECTION)] = 0
        self._shown = mujoco.MjData(model)  # its own: drawing cannot disturb the physics
        self._camera = camera = mujoco.MjvCamera()
        camera.azimuth = 90
        camera.distance, camera.lookat, camera.elevation = self.CAMERA
        atexit.register(self.close)  # registered after the OpenGL library's handler: runs first
        return renderer

    @property
    def gl_renderer(self):
        self._renderer.render()  # makes its context the current one
        from OpenGL import GL
        parts = [GL.glGetString(GL.GL_RENDERER), GL.glGetString(GL.GL_VERSION)]
        return b"; ".join(parts).decode()

    def close(self):
        """Free the renderer; a later draw makes another."""
        if "_renderer" in vars(self):
            self._renderer.render()  # makes current the context to be freed
            self._renderer.close()
            del self._renderer
            atexit.unregister(self.close)

# === Kitchen ======================================================================================

def _import_robotics():
    """Register FrankaKitchen-v1. Raise UserError without mujoco or a way to render."""
    for package in ("mujoco", "gymnasium_robotics"):
        if not importlib.util.find_spec(package):
            raise UserError(f"{package} is not installed: pip install -r requirements.txt")
    choose_gl()
    with contextlib.redirect_stderr(io.StringIO()):  # a notice about environments not used here
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    return gymnasium_robotics

class Kitchen(Simulated):
    """Show FrankaKitchen-v1 in pixels: nine joint velocities, four tasks, 280 steps of 0.08 s.

    tasks: "microwave+kettle" and so on; None: all four. With one task an episode has 75 steps.
    A task is completed once its joints are within 0.3 of its goal. Success: all chosen tasks are
    completed. Reward: the number within 0.3 now. `log/tasks`: the number completed so far.
    robot_noise_ratio: noise of the measured joints, which enters the servo (the authors': 0.1)."""
    TASKS = ("microwave", "kettle", "light switch", "slide cabinet")
    CAMERA = (1.86, (-0.3, 0.5, 2.0), -60)
    MESH = 0.01
    ROUND = (12, 2, 1)
    LAMP_FREE = -0.018  # m: at this position of the block its shadow leaves the stove

    def __init__(self, tasks=None, episode_steps=None, robot_noise_ratio=0.01):
        chosen = tasks.split("+") if tasks else self.TASKS
        self.tasks = tuple(task.strip() for task in chosen)
        if len(set(self.tasks) & set(self.TASKS)) < len(self.tasks):
            raise UserError(f"tasks {tasks!r}: expected {', '.join(self.TASKS)}, joined by +")
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
        return super()._info() | {"log/tasks": float(len(self.completed))}

    def draw(self, qpos):
        # The lamp in the oven's hood always burns, behind a block that the light switch slides
        # away. Without shadows a block hides nothing, so this switches the lamp itself.
        block = qpos[self.model.joint("light_joint").qposadr[0]]
        self._renderer.model.light("ovenlight").active = np.float32(block) <= self.LAMP_FREE
        return super().draw(qpos)

    def tasks_in(self, qpos):
        from gymnasium_robotics.envs.franka_kitchen import kitchen_env as v1
        done = []
        for task in self.tasks:
            offset = qpos[:, v1.OBS_ELEMENT_INDICES[task]] - v1.OBS_ELEMENT_GOALS[task]
            if (np.linalg.norm(offset, axis=1) < v1.BONUS_THRESH).any():
                done.append(task)
        return tuple(done)

# === Baoding ======================================================================================
# Two balls in the palm of gymnasium-robotics' Shadow Hand, to be turned about each other. The
# package's files are read where they are installed. The palm looks up (+z), the fingers point along
# +y, the thumb is at +x.

HAND_POSE = {  # rad: where action zero sends the joints, a flat bowl; the wrist (WR) tilts it
    "WRJ1": 0.0126, "WRJ0": -0.398,
    "FFJ3": 0.30, "FFJ2": 0.056, "FFJ1": 0.75, "FFJ0": 0.85,
    "MFJ3": 0.20, "MFJ2": 0.0, "MFJ1": 0.75, "MFJ0": 0.85,
    "RFJ3": 0.07, "RFJ2": 0.1, "RFJ1": 0.75, "RFJ0": 0.85,
    "LFJ4": 0.0, "LFJ3": -0.34, "LFJ2": 0.0, "LFJ1": 0.8, "LFJ0": 0.9,
    "THJ4": -0.02, "THJ3": 0.374, "THJ2": 0.094, "THJ1": -0.126, "THJ0": -0.536,
}
BALL_RADIUS = 0.028  # m
BAODING_XML = """<mujoco model="baoding">
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
    # Deleting what has no effect halves a step's cost: touch sensors, forearm, wrist, and all
    # tendons but those that couple a finger's last two joints.
    unused = [tendon for tendon in spec.tendons if not tendon.name.endswith("J1c")]
    unused += [site for site in spec.sites if site.name.startswith("robot0:Tch")]
    unused += [*spec.sensors, spec.geom("robot0:C_forearm"), spec.geom("robot0:C_wrist")]
    for element in unused:
        spec.delete(element)
    skin = spec.material("robot0:MatViz")
    skin.rgba = (0.45, 0.46, 0.5, 1)  # stock white saturates
    skin.specular = 0
    return spec.compile()

class Baoding(Simulated):
    """Turn two balls about each other in the palm: 20 joint targets, 75 steps of 0.1 s.

    Each ball has an invisible target on an ellipse above the palm. The targets start at the angle
    of the line through the balls (some 23 mm away) and go round clockwise, seen from above, once in
    60 steps. Success, at the end: no ball was dropped, the pair turned by at least 88% of
    what was commanded (1.1 turns in 75 steps), and balls were at most 20 mm from their targets on
    average. Reward: 1 if both balls are within 25 mm of their targets and none was dropped.

    `log/rotation`: net turns in the commanded direction, up to a drop; `log/error`: mean distance
    of balls and targets so far, seen from above (m, at most 0.1 each); `log/dropped`: 0 or 1."""
    metadata = {**PixelEnv.metadata, "render_fps": 10}
    tasks = ("turn",)
    CAMERA = (0.27, (0.01, -0.015, 0.17), -80)
    MESH = 0.0015
    ROUND = (16, 10, 1)
    SUBSTEPS = 20  # of 0.005 s
    PERIOD = 60  # steps per turn of the targets
    CENTRE = np.array([0.005, -0.005])  # of the ellipse: m, x and y
    AXES = np.array([0.02, 0.036])
    TURNED = 0.88  # success: share of the commanded turns
    NEAR = 0.020  # success: m, mean error
    CLOSE = 0.025  # reward: m, error of a step
    DROPPED = 0.10  # m: a ball whose centre is below this has left the hand
    LOST = 0.1  # m: cap on the distance to a target
    NOISE = 0.05  # std of action noise: a blind replay seldom succeeds
    REACH = 0.9  # action +-1 goes this share of the way from pose to limit

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
        """Vary the start by a random action: settling would undo noise on the joints."""
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
        """Reset the measures of an episode, and put the targets at the balls' angle."""
        balls = self.balls_in(qpos)[:, :2]  # (2, 2)
        self._line = balls[0] - balls[1]
        x, y = self._line / self.AXES
        self.phase = np.arctan2(y, x)
        self._turned = 0.0
        self._errors = []
        self._dropped = False

    def _follow(self, qpos):
        """Measure the positions (nq,) after a step -> (2,) distances to the targets, m."""
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
        return super()._info() | {
            "log/rotation": float(self._turned),
            "log/error": float(np.mean(self._errors or 0)),
            "log/dropped": float(self._dropped)}

    def tasks_in(self, qpos):
        account = copy.copy(self)  # self may be in an episode of its own
        account._begin(qpos[0])
        for row in qpos[1:]:
            account._follow(row)
        return account._result()

# === Any Gymnasium environment ====================================================================

class Generic(PixelEnv):
    """Show any Gymnasium environment with bounded, continuous actions through 64x64 pixels.
    Frames: the observation if that is an RGB picture, else render(). Actions in [-1, 1] are scaled
    to the environment's bounds. An episode that ends early stays on its last frame, without reward,
    until step T (`padded` in info). Success: info["success"] or info["is_success"] was true at any
    step. T: `episode_steps`, else the environment's own limit."""
    def __init__(self, name, episode_steps=None):
        self.inner = inner = _make_inner(name, episode_steps)
        steps = episode_steps or (inner.spec and inner.spec.max_episode_steps)
        if not steps:
            raise UserError(f"{name} has no episode length of its own: give episode_steps")
        box = inner.action_space
        if not (isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and box.is_bounded()):
            raise UserError(f"{name} has actions {box}: expected a bounded Box with one axis")
        super().__init__(box.shape[0], steps)
        self.action_low = box.low.tolist()
        self.action_high = box.high.tolist()
        self.reset(seed=0)
        self.step(np.zeros(box.shape))  # what fails should fail now, not after pretraining

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
        return self._frame.copy()

    def close(self):
        self.inner.close()

def _is_picture(array):  # or a space
    return array.dtype == np.uint8 and len(array.shape) == 3 and array.shape[2] == 3

def _picture(env, observation):
    """Return an environment's observation if that is a picture, else render(); at 64x64."""
    observed = _is_picture(env.observation_space) or env.render_mode is None
    frame = np.asarray(observation if observed else env.render())
    if not _is_picture(frame):
        found = f"{env} shows {frame.dtype} {frame.shape}"
        raise UserError(f'{found}: expected uint8 RGB; make it with render_mode="rgb_array"')
    return resize(frame)

def _make_inner(name, episode_steps):
    """Make a Gymnasium environment, with rgb_array rendering unless it observes pictures."""
    choose_gl(required=False)  # in case it is a mujoco environment
    limit = {"max_episode_steps": episode_steps} if episode_steps else {}
    try:
        env = gym.make(name, **limit)
        if not _is_picture(env.observation_space):
            env.close()
            env = gym.make(name, render_mode="rgb_array", **limit)
        _picture(env, env.reset(seed=0)[0])  # fail at once without a renderer
        return env
    except (gym.error.Error, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"cannot make environment {name!r} ({reason}): give kitchen, baoding, point, or a "
            "Gymnasium id, as module:Id if its module must be imported") from error

# === Making environments ==========================================================================

BUILT_IN = {"kitchen": Kitchen, "baoding": Baoding, "point": Point}
WORKER_GONE = (EOFError, ConnectionError, multiprocessing.TimeoutError)  # killed, or hanging

def make_env(name, **options):
    """Make an environment: "kitchen", "baoding", "point", a Gymnasium id or "module:Id".
    options: `episode_steps` (int); the kitchen's `tasks` ("microwave+kettle") and
    `robot_noise_ratio`. None means the environment's own. Refuse what does not apply."""
    made = BUILT_IN.get(name) or functools.partial(Generic, name)
    known = [key for key in inspect.signature(made).parameters if key != "name"]
    options = {key: value for key, value in options.items() if value is not None}
    for key in options:
        if key not in known:
            raise UserError(f"{key} does not apply to {name}, which has {', '.join(known)}")
    return made(**options)

def _make_in_worker(name, options):
    if multiprocessing.current_process().daemon:  # not the learner, which makes one too
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the learner
    return make_env(name, **options)

class InProcess(SyncVectorEnv):
    """Keep an environment in this process, with AsyncVectorEnv's calls."""
    def step_async(self, actions):
        self._actions = actions

    def step_wait(self, timeout=None):
        return self.step(self._actions)

def make_vec(name, n, **options):
    """Make `n` environments in lockstep, without autoreset -> gymnasium.vector.VectorEnv.
    n > 1: a process each (a script then needs `if __name__ == "__main__":`, since they are
    spawned). A worker's exception is raised here; see WORKER_GONE for a worker that is killed."""
    makers = [functools.partial(_make_in_worker, name, options)] * n
    if n == 1:
        return InProcess(makers, autoreset_mode=AutoresetMode.DISABLED)
    return AsyncVectorEnv(makers, context="spawn", autoreset_mode=AutoresetMode.DISABLED)

def close(vec):
    """End the environments of make_vec at once, even if a worker hangs."""
    for process in getattr(vec, "processes", ()):
        process.kill()
    vec._state = AsyncState.DEFAULT  # or AsyncVectorEnv waits for a pending call, and warns
    vec.close(terminate=True)

def env_info(vec):
    """Ask the environments of make_vec for their length, actions and renderer -> dict."""
    names = ("episode_steps", "action_dim", "gl_renderer", "action_low", "action_high")
    return {name: vec.call(name)[0] for name in names}

def record(env, policy, path, episodes, seed=0):
    """Record demonstrations in an environment to a pixel file, in Gymnasium's order.
    env: from make_env or gym.make(..., render_mode="rgb_array"); episode i: reset(seed=seed + i).
    policy(observation, info) -> action in the units of env.action_space, clipped to its bounds."""
    path = Path(path)
    if path.suffix != ".npz" or not path.parent.is_dir():
        raise UserError(f"{path}: give a name that ends in .npz, in a folder that exists")
    choose_gl(required=False)
    box = env.action_space
    stored = {"image": [], "action": [], "episode_ends": [], "terminated": []}
    for i in range(episodes):
        observation, info = env.reset(seed=seed + i)
        stored["image"].append(_picture(env, observation))
        ended = cut = False
        while not (ended or cut):
            action = np.clip(policy(observation, info), box.low, box.high).astype(box.dtype)
            observation, _, ended, cut, info = env.step(action)
            padded = info.get("padded", False)  # make_env's environments go on after the end
            ended = ended or padded
            if not padded:
                own = env.own_action(action) if isinstance(env, Generic) else action
                stored["image"].append(_picture(env, observation))
                stored["action"].append(own)
        stored["episode_ends"].append(len(stored["image"]))
        stored["terminated"].append(ended)
    np.savez_compressed(path, **stored)
    print(f"{path}: {episodes} episodes, {len(stored['action'])} steps", file=sys.stderr)

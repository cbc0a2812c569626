"""Scripted expert that makes the demonstrations for the four-task Franka kitchen.

    python demos/make_kitchen.py --n 20 --seed 0 --out demos/kitchen.npz

The robot opens the microwave, carries the kettle to the back burner, switches the light on, slides
the cabinet open and parks. A closed-loop controller (Expert) walks through a list of PHASES:

    J phases   straight in joint space to a KEY_POSE (transits through free space)
    C phases   the tool follows a target that is computed from the objects as they are NOW, by
               damped-least-squares inverse kinematics: a push or a noisy action is corrected
    a phase ends when its own condition holds or its time is up; the last phase of each task
    checks the object itself and, if the task is not done, jumps back to that task's first phase

Expert.servo corrects the actions. The kitchen's "velocity" actions are targets of a weak position
servo, which restarts from the measured joints at every step. Uncorrected, the arm covers only a
fraction of the commanded distance and sags under its own weight.

The file holds simulator states and actions, no pixels: see demos/README.md. Units: m, rad, steps
of 0.08 s. World frame: x to the right, y into the kitchen, z up; the robot's base is (0, 0, 1.8).
"""
import time
from collections.abc import Callable
from dataclasses import dataclass

import mujoco
import numpy as np
from recording import arguments, fail, roll, save, undrawn

# ---- the robot ------------------------------------------------------------------------------
DT = 0.08  # s: the environment's target is q_measured + 2 rad/s * DT * action
REACH = 2 * DT  # rad a full action (+-1) puts the target ahead of the joint
ARM = slice(0, 7)  # qpos and action layout: seven arm joints, then the two fingers
# Joint damping dominates: in one step a joint covers the fraction 1 - exp(-kp DT / damping).
KP = np.array([870.0] * 4 + [120.0] * 3)  # Nm / rad, servo stiffness
COVERED = np.array([0.50] * 4 + [0.62] * 3)
MAX_STEP = np.array([0.066] * 4 + [0.088] * 3)  # rad a step, where the torque saturates
Q_LOW = np.array([-2.85, -1.75, -2.85, -3.0, -2.85, 0.03, -2.85])
Q_HIGH = np.array([2.85, 1.75, 2.85, -0.45, 2.85, 2.08, 2.85])
TOOL = 0.03  # the tool point lies this far ahead of the end_effector site
OPEN = 0.04  # m, finger positions
HALF = 0.03
CLOSED = 0.0

# ---- inverse kinematics ---------------------------------------------------------------------
IK_STEPS = 8
DAMPING = 1e-4
NULL_GAIN = 0.03
WEIGHT = np.array([1, 1, 1, 0.3, 0.3, 0.1])  # position, pointing direction, roll
CARROT = 0.05  # m: how far ahead IK aims
CARROT_TURN = 0.25  # rad

# ---- variation between the demonstrations (so that they cover a tube, not a line) -------------
SPEED = (0.85, 1.0)  # an episode's factor on MAX_STEP, uniform
KEY_JITTER = 0.05  # rad a joint, drawn at each phase
POINT_JITTER = 0.007  # m
ACTION_NOISE = 0.05  # standard deviation, on all nine actions at each step
MAX_RETRIES = 3  # for each task; they use half the jitter

# ---- the task ---------------------------------------------------------------------------------
DEADLINE = 250  # all four tasks must be done by this step, and still be at the end
LIGHT = 17  # indices in qpos
SLIDE = 19
MICROWAVE = 22
KETTLE = slice(23, 26)

# Seven joint angles for each stage, found once: of about 200 collision-free IK solutions for each
# waypoint, the path (Viterbi) with the shortest joint travel at full speed plus a penalty near
# the limits. Successive poses therefore share one elbow branch.
KEY_POSES = {
    "mw_pre":   (-0.877, -1.718, 1.875, -1.836, -0.571, 1.368, 2.149),
    "mw_in":    (-1.292, -1.735, 1.818, -1.422, -0.612, 1.360, 2.148),
    "mw_pull":  (-0.827, -1.428, 2.085, -1.561, -0.972, 1.099, 2.528),
    "mw_out":   (-0.537, -1.244, 2.177, -1.849, -1.001, 0.948, 2.573),
    "kt_pre":   (-0.486, -1.307, 2.490, -2.349, -0.466, 0.527, 2.592),
    "kt_in":    (-0.768, -1.498, 2.292, -2.303, -0.539, 0.878, 2.584),
    "kt_lift":  (-0.714, -1.435, 2.226, -2.371, -0.635, 0.759, 2.515),
    "kt_carry": (-1.655, -1.723, 1.918, -1.668, -0.917, 1.097, 2.562),
    "kt_lower": (-1.728, -1.723, 1.990, -1.587, -0.916, 1.141, 2.525),
    "kt_out":   (-1.151, -1.705, 2.086, -2.163, -0.786, 1.231, 2.564),
    "ls_pre":   (-0.962, -1.728, 1.543, -2.316, -1.126, 0.663, 2.815),
    "ls_in":    (-1.324, -1.725, 1.458, -1.914, -1.099, 0.698, 2.819),
    "ls_push":  (-1.316, -1.725, 1.457, -1.813, -1.266, 0.692, 2.728),
    "ls_out":   (-1.003, -1.729, 1.432, -2.088, -1.432, 0.675, 2.511),
    "sl_pre":   (-1.234, -1.406, 0.894, -2.232, -0.035, 1.685, 1.252),
    "sl_in":    (-1.526, -1.072, 1.086, -1.923, -0.138, 1.885, 1.102),
    "sl_push":  (-1.983, -0.606, 1.170, -1.796, -0.409, 1.709, 1.336),
    "rest":     (-1.457, -0.944, 0.637, -2.320, -0.999, 1.887, 0.778),
}


# ---- small geometry ---------------------------------------------------------------------------
def rot_z(angle):
    """Return the rotation (3, 3) about z."""
    c = np.cos(angle)
    s = np.sin(angle)
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1.0]])


def rotation_vector(R):
    """Return axis times angle of a rotation (3, 3); the hand never turns by half a circle."""
    axis = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])  # 2 sin(angle)
    sine = np.linalg.norm(axis) / 2
    cosine = (np.trace(R) - 1) / 2
    return axis / 2 * (np.arctan2(sine, cosine) / sine if sine > 1e-9 else 1.0)


def rotation_matrix(v):
    """Invert rotation_vector: Rodrigues' formula."""
    angle = np.linalg.norm(v)
    x, y, z = v / max(angle, 1e-12)
    K = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K


def shorten(v, length):
    """Return the vector v, at most this long."""
    return v * min(1.0, length / max(np.linalg.norm(v), 1e-12))


# ---- what the expert sees: a private copy of the simulator ---------------------------------------
class Scene:
    """Robot and objects at the environment's present qpos.

    Kinematics run on a private mjData, so that they cannot disturb the physics: the recorded
    actions alone must reproduce the states, bit for bit.
    """

    def __init__(self, model):
        self.model = model
        self.data = mujoco.MjData(model)
        self.hand = model.site("end_effector").id
        self.hand_body = int(model.site_bodyid[self.hand])

    def see(self, qpos):
        """Read the environment's current positions."""
        self.qpos = qpos.copy()
        self.q = qpos[ARM].copy()
        self.tool, self.R, _ = self.forward(self.q)
        self.slide = self.data.site("slide_site").xpos.copy()
        self.kettle = self.qpos[KETTLE]

    def forward(self, q, jacobian=False):
        """Return tool point (3,), hand rotation (3, 3), Jacobian (6, 7) or None at joints (7,)."""
        model = self.model
        data = self.data
        data.qpos[:] = self.qpos
        data.qpos[ARM] = q
        mujoco.mj_kinematics(model, data)
        R = data.site_xmat[self.hand].reshape(3, 3).copy()
        tool = data.site_xpos[self.hand] + TOOL * R[:, 2]
        if not jacobian:
            return tool, R, None
        mujoco.mj_comPos(model, data)  # mj_jac needs it
        move = np.zeros((3, model.nv))
        turn = np.zeros((3, model.nv))
        mujoco.mj_jac(model, data, move, turn, tool, self.hand_body)
        return tool, R, np.vstack([move[:, ARM], R.T @ turn[:, ARM]])  # turns: hand's frame

    def solve(self, tool_goal, R_goal, key):
        """Return arm joints that bring the tool near (tool_goal, R_goal), the nearest to key.

        Damped least squares, dq = J' (J J' + damping)^-1 error, plus a pull towards the key pose
        in the null space. A joint at its limit is frozen, and the others are solved again.
        """
        q = self.q.copy()
        for _ in range(IK_STEPS):
            tool, R, J = self.forward(q, jacobian=True)
            error = WEIGHT * np.concatenate([tool_goal - tool, rotation_vector(R.T @ R_goal)])
            J = WEIGHT[:, None] * J
            free = np.ones(7, bool)
            for _ in range(2):
                Jf = J * free
                inverse = Jf.T @ np.linalg.inv(Jf @ Jf.T + DAMPING * np.eye(6))
                dq = inverse @ error
                dq = dq + free * (NULL_GAIN * (np.eye(7) - inverse @ Jf) @ (key - q))
                free &= ~(((q + dq < Q_LOW) & (dq < 0)) | ((q + dq > Q_HIGH) & (dq > 0)))
            q = np.clip(q + dq, Q_LOW, Q_HIGH)
        return q

    # -- the microwave's door: a hinge whose body is yawed by 0.3 rad --
    def door_handle(self, q):
        """Return the centre of the handle at door angle q, at the height where it is gripped."""
        hinge = np.array([-1.128, 0.455, 1.86])
        arm = np.array([0.475, -0.108, 0.0])
        return hinge + rot_z(0.3 + q) @ arm

    def door_normal(self, q):
        """Return the direction at right angles to the door at angle q."""
        return rot_z(0.3 + q) @ np.array([0, 1.0, 0])

    def hook(self):
        """Return the hand's rotation while it pulls: against the door's.

        The left finger then hooks behind the handle. A hand that turns with the door slips off at
        0.33 rad.
        """
        return rot_z(-0.4 * self.qpos[MICROWAVE])

    def pull_point(self):
        """Return where to pull the handle to: a little further open than it is now."""
        ahead = self.qpos[MICROWAVE] - 0.2
        return self.door_handle(ahead) + 0.02 * self.hook() @ self.door_normal(0)

    def from_kettle(self):
        """Return the horizontal distance of tool and kettle."""
        return np.linalg.norm(self.tool[:2] - self.kettle[:2])


# ---- the phases ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Phase:
    """Hold one stage of the plan: where to go, and when it ends."""

    key: str  # key pose: goal (J), or posture to stay near (C)
    grip: float  # finger position
    limit: int  # steps after which the phase ends anyway
    target: Callable = None  # scene -> tool point: makes it a C phase
    until: Callable = None  # scene -> bool: the phase's aim is reached
    near: float = 0.0  # also ends this near to its goal (rad: J, m: C)
    turn: Callable = None  # scene -> rotation added to the key's orientation
    contact: bool = False  # at an object: half the jitter
    check: Callable = None  # scene -> bool: if False at the end, retry


def at(*point):
    """Aim at a fixed point."""
    return lambda s: np.array(point)


def before_handle(depth):
    """Aim at the line through the microwave's handle, at right angles to the door."""
    return lambda s: s.door_handle(s.qpos[MICROWAVE]) + depth * s.door_normal(s.qpos[MICROWAVE])


PHASES = [
    # Microwave: line up (or a finger hits the handle), straddle the upright handle with open
    # fingers, close, pull the door, let go.
    Phase("mw_pre", OPEN, 30, near=0.06),
    Phase("mw_pre", OPEN, 10, before_handle(-0.11), near=0.025, contact=True),
    Phase("mw_in", OPEN, 15, before_handle(0.02), near=0.015, contact=True),
    Phase("mw_in", CLOSED, 3, before_handle(0.02), contact=True),
    Phase("mw_in", CLOSED, 30, Scene.pull_point, lambda s: s.qpos[MICROWAVE] < -0.70,
          turn=Scene.hook, contact=True, check=lambda s: s.qpos[MICROWAVE] < -0.60),
    Phase("mw_pull", OPEN, 2, Scene.pull_point, contact=True),
    Phase("mw_out", OPEN, 20, near=0.12),
    # Kettle: scooped, not grasped. Half-open fingers go under the handle between its posts, and
    # the hand is pitched up a little. Pushing would turn the kettle, and lose the goal later.
    Phase("kt_pre", HALF, 30, near=0.06),
    Phase("kt_in", HALF, 20, lambda s: s.kettle + (0, 0.015, 0.178), near=0.015, contact=True),
    Phase("kt_lift", HALF, 12, lambda s: np.array([s.tool[0], s.kettle[1] + 0.015, 1.869]),
          lambda s: s.tool[2] > 1.855, contact=True),
    Phase("kt_carry", HALF, 40, at(-0.22, 0.715, 1.869), near=0.02, contact=True),
    Phase("kt_lower", HALF, 12, at(-0.22, 0.715, 1.804), near=0.015, contact=True),
    # Back out along the hand, and rise only when the fingers are clear of the handle.
    Phase("kt_out", HALF, 25, lambda s: np.append((s.kettle - 0.19 * s.R[:, 2])[:2], 1.80),
          lambda s: s.from_kettle() > 0.13, contact=True,
          check=lambda s: s.kettle[1] > 0.6 and s.kettle[2] < 1.66),
    # Light: push the lever to the left. The hand points forward and up, so that the closed fingers
    # cross the lever: 1 cm of error in any direction does no harm, and 2 cm seldom. Fingers
    # parallel to the lever slip off it 1 cm too high, half a pixel of the agent's picture.
    Phase("ls_pre", CLOSED, 35, near=0.06),
    Phase("ls_in", CLOSED, 12, at(-0.305, 0.61, 2.308), near=0.015, contact=True),
    Phase("ls_push", CLOSED, 20, lambda s: np.array([max(s.tool[0] - 0.06, -0.50), 0.61, 2.308]),
          lambda s: s.qpos[LIGHT] < -0.66, contact=True, check=lambda s: s.qpos[LIGHT] < -0.55),
    Phase("ls_out", CLOSED, 15, at(-0.42, 0.47, 2.32), near=0.04),
    # Cabinet: push its upright handle to the right.
    Phase("sl_pre", CLOSED, 30, near=0.06),
    Phase("sl_in", CLOSED, 15, at(-0.175, 0.635, 2.57), near=0.02, contact=True),
    Phase("sl_push", CLOSED, 40, lambda s: np.array([s.slide[0] + 0.06, 0.63, 2.57]),
          lambda s: s.qpos[SLIDE] > 0.36, contact=True, check=lambda s: s.qpos[SLIDE] > 0.25),
    Phase("rest", CLOSED, np.inf),  # park at the right, out of the way
]


# ---- the controller -----------------------------------------------------------------------------
class Expert:
    """Walk through PHASES. act() is called once a step; `rng` draws all of the variation."""

    def __init__(self, scene, rng):
        self.scene = scene
        self.rng = rng
        self.cap = MAX_STEP * rng.uniform(*SPEED)  # rad a step, this episode's speed limit
        self.retries = {}  # task prefix -> number of retries
        self.enter(0)

    def enter(self, i):
        """Begin phase i: draw its jitter."""
        self.i = i
        self.phase = PHASES[i]
        self.age = 0
        size = 0.5 if self.phase.contact else 1.0
        size *= 0.5 if self.retries.get(self.phase.key[:2]) else 1.0
        key = np.array(KEY_POSES[self.phase.key]) + size * KEY_JITTER * self.rng.normal(size=7)
        self.key = np.clip(key, Q_LOW, Q_HIGH)
        self.shift = size * POINT_JITTER * self.rng.normal(size=3)

    def target(self):
        """Return this C phase's tool point (3,), with its jitter."""
        return self.phase.target(self.scene) + self.shift

    def finished(self):
        """Return whether the phase's aim is reached or its time is up."""
        phase = self.phase
        scene = self.scene
        if self.age >= phase.limit or (phase.until and phase.until(scene)):
            return True
        if phase.target:
            return np.linalg.norm(self.target() - scene.tool) < phase.near
        return np.abs(self.key - scene.q).max() < phase.near

    def advance(self):
        """Go on to the next phase, or back to the task's first one if its check fails."""
        task = self.phase.key[:2]
        failed = self.phase.check and not self.phase.check(self.scene)
        retries = self.retries.get(task, 0)
        if failed and retries < MAX_RETRIES:
            self.retries[task] = retries + 1
            self.enter(next(i for i, p in enumerate(PHASES) if p.key.startswith(task)))
        else:
            self.enter(self.i + 1)

    def act(self, qpos, gravity):
        """Return the action (9,) float32 at qpos (30,). gravity: torques on the arm (7,)."""
        self.scene.see(qpos)
        while self.finished():  # the last phase never is
            self.advance()
        self.age += 1
        wanted = self.reach() if self.phase.target else self.key
        return self.servo(qpos, wanted - self.scene.q, gravity)

    def reach(self):
        """Return joints at most CARROT nearer to a C phase's target."""
        scene = self.scene
        turn = self.phase.turn
        R_key = scene.forward(self.key)[1]
        R_goal = turn(scene) @ R_key if turn else R_key
        tool = scene.tool + shorten(self.target() - scene.tool, CARROT)
        R = scene.R @ rotation_matrix(shorten(rotation_vector(scene.R.T @ R_goal), CARROT_TURN))
        return scene.solve(tool, R, self.key)

    def servo(self, qpos, dq, gravity):
        """Return the action for a joint step dq (7,): invert what the position servo does.

            target = q + REACH * action;  moved = COVERED * (target - q - gravity / KP)
        One factor scales all joints down to their speed limits: the path stays straight.
        """
        dq = dq / max(1.0, (np.abs(dq) / self.cap).max())
        arm = (dq / COVERED + gravity / KP) / REACH
        if self.phase.grip == HALF:
            fingers = (HALF - qpos[7:9]) / REACH
        else:  # with full force
            fingers = [1.0, 1.0] if self.phase.grip == OPEN else [-1.0, -1.0]
        action = np.concatenate([arm, fingers]) + ACTION_NOISE * self.rng.normal(size=9)
        return np.clip(action, -1, 1).astype(np.float32)


# ---- episodes -----------------------------------------------------------------------------------
def expert_episode(env, scene, seed):
    """Play the expert's episode for this seed, which fixes all of its variation too."""
    expert = Expert(scene, np.random.default_rng(seed))
    done = {}  # task -> the step at which it was first completed

    def note(t):
        for task in env.completed:
            done.setdefault(task, t)

    def policy(t):
        note(t)
        return expert.act(env.qpos, env.data.qfrc_bias[ARM])

    demo, _ = roll(env, seed, policy)
    note(env.episode_steps)
    return demo, done


def main():
    args = arguments("kitchen", 20)
    began = time.time()
    env = undrawn("kitchen")
    scene = Scene(env.model)
    demos = []
    last = []
    tries = 0
    while len(demos) < args.n:
        if tries >= 10 + 2 * args.n:
            failures = tries - len(demos)
            fail(f"{failures} of {tries} attempts failed: install requirements.txt's versions")
        seed = args.seed + tries
        tries += 1
        demo, done = expert_episode(env, scene, seed)
        held = env.tasks_in(demo["qpos"][-1:])  # still satisfied at the very end
        good = len(held) == len(env.tasks) and max(done.values()) <= DEADLINE
        steps = ", ".join(f"{task} {done.get(task, '-')}" for task in env.tasks)
        verdict = "kept" if good else "dropped"
        print(f"seed {seed}: {verdict}, tasks done at {steps}, {len(held)} hold at the end")
        if good:
            demos.append(demo)
            last.append(max(done.values()))
    save(args.out, "kitchen", env, demos)
    print(
        f"{args.n} of {tries} attempts succeeded, the last task at step {np.mean(last):.0f} +- "
        f"{np.std(last):.0f} ({min(last)}-{max(last)}); {args.out}, {time.time() - began:.0f} s"
    )


if __name__ == "__main__":
    main()

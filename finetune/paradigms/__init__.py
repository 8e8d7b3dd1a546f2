"""The paradigms of world action model, by name. Each is one file that arranges the same parts; none inherits."""

from .joint_video_action import JointVideoAction

PARADIGMS = {"joint_video_action": JointVideoAction}

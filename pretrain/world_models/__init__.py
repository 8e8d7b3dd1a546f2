"""World models by kind: what predicts the future given actions."""

from .observation_space import ObservationSpaceWorldModel

WORLD_MODELS = {"observation_space": ObservationSpaceWorldModel}
